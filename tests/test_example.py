"""The worked example of the documentation runs as it is."""

import shutil
from pathlib import Path

import pytest

from pytest_vram.cases.case import OwnCase
from pytest_vram.records.files import read_run
from tests.test_own import run_file, run_pytest

EXAMPLE = Path(__file__).parents[1] / "docs" / "example"


def test_the_example_is_measured_on_the_cpu(tmp_path: Path) -> None:
    shutil.copytree(EXAMPLE, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("results", "__pycache__"))
    result = run_pytest(tmp_path, "--vram-device=cpu", "--vram-rounds=1", "-rs")
    assert result.returncode == pytest.ExitCode.OK, result.stdout
    assert "max_required is about the memory of a GPU: give --vram-device cuda" in result.stdout
    run = read_run(run_file(tmp_path))
    assert run.complete
    (record,) = run.records
    assert record.status == "ok"
    assert record.case == OwnCase(
        model="test_app.py", test="test_painter", build="app.py:build_painter", call="app.py:paint_two"
    )
    assert record.time.denoiser_calls == 4
    assert {"denoise", "decode"} <= record.phases.keys()
