"""What an accepted file brings in front of people: nothing in it is more than text, wherever it is shown."""

import csv
import io
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_vram.records.files import checked
from pytest_vram.records.reading import ReadRun
from pytest_vram.report.answer import answer
from pytest_vram.report.frame import frame
from pytest_vram.report.render import for_spreadsheets
from pytest_vram.report.summary import above_limit, line, summary
from tests.records.test_schema import FAILURE, MIB, facts, own
from tests.report.test_render import H100, Page, a_report, well_formed
from tests.untrusted.strategies import PLANTED, controls, mutated
from tests.untrusted.test_readers import run_files

plant = st.one_of(st.sampled_from(PLANTED), st.text(min_size=1, max_size=20)).filter(
    lambda text: text.strip() != "" and "\ud800" not in text  # of which no model takes one
)


@st.composite
def planted(draw: st.DrawFn) -> dict[str, Any]:
    """A run file with strings of strangers in every field that takes text; the figures are plain."""

    def text(most: int = 200) -> str:
        return draw(plant)[:most]

    case = {"model": text(), "optimizations": ["fp16", text()], "scheduler": text()}
    exactness = {"against": text(), "max_abs_difference": 0.5, "mean_abs_difference": 0.25}
    more = {
        "effects": {text(): "no_effect"},
        "exactness": exactness,
        "unavailable": {text(): text()},
        "disturbed": text(),
        "telemetry": {"rounds": [{"throttle": [text()]}]},
    }
    failure = {**FAILURE, "message": text(), "output_tail": text()}
    mine = own().model_dump(mode="json")
    mine["id"], mine["case"] = (
        text(),
        {**mine["case"], "model": text(), "test": text(), "build": text(), "call": text()},
    )
    records = [
        facts(id=text(), case=case, **more),
        facts(
            id=text(), case={**case, "batch_size": 2}, method="estimated", time={}, memory={"need_bytes": 12000 * MIB}
        ),
        facts(id=text(), status="oom", case={**case, "batch_size": 4}, failure=failure, time={}),
        facts(id=text(), status="error", case={**case, "batch_size": 8}, failure=failure, time={}),
        facts(id=text(), status="skipped", case={**case, "batch_size": 16}, reason=text(), time={}),
        mine,
    ]
    environment = {key: value if isinstance(value, int) else text() for key, value in H100.items()}
    vram = {"schema": 1, "environment": environment, "sweep": text(), "records": records}
    vram["aliases"] = {case["model"]: [text(), text()]}
    return {"vram": vram}


def read(document: Any) -> ReadRun:
    refused: list[Any] = []
    return ReadRun(Path("run.json"), checked(document, Path("run.json"), refused), tuple(refused))


def assert_only_text(shown: str, allowed: str = "\n") -> None:
    assert not controls(shown, allowed), controls(shown, allowed)


def everywhere(run: ReadRun) -> None:
    """Everything that shows a run, and what must not be in it."""
    for record in run.records:
        assert_only_text(line(record), "")
        assert "\n" not in (above_limit(record, 1) or "")
    table = summary(run.records, run.run.aliases)
    assert_only_text(table)
    assert all(len(row) <= 100 for row in table.splitlines())
    report = a_report(run)
    document = report.document()
    written = report.markdown(document, ())
    assert_only_text(written)
    assert "<script" not in written.lower()
    well_formed(written)
    page = Page(html := report.html(document, ()))
    assert_only_text(html)
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.island["rows"] is not None
    assert_only_text(answer(document, None, None))
    text = for_spreadsheets(frame([run])).to_csv(index=False)
    assert_only_text(text)
    rows = list(csv.reader(io.StringIO(text)))
    assert len(rows) == 1 + len(run.records)
    assert {len(row) for row in rows} == {len(rows[0])}
    assert not [cell for row in rows for cell in row if re.match(r"[=+@\t\r]|-(?![\d.])", cell)]


@given(planted())
@settings(max_examples=max(10, settings().max_examples // 5))
def test_planted_strings_stay_text(document: dict[str, Any]) -> None:
    run = read(document)
    assert len(run.records) == 6
    everywhere(run)


@given(mutated(run_files()))
@settings(max_examples=max(10, settings().max_examples // 5))
def test_whatever_is_accepted_can_be_shown(document: Any) -> None:
    from pytest_vram.errors import RunFileError

    try:
        run = read(document)
    except RunFileError:
        return
    everywhere(run)


@pytest.mark.parametrize("text", [text for text in PLANTED if "\ud800" not in text])
def test_each_planted_string_by_itself(text: str) -> None:
    run = read({"vram": {"environment": {**H100, "gpu": text}, "sweep": text, "records": [facts(id=text[:400])]}})
    everywhere(run)
