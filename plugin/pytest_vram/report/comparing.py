"""A comparison as people read it: a table in the terminal, Markdown for a pull request. Names come from strangers."""

from collections import Counter
from collections.abc import Iterator
from io import StringIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pytest_vram.compare.comparison import FAILS, ORDER, CaseComparison, Change, Comparison, Difference, Side, Word
from pytest_vram.report.text import code, gib, markdown, printable, seconds, signed

WIDTH = 100
MOST_ROWS = 20  # of the verdicts that stop nothing
FAILING_ROWS = 200
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
    return [printable(line) for line in (*lines, *comparison.notes)]


def _side(side: Side) -> str:
    commit = f"{side.commit or 'no commit'}{' and changes' if side.dirty else ''}"
    return ", ".join(filter(None, [commit, side.gpu, (side.started or "")[:16].replace("T", " "), side.name]))


def _differences(differences: list[Difference]) -> str:
    return ", ".join(f"{d.key} {d.base} → {d.head}" for d in differences)


def rows(comparison: Comparison, footnotes: list[str]) -> Iterator[Row | str]:
    """The table's rows, worst first; a line of text where some are not shown. A reason that several rows have goes into
    `footnotes`, and the rows have its number."""
    found = list(_all_rows(comparison))
    often = Counter(row[-1] for row in found if not isinstance(row, str) and row[-1])
    for row in found:
        if isinstance(row, str) or often[row[-1]] < 2:
            yield row
            continue
        if row[-1] not in footnotes:
            footnotes.append(row[-1])
        yield (*row[:-1], f"({footnotes.index(row[-1]) + 1})")


def _all_rows(comparison: Comparison) -> Iterator[Row | str]:
    cases = comparison.sorted()
    for word in ORDER:
        if word == "same":
            continue
        found = [row for case in cases if case.verdict == word for row in _rows(case)]
        most = FAILING_ROWS if word in FAILS else MOST_ROWS
        yield from found[:most]
        if len(found) > most:
            yield f"{len(found) - most} more {word}"


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
        if isinstance(row, str):
            shown.add_row("", Text(row))
            continue
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


def as_markdown(comparison: Comparison) -> str:
    """For a pull request's comment and `$GITHUB_STEP_SUMMARY`. Everything in it is escaped."""
    lines = [MARKER, f"### VRAM: {'worse' if comparison.failed else 'nothing worse'}: {verdict_line(comparison)}", ""]
    lines += [f"- {markdown(line)}" for line in title(comparison)]
    footnotes: list[str] = []
    found = list(rows(comparison, footnotes))
    for folded in (False, True):
        part = [row for row in found if (isinstance(row, str) or row[0] not in FAILS) == folded]
        if not part:
            continue
        block = ["", "| verdict | case | what | base | head | change | why |", "|---|---|---|--:|--:|--:|---|"]
        for row in part:
            cells = ["", markdown(row)] if isinstance(row, str) else [row[0], code(row[1]), *map(markdown, row[2:])]
            block.append(f"| {' | '.join([*cells, *[''] * (7 - len(cells))])} |")
        if folded:
            others = ", ".join(word for word in ORDER if word not in FAILS and comparison.counts()[word])
            block = ["", "<details>", f"<summary>{others}</summary>", *block, "", "</details>"]
        lines += block
    lines += ["", *(f"({number}) {markdown(note)}  " for number, note in enumerate(footnotes, 1))] if footnotes else []
    return "\n".join(lines) + "\n"
