"""Cases measured again in fresh workers, each side from its own checkout: `pytest` of both in turn."""

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pytest_vram.errors import RunFileError, UsageError, VramError
from pytest_vram.measure.environment import git_state, without_paths
from pytest_vram.measure.worker import die_with_parent
from pytest_vram.records.files import read_run
from pytest_vram.records.schema import Run

START_TIMEOUT_S = 600.0  # of pytest and its imports, beside that of the cases
# Options of the whole session, and of this one, that the measuring of single cases must not inherit.
_NOT_INHERITED = ("PYTEST_ADDOPTS", "PYTEST_CURRENT_TEST", "GITHUB_STEP_SUMMARY")


class NotMeasured(VramError):
    """A checkout could not be measured again; the message says why. `unknown` are node ids that it does not have."""

    def __init__(self, message: str, unknown: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.unknown = unknown


@dataclass(frozen=True)
class Checkout:
    """A working copy: pytest's rootdir in it, the interpreter, and PYTHONPATH. `shared` says that the interpreter is
    the head's too, so that what is installed in it is the same for both."""

    root: Path
    python: str
    python_path: str
    shared: bool = True

    def measure(self, node_ids: Sequence[str], options: Sequence[str], results: Path, timeout_s: float) -> Run:
        """Run these tests with these options: their run.

        Raises:
            NotMeasured: when no run came of it.
        """
        before = set(results.glob("*/*.json"))
        command = [self.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={self.root}"]
        command += [f"--vram-results={results}", *options, *node_ids]
        environ = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
        environ |= {"PYTHONPATH": self.python_path}
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
            try:
                process = subprocess.Popen(
                    command,
                    cwd=self.root,
                    env=environ,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=die_with_parent,
                )
            except OSError as error:
                raise NotMeasured(f"{self.python} could not be started: {error.strerror}") from error
            try:
                process.wait(START_TIMEOUT_S + timeout_s)
            except subprocess.TimeoutExpired as error:
                raise NotMeasured(f"pytest in {self.root.name} did not end in time") from error
            finally:
                if process.poll() is None:
                    with suppress(OSError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            output.seek(0)
            said = output.read()
        made = sorted(set(results.glob("*/*.json")) - before)
        if not made:
            missing = tuple(line for line in said.splitlines() if "not found: " in line)
            unknown = [node for node in node_ids if any(_names(line, node) for line in missing)]
            raise NotMeasured(f"pytest ended with {process.returncode}: {_last_line(said)}", unknown)
        try:
            return read_run(made[-1])
        except RunFileError as error:
            raise NotMeasured(str(error)) from error


def _names(line: str, node_id: str) -> bool:
    """Whether pytest says of this test that it is not there; it leaves parameters out."""
    test = node_id.split("[")[0]
    return re.search(rf"[/ ]{re.escape(test)}(\[.*)?$", line) is not None


def _last_line(output: str) -> str:
    """What says most of why pytest failed: argparse's complaint, an exception, or its own last word."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for pattern in (r".*error: ", r"E  ", r"ERROR .* - ", r"ERROR"):
        if found := [line for line in lines if re.match(pattern, line)]:
            return without_paths(found[-1])[:500]
    return without_paths((lines or ["it said nothing"])[-1])[:500]


def this_checkout(root: Path) -> Checkout:
    """The working copy that is measured now."""
    top = top_of(root)
    return Checkout(root, sys.executable, _python_path(top, top, _relative_paths(top)))


def other_checkout(folder: Path, root: Path, commit: str | None) -> Checkout:
    """The base's working copy in `folder`, for the rootdir `root` of the head's; `commit` is the base run's.

    Its interpreter is `.venv/bin/python` in it, where that exists; else this one, with whatever it imports from the
    head's checkout taken from the base's.

    Raises:
        UsageError: when it is no such working copy, or of another commit.
    """
    option = "--vram-base-checkout"
    if not folder.is_dir():
        raise UsageError(f"{option}: {folder} is no folder; give a checkout of the base's commit")
    folder, top = folder.resolve(), top_of(root)
    if folder == top or folder == root.resolve():
        raise UsageError(f"{option}: {folder} is the checkout that is measured; give one of the base's commit")
    base = folder / root.resolve().relative_to(top)
    base = base if base.is_dir() else folder
    found, dirty = git_state(base)
    if commit and found and not (found.startswith(commit) or commit.startswith(found)):
        raise UsageError(f"{option}: {folder} is at {found}, the base's run was made at {commit}; check that out")
    if commit is None and found:
        raise UsageError(f"{option}: the base's run does not name the commit that it was made from; make it anew")
    if dirty:
        raise UsageError(f"{option}: {folder} has changes that are not committed; check {commit or 'it'} out anew")
    own = folder / ".venv" / "bin" / "python"
    if own.exists():
        return Checkout(base, str(own), _python_path(top, folder, []), shared=False)
    return Checkout(base, sys.executable, _python_path(top, folder, _relative_paths(top)))


def top_of(root: Path) -> Path:
    """The top folder of the working copy that `root` is in, or `root` where there is no git."""
    command = ["git", "-C", str(root), "rev-parse", "--show-toplevel"]
    with suppress(OSError, subprocess.SubprocessError):
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
        return Path(found).resolve()
    return root.resolve()


def _relative_paths(top: Path) -> list[Path]:
    """Where Python imports from in this working copy, as seen from its top; not its virtual environment."""
    prefixes = [
        prefix for name in (sys.prefix, sys.base_prefix) if (prefix := Path(name).resolve()).is_relative_to(top)
    ]
    found = [Path(entry or ".").resolve() for entry in sys.path]
    inside = [p for p in found if p.is_relative_to(top) and not any(p.is_relative_to(prefix) for prefix in prefixes)]
    return [path.relative_to(top) for path in dict.fromkeys(inside)]


def _python_path(top: Path, folder: Path, first: Sequence[Path]) -> str:
    """PYTHONPATH for `folder`: the paths `first` in it, then what the variable has now, moved there from `top`."""
    given = [Path(entry).resolve() for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    moved = [folder / entry.relative_to(top) if entry.is_relative_to(top) else entry for entry in given]
    return os.pathsep.join(dict.fromkeys(str(path) for path in (*(folder / path for path in first), *moved)))
