"""The page on the original report says what the runs in results/ say."""

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_page_is_made_from_the_runs() -> None:
    script = runpy.run_path(str(ROOT / "bench" / "original_report.py"))
    assert (ROOT / "docs" / "original-report.md").read_text(encoding="utf-8") == script["page"]()
