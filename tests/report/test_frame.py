"""The table of all records: its columns and dtypes are promised, and what was not measured is never 0."""

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import pytest_vram
from pytest_vram.errors import RunFileError
from pytest_vram.records.reading import ReadRun
from pytest_vram.records.schema import Record, Run
from pytest_vram.report.frame import COLUMNS, PHASES, frame, load
from tests.records.test_schema import FAILURE, MIB, facts, own, record

ROOT = Path(__file__).parents[2]
NOTHING = dict.fromkeys(facts()["memory"])
HUGE = 10**4000
ENVIRONMENT: dict[str, Any] = {
    "gpu": "NVIDIA H100",
    "gpu_memory_bytes": 81559 * MIB,
    "driver": "580.95",
    "torch": "2.9.0",
    "diffusers": "0.40.0",
    "commit": "1a2b3c4",
    "dirty": False,
    "started": "2026-11-24T08:00:00+02:00",
}
FULL = record(
    case={
        "frames": 9,
        "sequence_length": 77,
        "seed": 3,
        "limit_bytes": 20000 * MIB,
        "optimizations": ["fp16", "a", "b"],
    },
    memory={"host_peak_bytes": 3000 * MIB, "estimated_need_bytes": 12000 * MIB, "alloc_retries": 0},
    time={
        **facts()["time"],
        "cold_s": 3.5,
        "step_s": 0.25,
        "first_step_s": 0.5,
        "images_per_s": 0.5,
        "at_need_s": 2.5,
        "full_length_s": 12.5,
        "full_length_steps": 50,
        "denoiser_calls": 8,
        "gpu_lag_s": 0.125,
        "rounds_discarded": 1,
    },
    phases={
        "load": {"time_s": 4.0},
        "compile": {"time_s": 30.0, "allocated_peak_bytes": 11500 * MIB},
        "encode": {"time_s": 0.125, "allocated_peak_bytes": 900 * MIB},
        "denoise": {"time_s": 1.5, "allocated_peak_bytes": 11000 * MIB},
        "decode": {"time_s": 0.0, "allocated_peak_bytes": 11800 * MIB},
    },
    need_phase="decode",
    energy_j_per_image=700.0,
    telemetry={
        "rounds": [
            {"sm_clock_mhz": 1980, "temperature_c": 60, "power_w": 500.0},
            {"sm_clock_mhz": 1755, "temperature_c": 64, "power_w": 600.0},
            {"sm_clock_mhz": None, "temperature_c": None, "power_w": None},
        ]
    },
    effects={"a": "no_effect", "b": "no_effect", "fp16": "applied"},
    exactness={"against": "x", "max_abs_difference": 0.5, "mean_abs_difference": 0.25, "psnr_db": 12.0},
    drift={"calls": 20, "allocated_bytes_per_call": 512.0, "tensors_per_call": 2.0, "leaks": ["allocated", "tensors"]},
    disturbed="another process",
    wall={"total_s": 60.0, "probes": 7},
)
ESTIMATE = {**NOTHING, "need_bytes": 12000 * MIB, "estimated_need_bytes": 12000 * MIB, "required_bytes": 12768 * MIB}
RECORDS = {
    "full": FULL,
    "plain": record(),
    "own": own(phases={"call": {"time_s": 2.0}}),
    "oom": record(status="oom", failure=FAILURE, time={}, memory=NOTHING),
    "error": record(status="error", failure={"message": "CUDA error"}, time={}, memory=NOTHING),
    "skipped": record(status="skipped", reason="not here", time={}, memory=NOTHING),
    "estimated": record(method="estimated", time={}, memory=ESTIMATE, wall={"total_s": 2.0}),
}


def run(records: Sequence[Record], name: str = "run.json", **environment: Any) -> ReadRun:
    return ReadRun(Path(name), Run(environment=environment, sweep="default", records=list(records)))


def row(found: Record, **environment: Any) -> dict[str, Any]:
    """The row of one record, with None for what is not known."""
    [values] = frame([run([found], **environment)]).to_dict("records")
    return {str(name): None if pd.isna(value) else value for name, value in values.items()}


def put(path: Path, *records: Any, **environment: Any) -> Path:
    vram = {"environment": environment, "sweep": "default", "records": list(records)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"vram": vram}), encoding="utf-8")
    return path


def promised(table: pd.DataFrame) -> bool:
    """Whether a table has the columns and dtypes of `COLUMNS`, in their order."""
    dtypes = [(str(name), str(dtype)) for name, dtype in table.dtypes.items()]
    return dtypes == [(name, dtype) for name, (dtype, _) in COLUMNS.items()]


def everything() -> pd.DataFrame:
    return frame([run(list(RECORDS.values()), **ENVIRONMENT), run([record()], "old.json")])


@pytest.mark.parametrize("kind", [*RECORDS, "all", "none", "no runs"])
def test_columns_and_dtypes_are_promised(kind: str) -> None:
    kinds: dict[str, list[ReadRun]] = {"all": [run(list(RECORDS.values()))], "none": [run([])], "no runs": []}
    table = frame(kinds[kind] if kind in kinds else [run([RECORDS[kind]], **ENVIRONMENT)])
    assert promised(table)
    assert len(table) == {"all": len(RECORDS), "none": 0, "no runs": 0}.get(kind, 1)


def test_a_row_a_record_in_their_order() -> None:
    table = frame([run([record(id="a"), record(id="b")], "1.json"), run([], "2.json"), run([record(id="a")], "3.json")])
    assert list(table["id"]) == ["a", "b", "a"]
    assert list(table["run"]) == ["1.json", "1.json", "3.json"]
    assert list(table.index) == [0, 1, 2]


def test_every_column_of_a_full_record() -> None:
    assert row(FULL, **ENVIRONMENT) == {
        **{name: value for name, value in ENVIRONMENT.items() if name != "started"},
        **FULL.memory.model_dump(),
        "run": "run.json",
        "started": pd.Timestamp("2026-11-24T06:00:00Z"),
        "sweep": "default",
        "id": "sdxl/fp16/1024x1024/b1",
        "method": "measured",
        "status": "ok",
        "reason": None,
        "model": "sdxl",
        "test": None,
        "optimizations": "fp16+a+b",
        "width": 1024,
        "height": 1024,
        "frames": 9,
        "batch_size": 1,
        "steps": 8,
        "guidance_scale": 5.0,
        "sequence_length": 77,
        "scheduler": "EulerDiscreteScheduler",
        "seed": 3,
        "weights": "random",
        "limit_bytes": 20000 * MIB,
        "need_phase": "decode",
        "cold_s": 3.5,
        "median_s": 2.0,
        "step_s": 0.25,
        "first_step_s": 0.5,
        "images_per_s": 0.5,
        "frame_s": 2.0 / 9,
        "at_need_s": 2.5,
        "full_length_s": 12.5,
        "full_length_steps": 50,
        "denoiser_calls": 8,
        "gpu_lag_s": 0.125,
        "rounds": 3,
        "rounds_discarded": 1,
        "load_s": 4.0,
        "compile_s": 30.0,
        "encode_s": 0.125,
        "denoise_s": 1.5,
        "decode_s": 0.0,
        "call_s": None,
        "load_allocated_peak_bytes": None,
        "compile_allocated_peak_bytes": 11500 * MIB,
        "encode_allocated_peak_bytes": 900 * MIB,
        "denoise_allocated_peak_bytes": 11000 * MIB,
        "decode_allocated_peak_bytes": 11800 * MIB,
        "call_allocated_peak_bytes": None,
        "sm_clock_mhz": 1867.5,
        "temperature_c": 64.0,
        "power_w": 550.0,
        "energy_j_per_image": 700.0,
        "no_effect": "a+b",
        "exact": False,
        "mean_abs_difference": 0.25,
        "max_abs_difference": 0.5,
        "psnr_db": 12.0,
        "leak_check_calls": 20,
        "allocated_bytes_per_call": 512.0,
        "reserved_bytes_per_call": None,
        "host_bytes_per_call": None,
        "tensors_per_call": 2.0,
        "leaks": "allocated+tensors",
        "disturbed": "another process",
        "failure_phase": None,
        "wall_s": 60.0,
        "probes": 7,
    }


@pytest.mark.parametrize("kind", [kind for kind in RECORDS if kind != "full"])
def test_what_was_not_measured_is_not_0(kind: str) -> None:
    found = row(RECORDS[kind])
    zero = {name for name, value in found.items() if value == 0} - {"seed"}
    assert zero == ({"rounds_discarded"} if found["rounds"] else set())


def test_what_was_measured_as_0_is_0() -> None:
    found = row(FULL)
    assert (found["decode_s"], found["alloc_retries"]) == (0.0, 0)


def test_a_run_that_says_nothing_of_itself_has_nothing() -> None:
    found = row(record())
    assert {name: found[name] for name in ENVIRONMENT} == dict.fromkeys(ENVIRONMENT)


@pytest.mark.parametrize(
    ("kind", "reason", "phase"),
    [
        ("oom", "out of memory", "denoise"),
        ("error", "CUDA error", None),
        ("skipped", "not here", None),
        ("plain", None, None),
    ],
)
def test_why_it_has_no_figures(kind: str, reason: str | None, phase: str | None) -> None:
    found = row(RECORDS[kind])
    assert (found["reason"], found["failure_phase"], found["need_bytes"] is None) == (reason, phase, kind != "plain")


def test_the_rounds_of_all_workers() -> None:
    workers = [{"rounds_s": [1.0] * 5, "median_s": 1.0}, {"rounds_s": [1.0] * 2, "median_s": 1.0}]
    assert row(record(time={"workers": workers}))["rounds"] == 7


def test_a_pipeline_of_ones_own() -> None:
    found = row(RECORDS["own"])
    assert (found["model"], found["test"], found["optimizations"]) == ("tests/test_app.py", "test_painter", "")
    assert (found["call_s"], found["denoise_s"]) == (2.0, None)
    for name in ("width", "height", "batch_size", "steps", "scheduler", "seed", "weights", "guidance_scale"):
        assert found[name] is None


def test_probes_are_those_of_a_search() -> None:
    wall = {"total_s": 2.0, "probes": 3}
    assert row(record(wall=wall))["probes"] == 3
    assert row(record(wall=wall, method="estimated"))["probes"] is None


@pytest.mark.parametrize(
    "value", [None, True, 1.5, HUGE, -HUGE, 1 << 63, "\ud800", ["x"], {"a": 1}], ids=lambda value: repr(value)[:30]
)
def test_an_odd_environment_costs_no_table(value: Any, tmp_path: Path) -> None:
    odd = dict.fromkeys(ENVIRONMENT, value)
    table = frame([run([record()], **odd), run([record()], **ENVIRONMENT)])
    assert promised(table)
    assert table.loc[1, list(ENVIRONMENT)].notna().all()
    table.to_csv(tmp_path / "records.csv")
    table.to_parquet(tmp_path / "records.parquet")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gpu", 1),
        ("gpu_memory_bytes", True),
        ("gpu_memory_bytes", "1"),
        ("gpu_memory_bytes", 1.0),
        ("driver", 580.95),
        ("dirty", 0),
        ("dirty", "no"),
        ("commit", ["1a"]),
    ],
)
def test_an_environment_of_the_wrong_type_is_not_known(name: str, value: Any) -> None:
    assert row(record(), **{**ENVIRONMENT, name: value})[name] is None


@pytest.mark.parametrize(
    "found",
    [
        facts(case={"steps": HUGE}),
        facts(case={"seed": -HUGE}),
        facts(case={"width": 1 << 63}),
        facts(case={"limit_bytes": 1 << 64}),
        facts(memory={"alloc_retries": HUGE}),
        facts(telemetry={"rounds": [{"sm_clock_mhz": HUGE, "temperature_c": -HUGE}]}),
        facts(case={"scheduler": "\ud800"}),
        facts(case={"optimizations": ["fp16", "\ud800"]}),
    ],
    ids=["steps", "seed", "width", "limit", "retries", "clock", "scheduler", "optimization"],
)
def test_a_hostile_record_costs_no_table(found: dict[str, Any], tmp_path: Path) -> None:
    path = put(tmp_path / "run.json", found, facts(id="neighbour"))
    with pytest.warns(UserWarning, match="this record is left out"):
        table = load(path)
    assert promised(table)
    assert "neighbour" in set(table["id"])
    table.to_csv(tmp_path / "records.csv")
    table.to_parquet(tmp_path / "records.parquet")


@pytest.mark.parametrize(
    ("started", "expected"),
    [
        ("2026-11-24T08:00:00.123456", pd.Timestamp("2026-11-24T08:00:00.123456Z")),
        ("2026-11-24T08:00:00+02:00", pd.Timestamp("2026-11-24T06:00:00Z")),
        ("yesterday", None),
        (None, None),
        (HUGE, None),
    ],
    ids=["naive", "zone", "text", "null", "huge"],
)
def test_started(started: Any, expected: pd.Timestamp | None) -> None:
    assert row(record(), started=started)["started"] == expected


def test_load_reads_a_folder_a_file_and_several(tmp_path: Path) -> None:
    first = put(tmp_path / "gpu" / "1.json", facts(id="a"), started="2026-11-24T08:00:00")
    second = put(tmp_path / "2.json", facts(id="b"), started="2026-11-23T08:00:00")
    assert list(load(tmp_path)["id"]) == list(load(str(tmp_path))["id"]) == ["b", "a"]
    assert list(load(first)["id"]) == ["a"]
    assert list(load([str(first), second])["id"]) == ["b", "a"]
    assert list(load(path for path in (first, second))["id"]) == ["b", "a"]
    assert promised(load(tmp_path))


def test_a_refused_record_is_left_out_with_a_warning_that_names_it(tmp_path: Path) -> None:
    path = put(tmp_path / "run.json", facts(id="a"), facts(id="b", time={}), None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        table = load(path)
    assert list(table["id"]) == ["a"]
    said = [str(warning.message) for warning in caught]
    assert said[0] == f"{path}: b: status ok with no rounds; this record is left out"
    assert said[1].startswith(f"{path}: records.2: ")
    assert {warning.filename for warning in caught} == {__file__}, "where `load` was called"
    assert len(said) == 2


def test_other_json_in_a_folder_is_a_warning(tmp_path: Path) -> None:
    put(tmp_path / "run.json", facts())
    (tmp_path / "other.json").write_text("{}", encoding="utf-8")
    with pytest.warns(UserWarning, match=r"^passed over .*other\.json: has no key 'vram'"):
        assert len(load(tmp_path)) == 1


def test_load_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFileError, match="no run file here"):
        load(tmp_path)
    with pytest.raises(RunFileError, match=r"none\.json: No such file"):
        load(tmp_path / "none.json")
    with pytest.raises(RunFileError):
        load([])


def test_parquet_round_trip(tmp_path: Path) -> None:
    table = everything()
    table.to_parquet(tmp_path / "records.parquet", index=False)
    again = pd.read_parquet(tmp_path / "records.parquet")
    pd.testing.assert_frame_equal(again, table)
    assert promised(again)


def test_csv_round_trip(tmp_path: Path) -> None:
    table = everything()
    table.to_csv(tmp_path / "records.csv", index=False)
    dtypes: dict[str, Any] = {name: dtype for name, (dtype, _) in COLUMNS.items() if name != "started"}
    again = pd.read_csv(tmp_path / "records.csv", dtype=dtypes)
    again["started"] = pd.to_datetime(again["started"], utc=True).astype("datetime64[us, UTC]")
    table["optimizations"] = table["optimizations"].replace("", pd.NA)  # CSV has one way to write nothing
    pd.testing.assert_frame_equal(again, table)


def test_a_table_without_rows_goes_both_ways(tmp_path: Path) -> None:
    frame([]).to_parquet(tmp_path / "records.parquet", index=False)
    assert promised(pd.read_parquet(tmp_path / "records.parquet"))
    frame([]).to_csv(tmp_path / "records.csv", index=False)
    assert (tmp_path / "records.csv").read_text(encoding="utf-8").strip() == ",".join(COLUMNS)


def test_figures_can_be_reckoned_with() -> None:
    table = everything()
    assert table["need_bytes"].sum() == sum(found.memory.need_bytes or 0 for found in [*RECORDS.values(), record()])
    assert table["median_s"].mean() == 2.0
    assert table.groupby("status", observed=True).size()["oom"] == 1


def test_every_figure_of_memory_and_every_phase_has_a_column() -> None:
    assert set(record().memory.model_dump()) <= set(COLUMNS)
    assert {f"{phase}_s" for phase in PHASES} | {f"{phase}_allocated_peak_bytes" for phase in PHASES} <= set(COLUMNS)


def test_units_are_in_the_names() -> None:
    for name, (dtype, _) in COLUMNS.items():
        if name.endswith("_bytes"):
            assert dtype == "Int64", name
        if name.endswith("_s"):
            assert dtype == "Float64", name


def test_the_documented_table_is_the_table() -> None:
    text = (ROOT / "docs" / "tables.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+) \|$", text, re.MULTILINE)
    assert rows == [(name, dtype, what) for name, (dtype, what) in COLUMNS.items()]


def test_the_package_offers_load_and_columns() -> None:
    assert pytest_vram.load is load
    assert pytest_vram.COLUMNS is COLUMNS
    with pytest.raises(AttributeError, match="no attribute 'unload'"):
        _ = pytest_vram.unload


def test_the_package_alone_imports_neither_pandas_nor_torch() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import pytest_vram;"
        "print([m for m in ('pandas', 'torch', 'numpy', 'pydantic', 'pyarrow') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(ROOT / "plugin")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
