"""The output of a case against that of the case with its dtype alone."""

import pickle
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

from pytest_vram.cases.case import Case
from pytest_vram.measure.exactness import NoReference, References, difference, pixels, reference_of, save_output
from pytest_vram.pipelines.optimizations import OPTIMIZATIONS
from pytest_vram.records.schema import EXACT_WITHIN_ROUNDOFFS, Exactness, Record


def case_of(*optimizations: str, **changes: Any) -> Case:
    facts = {
        "model": "tiny-sd",
        "optimizations": optimizations,
        "height": 32,
        "width": 32,
        "batch_size": 2,
        "steps": 3,
        "guidance_scale": 5.0,
        "scheduler": "PNDMScheduler",
    }
    return Case(**{**facts, **changes})


def images(*values: float, dtype: torch.dtype = torch.float32) -> Any:
    return SimpleNamespace(images=torch.tensor(values, dtype=dtype).reshape(1, 1, 1, -1))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "output.npy"


# Two outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_same_output_differs_in_nothing(path: Path, dtype: torch.dtype) -> None:
    output = images(0.0, 0.3, 0.7, 1.0, dtype=dtype)
    save_output(output, path)
    assert difference(output, path) == {"max_abs_difference": 0.0, "mean_abs_difference": 0.0, "psnr_db": None}


def test_a_known_difference(path: Path) -> None:
    save_output(images(0.5, 0.5, 0.5, 0.5), path)
    found = difference(images(0.5, 0.5, 0.75, 0.25), path)
    assert found == {
        "max_abs_difference": 0.25,
        "mean_abs_difference": 0.125,
        "psnr_db": pytest.approx(15.0515),  # 10 log10 of 1 by a mean square of 1/32
    }


def test_the_largest_difference_there_is(path: Path) -> None:
    save_output(images(0.0, 0.0), path)
    found = difference(images(1.0, 1.0), path)
    assert found == {"max_abs_difference": 1.0, "mean_abs_difference": 1.0, "psnr_db": 0.0}
    assert Exactness.model_validate({**found, "against": "x"}).psnr_db == 0


def test_the_frames_of_a_video_are_compared(path: Path) -> None:
    video = SimpleNamespace(frames=torch.full((1, 4, 3, 8, 8), 0.25))
    save_output(video, path)
    video.frames[0, 3] += 0.5
    found = difference(video, path)
    assert (found["max_abs_difference"], found["mean_abs_difference"]) == (0.5, 0.125)


def test_pixels_are_float32_and_there_are_none_in_what_holds_no_tensor() -> None:
    assert pixels(images(0.5, dtype=torch.bfloat16)).dtype == numpy.float32
    assert pixels(SimpleNamespace(images=["a PIL image"])) is None
    assert pixels("text") is None


@pytest.mark.parametrize(
    "other",
    [
        images(0.5),  # which would broadcast
        images(0.5, 0.5, 0.5),
        SimpleNamespace(images=torch.full((1, 1, 2, 1), 0.5)),
        SimpleNamespace(images=["a PIL image"]),
    ],
    ids=["fewer", "more", "turned", "none"],
)
def test_different_shapes_cannot_be_compared(path: Path, other: Any) -> None:
    save_output(images(0.5, 0.5), path)
    with pytest.raises(ValueError, match="different shapes"):
        difference(other, path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("whose", ["ours", "theirs", "both"])
def test_what_is_not_finite_cannot_be_compared(path: Path, value: float, whose: str) -> None:
    good, bad = images(0.5, 0.5), images(0.5, value)
    save_output(good if whose == "ours" else bad, path)
    with pytest.raises(ValueError, match="not finite"):
        difference(good if whose == "theirs" else bad, path)


def test_a_file_that_is_gone_cannot_be_compared(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        difference(images(0.5), path)


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return Path.mkdir, (self.folder,)


@pytest.mark.parametrize("form", ["pickle", "array of objects"])
def test_a_file_that_is_no_array_is_refused_and_not_unpickled(path: Path, tmp_path: Path, form: str) -> None:
    bomb = Bomb(tmp_path / "made")
    with path.open("wb") as file:
        if form == "pickle":
            pickle.dump(bomb, file)
        else:
            numpy.save(file, numpy.array([bomb], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="pickle"):
        difference(images(0.5), path)
    assert not bomb.folder.exists()
    numpy.load(path, allow_pickle=True)  # it would have gone off
    assert bomb.folder.exists()


# The file


def test_a_saved_output_is_alone_in_its_folder(path: Path) -> None:
    save_output(images(0.25), path)
    save_output(images(0.5), path)
    assert list(path.parent.iterdir()) == [path]
    assert numpy.load(path).tolist() == [[[[0.5]]]]


def test_an_output_is_kept_whole_or_not_at_all(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disk_full(file: Any, *_: Any, **__: Any) -> None:
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(numpy, "save", disk_full)
    with pytest.raises(OSError, match="no space left"):
        save_output(images(0.25), path)
    assert not path.exists()
    monkeypatch.undo()
    save_output(images(0.25), path)
    monkeypatch.setattr(numpy, "save", disk_full)
    with pytest.raises(OSError, match="no space left"):
        save_output(images(0.75), path)
    assert numpy.load(path).item() == 0.25  # what was there before


def test_an_output_with_no_tensor_is_not_kept(path: Path) -> None:
    with pytest.raises(ValueError, match="Object arrays cannot be saved"):
        save_output(SimpleNamespace(images=["a PIL image"]), path)
    assert not path.exists()


# What a case is compared with


@pytest.mark.parametrize("name", [name for name, flag in OPTIMIZATIONS.items() if not (flag.dtype or flag.replaces)])
def test_a_case_is_compared_with_its_dtype_alone(name: str) -> None:
    case = case_of("fp16", name, limit_bytes=1 << 30, seed=7)
    assert reference_of(case) == case_of("fp16", seed=7)


def test_all_flags_are_left_out_at_once() -> None:
    assert reference_of(case_of("bf16", "vae_slicing", "layerwise_casting")) == case_of("bf16")


def test_random_weights_of_another_network_are_compared_with_nothing() -> None:
    assert reference_of(case_of("fp16", "tiny_vae", "vae_tiling")) is None
    assert reference_of(case_of("fp16", "tiny_vae", weights="pretrained")) == case_of("fp16", weights="pretrained")


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_a_case_with_no_flag_is_compared_with_nothing(dtype: str) -> None:
    assert reference_of(case_of(dtype)) is None
    assert reference_of(case_of(dtype, limit_bytes=1 << 30)) is None


# References

PLAIN, TILED, SLICED = case_of("fp32"), case_of("fp32", "vae_tiling"), case_of("fp32", "vae_slicing")
OFFLOADED = case_of("fp32", "model_offload")


class Maker:
    """Makes outputs, or fails with `problem`."""

    def __init__(self, problem: str | None = None) -> None:
        self.problem = problem
        self.made: list[tuple[Case, Path, bool]] = []

    def __call__(self, case: Case, path: Path, on_host: bool) -> str | None:
        self.made.append((case, path, on_host))
        if self.problem is None:
            path.write_text("made")
        return self.problem


@pytest.fixture
def references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[References]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    references = References([PLAIN, TILED, SLICED])
    yield references
    references.close()


def test_only_a_case_that_others_are_compared_with_is_kept(references: References) -> None:
    assert references.keep(PLAIN) is not None
    for case in (TILED, case_of("fp16"), case_of("fp32", limit_bytes=1 << 30), case_of("fp32", seed=1)):
        assert references.keep(case) is None


def test_a_plain_case_that_nobody_is_compared_with_is_not_kept() -> None:
    references = References([PLAIN, case_of("fp16", "vae_tiling")])
    assert references.keep(PLAIN) is None
    assert references.keep(case_of("fp16")) is not None  # though it is none of the cases
    references.close()


def test_what_is_kept_is_found(references: References) -> None:
    kept = references.keep(PLAIN)
    assert kept is not None
    kept.write_text("kept")
    maker = Maker()
    assert references.find(TILED, maker) == references.find(SLICED, maker) == (PLAIN, kept)
    assert maker.made == []


def test_what_is_missing_is_made_once(references: References) -> None:
    maker = Maker()
    found = references.find(TILED, maker)
    assert found == references.find(SLICED, maker)
    assert found is not None
    assert maker.made == [(PLAIN, found[1], False)]
    assert found == (PLAIN, references.keep(PLAIN))


def test_nothing_is_found_or_made_for_a_case_with_no_exact_flag(references: References) -> None:
    maker = Maker()
    assert references.find(PLAIN, maker) is None
    assert maker.made == []


def test_what_could_not_be_made_is_remembered(references: References) -> None:
    maker = Maker("out of memory")
    for case in (TILED, SLICED):
        with pytest.raises(NoReference, match=f"^{PLAIN.id} gave no output to compare with: out of memory$"):
            references.find(case, maker)
    assert len(maker.made) == 1


def test_one_failure_is_not_that_of_another(references: References) -> None:
    with pytest.raises(NoReference):
        references.find(TILED, Maker("out of memory"))
    larger = case_of("fp32", "vae_tiling", batch_size=1)
    assert references.find(larger, Maker()) is not None


@pytest.mark.parametrize(
    ("case", "on_host"),
    [
        (OFFLOADED, True),
        (case_of("fp32", "sequential_offload"), True),
        (case_of("fp32", "vae_tiling", "model_offload"), True),
        (case_of("fp32", "model_offload", weights="pretrained"), False),  # they are read, not made
        (TILED, False),
    ],
)
def test_where_the_weights_of_a_reference_are_made(references: References, case: Case, on_host: bool) -> None:
    maker = Maker()
    references.find(case, maker)
    assert [made[2] for made in maker.made] == [on_host]


def test_an_offloaded_case_has_a_file_of_its_own(references: References) -> None:
    maker = Maker()
    found = [references.find(case, maker) for case in (TILED, OFFLOADED, SLICED, OFFLOADED)]
    assert found[0] == found[2] != found[1] == found[3]
    assert len(maker.made) == 2


def test_the_outputs_are_gone_at_the_end(tmp_path: Path, references: References) -> None:
    references.find(TILED, Maker())
    assert [path.read_text() for path in tmp_path.rglob("*.npy")] == ["made"]
    references.close()
    assert list(tmp_path.iterdir()) == []


# Whether a record is exact


def record(optimizations: tuple[str, ...], mean: float | None) -> Record:
    exactness = {"against": "x", "max_abs_difference": 1.0, "mean_abs_difference": mean, "psnr_db": 20.0}
    return Record.model_validate(
        {
            "id": "x",
            "case": case_of(*optimizations).model_dump(),
            "status": "ok",
            "method": "measured",
            "time": {"workers": [{"rounds_s": [1.0], "median_s": 1.0}]},
            "exactness": None if mean is None else exactness,
        }
    )


@pytest.mark.parametrize(("dtype", "roundoff"), [("fp32", 2**-11), ("fp16", 2**-11), ("bf16", 2**-8)])
def test_exact_is_what_rounding_in_the_dtype_explains(dtype: str, roundoff: float) -> None:
    optimizations, bound = (dtype, "vae_tiling"), EXACT_WITHIN_ROUNDOFFS * roundoff
    assert record(optimizations, 0.0).exact is True
    assert record(optimizations, bound).exact is True
    assert record(optimizations, bound * 1.001).exact is False


def test_a_record_with_no_comparison_is_neither_exact_nor_not() -> None:
    assert record(("fp32",), None).exact is None


def test_whether_it_is_exact_is_in_the_file_and_is_judged_anew_when_read() -> None:
    written = record(("fp32",), 0.5).model_dump(mode="json")
    assert written["exact"] is False
    assert Record.model_validate({**written, "exact": True}).exact is False
