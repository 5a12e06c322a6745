"""Files that strangers may have written: how much of one is read, and how large the value it holds may be.

A run file of ten thousand cases is 31 MiB of JSON with a million values; the packaged cards are 63 KiB of TOML. Within
these limits the worst that was found takes 0.9 GB to read: so values are counted before they are made.
"""

import contextlib
import json
import re
import tomllib
from pathlib import Path
from typing import Any

from pytest_vram.errors import VramError

MAX_FILE_BYTES = 64 << 20
MAX_TOML_BYTES = 1 << 20  # and of a network's configuration in JSON
MAX_VALUES = 4_000_000  # of a JSON file
MAX_CONTAINERS = 1_000_000  # lists and tables among them
MAX_DEPTH = 32  # of tables and lists within each other: those of a run file are 6
MAX_TEXT = 100_000  # letters of one string: an `output_tail` may have 20,000

# A dotted key of so many parts; tomllib's time grows with their number, times that of the lines below it.
_LONG_KEY = re.compile(r"""(?:[ \t]*\.[ \t]*(?:[A-Za-z0-9_-]+|"[^"\n]{0,200}"|'[^'\n]{0,200}')){32}""")


def read_text(path: Path, error: type[VramError], most_bytes: int = MAX_FILE_BYTES) -> str:
    """The text of a file that somebody names, which may be anything.

    Raises:
        VramError: of the kind `error`, naming the file, where it is no file of text, or a huge one.
    """
    try:
        if path.exists() and not path.is_file():
            raise error(f"{path}: is no file")
        with path.open("rb") as file:
            content = file.read(most_bytes + 1)  # whatever size the file says it has
        if len(content) > most_bytes:
            raise error(f"{path}: is larger than {most_bytes >> 20} MiB; no file of pytest-vram is")
        return content.decode("utf-8").replace("\r\n", "\n")
    except OSError as problem:
        raise error(f"{path}: {problem.strerror}") from problem
    except ValueError as problem:  # no UTF-8, or a name that no file can have
        raise error(f"{path}: is not UTF-8 text") from problem


def is_there(path: Path) -> bool:
    """Whether there is a file or folder of this name, which may be one that none can have."""
    with contextlib.suppress(OSError, ValueError):
        return path.exists()
    return False


def within(folder: Path, *patterns: str) -> tuple[list[Path], list[Path]]:
    """The files of a folder that match, sorted; apart from them the links that lead out of it.

    Raises OSError, or RuntimeError for links that lead to each other.
    """
    root = folder.resolve()
    files = sorted(file for pattern in patterns for file in folder.glob(pattern) if file.is_file())
    inside = {file: file.resolve().is_relative_to(root) for file in files}
    return [file for file in files if inside[file]], [file for file in files if not inside[file]]


def parse_json(text: str, path: Path, error: type[VramError]) -> Any:
    """The value of a JSON text read from `path`; raises `error`, naming the file."""
    check_count(text, path, error)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise error(f"{path}: is not JSON: {problem}") from problem
    _check(value, path, error)
    return value


def check_count(text: str, path: Path, error: type[VramError]) -> None:
    """Refuse a JSON text of too many values; those of strings that look like one count too."""
    if text.count(",") > MAX_VALUES or text.count("[") + text.count("{") > MAX_CONTAINERS:
        raise error(f"{path}: holds more values than a file of pytest-vram has, {MAX_VALUES:,}")


def parse_toml(text: str, path: Path, error: type[VramError]) -> dict[str, Any]:
    """The table of a TOML text read from `path`; raises `error`, naming the file."""
    if _LONG_KEY.search(text):
        raise error(f"{path}: has a key of more than {MAX_DEPTH} parts")
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as problem:  # no TOML, or a number of 5000 digits
        raise error(f"{path}: {problem}") from problem
    _check(table, path, error)
    return table


def _check(value: Any, path: Path, error: type[VramError]) -> None:
    """Refuse what is nested too deep for those who walk through it, and huge strings, also as keys."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        if not level:
            return
        texts = (text for one in level for text in (one if isinstance(one, dict) else (one,)) if isinstance(text, str))
        if max(map(len, texts), default=0) > MAX_TEXT:
            raise error(f"{path}: holds a text of more than {MAX_TEXT:,} letters; no file of pytest-vram does")
        level = [
            inner
            for one in level
            if isinstance(one, (dict, list))
            for inner in (one.values() if isinstance(one, dict) else one)
            if isinstance(inner, (dict, list, str))
        ]
    raise error(f"{path}: tables and lists are more than {MAX_DEPTH} deep; no file of pytest-vram is")
