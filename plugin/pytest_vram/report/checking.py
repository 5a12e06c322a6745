"""Does a document still say what the runs say: the cells where it does not."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from pytest_vram.errors import UsageError
from pytest_vram.report.document import Table

HEADER = re.compile(r"^<!-- pytest-vram report (\{.*\}) -->$", re.MULTILINE)


@dataclass(frozen=True)
class MadeFrom:
    """What a document was made from: paths of runs and of card files, as seen from the document's folder."""

    runs: list[str]
    cards: list[str]
    headless: bool = False

    def header(self) -> str:
        """The comment's text that says so in the document."""
        return "pytest-vram report " + json.dumps(asdict(self))


def made_from(text: str, path: Path) -> MadeFrom:
    """What the document says that it was made from.

    Raises:
        UsageError: naming the file, where it does not say.
    """
    found = HEADER.search(text)
    try:
        return TypeAdapter(MadeFrom).validate_json(found[1] if found else "")
    except ValidationError as error:
        line = "has no line that says what it was made from; make it with `pytest-vram report`"
        raise UsageError(f"{path}: {line}") from error


@dataclass
class _Parts:
    """A Markdown text: its tables by heading, each as its columns and rows, and its other lines."""

    tables: dict[str, list[list[list[str]]]] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)


def differences(document: str, fresh: str, tables: Mapping[str, Table]) -> Iterator[str]:
    """Where the document disagrees with `fresh`, the same document made anew; what else it says is its own affair.

    `tables` are those of the fresh document under their headings: they tell which columns name a row.
    """
    old, new = _parts(document), _parts(fresh)
    for heading, table in sorted(tables.items(), key=lambda item: item[1].title != "Runs"):
        if heading in new.tables:
            for number, rows in enumerate(new.tables[heading]):  # two models may be written alike
                candidates = old.tables.get(heading, [])  # a team may have put tables of its own below ours
                same = [found for found in candidates if found[0] == rows[0]] or candidates
                yield from _in_table(
                    heading.lstrip("# "), table.keys, same[number] if number < len(same) else None, rows
                )
    said = set(old.lines)
    for line in new.lines:
        if line not in said and not HEADER.match(line):
            yield f"the document lacks: {line[:160]}"


def _in_table(title: str, keys: int, old: list[list[str]] | None, new: list[list[str]]) -> Iterator[str]:
    if old is None:
        yield f"{title}: the table is missing"
        return
    columns = new[0]
    if old[0] != columns:
        names = [name for name in columns if name not in old[0]] or columns
        yield f"{title}: the columns are others; the runs have {', '.join(names)}"
        return
    before, now = (_by_key(rows[1:], keys) for rows in (old, new))
    for key, row in now.items():
        named = ", ".join(filter(None, row[:keys]))
        if key not in before:
            yield f"{title}: {named}: the row is missing"
            continue
        for column, said, found in zip_longest(columns, before[key], row, fillvalue=""):
            if said != found:
                they = f"the document says {said or 'nothing'}, the runs {found or 'nothing'}"
                yield f"{title}: {named}: {column}: {they}"
    for key, row in before.items():
        if key not in now:
            yield f"{title}: {', '.join(filter(None, row[:keys]))}: the runs have no such row"


def _by_key(rows: list[list[str]], keys: int) -> dict[tuple[str, ...], list[str]]:
    """The rows by the cells that name them, and by their place among rows of the same name."""
    found: dict[tuple[str, ...], list[str]] = {}
    places: Counter[tuple[str, ...]] = Counter()
    for row in rows:
        key = tuple(row[:keys])
        found[*key, str(places[key])] = row
        places[key] += 1
    return found


def _parts(text: str) -> _Parts:
    parts = _Parts()
    heading, before = "", ""
    for line in map(str.strip, text.split("\n")):
        if re.match(r"#{1,6} ", line):
            heading = line
        if line.startswith("|"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            if not all(re.fullmatch(r":?-+:?", cell) for cell in cells):
                tables = parts.tables.setdefault(heading, [])
                if not before.startswith("|") or not tables:  # else the delimiter row came first
                    tables.append([])
                tables[-1].append(cells)
        elif line:
            parts.lines.append(line)
        before = line
    return parts
