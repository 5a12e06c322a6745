"""The errors of this package, in one hierarchy; every message is one line for the person who can mend it.

VramError
├── UsageError        bad input: an option, a matrix, a model file, a function, a machine that cannot do it
├── Inapplicable      an optimization that a pipeline or a machine cannot take: the case is skipped
├── NotComparable     two runs whose difference says nothing of the commits
├── RunFileError      a run file or journal that is not what the schema says
│   └── NotOurs       JSON that is no run file at all
├── NotSaved          what was found could not be written: the disk is full, or gone
└── StartError        the fork server or a worker could not be started
"""

import unicodedata
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


MAX_MESSAGE = 2000  # letters of a message, which may hold names that strangers chose
_CONTROLS = ("Cc", "Cf", "Zl", "Zp")


def printable(text: str) -> str:
    """One line that no terminal or page takes for more than text: controls, also of direction, become spaces."""
    return " ".join(_plain(text).split())


def _plain(text: str) -> str:
    if text.isprintable():
        return text
    kept = ("?" if (kind := unicodedata.category(c)) == "Cs" else " " if kind in _CONTROLS else c for c in text)
    return "".join(kept)


class VramError(Exception):
    """Anything that this package reports to a person: one line, whatever stood in the file that it is about."""

    def __init__(self, message: str) -> None:
        if len(message) > MAX_MESSAGE:  # by a long name, which stands between what is wrong and what would be right
            half = MAX_MESSAGE // 2
            message = f"{message[: half - 1]}…{message[-half:]}"
        super().__init__(_plain(message).strip())  # a path may hold two spaces


class UsageError(VramError):
    """Bad input; before the first case pytest ends with exit code 4 and writes nothing, later the test fails."""


class Inapplicable(VramError):
    """What this pipeline, or the software of this machine, cannot take; the case is skipped with that reason."""


class RunFileError(VramError):
    """A run file or journal that cannot be read, or a record that must not be written."""


class NotOurs(RunFileError):
    """A JSON file that is no run file of pytest-vram."""


class NotComparable(VramError):
    """Two runs that cannot be compared; the message names the keys that differ."""


class NotSaved(VramError):
    """A file could not be written; what was to be in it is kept in memory. `reason` is the system's."""

    def __init__(self, path: Path, error: OSError) -> None:
        self.reason = error.strerror or str(error)
        super().__init__(f"{path} could not be written: {self.reason}")


class StartError(VramError):
    """The fork server or a worker could not be started."""


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that is not known, with the nearest one that is."""
    known, name = sorted(known), name if len(name) <= 200 else f"{name[:199]}…"
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}{hint} (known: {', '.join(known)})"


def first_problem(error: "ValidationError", source: str | Path, within: str = "") -> str:
    """The first problem pydantic found, as `file: key: what is right`; the key is one of the table `within`."""
    problems = error.errors(include_url=False)
    first = problems[0]
    parts = [part for part in first["loc"] if not str(part).startswith("kind:")]  # the tag of a union is no key
    key = ".".join(str(part) for part in ([within] if within else []) + parts) or "(top level)"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    message = " ".join(first["msg"].removeprefix("Value error, ").split())
    if first["type"] == "extra_forbidden":
        message = "is not a key of this table"
    key = printable(key)[:200]
    if len(message) > 500:
        message = f"{message[:499]}…"
    return f"{source}: {key}: {message[:1].lower()}{message[1:]}{more}"
