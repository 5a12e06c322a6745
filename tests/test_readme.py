"""The figures of the README are those of the run file that it names."""

import re
from pathlib import Path

import pytest

from pytest_vram.records.files import read_run
from pytest_vram.records.schema import Record
from pytest_vram.report.summary import gib

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FILE = re.search(r"`(results/\S+\.json)`", README)
ROWS = re.findall(r"^\| `(\S+)` \| (.+) \|$", README, re.MULTILINE)


@pytest.fixture(scope="module")
def records() -> dict[str, Record]:
    assert FILE
    return {record.id: record for record in read_run(ROOT / FILE[1]).records}


@pytest.mark.parametrize(("case_id", "cells"), ROWS, ids=[row[0] for row in ROWS])
def test_a_row_is_its_record(case_id: str, cells: str, records: dict[str, Record]) -> None:
    memory, time = records[case_id].memory, records[case_id].time
    figures = [
        memory.weights_bytes,
        memory.allocated_peak_bytes,
        memory.estimated_allocated_peak_bytes,
        memory.reserved_peak_bytes,
        memory.nvml_process_peak_bytes,
    ]
    assert cells.split(" | ") == [*(gib(figure) for figure in figures), f"{time.median_s:.2f}"]


def test_what_is_said_of_attention_slicing_is_so(records: dict[str, Record]) -> None:
    plain = records["stable-diffusion-v1-5/fp16/1024x1024/b1"]
    sliced = records["stable-diffusion-v1-5/fp16+attention_slicing/1024x1024/b1"]
    more = (sliced.memory.allocated_peak_bytes or 0) - (plain.memory.allocated_peak_bytes or 0)
    assert f"costs SD 1.5 at 1024x1024 {gib(more)} GiB and more than doubles its time" in README
    assert (sliced.time.median_s or 0) > 2 * (plain.time.median_s or 0)


def test_every_case_is_close_to_its_estimate(records: dict[str, Record]) -> None:
    for record in records.values():
        estimate = record.memory.estimated_allocated_peak_bytes
        assert estimate == pytest.approx(record.memory.allocated_peak_bytes, rel=0.01)
