"""The runs that this repository keeps, read once, and the documents made from them once."""

from pathlib import Path

import pytest

from pytest_vram.cases.models import read_models
from pytest_vram.records.reading import ReadRun, read_runs
from pytest_vram.report.cards import read_cards
from pytest_vram.report.charts import CHARTS, Chart
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
    """The report of these runs, not written."""
    return Report(committed, read_cards(), read_models(), tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="session")
def document(report: Report) -> Document:
    """What it says."""
    return report.document()


@pytest.fixture(scope="session")
def pictures() -> list[Chart]:
    """In place of its charts, which take long to draw: all of them, with nothing on them."""
    names = [(function.__name__.replace("_", "-"), title, caption) for function, title, caption in CHARTS]
    return [Chart(*name, b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"", False) for name in names]


@pytest.fixture(scope="session")
def written(committed: list[ReadRun], tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The report of a part of these runs, written to its folder."""
    made = Report(committed[:9], read_cards(), read_models(), tmp_path_factory.mktemp("written") / "first")
    made.write()
    return made
