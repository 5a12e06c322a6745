"""How good the simulation of today is: python bench/estimates.py [results] [-k WORD] [--output FILE]

Simulates every case of the run files whose need was searched, and holds the result against it, beside the estimate that
its own run had made. An older estimate stays in its run file; this says what a change of the simulation is worth.
"""

import argparse
import csv
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from pytest_vram.cases.case import Case
from pytest_vram.cases.models import Model, read_models
from pytest_vram.errors import Inapplicable
from pytest_vram.measure.simulation import Estimate, simulate
from pytest_vram.pipelines.optimizations import impossible
from pytest_vram.records.reading import read_runs
from pytest_vram.records.schema import Record

GIB = 1 << 30
WITHIN = 0.05
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


def simulated(model: Model, case: Case) -> Estimate | str:
    """The estimate, or why there is none."""
    if reason := impossible(case.optimizations, "meta", case.weights):
        return reason
    try:
        return simulate(model, case)
    except Inapplicable as error:
        return str(error)


def summary(errors: Sequence[float]) -> list[str]:
    """What is read of a distribution of relative errors."""
    within = sum(abs(error) <= WITHIN for error in errors)
    return [
        f"{median(map(abs, errors)):.2%}",
        f"{within} of {len(errors)}",
        f"{min(errors):+.1%} to {max(errors):+.1%}",
    ]


class Row(NamedTuple):
    """A case: its need, today's estimate of it, and how far off that and its run's own estimate are."""

    case: str
    need_bytes: int
    estimated_bytes: int
    error: float
    error_in_its_run: float | None
    phases_off_bytes: dict[
        str, int
    ]  # by phase, how far the simulated peak of allocated memory is above the measured one


def row(record: Record, estimate: Estimate) -> Row:
    need, before = record.memory.need_bytes or 0, record.memory.estimated_need_bytes
    peaks = {name: cost.allocated_peak_bytes or 0 for name, cost in record.phases.items()}
    off: dict[str, int] = {
        name: estimate.phases[name] - peak for name, peak in peaks.items() if peak and name in estimate.phases
    }
    return Row(record.id, need, estimate.need, estimate.need / need - 1, before / need - 1 if before else None, off)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=Path, default=Path(__file__).parents[1] / "results")
    parser.add_argument("-k", default="", metavar="WORD", help="only the cases whose id has it")
    parser.add_argument("--output", type=Path, metavar="FILE", help="a CSV file of all cases")
    given = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    models = read_models()
    records = [record for record in searched(given.results, given.k) if record.case.model in models]
    if not records:
        parser.error(f"{given.results}: no case with a searched need, of a model of this repository, has {given.k!r}")
    cases = [record.case for record in records if isinstance(record.case, Case)]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest_vram.measure.simulation"])
    found: list[Row] = []
    with ProcessPoolExecutor(os.cpu_count(), context, max_tasks_per_child=1) as pool:
        estimates = pool.map(simulated, [models[case.model] for case in cases], cases)
        for record, estimate in zip(records, estimates, strict=True):
            if isinstance(estimate, str):
                print(f"{record.id}: {estimate}")
            else:
                found.append(row(record, estimate))
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
    main()
