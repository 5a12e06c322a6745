"""How good the simulation of today is: python bench/estimates.py [results] [-k WORD] [--output FILE]

Simulates every case of the run files whose need was searched, and holds the result against it, beside the estimate that
its own run had made. An older estimate stays in its run file; this says what a change of the simulation is worth.
"""

import argparse
import contextlib
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from pytest_vram.cases.case import Case
from pytest_vram.cases.models import read_models
from pytest_vram.errors import VramError
from pytest_vram.measure.channel import Message
from pytest_vram.measure.estimates import Estimates
from pytest_vram.measure.machine import start_machine
from pytest_vram.records.reading import read_runs
from pytest_vram.records.schema import Record

GIB = 1 << 30
WITHIN = 0.05
TIMEOUT_S = 600.0
PHASES = ("load", "encode", "denoise", "decode")


def searched(folder: Path, word: str) -> list[Record]:
    """The newest record of each case with a need that was searched, and with no limit."""
    found: dict[Case, Record] = {}
    for run in read_runs([folder])[0]:
        for record in run.records:
            case = record.case
            if record.method == "measured" and record.memory.need_bytes and isinstance(case, Case):
                found[case] = record
    return [record for case, record in found.items() if case.limit_bytes is None and word in case.id]


def summary(errors: Sequence[float]) -> list[str]:
    """What is read of a distribution of relative errors."""
    within = sum(abs(error) <= WITHIN for error in errors)
    return [
        f"{median(map(abs, errors)):.2%}",
        f"{within} of {len(errors)}",
        f"{min(errors):+.1%} to {max(errors):+.1%}",
    ]


class Row(NamedTuple):
    """A case: its need, today's estimate of it, how far off that and its run's own estimate are; and by phase how many
    bytes the simulated peak of allocated memory is above the measured one."""

    case: str
    need_bytes: int
    estimated_bytes: int
    error: float
    error_in_its_run: float | None
    phases_off_bytes: dict[str, int]


def row(record: Record, estimate: Message) -> Row:
    need, before = record.memory.need_bytes or 0, record.memory.estimated_need_bytes
    peaks = {str(name): cost.allocated_peak_bytes for name, cost in record.phases.items()}
    off = {name: peak - found for name, peak in estimate["phases"].items() if (found := peaks.get(name))}
    error_in_its_run = before / need - 1 if before else None
    return Row(record.id, need, estimate["need"], estimate["need"] / need - 1, error_in_its_run, off)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=Path, default=Path(__file__).parents[1] / "results")
    parser.add_argument("-k", default="", metavar="WORD", help="only the cases whose id has it")
    parser.add_argument("--output", type=Path, metavar="FILE", help="a CSV file of all cases")
    given = parser.parse_args()
    models = read_models()
    records = {record.case: record for record in searched(given.results, given.k) if record.case.model in models}
    if not records:
        parser.error(f"{given.results}: no case with a searched need, of a model of this repository, has {given.k!r}")
    cases = [case for case in records if isinstance(case, Case)]
    with Console().status("") as status:
        used = {case.model: models[case.model] for case in cases}
        machine = start_machine("meta", used.values(), allow_shared=False, name_host=False, say=status.update)
        with contextlib.closing(machine):
            estimates = Estimates(cases, models, machine.starter)
            estimates.finish(TIMEOUT_S, status.update)
    outcomes = estimates.done()
    found = [row(records[case], outcome) for case, outcome in outcomes.items() if outcome["event"] == "done"]
    for case in cases:
        if case not in outcomes or outcomes[case]["event"] != "done":
            print(f"{case.id}: not simulated: {outcomes[case]['message'] if case in outcomes else 'impossible here'}")
    found.sort(key=lambda row: -abs(row.error))
    table = Table("case", "need GiB", "error", "in its run", title="the furthest off")
    for one in found[:20]:
        before = "–" if one.error_in_its_run is None else f"{one.error_in_its_run:+.1%}"
        table.add_row(one.case, f"{one.need_bytes / GIB:.2f}", f"{one.error:+.1%}", before)
    Console().print(table)
    table = Table("", "median", f"within {WITHIN:.0%}", "from, to")
    table.add_row("today", *summary([row.error for row in found]))
    if runs := [row.error_in_its_run for row in found if row.error_in_its_run is not None]:
        table.add_row("in their runs", *summary(runs))
    Console().print(table)
    if given.output:
        with given.output.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*Row._fields[:-1], *(f"{name}_off_bytes" for name in PHASES)])
            writer.writerows([*row[:-1], *(row.phases_off_bytes.get(name) for name in PHASES)] for row in found)


if __name__ == "__main__":
    try:
        main()
    except VramError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
