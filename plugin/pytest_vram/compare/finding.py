"""The run that a person means: a file, or the newest finished one of a folder, of a commit, or of all (`latest`)."""

import contextlib
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_vram.errors import RunFileError
from pytest_vram.records.files import Refused, read_journal, read_run
from pytest_vram.records.reading import MAX_FILES, RUN_FILES, ReadRun, age
from pytest_vram.untrusted import within

LATEST = "latest"
_COMMIT = re.compile(r"[0-9a-f]{4,40}")


@dataclass(frozen=True)
class Like:
    """What the run must have in common with the one that it is compared with, and the file that it must not be."""

    gpu: str | None
    device: Any
    sweep: str
    path: Path | None = None
    across: Sequence[str] = ()
    commit: str | None = None
    narrowed: bool = False
    shard: Any = None

    @classmethod
    def run(cls, run: ReadRun, across: Sequence[str] = ()) -> "Like":
        """The same GPU (unless that is to be compared across), device and sweep as a run, but another file."""
        commit = None if run.run.environment.get("dirty") else run.run.environment.get("commit")
        options = run.run.options
        narrowed, shard = bool(options.get("deselected")), options.get("shard")
        return cls(run.gpu, options.get("device"), run.run.sweep, run.path, across, commit, narrowed, shard)

    def admits(self, run: ReadRun) -> bool:
        """Whether a run may be meant: of shards only the same one."""
        if self.path is not None and run.path.resolve() == self.path.resolve():
            return False
        gpu = "gpu" in self.across or run.gpu == self.gpu
        device = "device" in self.across or run.run.options.get("device") == self.device
        shard = run.run.options.get("shard") in (None, self.shard)
        return gpu and device and shard and run.run.sweep == self.sweep

    def rank(self, run: ReadRun) -> bool:
        """Whether `latest` rather means this run: of another commit, so that a second try is not compared with the
        first; of all cases; and with no changes that nobody knows."""
        environment, options = run.run.environment, run.run.options
        other = self.commit is None or environment.get("commit") != self.commit
        return other and not environment.get("dirty") and (self.narrowed or not options.get("deselected"))

    def __str__(self) -> str:
        on = f"of {self.gpu}" if self.gpu else "of estimates" if self.device == "meta" else f"of the {self.device}"
        return f"{on} and the sweep {self.sweep!r}"


def find_run(name: str, results: Path, root: Path, like: Like | None = None) -> ReadRun:
    """The run called `name`, which is a path, a commit (of the repository at `root`), or `latest`.

    Raises:
        RunFileError: naming the file that cannot be read, or saying where there is no such run.
    """
    path, said = Path(name), " ".join(name.split())
    if is_file(name):
        return read_one(path)
    if _is_folder(name):
        found, where = _candidates(path, like), f"{path}: has"
    elif name == LATEST:
        found, where = _candidates(results, like), f"{LATEST}: {results} has"
    elif commit := _commit(name, root):
        found = [run for run in _candidates(results, like) if _is_of(run, commit)]
        where = f"{said}: {results} has, of the commit {commit[:12]},"
    else:
        raise RunFileError(f"{said or 'a name of no letters'}: is no file, no folder, no commit, and not {LATEST!r}")
    if not found:
        kind = f" {like}" if like else ""
        raise RunFileError(f"{where} no finished run{kind}; make one, or name another base")
    if name == LATEST and like is not None:
        found = [run for run in found if like.rank(run)] or found
    if like is None:
        found = [run for run in found if not run.run.options.get("shard")] or found
    return max(found, key=age)


def is_file(name: str) -> bool:
    """Whether there is a file of this name, which may be one that no file can have."""
    with contextlib.suppress(OSError, ValueError):
        return Path(name).is_file()
    return False


def _is_folder(name: str) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return bool(name) and Path(name).is_dir()
    return False


def read_one(path: Path) -> ReadRun:
    """One run file or journal; records with impossible figures are left out and kept in `refused`."""
    refused: list[Refused] = []
    read = read_journal if path.suffix == ".jsonl" else read_run
    return ReadRun(path, read(path, refused), tuple(refused))


def _candidates(folder: Path, like: Like | None) -> list[ReadRun]:
    """Finished runs of a folder and the folders in it. A broken file is passed over: it is not the finished run that
    was asked for."""
    found = []
    for file in within(folder, *RUN_FILES)[0][-MAX_FILES:]:
        with contextlib.suppress(RunFileError):
            run = read_one(file)
            if run.run.complete and (like is None or like.admits(run)):
                found.append(run)
    return found


def _commit(name: str, root: Path) -> str | None:
    """The full id of a commit, or what may be one where there is no git to ask."""
    command = ["git", "-C", str(root), "rev-parse", "--quiet", "--verify", "--end-of-options", f"{name}^{{commit}}"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        if found.returncode == 0:
            return found.stdout.strip()
    except (OSError, subprocess.SubprocessError, ValueError):
        pass
    return name.lower() if _COMMIT.fullmatch(name.lower()) else None


def _is_of(run: ReadRun, commit: str) -> bool:
    """Whether a run was made from exactly this commit."""
    said = run.run.environment.get("commit")
    if not isinstance(said, str) or len(said) < 4 or run.run.environment.get("dirty"):
        return False
    return commit.startswith(said.lower()) or said.lower().startswith(commit)
