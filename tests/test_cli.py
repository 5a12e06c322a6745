"""The command pytest-vram."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pytest_vram.cli import app

runner = CliRunner()


def test_models_and_optimizations_as_tables_and_as_json() -> None:
    assert "wan2.1-t2v-1.3b" in runner.invoke(app, ["models"]).stdout
    one = runner.invoke(app, ["models", "sd-food"]).stdout
    assert "unet (denoiser): UNet2DConditionModel of diffusers, 0.860 B" in one
    assert json.loads(runner.invoke(app, ["models", "sd-food", "--json"]).stdout)["kind"] == "image"
    names = [model["name"] for model in json.loads(runner.invoke(app, ["models", "--json"]).stdout)]
    assert {"flux1-dev", "sdxl", "stable-diffusion-v1-5", "wan2.1-t2v-1.3b"} <= set(names)
    assert "vae_tiling" in runner.invoke(app, ["optimizations"]).stdout
    rows = json.loads(runner.invoke(app, ["optimizations", "--json"]).stdout)
    assert [row["name"] for row in rows][:3] == ["fp32", "fp16", "bf16"]
    assert all(row["call"] for row in rows)


def test_one_optimization() -> None:
    text = runner.invoke(app, ["optimizations", "int8_weight_only"]).stdout
    for part in (
        "TorchAoConfig(Int8WeightOnlyConfig())",
        "torchao>=",
        "diffusers>=",
        "other precisions of the weights",
    ):
        assert part in text
    assert re.search("^gpus +1$", text, re.MULTILINE)
    one = json.loads(runner.invoke(app, ["optimizations", "attention_flash", "--json"]).stdout)
    assert one["versions"][1:] == ["flash-attn"]
    assert one["gpus"] == 1
    wrong = runner.invoke(app, ["optimizations", "int8_weightonly"])
    assert wrong.exit_code != 0
    assert "did you mean 'int8_weight_only'" in str(wrong.exception)


def test_doctor_says_what_is_missing_and_what_mends_it() -> None:
    if Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has a GPU")
    result = runner.invoke(app, ["doctor", "--json"])
    assert result.exit_code == 1
    findings = {finding["name"]: finding for finding in json.loads(result.stdout)}
    assert findings["torch"]["verdict"] == "ok"
    assert findings["NVIDIA driver"]["verdict"] == findings["CUDA in a worker"]["verdict"] == "missing"
    assert findings["NVIDIA driver"]["mend"]
