"""Run files and their journals: names, writing without loss, reading without trust."""

import contextlib
import json
import os
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import ValidationError

from pytest_vram import untrusted
from pytest_vram.errors import NotOurs, NotSaved, RunFileError, UsageError, first_problem
from pytest_vram.records.schema import SCHEMA, Record, Run, above_the_card

MAX_RECORDS = 50_000  # of one file, and of all that are read at once
TIME_FORMAT = "%Y%m%dT%H%M%SZ"
_JOURNAL = re.compile(r"(\.gw[0-9]+)?\.jsonl$")  # of one of several xdist workers, or of the only process
TORN = "its last line was not written to its end"


@dataclass(frozen=True)
class Refused:
    """A record of a run file that was left out: the id that it gives itself, if it does, and what is wrong."""

    id: str | None
    problem: str

    def __str__(self) -> str:
        return self.problem


def slug(text: str) -> str:
    """`text` in lower-case letters, digits and hyphens, for a folder's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:100].strip("-") or "unknown"


def folder_of(device: Any, gpu: Any) -> str:
    """The name of the folder for the runs of a device (of which `gpu` is the GPU's name)."""
    return {"meta": "estimated", "cpu": "cpu"}.get(str(device), slug(str(gpu or "")))


def new_path(folder: Path, environment: dict[str, Any], began: str | None = None, mark: str | None = None) -> Path:
    """Where the next run file of this environment goes: `folder/<UTC time>_<commit>[-dirty]_<4 hex>.json`, a name that
    no other has, whatever the clock says.

    The time and the hex digits are new ones, unless they are given.
    """
    commit = re.sub(r"[^0-9a-f]", "", str(environment.get("commit") or ""))[:12] or "nogit"
    dirty = "-dirty" if environment.get("dirty") else ""
    began = began or datetime.now(UTC).strftime(TIME_FORMAT)
    while True:
        path = folder / f"{began}_{commit}{dirty}_{mark or secrets.token_hex(2)}.json"
        if mark or not any(path.with_suffix(suffix).exists() for suffix in (".json", ".jsonl", ".part")):
            return path


def run_path_of(path: Path) -> Path:
    """The run file to which a journal belongs; or the run file itself."""
    return path.with_name(_JOURNAL.sub(".json", path.name))


def journals_of(run_path: Path) -> list[Path]:
    """The journals of a run that is not finished: one, or one for each xdist worker."""
    return [path for path in sorted(run_path.parent.glob("*.jsonl")) if run_path_of(path) == run_path]


class Journal:
    """The records of a run as they come: one JSON line each, on the disk before the next case starts.

    The first line is the run without its records. A later line for the same id replaces the earlier one. The run file
    replaces the journal when the sweep ends. Of several xdist workers each has its own, `worker` in its name. While it
    is open no other sweep goes on with it (`claim`).
    """

    def __init__(self, path: Path, run: Run, worker: str = "") -> None:
        """`path` is the run file's; raises UsageError where its folder cannot be written, or another sweep writes
        there."""
        self.run_path = path
        self.path = path.with_suffix(f".{worker}.jsonl" if worker else ".jsonl")
        self.run = run
        self.records: dict[str, Record] = {}
        self._waiting: list[bytes] = []  # lines for which there was no room
        self._whole = 0  # bytes of the file up to the end of its last whole line
        part = self.path.with_suffix(".part")
        self._made = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
        cannot = f"--vram-results: {path.parent} cannot be written"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = part.open("ab", buffering=0)
            if not _lock(self._file):
                self._file.close()
                raise UsageError(f"{cannot}: another sweep writes {part.name}")
            self._file.truncate(0)  # a rest of a sweep that ended while it was made
        except OSError as error:
            raise UsageError(f"{cannot}: {error.strerror}") from error
        header = run.model_copy(update={"records": [], "complete": False})
        try:
            self._append(header.model_dump(mode="json", by_alias=True))
            for record in run.records:
                self.add(record)
            part.replace(self.path)  # a journal that is gone on with is never shorter than it was
            _sync(path.parent)
        except (NotSaved, OSError) as error:
            self._file.close()
            part.unlink(missing_ok=True)
            reason = error.strerror if isinstance(error, OSError) else error.reason
            raise UsageError(f"{cannot}: {reason}") from error

    @property
    def unsaved(self) -> int:
        """How many lines wait for room on the disk."""
        return len(self._waiting)

    def add(self, record: Record) -> None:
        """Append one record and wait until it is on the disk.

        Raises:
            NotSaved: when it could not be written; it is kept, and tried again with the next one.
        """
        self.records[record.id] = record
        self._append(record.model_dump(mode="json"))

    def _append(self, line: dict[str, Any]) -> None:
        self._waiting.append((json.dumps(line, allow_nan=False) + "\n").encode())
        self._write()

    def _write(self) -> None:
        text = b"".join(self._waiting)
        try:
            self._file.truncate(self._whole)  # half a line of the last try; the file is opened to append
            left = memoryview(text)
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self._whole)
            raise NotSaved(self.path, error) from error
        self._waiting.clear()
        self._whole += len(text)

    def finish(self, complete: bool) -> Path:
        """Write the run file, then remove the journal, and those it goes on with; the file is whole or not there.

        Raises:
            NotSaved: when it could not be written; the journal stays, with what there is room for.
        """
        run = self.run.model_copy(update={"records": list(self.records.values()), "complete": complete})
        try:
            write_run(self.run_path, run)
        except OSError as error:
            if self._waiting:
                with contextlib.suppress(NotSaved):
                    self._write()
            raise NotSaved(self.run_path, error) from error
        for path in journals_of(self.run_path):
            path.unlink()
        self.close()
        return self.run_path

    def close(self) -> None:
        """Let others go on with what is on the disk."""
        self._file.close()

    def leave(self) -> None:
        """Write no more; whoever joins the journals of all xdist workers reads it, unless it has no record."""
        if self.records:
            if self._waiting:
                with contextlib.suppress(NotSaved):
                    self._write()
            self.close()
        else:
            self.discard()

    def discard(self) -> None:
        """Leave nothing behind: no case was run."""
        self.path.unlink()
        self.close()
        with contextlib.suppress(OSError):  # not empty: somebody else's
            for folder in self._made:
                folder.rmdir()


def claim(path: Path) -> BinaryIO | None:
    """The journal or run file, open and locked so that no other sweep goes on with it; None where one does already.

    The lock goes with the process, however that ends. Where a file system knows no locks nothing is held.
    """
    file = path.open("rb")
    if _lock(file):
        return file
    file.close()
    return None


def _lock(file: BinaryIO | FileIO) -> bool:
    """Whether nobody else has this file locked; it is then, until it is closed."""
    try:
        import fcntl
    except ImportError:  # where no sweep runs, but run files are read
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def is_torn(path: Path) -> bool:
    """Whether the last line of a journal was not written to its end."""
    try:
        with path.open("rb") as file:
            if not file.seek(0, os.SEEK_END):
                return False
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"
    except OSError:
        return False


def _sync(folder: Path) -> None:
    """Have the disk keep the folder's names, too."""
    with contextlib.suppress(OSError):  # some file systems cannot
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def write_run(path: Path, run: Run) -> None:
    """Write `run` as a pytest-benchmark file with the key `vram`; whole, or an OSError and no file.

    Raises:
        RunFileError: when a record holds figures that cannot be true.
    """
    document = {**_benchmark_document(run), "vram": run.model_dump(mode="json", by_alias=True)}
    checked(document, path)
    part = path.with_suffix(".json.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            json.dump(document, file, indent=1, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def read_run(path: Path, refused: list[Refused] | None = None) -> Run:
    """The run of a run file.

    A record that is not what the schema says ends the reading; with a list for `refused` it is left out and said
    there.

    Raises:
        RunFileError: naming the file and the key, for anything that is not what the schema says.
    """
    return checked(read_json(path), path, refused)


def read_journal(path: Path, refused: list[Refused] | None = None) -> Run:
    """The run of a journal, as far as it came; a last line that was cut off is left out. `refused` as in `read_run`.

    Raises:
        RunFileError: naming the file and the line.
    """
    text = read_text(path)
    untrusted.check_count(text, path, RunFileError)
    lines = text.split("\n")
    whole = lines[:-1]  # what follows the last newline was not written to its end
    if not whole:
        raise RunFileError(f"{path}: is empty")
    if lines[-1] and refused is not None:
        refused.append(Refused(None, TORN))
    documents = [_json(line, path) for line in whole]
    for number, document in enumerate(documents, 1):
        if not isinstance(document, dict):
            raise RunFileError(f"{path}: line {number} is no JSON object; it is no journal of pytest-vram")
    records = {str(record.get("id")): record for record in documents[1:]}
    return checked({"vram": {**documents[0], "records": list(records.values())}}, path, refused)


def checked(document: Any, source: Path, refused: list[Refused] | None = None) -> Run:
    """The run in a document read from `source`, or RunFileError. `refused` as in `read_run`."""
    if not isinstance(document, dict) or not isinstance(document.get("vram"), dict):
        raise NotOurs(f"{source}: has no key 'vram'; it is no run file of pytest-vram")
    vram = document["vram"]
    schema = vram.get("schema", SCHEMA)
    if type(schema) is int and schema > SCHEMA:
        wrote = _of(vram, "environment", "pytest-vram")
        version = f", {' '.join(wrote.split())[:40]}" if isinstance(wrote, str) else ""
        newer = schema if schema < 1000 else "it"
        raise RunFileError(
            f"{source}: schema: {newer} is newer than this pytest-vram reads ({SCHEMA}); "
            f"install the version that wrote it{version}"
        )
    documents = vram.get("records", [])
    if isinstance(documents, list) and len(documents) > MAX_RECORDS:
        raise RunFileError(f"{source}: records: are more than {MAX_RECORDS:,}; split the sweep with --vram-shard")
    try:
        run = Run.model_validate({**vram, "records": []} if isinstance(documents, list) else vram)
    except ValidationError as error:
        raise RunFileError(first_problem(error, source)) from error
    for number, one in enumerate(documents):
        try:
            run.records.append(_record(one, f"records.{number}", run.environment.get("gpu_memory_bytes")))
        except RunFileError as error:
            problem = " ".join(str(error).split())
            if refused is None:
                raise RunFileError(f"{source}: {problem}") from error
            name = _of(one, "id")
            refused.append(Refused(name if isinstance(name, str) else None, problem))
    return run


def _record(document: Any, at: str, card_bytes: Any) -> Record:
    """One record, or RunFileError with the key, or with the record's id where its figures cannot be true."""
    try:
        record = Record.model_validate(document)
    except ValidationError as error:
        if error.errors()[0]["loc"]:
            raise RunFileError(first_problem(error, "", at).removeprefix(": ")) from error
        name = _of(document, "id")
        named = name[:500] if isinstance(name, str) else at
        raise RunFileError(first_problem(error, "", named).removeprefix(": ")) from error
    if type(card_bytes) is int and record.method == "measured" and (problem := above_the_card(record, card_bytes)):
        raise RunFileError(f"{record.id}: {problem}")
    return record


def _of(document: Any, *keys: str) -> Any:
    """What stands under these keys of a document whose form is not known, or None."""
    for key in keys:
        document = document.get(key) if isinstance(document, dict) else None
    return document


def read_text(path: Path) -> str:
    """The text of a file that somebody names; raises RunFileError, naming the file."""
    return untrusted.read_text(path, RunFileError)


def read_json(path: Path) -> Any:
    """A JSON document that somebody names; raises RunFileError, naming the file."""
    return _json(read_text(path), path)


def _json(text: str, path: Path) -> Any:
    return untrusted.parse_json(text, path, RunFileError)


def best_records(runs: Iterable[Run]) -> list[Record]:
    """All records, each case once: of two one that did not fail, then one with a need, then the later."""
    found: dict[str, Record] = {}
    for record in (record for run in runs for record in run.records):
        old = found.get(record.id)
        if old is None or _worth(record) >= _worth(old):
            found[record.id] = record
    return list(found.values())


def _worth(record: Record) -> tuple[bool, bool]:
    return record.status not in ("error", "timeout"), record.memory.need_bytes is not None


def _benchmark_document(run: Run) -> dict[str, Any]:
    """The keys of pytest-benchmark's own file, so that `pytest-benchmark compare` reads ours."""
    import pytest_benchmark
    from pytest_benchmark.stats import Stats

    environment = run.environment
    benchmarks = []
    for record in run.records:
        if not record.time.workers:
            continue
        stats = Stats()
        for seconds in (s for worker in record.time.workers for s in worker.rounds_s):
            stats.update(seconds)
        benchmarks.append(
            {
                "group": record.case.model,
                "name": record.id,
                "fullname": record.id,
                "params": None,
                "param": record.id,
                "extra_info": {"status": record.status},
                "options": {"timer": "device_time", "rounds": len(stats.data)},
                "stats": {**stats.as_dict(), "data": stats.data, "iterations": 1},
            }
        )
    return {
        "machine_info": {
            "node": environment.get("host"),
            "gpu": environment.get("gpu"),
            "python_version": environment.get("python"),
            "cpu": {"brand_raw": environment.get("cpu")},
        },
        "commit_info": {"id": environment.get("commit"), "dirty": environment.get("dirty")},
        "benchmarks": benchmarks,
        "datetime": environment.get("started") or datetime.now(UTC).isoformat(),
        "version": pytest_benchmark.__version__,
    }
