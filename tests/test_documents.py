"""The committed documents say what the runs say that they name; runs that somebody made since are not theirs."""

import re
import runpy
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pytest_vram.cli import app

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The document, and the runs that it names."""
    folder = tmp_path_factory.mktemp("checkout") / "results"
    document = ROOT / "results" / "HARDWARE.md"
    for name in re.findall(r"^\| R\d+ \| `(\S+)` \|", document.read_text(encoding="utf-8"), re.MULTILINE):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "results" / name, folder / name)
    shutil.copy(document, folder)
    return folder


def test_the_document_agrees_with_its_runs(results: Path) -> None:
    result = CliRunner().invoke(app, ["check", str(results / "HARDWARE.md")])
    assert result.exit_code == 0, result.output


def test_the_page_on_the_original_report_is_made_from_them(results: Path) -> None:
    script = runpy.run_path(str(ROOT / "bench" / "original_report.py"))
    assert (ROOT / "docs" / "original-report.md").read_text(encoding="utf-8") == script["page"](results)


def test_the_page_on_the_models_is_made_from_them(results: Path) -> None:
    script = runpy.run_path(str(ROOT / "bench" / "published.py"))
    assert (ROOT / "docs" / "models.md").read_text(encoding="utf-8") == script["page"](results)


def test_every_fault_has_the_tests_that_are_named() -> None:
    page = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", page))
    there = {
        name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    assert named - there == set()
    for row in re.findall(r"^\| (?!what|---)(.*) \|$", page.partition("\n## ")[0], re.MULTILINE):
        assert re.search(r"`test_\w+`$", row), row
