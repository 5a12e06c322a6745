"""What loading the plugin costs a project that does not use it, and who may import whom."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = [
    "torch",
    "numpy",
    "pandas",
    "matplotlib",
    "pydantic",
    "typer",
    "rich",
    "jinja2",
    "scipy",
    "pynvml",
    "diffusers",
    "transformers",
]


def test_the_plugin_imports_nothing_heavy() -> None:
    code = (
        "import sys; before = set(sys.modules); import pytest; loaded = set(sys.modules);"
        "sys.path.insert(0, sys.argv[1]); import pytest_vram.plugin, pytest_vram.pipelines.optimizations;"
        f"print([m for m in {HEAVY} if m in sys.modules and m not in loaded])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "plugin")], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_imports_point_one_way() -> None:
    pytest.importorskip("importlinter", reason="comes with the extra dev")
    result = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as main; main()", "--no-cache"],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT / "plugin"), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
