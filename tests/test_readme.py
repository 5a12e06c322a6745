"""The figures of the README are those of the files that it names."""

import json
import re
import statistics
from pathlib import Path

import pytest

from pytest_vram.records.files import read_run
from pytest_vram.records.schema import Record
from pytest_vram.report.choices import move_is_in_the_steps
from pytest_vram.report.text import gib

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FLAT = " ".join(README.split())
FILE = re.search(r"`(results/\S+\.json)`", README)
CHECKS = re.search(r"`(results/\S+/checks/)`", README)
ROWS = re.findall(r"^\| `(\S+)` \| (.+) \|$", README, re.MULTILINE)
MIB = 1 << 20


@pytest.fixture(scope="module")
def records() -> dict[str, Record]:
    assert FILE
    return {record.id: record for record in read_run(ROOT / FILE[1]).records}


@pytest.mark.parametrize(("case_id", "cells"), ROWS, ids=[row[0] for row in ROWS])
def test_a_row_is_its_record(case_id: str, cells: str, records: dict[str, Record]) -> None:
    memory, time = records[case_id].memory, records[case_id].time
    at_need = "–" if move_is_in_the_steps(records[case_id]) else f"{time.at_need_s:.2f}"
    figures = [
        memory.nvml_process_peak_bytes,
        memory.allocated_peak_bytes,
        memory.need_bytes,
        memory.estimated_need_bytes,
    ]
    required = f"**{gib(memory.required_bytes)}**"
    assert cells.split(" | ") == [*map(gib, figures), required, f"{time.median_s:.2f}", at_need]


def test_the_four_figures_of_one_program(records: dict[str, Record]) -> None:
    memory = records["sdxl/fp16/1024x1024/b4"].memory
    for name, value in {
        "NVML peak": f"{gib(memory.nvml_process_peak_bytes)} GiB",
        "reserved": gib(memory.reserved_peak_bytes),
        "allocated": gib(memory.allocated_peak_bytes),
        "need": gib(memory.need_bytes),
        "context": gib(memory.context_bytes),
        "required": gib(memory.required_bytes),
    }.items():
        assert re.search(rf"\*\*{name}\*\*, {re.escape(value)}[:;]", FLAT), name


def test_what_is_said_of_the_estimate_is_so(records: dict[str, Record]) -> None:
    errors = []
    for record in records.values():
        assert record.memory.need_bytes
        assert record.memory.estimated_need_bytes
        errors.append(abs(record.memory.estimated_need_bytes / record.memory.need_bytes - 1))
    close = sum(error <= 0.05 for error in errors)
    median, worst = (f"{100 * error:.1f} %" for error in (statistics.median(errors), max(errors)))
    assert f"over the {len(errors)} cases of that run its median error is {median}, {close} are within 5 %" in FLAT
    assert f"and the worst is {worst} off" in FLAT


def test_the_error_of_all_estimates_is_the_document_s() -> None:
    document = " ".join((ROOT / "results" / "HARDWARE.md").read_text(encoding="utf-8").split())
    said = re.search(
        r"Over (\d+) cases with a searched need .*?; (\d+) are within 5 %, the extremes are (\S+ %) and (\S+ %)",
        document,
    )
    assert said is not None
    count, close, lowest, highest = said.groups()
    assert f"Of all {count} searched cases in `results/HARDWARE.md` {close} are within 5 %" in FLAT
    assert f"the extremes are {lowest} and {highest}" in FLAT


def test_what_is_said_of_attention_slicing_is_so(records: dict[str, Record]) -> None:
    plain = records["stable-diffusion-v1-5/fp16/1024x1024/b1"]
    sliced = records["stable-diffusion-v1-5/fp16+attention_slicing/1024x1024/b1"]
    more = (sliced.memory.required_bytes or 0) - (plain.memory.required_bytes or 0)
    assert f"makes SD 1.5 at 1024x1024 require {gib(more)} GiB more and take twice as long" in FLAT
    assert (sliced.time.median_s or 0) > 2 * (plain.time.median_s or 0)


def test_what_is_said_of_the_time_at_need_is_so(records: dict[str, Record]) -> None:
    time = records["sdxl/fp16+model_offload/1024x1024/b1"].time
    assert 2.5 < (time.at_need_s or 0) / (time.median_s or 1) < 3.5


def test_every_case_is_close_to_its_estimate(records: dict[str, Record]) -> None:
    for record in records.values():
        estimate = record.memory.estimated_allocated_peak_bytes
        assert estimate == pytest.approx(record.memory.allocated_peak_bytes, rel=0.01)


def test_what_is_said_of_fragmentation_is_so(records: dict[str, Record]) -> None:
    said = re.search(r"SDXL at batch 4 ran out of memory once with ([\d.]+) % more than it requires", FLAT)
    assert said
    runs = [read_run(path).records for path in (ROOT / "results").glob("nvidia-*/*.json")]
    [limit] = [
        one.case.limit_bytes
        for found in runs
        for one in found
        if one.status == "oom" and one.id.startswith("sdxl/fp16/1024x1024/b4/")
    ]
    required = records["sdxl/fp16/1024x1024/b4"].memory.required_bytes
    assert f"{100 * ((limit or 0) / (required or 1) - 1):.1f}" == said[1]


def test_the_filled_card_agreed() -> None:
    assert CHECKS
    assert FILE
    (path,) = (ROOT / CHECKS[1]).glob("*.json")
    check = json.loads(path.read_text(encoding="utf-8"))
    assert check["run"] == Path(FILE[1]).name
    assert check["margin_bytes"] == 64 * MIB
    assert len({entry["id"] for entry in check["found"]}) == 5
    assert all(entry["fits"] == entry["expected"] for entry in check["found"])
    for entry in check["found"]:
        assert abs(abs(entry["free_bytes"] - entry["required_bytes"]) - 64 * MIB) <= 4 * MIB
