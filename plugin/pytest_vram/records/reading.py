"""Many run files at once: found in folders, read without trust, in the order in which they were made."""

import contextlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pytest_vram.errors import NotOurs, RunFileError
from pytest_vram.records.files import MAX_RECORDS, TIME_FORMAT, Refused, read_journal, read_run
from pytest_vram.records.schema import Record, Run
from pytest_vram.untrusted import within

MAX_FILES = 10_000  # read at once
RUN_FILES = ("*.json", "*/*.json")  # of a folder, and of those in it: a folder for each GPU


@dataclass(frozen=True, eq=False)
class ReadRun:
    """A run and the file it was read from; `refused` says which records were left out, and why."""

    path: Path
    run: Run
    refused: tuple[Refused, ...] = ()

    @property
    def records(self) -> list[Record]:
        return self.run.records

    @property
    def name(self) -> str:
        """The file's name; what is no text in it becomes `?`."""
        return os.fsencode(self.path.name).decode("utf-8", "replace").replace("\ufffd", "?")

    @property
    def gpu(self) -> str | None:
        """The GPU's name, or None where the run had none."""
        name = self.run.environment.get("gpu")
        return name if isinstance(name, str) else None

    @property
    def gpu_memory_bytes(self) -> int | None:
        """What PyTorch saw of the GPU's memory."""
        value = self.run.environment.get("gpu_memory_bytes")
        return value if type(value) is int and 0 < value < 1 << 50 else None

    @property
    def started(self) -> datetime | None:
        """When the run began, UTC; from the file's name where the file does not say."""
        with contextlib.suppress(ValueError, OverflowError):
            when = datetime.fromisoformat(str(self.run.environment.get("started")))
            return when.replace(tzinfo=UTC) if when.tzinfo is None else when.astimezone(UTC)
        with contextlib.suppress(ValueError):
            return datetime.strptime(self.path.name.split("_")[0], TIME_FORMAT).replace(tzinfo=UTC)
        return None


def read_runs(paths: Sequence[Path]) -> tuple[list[ReadRun], list[str]]:
    """The runs of files, and of the run files in folders, oldest first; and what a person should know of the reading.

    A record with impossible figures is refused and said, its neighbours are kept. In a folder, JSON that is no run file
    is passed over and said; a file that was named must be one.

    Raises:
        RunFileError: naming the file that cannot be read, or the folder that has none.
    """
    runs: list[ReadRun] = []
    notes: list[str] = []
    found, left_out = _files(paths)
    if len(found) > MAX_FILES:
        raise RunFileError(f"{found[0][0].parent}: {len(found):,} files, above {MAX_FILES:,}; name fewer at once")
    notes += [f"passed over {path}: the link leads out of the folder" for path in left_out]
    records = 0
    for path, named in found:
        refused: list[Refused] = []
        try:
            read = read_journal if path.suffix == ".jsonl" else read_run
            runs.append(ReadRun(path, read(path, refused), tuple(refused)))
            records += len(runs[-1].records)
            if records > MAX_RECORDS:
                named = True  # it is not this file's fault
                raise RunFileError(f"{path}: with it there are more than {MAX_RECORDS:,} records; name fewer at once")
        except NotOurs as error:
            if named:
                raise
            notes.append(f"passed over {error}")
        except RunFileError as error:
            if named:
                raise
            raise RunFileError(f"{error}; move it away, and the other runs of the folder are read") from error
        notes += [f"{path}: {problem}; this record is left out" for problem in refused]
    if not runs:
        where = ", ".join(str(path) for path in paths)
        raise RunFileError(f"{where}: no run file here; pytest bench --gpu writes one, pytest bench an estimate")
    return sorted(runs, key=age), notes


def age(run: ReadRun) -> tuple[datetime, str]:
    """What sorts runs, oldest first."""
    return run.started or datetime.min.replace(tzinfo=UTC), run.path.name


def _files(paths: Iterable[Path]) -> tuple[list[tuple[Path, bool]], list[Path]]:
    """Each file once, and whether it was named; of a folder its own `*.json` and those of the folders in it. Apart from
    them the links that lead out of their folder."""
    found: dict[Path, tuple[Path, bool]] = {}
    left_out: list[Path] = []
    for path in paths:
        try:
            if path.is_dir():
                files, outside = within(path, *RUN_FILES)
                left_out += outside
                for file in files:
                    found.setdefault(file.resolve(), (file, False))
            else:
                first, _ = found.get(path.resolve(), (path, True))
                found[path.resolve()] = first, True
        except (OSError, RuntimeError, ValueError) as error:  # links that lead to each other; a name with a null byte
            raise RunFileError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    return list(found.values()), left_out
