"""Run files and journals: nothing is lost in writing, nothing is believed in reading."""

import errno
import fcntl
import io
import json
import os
import re
import secrets
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from pytest_vram.errors import NotSaved, RunFileError, UsageError
from pytest_vram.records import files
from pytest_vram.records.files import (
    TORN,
    Journal,
    Refused,
    claim,
    is_torn,
    new_path,
    read_journal,
    read_run,
    slug,
    write_run,
)
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
    refused: list[Refused] = []
    read_journal(path, refused)
    assert (refused, is_torn(path)) == ([Refused(None, TORN)], True)


def test_a_whole_journal_is_not_torn(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text("".join(journal_lines(tmp_path, batch(1))), encoding="utf-8")
    refused: list[Refused] = []
    read_journal(path, refused)
    assert (refused, is_torn(path)) == ([], False)
    path.write_text("")
    assert not is_torn(path)
    assert not is_torn(tmp_path / "none.jsonl")


# A disk with no room


class Disk:
    """Plays the system calls of the journal on a disk that has room for so many more bytes, or whose sync fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room: int | None = None
        self.synced = True
        fsync = os.fsync

        def sync(number: int) -> None:
            if not self.synced:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            fsync(number)

        monkeypatch.setattr(os, "fsync", sync)

    def fill(self, journal: Journal) -> None:
        """Let the journal write to this disk."""
        real = journal._file

        class Full(io.FileIO):
            def write(this, data: Any, /) -> int:
                if self.room is not None and not self.room:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                taken = len(data) if self.room is None else min(len(data), self.room)
                self.room = None if self.room is None else self.room - taken
                return real.write(bytes(data[:taken]))

            def truncate(this, size: int | None = None, /) -> int:
                return real.truncate(size)

            def fileno(this) -> int:
                return real.fileno()

            def close(this) -> None:
                real.close()

        journal._file = Full(os.devnull, "wb")


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.mark.parametrize("room", [0, 100, None], ids=["no room", "room for half a line", "no sync"])
def test_what_there_is_no_room_for_is_written_later(room: int | None, disk: Disk, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run.json", a_run())
    journal.add(batch(1))
    before = journal.path.read_bytes()
    disk.fill(journal)
    disk.room, disk.synced = room, room is not None
    why = "Input/output error" if room is None else "No space left on device"
    for size in (2, 4):
        with pytest.raises(NotSaved, match=rf"^{journal.path} could not be written: {why}$"):
            journal.add(batch(size))
        assert journal.path.read_bytes() == before  # and no half of a line
    assert journal.unsaved == 2
    disk.room, disk.synced = None, True
    journal.add(batch(8))
    assert journal.unsaved == 0
    assert [record.case.batch_size for record in read_journal(journal.path).records] == [1, 2, 4, 8]  # type: ignore[union-attr]
    assert len(read_run(journal.finish(complete=True)).records) == 4


def test_a_run_file_that_there_is_no_room_for_leaves_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path / "run.json", a_run())
    journal.add(batch(1))
    monkeypatch.setattr(json, "dump", no_room)
    with pytest.raises(NotSaved, match=rf"^{tmp_path / 'run.json'} could not be written: No space left on device$"):
        journal.finish(complete=True)
    journal.close()
    assert [path.name for path in tmp_path.iterdir()] == ["run.jsonl"]
    assert ids(read_journal(journal.path)) == ["sdxl/fp16/1024x1024/b1"]


def no_room(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_said_before_the_first_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(UsageError, match=r"^--vram-results: .* cannot be written: No space left on device$"):
        Journal(tmp_path / "run.json", a_run())
    assert not list(tmp_path.iterdir())


# Two sweeps on one folder


def test_a_journal_belongs_to_one_sweep_until_that_ends(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run.json", a_run())
    assert claim(journal.path) is None
    with (tmp_path / "run.part").open("wb") as part:
        fcntl.flock(part, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match=r"another sweep writes run\.part"):
            Journal(tmp_path / "run.json", a_run())
    journal.close()
    held = claim(journal.path)
    assert held is not None
    assert claim(journal.path) is None
    held.close()


def test_no_two_sweeps_of_one_second_share_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Still(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Still":
            return cls(2026, 1, 1, tzinfo=tz)

    drawn = iter(["aaaa", "aaaa", "bbbb", "bbbb", "aaaa", "cccc"])
    monkeypatch.setattr(files, "datetime", Still)
    monkeypatch.setattr(secrets, "token_hex", lambda size: next(drawn))
    runs = [a_run([batch(size)]) for size in (1, 2, 4)]
    paths = []
    for number, run in enumerate(runs):
        journal = Journal(new_path(tmp_path, {}), run)
        paths.append(journal.finish(complete=True) if number else journal.path)
        journal.close()
    assert [path.name for path in paths] == [
        "20260101T000000Z_nogit_aaaa.jsonl",
        "20260101T000000Z_nogit_bbbb.json",
        "20260101T000000Z_nogit_cccc.json",
    ]
    assert [ids(read_journal(paths[0])), *(ids(read_run(path)) for path in paths[1:])] == [ids(run) for run in runs]


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
