"""A comparison as people read it: a table in the terminal, Markdown for a pull request. Names come from strangers."""

import re
from collections import Counter
from collections.abc import Iterator
from io import StringIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pytest_vram.compare.comparison import ORDER, CaseComparison, Change, Comparison, Difference, Side, Word
from pytest_vram.errors import printable
from pytest_vram.report.text import code, gib, markdown, seconds, signed

WIDTH = 100
MOST_ROWS = 20  # of the verdicts that stop nothing
FAILING_ROWS = 200
_MENTION = re.compile(
    r"([@#]|\bGH(?=-\d))", re.IGNORECASE
)  # GitHub tells people and issues of them; no backslash helps
MARKER = "<!-- pytest-vram comparison -->"  # by which a comment is found again

_METRICS = {
    "memory.allocated_peak_bytes": "allocated",
    "memory.need_bytes": "need",
    "memory.host_peak_bytes": "host memory",
    "time.median_s": "call",
}
Row = tuple[Word, str, str, str, str, str, str]  # verdict, case, what, base, head, change, why
HEADINGS = ("verdict", "case", "what", "base", "head", "change", "")


def verdict_line(comparison: Comparison) -> str:
    """The counts, worst first."""
    counts = comparison.counts()
    said = ", ".join(f"{counts[word]} {word}" for word in ORDER if counts[word])
    return f"{said}{' (ambiguous counts: strict)' if comparison.strict and counts['ambiguous'] else ''}"


def title(comparison: Comparison) -> list[str]:
    """What was compared with what, and in what else the two differ."""
    lines = [
        f"head: {_side(comparison.head)}",
        f"base: {_side(comparison.base)}",
    ]
    if comparison.across:
        lines.append(f"ACROSS {_differences(comparison.across)}: the difference may not be the commit's")
    if comparison.remarks:
        lines.append(f"also other: {_differences(comparison.remarks)}")
    return [printable(line) for line in (*lines, *(f"note: {note}" for note in comparison.notes))]


def _side(side: Side) -> str:
    commit = f"{side.commit or 'no commit'}{' and changes' if side.dirty else ''}"
    return ", ".join(filter(None, [commit, side.gpu, (side.started or "")[:16].replace("T", " "), side.name]))


def _differences(differences: list[Difference]) -> str:
    return ", ".join(f"{d.key} {d.base} → {d.head}" for d in differences)


def rows(comparison: Comparison, footnotes: list[str]) -> Iterator[Row]:
    """The table's rows, worst first, and of each verdict a last one that says how many are not shown. A reason that
    several rows have goes into `footnotes`, and the rows have its number."""
    found = list(_all_rows(comparison))
    often = Counter(row[-1] for row in found if row[-1])
    for row in found:
        if often[row[-1]] < 2:
            yield row
            continue
        if row[-1] not in footnotes:
            footnotes.append(row[-1])
        yield (*row[:-1], f"({footnotes.index(row[-1]) + 1})")


def _all_rows(comparison: Comparison) -> Iterator[Row]:
    for word in ORDER:
        cases = [case for case in comparison.cases if case.verdict == word != "same"]
        found = [row for case in sorted(cases, key=_grown, reverse=True) for row in _rows(case)]
        most = FAILING_ROWS if word in comparison.fails else MOST_ROWS
        yield from found[:most]
        if len(found) > most:
            yield word, f"{len(found) - most} more rows", "", "", "", "", ""


def _grown(case: CaseComparison) -> float:
    """By how much the metric that decides has grown, as a ratio."""
    ratios = [c.head / c.base for c in case.changes if c.verdict == case.verdict and c.base and c.head]
    return max(ratios, default=0.0)


def _rows(case: CaseComparison) -> Iterator[Row]:
    name = printable(case.id)
    told = [change for change in case.changes if change.verdict not in ("same", "not comparable")]
    if not told or case.reason:
        yield case.verdict, name, "", "", "", "", printable(case.reason)
    for change in sorted(told, key=lambda change: ORDER.index(change.verdict)):
        yield change.verdict, name, metric_name(change.metric), *_figures(change), _why(change)


def metric_name(metric: str) -> str:
    """How a metric is called in tables."""
    if metric in _METRICS:
        return _METRICS[metric]
    parts = metric.split(".")
    if parts[0] == "phases" and len(parts) == 3:
        return printable(f"allocated, {parts[1]}")
    return printable(parts[-1])


def _figures(change: Change) -> tuple[str, str, str]:
    timed = change.metric.startswith("time.")

    def written(value: float | None) -> str:
        if value is None:
            return ""
        return f"{seconds(value)} s" if timed else f"{gib(round(value))} GiB"

    if change.base is None or change.head is None:
        return written(change.base), written(change.head), ""
    share = (change.head / change.base - 1) * 100 if change.base else 0.0
    return written(change.base), written(change.head), f"{signed(share, 1)} %"


def _why(change: Change) -> str:
    parts = [change.reason] if change.reason else []
    if change.workers and change.verdict != "same":
        base, head = (", ".join(seconds(value) for value in side[:10]) for side in change.workers)
        parts.append(f"workers: base {base}; head {head}{'; both measured again' if change.again else ''}")
    return printable("; ".join(parts))


def table(comparison: Comparison) -> str:
    """For a terminal, without colours, at most 100 columns."""
    out = StringIO()
    console = Console(file=out, width=WIDTH, color_system=None, legacy_windows=False, highlight=False)
    for line in title(comparison):
        console.print(Text(line, overflow="fold"))
    console.print()
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    for heading in HEADINGS[:-1]:
        right = heading in ("base", "head", "change")
        if heading == "case":
            shown.add_column(heading, overflow="fold", ratio=1)
        else:
            shown.add_column(heading, justify="right" if right else "left", no_wrap=right or heading == "verdict")
    footnotes: list[str] = []
    found = list(rows(comparison, footnotes))
    before = ""
    for row in found:
        *cells, why = row
        named = "" if cells[1] == before else cells[1]
        before = cells[1]
        if why.startswith("("):
            named = f"{named} {why}".strip()
        elif why:
            named = f"{named}\n  {why}" if named else f"  {why}"
        shown.add_row(cells[0], Text(named), *map(Text, cells[2:]))
    if found:
        console.print(shown)
    for number, note in enumerate(footnotes, 1):
        console.print(Text(f"({number}) {note}", overflow="fold"))
    console.print(Text(verdict_line(comparison)))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _quiet(text: str) -> str:
    """Markdown that mentions nobody: a space of no width stands behind the sign."""
    return _MENTION.sub("\\1\N{ZERO WIDTH SPACE}", markdown(text))


def _name(text: str) -> str:
    """An id in a code span, if it can stand in one."""
    return span if (span := code(text)).startswith("`") else _quiet(text)


def as_markdown(comparison: Comparison) -> str:
    """For a pull request's comment and `$GITHUB_STEP_SUMMARY`. Everything in it is escaped."""
    lines = [MARKER, f"### VRAM: {'worse' if comparison.failed else 'nothing worse'}: {verdict_line(comparison)}", ""]
    lines += [f"- {_quiet(line)}" for line in title(comparison)]
    footnotes: list[str] = []
    found = list(rows(comparison, footnotes))
    for folded in (False, True):
        part = [row for row in found if (row[0] not in comparison.fails) == folded]
        if not part:
            continue
        block = ["", "| verdict | case | what | base | head | change | why |", "|---|---|---|--:|--:|--:|---|"]
        block += [f"| {' | '.join([row[0], _name(row[1]), *map(_quiet, row[2:])])} |" for row in part]
        if folded:
            others = ", ".join(dict.fromkeys(row[0] for row in part))
            block = ["", "<details>", f"<summary>{others}</summary>", *block, "", "</details>"]
        lines += block
    lines += ["", *(f"({number}) {_quiet(note)}  " for number, note in enumerate(footnotes, 1))] if footnotes else []
    return "\n".join(lines) + "\n"
