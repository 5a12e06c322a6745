"""Many run files at once: which are read, in what order, and what strangers' files cannot do."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from pytest_vram.errors import NotOurs, RunFileError
from pytest_vram.records.files import Refused
from pytest_vram.records.reading import ReadRun, read_runs
from pytest_vram.records.schema import Run
from tests.records.test_schema import MIB, facts, own, record

FOREIGN = {"benchmarks": [], "version": "5.0"}
HUGE = 10**4000


def put(path: Path, *records: Any, **changes: Any) -> Path:
    """A run file with these records, as JSON; `changes` replace keys of its `vram`."""
    vram = {"schema": 1, "environment": {}, "sweep": "default", "records": list(records), **changes}
    return foreign(path, {"vram": vram})


def foreign(path: Path, document: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def batch(size: int, **changes: Any) -> dict[str, Any]:
    return facts(id=f"b{size}", **changes, case={"batch_size": size})


def read(*paths: Path) -> list[ReadRun]:
    """The runs of paths of which there is nothing to say."""
    runs, notes = read_runs(paths)
    assert notes == []
    return runs


def names(runs: list[ReadRun]) -> list[str]:
    return [run.path.name for run in runs]


def ids(run: ReadRun) -> list[str]:
    return [record.id for record in run.records]


def refusal(*paths: Path) -> str:
    with pytest.raises(RunFileError) as caught:
        read_runs(paths)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def short(value: Any) -> str:
    """The id of a parameter that may be very long."""
    return repr(value)[:30]


def one(environment: dict[str, Any], name: str = "run.json") -> ReadRun:
    return ReadRun(Path(name), Run(environment=environment, sweep="default"))


def test_a_named_file_is_read_with_its_records(tmp_path: Path) -> None:
    path = put(tmp_path / "run.json", facts(), own().model_dump(mode="json"), environment={"gpu": "NVIDIA H100"})
    [run] = read(path)
    assert (run.path, run.gpu, run.refused) == (path, "NVIDIA H100", ())
    assert run.records == [record(), own()]


def test_a_folder_is_read_one_level_deep(tmp_path: Path) -> None:
    for place in ("here.json", "gpu/below.json", "gpu/checks/too_deep.json", "notes.txt"):
        put(tmp_path / place)
    assert names(read(tmp_path)) == ["below.json", "here.json"]


def test_files_and_folders_together(tmp_path: Path) -> None:
    put(tmp_path / "a" / "1.json")
    put(tmp_path / "b" / "2.json")
    named = put(tmp_path / "b" / "c" / "d" / "3.json")
    assert names(read(named, tmp_path / "a", tmp_path / "b")) == ["1.json", "2.json", "3.json"]


def journal(path: Path, *records: dict[str, Any]) -> Path:
    """What a sweep leaves behind that ends before its time."""
    lines = [{"environment": {}, "sweep": "default", "complete": False}, *records]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_a_journal_is_read_where_it_is_named(tmp_path: Path) -> None:
    [run] = read(journal(tmp_path / "run.jsonl", facts()))
    assert (run.records, run.run.complete) == ([record()], False)


def test_a_folder_has_no_journals(tmp_path: Path) -> None:
    journal(tmp_path / "interrupted.jsonl", facts())
    put(tmp_path / "whole.json")
    assert names(read(tmp_path)) == ["whole.json"]


def test_a_journal_keeps_the_neighbours_of_a_refused_record(tmp_path: Path) -> None:
    path = journal(tmp_path / "run.jsonl", batch(1), batch(2, time={}), batch(4))
    [run], notes = read_runs([path])
    assert (ids(run), run.refused) == (["b1", "b4"], (Refused("b2", "b2: status ok with no rounds"),))
    assert notes == [f"{path}: b2: status ok with no rounds; this record is left out"]


@pytest.mark.parametrize("document", [FOREIGN, [], None, {"vram": []}, "text"])
def test_other_json_in_a_folder_is_passed_over_and_said(document: Any, tmp_path: Path) -> None:
    path = foreign(tmp_path / "gpu" / "other.json", document)
    put(tmp_path / "run.json")
    runs, notes = read_runs([tmp_path])
    assert names(runs) == ["run.json"]
    assert notes == [f"passed over {path}: has no key 'vram'; it is no run file of pytest-vram"]


@pytest.mark.parametrize("order", [("other.json", "."), (".", "other.json")])
def test_other_json_that_is_named_is_refused(order: tuple[str, str], tmp_path: Path) -> None:
    foreign(tmp_path / "other.json", FOREIGN)
    put(tmp_path / "run.json")
    with pytest.raises(NotOurs, match=r"other\.json: has no key 'vram'"):
        read_runs([tmp_path / name for name in order])


def test_each_file_once(tmp_path: Path) -> None:
    path = put(tmp_path / "gpu" / "run.json", facts())
    (tmp_path / "gpu" / "link.json").symlink_to(path)
    (tmp_path / "again").symlink_to(path.parent)
    [run] = read(path, path, tmp_path, path.parent, path.parent / ".." / "gpu" / "run.json")
    assert run.path == path
    assert len(read(tmp_path)) == 1


def test_two_copies_are_two_runs(tmp_path: Path) -> None:
    put(tmp_path / "a" / "run.json", facts())
    put(tmp_path / "b" / "run.json", facts())
    assert len(read(tmp_path)) == 2


def test_the_oldest_run_comes_first_whatever_the_order_of_the_paths(tmp_path: Path) -> None:
    old = put(tmp_path / "z.json", environment={"started": "2026-11-20T23:30:00-02:00"})
    new = put(tmp_path / "a.json", environment={"started": "2026-11-21T02:00:00+00:00"})
    by_name = put(tmp_path / "20261121T013100Z_nogit_0000.json")
    unknown = put(tmp_path / "unknown.json")
    expected = [unknown, old, by_name, new]
    for paths in ([tmp_path], expected, expected[::-1]):
        assert [run.path for run in read(*paths)] == expected


def test_runs_of_one_moment_come_by_name(tmp_path: Path) -> None:
    for name in ("b", "c", "a"):
        put(tmp_path / f"{name}.json", environment={"started": "2026-11-21T02:00:00"})
    assert names(read(tmp_path)) == ["a.json", "b.json", "c.json"]


BY_NAME = "20261120T213000Z_1a2b3c4_9f0e.json"
NAMED = datetime(2026, 11, 20, 21, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    ("started", "expected"),
    [
        ("2026-11-24T08:00:00+00:00", datetime(2026, 11, 24, 8, tzinfo=UTC)),
        ("2026-11-24T08:00:00Z", datetime(2026, 11, 24, 8, tzinfo=UTC)),
        ("2026-11-24T08:00:00+02:00", datetime(2026, 11, 24, 6, tzinfo=UTC)),
        ("2026-11-24T08:00:00", datetime(2026, 11, 24, 8, tzinfo=UTC)),
        ("0001-01-01T00:00:00+14:00", NAMED),
        ("9999-12-31T23:59:59-14:00", NAMED),
        ("yesterday", NAMED),
        ("", NAMED),
        ("\ud800", NAMED),
        ("2026-13-45", NAMED),
        (None, NAMED),
        (True, NAMED),
        (HUGE, NAMED),
        (float("nan"), NAMED),
        (["2026-11-24"], NAMED),
        ({"at": 1}, NAMED),
    ],
    ids=short,
)
def test_started(started: Any, expected: datetime) -> None:
    found = one({"started": started}, BY_NAME).started
    assert found is not None
    assert (found, found.tzinfo) == (expected, UTC)


@pytest.mark.parametrize("name", ["run.json", "20261399T999999Z_x.json", "_.json", "\ud800.json", "20261120.json"])
def test_a_run_that_does_not_say_when_it_began_is_the_oldest(name: str) -> None:
    assert one({}, name).started is None


@pytest.mark.parametrize("value", [None, 1, True, ["NVIDIA H100"], {}, 1.5])
def test_a_gpu_whose_name_is_no_text_is_none(value: Any) -> None:
    assert one({"gpu": value}).gpu is None
    assert one({}).gpu is None


@pytest.mark.parametrize("value", [None, "81559", True, 1.5, [1], {}])
def test_memory_that_is_no_whole_number_is_none(value: Any) -> None:
    assert one({"gpu_memory_bytes": value}).gpu_memory_bytes is None
    assert one({}).gpu_memory_bytes is None
    assert one({"gpu_memory_bytes": 81559 * MIB}).gpu_memory_bytes == 81559 * MIB


def test_a_refused_record_is_named_by_its_id_and_its_neighbours_are_kept(tmp_path: Path) -> None:
    large = batch(4, memory={"nvml_process_peak_bytes": 20001 * MIB})
    path = put(
        tmp_path / "run.json",
        batch(1),
        batch(2, status="skipped"),
        large,
        batch(8),
        environment={"gpu_memory_bytes": 20000 * MIB},
    )
    [run], notes = read_runs([path])
    assert ids(run) == ["b1", "b8"]
    assert tuple(map(str, run.refused)) == (
        "b2: status skipped with no reason",
        f"b4: nvml_process_peak_bytes {20001 * MIB} is more than the GPU has ({20000 * MIB})",
    )
    assert notes == [f"{path}: {problem}; this record is left out" for problem in run.refused]


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        (None, "records.1: "),
        (1, "records.1: "),
        ([], "records.1: "),
        ("ok", "records.1: "),
        ({}, "records.1.id: "),
        ({**facts(), "memory": []}, "records.1.memory: "),
        (facts(wall={"total_s": HUGE}), "records.1.wall.total_s: "),
        (facts(memory={"need_bytes": HUGE}), "records.1.memory.need_bytes: "),
        (facts(memory={"need_bytes": float("inf")}), "records.1.memory.need_bytes: "),
        (facts(time={"median_s": float("nan")}), "records.1.time.median_s: "),
        (facts(id="\ud800"), "records.1.id: "),
        (facts(case={"model": "\ud800"}), "records.1.case.model: "),
        (facts(id="x" * 501), "records.1.id: "),
        (facts(effects={"a\nb": "perhaps"}), "records.1.effects.a b: "),
        (facts(phases={"\ud800": {}}), "records.1.phases."),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_record_that_is_none_is_refused_by_its_place(document: Any, problem: str, tmp_path: Path) -> None:
    [run], [note] = read_runs([put(tmp_path / "run.json", batch(1), document, batch(4))])
    assert ids(run) == ["b1", "b4"]
    assert str(run.refused[0]).startswith(problem)
    assert "\n" not in note
    assert len(str(run.refused[0])) < 500
    assert str(run.refused[0]).encode()


@pytest.mark.parametrize(
    "changes", [{"time": {}}, {"memory": {"nvml_process_peak_bytes": 20001 * MIB}}], ids=["impossible", "above"]
)
def test_what_is_said_of_a_refused_record_is_one_line_whatever_its_id(changes: Any, tmp_path: Path) -> None:
    path = put(tmp_path / "run.json", facts(id="a\nb", **changes), environment={"gpu_memory_bytes": 20000 * MIB})
    [run], [note] = read_runs([path])
    assert str(run.refused[0]).startswith("a b: ")
    assert "\n" not in note


def test_a_run_whose_records_are_all_refused_is_a_run(tmp_path: Path) -> None:
    [run], notes = read_runs([put(tmp_path / "run.json", None, {})])
    assert (run.records, len(run.refused), len(notes)) == ([], 2, 2)


def test_no_records_is_a_run(tmp_path: Path) -> None:
    [run] = read(put(tmp_path / "run.json"))
    assert (run.records, run.refused) == ([], ())


@pytest.mark.parametrize("records", [{}, None, "ok", 1, True, {"0": facts()}])
def test_records_that_are_no_list_refuse_the_file(records: Any, tmp_path: Path) -> None:
    path = put(tmp_path / "run.json", records=records)
    assert refusal(path) == f"{path}: records: input should be a valid list"


@pytest.mark.parametrize("environment", [[], None, "H100", 1])
def test_an_environment_that_is_no_table_refuses_the_file(environment: Any, tmp_path: Path) -> None:
    path = put(tmp_path / "run.json", environment=environment)
    assert refusal(path).startswith(f"{path}: environment: ")


@pytest.mark.parametrize("value", [HUGE, -HUGE, "\ud800", None, [[[]]], float("nan"), ""], ids=short)
@pytest.mark.parametrize("key", ["gpu", "gpu_memory_bytes", "started", "commit", "\ud800"], ids=short)
def test_an_odd_environment_is_read(key: str, value: Any, tmp_path: Path) -> None:
    [run], _ = read_runs([put(tmp_path / "run.json", environment={key: value})])
    assert run.started is None
    assert (run.gpu is None) == (key != "gpu" or not isinstance(value, str))


@pytest.mark.parametrize("named", [True, False])
def test_a_newer_schema_is_refused_with_the_version_to_install(named: bool, tmp_path: Path) -> None:
    path = put(tmp_path / "new.json", schema=2, environment={"pytest-vram": "9.9.9"})
    put(tmp_path / "old.json")
    message = refusal(path if named else tmp_path)
    assert message.startswith(f"{path}: schema: 2 is newer ")
    assert "9.9.9" in message


@pytest.mark.parametrize(("schema", "version"), [(2, "9.9\nb"), (2, "\x1b[31m"), (HUGE, "9.9")], ids=short)
def test_a_hostile_newer_schema_is_refused_in_one_short_line(schema: int, version: str, tmp_path: Path) -> None:
    path = put(tmp_path / "new.json", schema=schema, environment={"pytest-vram": version})
    message = refusal(path).removeprefix(str(path))
    assert message.startswith(": schema: ")
    assert len(message) < 500


@pytest.mark.parametrize("content", [b"", b"hello", b'{"vram": {', b'{"vram": "\xff"}', b"[" * 200_000])
def test_what_is_no_json_is_named_and_ends_the_reading(content: bytes, tmp_path: Path) -> None:
    put(tmp_path / "run.json")
    (tmp_path / "torn.json").write_bytes(content)
    assert refusal(tmp_path).startswith(f"{tmp_path / 'torn.json'}: is not ")


def test_no_run_file_in_a_folder(tmp_path: Path) -> None:
    empty, other = tmp_path / "empty", foreign(tmp_path / "others" / "x.json", FOREIGN).parent
    empty.mkdir()
    assert refusal(empty).startswith(f"{empty}: no run file here; ")
    assert refusal(empty, other).startswith(f"{empty}, {other}: no run file here; ")


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    put(tmp_path / "run.json")
    assert refusal(tmp_path, tmp_path / "none.json") == f"{tmp_path / 'none.json'}: No such file or directory"


@pytest.mark.parametrize("name", ["x" * 300 + ".json", "loop.json", "torn_link.json"], ids=short)
def test_a_path_that_cannot_be_followed_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "loop.json").symlink_to("loop.json")
    (tmp_path / "torn_link.json").symlink_to("nowhere.json")
    assert refusal(tmp_path / name).startswith(f"{tmp_path / name}: ")


def test_a_folder_whose_name_ends_like_a_run_file_is_a_folder(tmp_path: Path) -> None:
    put(tmp_path / "gpu.json" / "run.json")
    assert names(read(tmp_path / "gpu.json")) == ["run.json"]
    assert names(read(tmp_path)) == ["run.json"]
