"""Pipelines named by their hub id; the hub itself is played by a folder."""

import json
import re
from pathlib import Path

import pytest

from pytest_vram.errors import UsageError
from pytest_vram.pipelines.hub import is_hub_id, model_from_hub

CONFIGS = {
    "model_index.json": {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    },
    "unet/config.json": {"sample_size": 96},
    "vae/config.json": {"block_out_channels": [1, 2, 3, 4]},
    "scheduler/scheduler_config.json": {"_class_name": "DDIMScheduler"},
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [("owner/name-1.5", True), ("./folder", False), ("/a/b", False), ("a/b/c", False), ("sdxl", False)],
)
def test_what_reads_like_a_hub_id(name: str, expected: bool) -> None:
    assert is_hub_id(name) is expected


def test_a_folder_of_that_name_goes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert not is_hub_id("owner/name")


def test_the_configuration_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in CONFIGS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    asked: list[object] = []

    def download(hub_id: str, allow_patterns: list[str]) -> str:
        asked.append((hub_id, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    model = model_from_hub("Owner/Name-2")
    assert asked == [("Owner/Name-2", ["model_index.json", "*/config.json", "scheduler/scheduler_config.json"])]
    assert re.fullmatch("name-2-[0-9a-f]{8}", model.name)
    assert model.hub_id == "Owner/Name-2"
    assert (model.native.width, model.resolution_multiple) == (768, 8)
    assert set(model.components) == {"unet", "vae"}


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(hub_id: str, allow_patterns: list[str]) -> str:
        raise OSError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(UsageError, match=r"^--vram-models: a/b is no folder here, and the hub .*: no route to host$"):
        model_from_hub("a/b")
