"""The terminal's summary: what a person sees of each kind of record, within 100 columns."""

from typing import Any

import pytest

from pytest_vram.records.schema import Record
from pytest_vram.report.summary import above_limit, deciding_phase, line, summary, where_time_went
from pytest_vram.report.text import duration, gib, seconds
from tests.records.test_schema import FAILURE, MIB, facts, own, record

NOTHING = dict.fromkeys(facts()["memory"])
ESTIMATE = {**NOTHING, "need_bytes": 12000 * MIB, "estimated_need_bytes": 12000 * MIB, "required_bytes": 12768 * MIB}

OK = record()
RECORDS: dict[str, Record] = {
    "oom": record(status="oom", failure=FAILURE, time={}, memory=NOTHING),
    "error": record(status="error", failure=FAILURE, time={}, memory=NOTHING),
    "timeout": record(status="timeout", failure=FAILURE, time={}, memory=NOTHING),
    "skipped": record(status="skipped", reason="bf16 is not for this GPU", time={}, memory=NOTHING),
    "estimated": record(method="estimated", time={}, memory=ESTIMATE),
}


def row(found: Record, **aliases: list[str]) -> str:
    """The row of one record: the last line of its table."""
    return summary([found], aliases).splitlines()[-1]


def first_column(found: Record) -> list[str]:
    """What stands in the column `case`, line by line."""
    header, _, *lines = summary([found], {}).splitlines()
    return [text[: header.index("status")].strip() for text in lines]


def test_a_measured_row() -> None:
    times = {**facts()["time"], "at_need_s": 3.25, "images_per_s": 0.5, "full_length_s": 12.5}
    cells = row(record(time=times)).split()
    assert cells == [
        "fp16",
        "1024x1024",
        "b1",
        "ok",
        "12.49",
        "11.52",
        "15.43",
        "16.11",
        "2.000",
        "3.250",
        "12.5",
        "0.50",
    ]


def test_of_a_video_the_frames_of_a_second_are_shown() -> None:
    times = {**facts()["time"], "images_per_s": 0.5}
    assert row(record(time=times, case={"frames": 33})).split()[-1] == "16.50"


@pytest.mark.parametrize("kind", RECORDS)
def test_what_is_not_ok_looks_different(kind: str) -> None:
    status = row(RECORDS[kind]).split()[3]
    assert status == ("estim." if kind == "estimated" else kind)
    assert line(RECORDS[kind]) != line(OK)


def test_an_estimate_is_marked_and_has_the_assumed_context() -> None:
    assert row(RECORDS["estimated"]).split()[4] == "~12.47"
    assert "~12.47 GiB" in line(RECORDS["estimated"])
    assert "~" not in summary([OK], {})


def test_a_measured_row_without_its_need_shows_the_estimate_and_the_measured_context() -> None:
    unsearched = {"need_bytes": None, "required_bytes": None, "estimated_need_bytes": 12000 * MIB}
    measured = record(memory={**unsearched, "context_bytes": 1300 * MIB})
    assert row(measured).split()[4] == "~12.99"
    assert row(record(memory={**unsearched, "context_bytes": None})).split()[4] == "~12.47"


def test_what_disturbed_a_case_is_said() -> None:
    assert "disturbed: pid 1" in first_column(record(disturbed="pid 1"))
    assert "\x1b" not in summary([record(disturbed="\x1b[2J")], {})
    assert not any("disturbed" in text for text in first_column(OK))


def test_an_error_shows_no_figure_that_it_has_not() -> None:
    assert row(RECORDS["error"]).split()[4:] == ["–"] * 8


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"id": "sdxl/" + "+".join(["a_long_optimization"] * 12) + "/1024x1024/b1"},
        {"id": "x" * 500},
        {"effects": dict.fromkeys(("vae_tiling", "vae_slicing", "attention_slicing", "channels_last"), "no_effect")},
        {"status": "timeout", "failure": FAILURE, "memory": {"required_bytes": 999 << 30}},
        {"time": {**facts()["time"], "median_s": 123456.7, "at_need_s": 123456.7, "images_per_s": 12345.67}},
        {"case": {"model": "m" * 200}},
    ],
)
def test_at_most_100_columns(changes: dict[str, Any]) -> None:
    lines = summary([OK, record(**changes)], {"sdxl": ["alias" * 30]}).splitlines()
    assert max(len(text) for text in lines) <= 100


def test_a_long_id_is_folded_not_cut() -> None:
    name = "+".join(f"optimization_{n}" for n in range(12))
    folded = "".join(first_column(record(case={"optimizations": name.split("+")})))
    assert folded.replace(" ", "") == f"sdxl{name}1024x1024b1"


def test_no_effect_is_said() -> None:
    found = record(effects={"vae_tiling": "no_effect", "vae_slicing": "applied", "channels_last": "no_effect"})
    assert " ".join(first_column(found)) == "sdxl fp16 1024x1024 b1 vae_tiling, channels_last: no effect"


@pytest.mark.parametrize(
    ("mean", "psnr", "lines"),
    [
        (0.0, None, ["sdxl", "fp16 1024x1024 b1"]),
        (2**-9, 50.0, ["sdxl", "fp16 1024x1024 b1"]),
        (0.0312, 20.0, ["sdxl", "fp16 1024x1024 b1", "not exact: differs by 0.031"]),
    ],
)
def test_what_is_not_exact_is_marked(mean: float, psnr: float | None, lines: list[str]) -> None:
    exactness = {"against": "x", "max_abs_difference": 0.9, "mean_abs_difference": mean, "psnr_db": psnr}
    assert first_column(record(exactness=exactness)) == lines


def test_a_flag_that_claims_nothing_is_not_blamed() -> None:
    apart = {"against": "x", "max_abs_difference": 0.9, "mean_abs_difference": 0.0312, "psnr_db": 20.0}
    shown = first_column(record(exactness={**apart, "claimed": False}))
    assert shown == ["sdxl", "fp16 1024x1024 b1", "the image: differs by 0.031"]


def test_a_pipeline_of_ones_own_stands_under_its_file() -> None:
    assert first_column(own()) == ["tests/test_app.py", "test_painter"]
    assert line(own()).startswith("tests/test_app.py::test_painter: ok, 12.49 GiB required")


PEAKS = {"encode": 900 * MIB, "denoise": 11000 * MIB, "decode": 11800 * MIB}
PHASES = {name: {"time_s": 1.0, "allocated_peak_bytes": peak} for name, peak in PEAKS.items()}
ID = "sdxl/fp16/1024x1024/b1"


@pytest.mark.parametrize(
    ("changes", "limit", "said"),
    [
        ({}, 12786 * MIB, None),
        ({}, 1 << 40, None),
        (
            {"need_phase": "denoise", "phases": PHASES},
            12786 * MIB - 1,
            f"{ID}: required 12.49 GiB (need 11.82 + context 0.67); max_required is 12.49 GiB; denoise decides",
        ),
        (
            {"phases": PHASES},
            8 << 30,
            f"{ID}: required 12.49 GiB (need 11.82 + context 0.67); max_required is 8.00 GiB; decode decides",
        ),
        ({}, 8 << 30, f"{ID}: required 12.49 GiB (need 11.82 + context 0.67); max_required is 8.00 GiB"),
        (
            {"status": "oom", "failure": FAILURE, "time": {}, "memory": NOTHING},
            8 << 30,
            f"{ID}: out of memory in denoise; max_required is 8.00 GiB",
        ),
        (
            {"status": "oom", "failure": {"message": "no room"}, "time": {}},
            1 << 40,
            f"{ID}: out of memory; max_required is 1024.00 GiB",
        ),
        (
            {"memory": {"required_bytes": None}, "unavailable": {"memory.required_bytes": "not searched"}},
            1 << 40,
            f"{ID}: the required memory is not known (not searched); max_required is 1024.00 GiB",
        ),
        (
            {"memory": NOTHING},
            8 << 30,
            f"{ID}: the required memory is not known (it was not measured); max_required is 8.00 GiB",
        ),
        (
            {"method": "estimated", "time": {}, "memory": ESTIMATE},
            12 << 30,
            f"{ID}: required 12.47 GiB (need 11.72 + context 0.75); max_required is 12.00 GiB",
        ),
    ],
)
def test_above_limit(changes: dict[str, Any], limit: int, said: str | None) -> None:
    assert above_limit(record(**changes), limit) == said


def test_the_phase_that_ran_out_of_memory_decides_and_else_the_highest_peak() -> None:
    assert deciding_phase(record(phases=PHASES)) == "decode"
    assert deciding_phase(record(phases=PHASES, need_phase="denoise")) == "denoise"
    assert deciding_phase(record(phases={"denoise": {"time_s": 1.0}})) is None


def test_models_are_headings_with_their_aliases() -> None:
    other = record(id="tiny/fp16/8x8/b1", case={"model": "tiny"})
    lines = summary([OK, other, OK], {"sdxl": ["xl", "sd-food"]}).splitlines()
    headings = [text for text in lines[2:] if not text.startswith(" ")]
    assert headings == ["sdxl (xl, sd-food)", "tiny"]
    assert lines.index("tiny") == len(lines) - 2, "the rows of a model stand together"


@pytest.mark.parametrize("name", ["test_unet[fp16]", "[/b]"])
def test_brackets_are_text(name: str) -> None:
    assert first_column(record(case={"model": name})) == [name, "fp16 1024x1024 b1"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "sdxl/fp16/1024x1024/b1: ok, 12.49 GiB required, 15.43 reserved, 2.000 s"),
        ({"status": "oom", "failure": FAILURE}, "sdxl/fp16/1024x1024/b1: out of memory"),
        ({"status": "error", "failure": FAILURE}, "sdxl/fp16/1024x1024/b1: error"),
        ({"status": "skipped", "reason": "no GPU"}, "sdxl/fp16/1024x1024/b1: skipped: no GPU"),
    ],
)
def test_line(changes: dict[str, Any], expected: str) -> None:
    assert line(record(**changes)) == expected


def test_unknown_is_an_en_dash_or_not_said() -> None:
    assert (gib(None), seconds(None)) == ("–", "–")
    assert "required" not in line(record(memory=NOTHING))


@pytest.mark.parametrize(("value", "expected"), [(1 << 30, "1.00"), (12786 * MIB, "12.49"), (5 << 20, "0.00")])
def test_gib(value: int, expected: str) -> None:
    assert gib(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"), [(0.0124, "0.012"), (9.9994, "9.999"), (10.0, "10.0"), (123.45, "123.5")]
)
def test_seconds(value: float, expected: str) -> None:
    assert seconds(value) == expected


@pytest.mark.parametrize(("value", "expected"), [(5, "0:05"), (59.6, "1:00"), (3599, "59:59"), (3661, "1:01:01")])
def test_duration(value: float, expected: str) -> None:
    assert duration(value) == expected


def test_where_time_went() -> None:
    walls = {"total_s": 10.0, "load_s": 1.0, "warmup_s": 2.0, "rounds_s": 3.0, "need_s": 3.0}
    estimated = RECORDS["estimated"].model_copy(update={"wall": record(wall=walls).wall})
    said = where_time_went([record(wall=walls), record(wall=walls), estimated, OK], 24.0)
    assert said == "24 s of wall time, 75% of it measurement: load 2 s, warm-up 4 s, rounds 6 s, need 6 s"
    assert where_time_went([], 0.0).startswith("0 s of wall time, 0%")
