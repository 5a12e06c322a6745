"""Run files and their journals: names, writing without loss, reading without trust."""

import contextlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pytest_vram import untrusted
from pytest_vram.errors import NotOurs, RunFileError, UsageError, first_problem
from pytest_vram.records.schema import SCHEMA, Record, Run, above_the_card

MAX_RECORDS = 50_000  # of one file, and of all that are read at once
TIME_FORMAT = "%Y%m%dT%H%M%SZ"


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


def new_path(folder: Path, environment: dict[str, Any]) -> Path:
    """Where the next run file of this environment goes: `folder/<UTC time>_<commit>[-dirty]_<4 hex>.json`."""
    commit = re.sub(r"[^0-9a-f]", "", str(environment.get("commit") or ""))[:12] or "nogit"
    dirty = "-dirty" if environment.get("dirty") else ""
    now = datetime.now(UTC).strftime(TIME_FORMAT)
    return folder / f"{now}_{commit}{dirty}_{secrets.token_hex(2)}.json"


class Journal:
    """The records of a run as they come: one JSON line each, on the disk before the next case starts.

    The first line is the run without its records. A later line for the same id replaces the earlier one. The run file
    replaces the journal when the sweep ends.
    """

    def __init__(self, path: Path, run: Run) -> None:
        """`path` is the run file's; raises UsageError where its folder cannot be written."""
        self.run_path = path
        self.path = path.with_suffix(".jsonl")
        self.run = run
        self.records: dict[str, Record] = {}
        part = path.with_suffix(".part")
        self._made = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = part.open("w", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--vram-results: {path.parent} cannot be written: {error.strerror}") from error
        header = run.model_copy(update={"records": [], "complete": False})
        self._append(header.model_dump(mode="json", by_alias=True))
        for record in run.records:
            self.add(record)
        part.replace(self.path)  # a journal that is gone on with is never shorter than it was

    def add(self, record: Record) -> None:
        """Append one record and wait until it is on the disk."""
        self.records[record.id] = record
        self._append(record.model_dump(mode="json"))

    def _append(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self, complete: bool) -> Path:
        """Write the run file, then remove the journal; the file is whole or not there."""
        run = self.run.model_copy(update={"records": list(self.records.values()), "complete": complete})
        write_run(self.run_path, run)
        self._file.close()
        self.path.unlink()
        return self.run_path

    def discard(self) -> None:
        """Leave nothing behind: no case was run."""
        self._file.close()
        self.path.unlink()
        with contextlib.suppress(OSError):  # not empty: somebody else's
            for folder in self._made:
                folder.rmdir()


def write_run(path: Path, run: Run) -> None:
    """Write `run` as a pytest-benchmark file with the key `vram`.

    Raises:
        RunFileError: when a record holds figures that cannot be true.
    """
    document = {**_benchmark_document(run), "vram": run.model_dump(mode="json", by_alias=True)}
    checked(document, path)
    part = path.with_suffix(".json.part")
    with part.open("w", encoding="utf-8") as file:
        json.dump(document, file, indent=1, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


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


def unfinished(folder: Path) -> Iterator[tuple[Path, Run]]:
    """Journals and run files of a folder that lack cases or hold failed ones, with their runs, the newest first."""
    journals = set(folder.glob("*.jsonl"))
    files = {path for path in folder.glob("*.json") if path.with_suffix(".jsonl") not in journals}
    for path in sorted(journals | files, key=lambda path: path.name, reverse=True):
        try:
            run = read_journal(path) if path.suffix == ".jsonl" else read_run(path)
        except RunFileError:
            continue  # not ours to judge here: whoever names the file gets the message
        if not run.complete or any(record.status in ("error", "timeout") for record in run.records):
            yield path, run


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
