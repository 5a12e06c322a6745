"""The runs that this repository keeps, read once, and the documents made from them once."""

from pathlib import Path

import pytest

from pytest_vram.cases.models import read_models
from pytest_vram.records.reading import ReadRun, read_runs
from pytest_vram.report.cards import read_cards
from pytest_vram.report.document import Document
from pytest_vram.report.render import Report

RESULTS = Path(__file__).parents[2] / "results"


@pytest.fixture(scope="session")
def committed() -> list[ReadRun]:
    """The runs in results/."""
    runs, notes = read_runs([RESULTS])
    assert notes == []
    return runs


@pytest.fixture(scope="session")
def report(committed: list[ReadRun], tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The report of these runs, written to its folder."""
    made = Report(committed, read_cards(), read_models(), tmp_path_factory.mktemp("report") / "first")
    made.write()
    return made


@pytest.fixture(scope="session")
def document(report: Report) -> Document:
    """What it says."""
    return report.document()
