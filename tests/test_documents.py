"""The committed documents say what the runs in results/ say."""

import runpy
from pathlib import Path

from typer.testing import CliRunner

from pytest_vram.cli import app

ROOT = Path(__file__).parents[1]


def test_the_document_agrees_with_the_runs() -> None:
    result = CliRunner().invoke(app, ["check", str(ROOT / "results" / "HARDWARE.md")])
    assert result.exit_code == 0, result.output


def test_the_page_on_the_original_report_is_made_from_the_runs() -> None:
    script = runpy.run_path(str(ROOT / "bench" / "original_report.py"))
    assert (ROOT / "docs" / "original-report.md").read_text(encoding="utf-8") == script["page"]()
