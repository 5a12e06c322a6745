"""Run files and journals: nothing is lost in writing, nothing is believed in reading."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pytest_vram.errors import RunFileError, UsageError
from pytest_vram.records.files import Journal, new_path, read_journal, read_run, slug, unfinished, write_run
from pytest_vram.records.schema import Record, Run
from tests.records.test_schema import MIB, facts, own, record

ENVIRONMENT = {"gpu": "NVIDIA H100", "gpu_memory_bytes": 81559 * MIB, "commit": "1a2b3c4", "host": "a1b2"}


def a_run(records: Sequence[Record] = (), **changes: Any) -> Run:
    return Run(environment=ENVIRONMENT, sweep="default", records=list(records), **changes)


def batch(size: int, **changes: Any) -> Record:
    return record(id=f"sdxl/fp16/1024x1024/b{size}", case={"batch_size": size}, **changes)


def skipped(size: int) -> Record:
    return batch(size, status="skipped", reason="not here", time={})


def ids(run: Run) -> list[str]:
    return [record.id for record in run.records]


def refusal(path: Path) -> str:
    """The one line with which a run file or journal is refused, less the file's name."""
    with pytest.raises(RunFileError) as caught:
        read_journal(path) if path.suffix == ".jsonl" else read_run(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def test_round_trip(tmp_path: Path) -> None:
    run = a_run([batch(1), skipped(4)], aliases={"sdxl": ["xl"]}, options={"rounds": 5}, complete=False)
    write_run(tmp_path / "run.json", run)
    assert read_run(tmp_path / "run.json") == run
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_pipeline_of_ones_own_comes_back_from_journal_and_run_file(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run.json", a_run())
    for found in (batch(1), own()):
        journal.add(found)
    assert read_journal(journal.path).records == [batch(1), own()]
    assert read_run(journal.finish(complete=True)).records == [batch(1), own()]


def test_the_key_vram_is_as_documented(tmp_path: Path) -> None:
    write_run(tmp_path / "run.json", a_run([batch(1)]))
    vram = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["vram"]
    assert (vram["schema"], vram["sweep"]) == (1, "default")
    assert vram["environment"] == ENVIRONMENT
    assert vram["records"][0]["memory"]["required_bytes"] == 12786 * MIB
    assert vram["records"][0]["memory"]["host_peak_bytes"] is None


def test_unknown_keys_of_a_run_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_run(path, a_run([batch(1)]))
    document = json.loads(path.read_text(encoding="utf-8"))
    document["colour"] = document["vram"]["colour"] = "red"
    path.write_text(json.dumps(document), encoding="utf-8")
    assert read_run(path) == a_run([batch(1)])


def test_more_than_the_card_has_is_not_written(tmp_path: Path) -> None:
    large = batch(1, memory={"nvml_process_peak_bytes": 81560 * MIB})
    with pytest.raises(RunFileError, match=r"run\.json: sdxl/fp16/1024x1024/b1: nvml_process_peak_bytes .* GPU has"):
        write_run(tmp_path / "run.json", a_run([large]))
    assert not list(tmp_path.iterdir())


def test_more_than_the_card_has_may_be_estimated(tmp_path: Path) -> None:
    memory = dict.fromkeys(facts()["memory"]) | {"need_bytes": 1 << 40, "estimated_need_bytes": 1 << 40}
    write_run(tmp_path / "run.json", a_run([batch(1, method="estimated", time={}, memory=memory)]))
    assert read_run(tmp_path / "run.json").records[0].memory.need_bytes == 1 << 40


def vram(**changes: Any) -> dict[str, Any]:
    return {"vram": {"schema": 1, "environment": {}, "sweep": "default", "records": [], **changes}}


HOSTILE: dict[str, tuple[bytes | dict[str, Any], str]] = {
    "empty": (b"", "is not JSON"),
    "text": (b"hello", "is not JSON"),
    "cut off": (b'{"vram": {"schema": 1', "is not JSON"),
    "not UTF-8": (b'{"vram": "\xff"}', "is not UTF-8"),
    "nested lists": (b"[" * 200_000, "is not JSON"),
    "nested tables": (b'{"vram":' * 200_000, "is not JSON"),
    "long number": (b'{"vram": ' + b"9" * 10_000 + b"}", "is not JSON"),
    "list": (b"[]", "vram"),
    "null": (b"null", "vram"),
    "no vram": (b'{"benchmarks": []}', "vram"),
    "vram is a list": (b'{"vram": []}', "vram"),
    "vram is empty": (b'{"vram": {}}', "environment: field required"),
    "newer schema": (vram(schema=2), "schema: "),
    "environment is text": (vram(environment="H100"), "environment: "),
    "records are a table": (vram(records={}), "records: "),
    "a record is text": (vram(records=["ok"]), "records.0: "),
    "a record is null": (vram(records=[facts(), None]), "records.1: "),
    "a case of one's own": (vram(records=[{**facts(), "case": {"build": 1}}]), "records.0.case.model: field required"),
    "a case is a list": (vram(records=[{**facts(), "case": []}]), "records.0.case: "),
    "memory is text": (vram(records=[{**facts(), "memory": "lots"}]), "records.0.memory: "),
    "a figure is a table": (vram(records=[facts(memory={"need_bytes": {}})]), "records.0.memory.need_bytes: "),
    "a figure is true": (vram(records=[facts(memory={"need_bytes": True})]), "records.0.memory.need_bytes: "),
    "a figure is huge": (vram(records=[facts(wall={"total_s": 10**4000})]), "records.0.wall.total_s: "),
    "a figure is NaN": (vram(records=[facts(energy_j_per_image=float("nan"))]), "records.0.energy_j_per_image: "),
    "half a character": (vram(records=[facts(id="\ud800")]), "records.0.id: "),
    "a key of two lines": (vram(records=[facts(effects={"a\nb": "perhaps"})]), "records.0.effects."),
    "no rounds": (vram(records=[facts(time={})]), "sdxl/fp16/1024x1024/b1: status ok with no rounds"),
    "above the card": (vram(environment={"gpu_memory_bytes": MIB}, records=[facts()]), "sdxl/fp16/1024x1024/b1: "),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_run_file(name: str, tmp_path: Path) -> None:
    content, problem = HOSTILE[name]
    path = tmp_path / "run.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    message = refusal(path)
    assert problem in message
    assert len(message) < 500


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_no_file(suffix: str, tmp_path: Path) -> None:
    assert refusal(tmp_path / f"none{suffix}") == "No such file or directory"
    (tmp_path / f"folder{suffix}").mkdir()
    assert refusal(tmp_path / f"folder{suffix}") == "is no file"
    os.mkfifo(tmp_path / f"pipe{suffix}")  # reading one would wait for ever
    assert refusal(tmp_path / f"pipe{suffix}") == "is no file"


def test_each_record_is_on_disk_before_the_next(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "new" / "run.json", a_run())
    assert ids(read_journal(journal.path)) == []
    for size in (1, 2, 4):
        journal.add(batch(size))
        assert ids(read_journal(journal.path))[-1] == f"sdxl/fp16/1024x1024/b{size}"
    assert read_journal(journal.path) == a_run([batch(1), batch(2), batch(4)], complete=False)
    assert [path.name for path in journal.path.parent.iterdir()] == ["run.jsonl"]
    journal.discard()


@pytest.mark.parametrize("complete", [True, False])
def test_the_run_file_replaces_the_journal(complete: bool, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run.json", a_run([skipped(1)]))
    journal.add(batch(2))
    assert journal.finish(complete) == tmp_path / "run.json"
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    assert read_run(tmp_path / "run.json") == a_run([skipped(1), batch(2)], complete=complete)


def test_a_later_record_replaces_the_earlier(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run.json", a_run())
    for found in (skipped(1), batch(2), batch(1)):
        journal.add(found)
    assert {found.id: found.status for found in read_journal(journal.path).records} == {
        "sdxl/fp16/1024x1024/b1": "ok",
        "sdxl/fp16/1024x1024/b2": "ok",
    }
    assert len(read_run(journal.finish(complete=True)).records) == 2


def journal_lines(folder: Path, *records: Record) -> list[str]:
    journal = Journal(folder / "lines.json", a_run())
    for found in records:
        journal.add(found)
    text = journal.path.read_text(encoding="utf-8")
    journal.discard()
    return text.splitlines(keepends=True)


def test_an_interrupted_run_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    head, first, last = journal_lines(tmp_path, batch(1), batch(2))
    path.write_text(head + first + last[:50], encoding="utf-8")
    journal = Journal(tmp_path / "run.json", read_journal(path))
    journal.add(batch(4))
    assert ids(read_journal(path)) == ["sdxl/fp16/1024x1024/b1", "sdxl/fp16/1024x1024/b4"]
    assert read_run(journal.finish(complete=True)).complete


def test_discard_leaves_nothing(tmp_path: Path) -> None:
    Journal(tmp_path / "run.json", a_run()).discard()
    assert not list(tmp_path.iterdir())


def test_results_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "results").touch()
    with pytest.raises(UsageError, match=r"^--vram-results: .*results cannot be written: "):
        Journal(tmp_path / "results" / "run.json", a_run())


@pytest.mark.parametrize("kept", [0.02, 0.5, 1.0])
def test_a_torn_last_line_is_left_out(kept: float, tmp_path: Path) -> None:
    head, first, last = journal_lines(tmp_path, batch(1), batch(2))
    path = tmp_path / "run.jsonl"
    path.write_text(head + first + last[: int(kept * (len(last) - 1))], encoding="utf-8")
    assert ids(read_journal(path)) == ["sdxl/fp16/1024x1024/b1"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "is not JSON"),
        ("", "is not JSON"),
        ("[1]", ""),
        ("null", ""),
        ("{}", "records.1."),
        ('{"id": []}', "records.1."),
        ("[" * 200_000, "is not JSON"),
    ],
)
def test_a_journal_with_a_bad_line(line: str, problem: str, tmp_path: Path) -> None:
    head, first, last = journal_lines(tmp_path, batch(1), batch(2))
    path = tmp_path / "run.jsonl"
    path.write_text(f"{head}{first}{line}\n{last}", encoding="utf-8")
    assert problem in refusal(path)


@pytest.mark.parametrize("text", ["", '{"schema": 1', "[]\n", "null\n", "{}\n", "hello\n"])
def test_a_journal_with_a_bad_head(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(text, encoding="utf-8")
    assert refusal(path)


def test_unfinished_runs_the_newest_first(tmp_path: Path) -> None:
    def name(day: int, suffix: str) -> Path:
        return tmp_path / f"202611{day}T210000Z_1a2b3c4_9f0e{suffix}"

    lines = "".join(journal_lines(tmp_path, batch(1)))
    for day in (25, 21, 24):
        name(day, ".jsonl").write_text(lines, encoding="utf-8")
    write_run(name(20, ".json"), a_run(complete=False))
    write_run(name(23, ".json"), a_run())
    write_run(name(24, ".json"), a_run(complete=False))  # the journal beside it goes on with it
    assert [path.name for path, _ in unfinished(tmp_path)] == [
        name(25, ".jsonl").name,
        name(24, ".jsonl").name,
        name(21, ".jsonl").name,
        name(20, ".json").name,
    ]


@pytest.mark.parametrize("content", ["not ours", "[]\n", "null\n", "{}\n"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_what_is_no_run_is_not_unfinished(suffix: str, content: str, tmp_path: Path) -> None:
    (tmp_path / f"run{suffix}").write_text(content, encoding="utf-8")
    assert list(unfinished(tmp_path)) == []


def test_no_folder_has_nothing_unfinished(tmp_path: Path) -> None:
    assert list(unfinished(tmp_path / "none")) == []


@pytest.mark.parametrize(
    ("environment", "middle"),
    [
        ({"commit": "1a2b3c4", "dirty": False}, "1a2b3c4"),
        ({"commit": "1a2b3c4", "dirty": True}, "1a2b3c4-dirty"),
        ({"commit": None}, "nogit"),
        ({}, "nogit"),
        ({"commit": "../../1a"}, "1a"),
    ],
)
def test_new_path(environment: dict[str, Any], middle: str, tmp_path: Path) -> None:
    path = new_path(tmp_path, environment)
    assert path.parent == tmp_path
    assert re.fullmatch(rf"\d{{8}}T\d{{6}}Z_{middle}_[0-9a-f]{{4}}\.json", path.name)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"),
        ("NVIDIA GeForce RTX™ 4060 Ti", "nvidia-geforce-rtx-4060-ti"),
        ("../../etc/", "etc"),
        ("", "unknown"),
        ("测试", "unknown"),
    ],
)
def test_slug(text: str, expected: str) -> None:
    assert slug(text) == expected


@pytest.mark.parametrize("records", [[batch(1), batch(4), skipped(8)], []], ids=["two", "none"])
def test_pytest_benchmark_reads_a_run_file(records: list[Record], tmp_path: Path) -> None:
    write_run(tmp_path / "run.json", a_run(records))
    command = [sys.executable, "-m", "pytest_benchmark", "compare", "run.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    named = [record.id for record in records if record.id in done.stdout]
    assert named == [record.id for record in records if record.status == "ok"]
