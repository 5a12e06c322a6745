"""Group offload whose weights wait in files."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from pytest_vram.cases.models import Model
from pytest_vram.errors import Inapplicable
from pytest_vram.measure.subject import SweepSubject
from pytest_vram.pipelines.build import Arrived, Components, call_arguments, networks, random_pipeline
from pytest_vram.pipelines.offload import unwritable
from pytest_vram.pipelines.optimizations import OPTIMIZATIONS, excluded
from pytest_vram.pipelines.optimizations.base import OFFLOAD_FOLDER
from pytest_vram.pipelines.optimizations.memory import GroupOffloadBlockDisk, GroupOffloadLeafDisk
from tests.measure.test_simulation import estimate
from tests.pipelines.test_build import case_of
from tests.pipelines.test_encoders import job_of


class Leaf(GroupOffloadLeafDisk):
    onto: ClassVar[str] = "cpu"


class Block(GroupOffloadBlockDisk):
    onto: ClassVar[str] = "cpu"


BOTH = pytest.mark.parametrize("flag", [Leaf(), Block()], ids=lambda flag: flag.name)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(OFFLOAD_FOLDER, str(tmp_path))
    return tmp_path


def image(pipe: Any, tiny: Model) -> torch.Tensor:
    pixels: torch.Tensor = pipe(**call_arguments(pipe, case_of(tiny), torch.Generator().manual_seed(0))).images
    return pixels


def written(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


@BOTH
def test_the_image_is_the_same_with_weights_from_files(tiny: Model, folder: Path, flag: Any) -> None:
    torch.manual_seed(0)
    plain = random_pipeline(tiny, torch.float32, "cpu")
    torch.manual_seed(0)
    pipe = random_pipeline(tiny, torch.float32, "cpu")
    flag.apply(pipe, "unet")
    seen = flag.watch(pipe, "unet")
    assert not seen()
    assert torch.equal(image(pipe, tiny), image(plain, tiny))
    assert seen()
    bytes_of = {name: sum(weight.nbytes for weight in part.parameters()) for name, part in networks(plain).items()}
    left_out = flag._left_out(pipe, "unet")
    for name in set(bytes_of) - set(left_out):
        assert bytes_of[name] <= written(folder / name) < 1.5 * bytes_of[name], name


@BOTH
def test_without_files_it_is_not_seen(tiny: Model, folder: Path, flag: Any) -> None:
    pipe = random_pipeline(tiny, torch.float32, "cpu")
    seen = flag.watch(pipe, "unet")
    image(pipe, tiny)
    assert not seen()


@BOTH
def test_a_disk_that_is_too_small(tiny: Model, folder: Path, flag: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    pipe = random_pipeline(tiny, torch.float32, "cpu")
    with pytest.raises(Inapplicable, match=r"GiB of weights, and the temporary folder \(TMPDIR\) has 0.0 GiB free$"):
        flag.apply(pipe, "unet")
    assert not written(folder)


def test_what_cannot_be_written() -> None:
    layers = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    assert unwritable(layers) is None
    assert unwritable(torch.nn.Sequential(layers[0], layers[0])) is None, "one module, one group"
    layers[1].weight = layers[0].weight
    assert unwritable(layers) == "Sequential has tied weights: in files they get lost"


@BOTH
def test_a_text_encoder_with_tied_weights_waits_in_host_memory(tiny: Model, folder: Path, flag: Any) -> None:
    torch.manual_seed(0)
    plain, pipe = random_pipeline(tiny, torch.float32, "cpu"), random_pipeline(tiny, torch.float32, "cpu")
    pipe.unet.load_state_dict(plain.unet.state_dict())
    pipe.vae.load_state_dict(plain.vae.state_dict())
    for it in (plain, pipe):
        layers = [module for module in it.text_encoder.modules() if isinstance(module, torch.nn.Linear)]
        it.text_encoder.load_state_dict(plain.text_encoder.state_dict())
        layers[0].weight = layers[1].weight
    flag.apply(pipe, "unet")
    assert torch.equal(image(pipe, tiny), image(plain, tiny))
    assert written(folder / "unet")
    assert not written(folder / "text_encoder")


def test_what_excludes_files() -> None:
    for name in ("group_offload_block_disk", "group_offload_leaf_disk"):
        assert "channels_last" in excluded(name)
        assert "group_offload_leaf" in excluded(name)


@BOTH
def test_a_quantized_denoiser(tiny: Model, folder: Path, flag: Any) -> None:
    def prepare(parts: Components) -> list[Arrived]:
        change = OPTIMIZATIONS["int8_weight_only"].prepare(parts, "unet")
        return [change] if change else []

    pipe = random_pipeline(tiny, torch.float32, "cpu", prepare=prepare)
    with pytest.raises(Inapplicable, match="is quantized: its weights cannot be saved in files"):
        flag.apply(pipe, "unet")


@BOTH
def test_a_vae_that_is_cast_for_its_decode(tiny: Model, folder: Path, flag: Any) -> None:
    pipe = random_pipeline(tiny, torch.float16, "cpu")
    pipe.upcast_vae = lambda: None
    pipe.vae.register_to_config(force_upcast=True)
    with pytest.raises(Inapplicable, match="its files undo the cast of the VAE to float32"):
        flag.apply(pipe, "unet")


@pytest.mark.parametrize("where", ["leaf", "block"])
def test_the_estimate_is_that_of_weights_in_host_memory(tiny: Model, where: str) -> None:
    plain, disk = (estimate(tiny, "fp32", f"group_offload_{where}{more}") for more in ("", "_disk"))
    assert disk.effects[f"group_offload_{where}_disk"] == "applied"
    assert disk.allocated_peak == plain.allocated_peak
    assert disk.need == plain.need


def test_a_probes_weights_share_no_storage(tiny: Model, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GroupOffloadLeafDisk, "onto", "cpu")
    subject = SweepSubject(job_of(tiny, "group_offload_leaf_disk", probe=True))
    pipe = subject.build("cpu")  # which writes the files: safetensors refuses storages that are shared
    assert subject.call(pipe, "cpu", 1).images.isfinite().all()
