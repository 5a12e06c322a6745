"""What several GPUs save, and change: python bench/several_gpus.py --one RUN… --several RUN…

Run files, or folders of them, of one sweep: measured on one GPU, and with `-n auto`. Prints how many times shorter the
wall time is, and by metric how far the figures are apart: between the two, and among the runs on one GPU, where there
are several.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import combinations, product
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "plugin"))

from pytest_vram.records.reading import ReadRun, read_runs
from pytest_vram.records.schema import Record

FIGURES: dict[str, Callable[[Record], float | None]] = {
    "allocated": lambda record: record.memory.allocated_peak_bytes,
    "reserved": lambda record: record.memory.reserved_peak_bytes,
    "need": lambda record: record.memory.need_bytes,
    "host memory": lambda record: record.memory.host_peak_bytes,
    "load s": lambda record: record.wall.load_s if record.wall else None,
    "cold call s": lambda record: record.time.cold_s,
    "call s": lambda record: record.time.median_s,
    "case, all of it, s": lambda record: record.wall.total_s if record.wall else None,
}


def apart(pairs: Iterable[tuple[ReadRun, ReadRun]], figure: Callable[[Record], float | None]) -> Iterator[float]:
    """The second run's figure as a share of the first's, less 1, of each case that both have."""
    for one, other in pairs:
        found = {record.id: figure(record) for record in one.records if record.status == "ok"}
        for record in other.records:
            ours, theirs = found.get(record.id), figure(record)
            if ours and theirs and record.status == "ok":
                yield theirs / ours - 1


def wall_s(runs: list[ReadRun]) -> float | None:
    """The median wall time of runs that say it."""
    known = [run.run.wall_s for run in runs if run.run.wall_s]
    return statistics.median(known) if known else None


def gpus(run: ReadRun) -> int:
    """On how many GPUs a run was made."""
    workers = run.run.options.get("xdist_workers")
    return workers if isinstance(workers, int) else 1


def row(metric: str, between: list[float], among: list[float]) -> list[str]:
    def said(shares: list[float]) -> list[str]:
        if not shares:
            return ["–", "–"]
        return [f"{statistics.median(shares):+.2%}", f"{max(shares, key=abs):+.2%}"]

    return [metric, str(len(between)), *said(between), *said(among)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs="+", type=Path, required=True, help="of one GPU")
    parser.add_argument("--several", nargs="+", type=Path, required=True, help="of several")
    arguments = parser.parse_args()
    one, several = read_runs(arguments.one)[0], read_runs(arguments.several)[0]
    before, after = wall_s(one), wall_s(several)
    count = max(map(gpus, several))
    if before and after:
        print(f"{before:.0f} s on 1 GPU, {after:.0f} s on {count}: {before / after:.2f} times as fast")
    else:
        print("how much faster: a run does not say its wall time")
    table = Table("metric", "cases", "median", "largest", "median, 1 GPU alone", "largest, 1 GPU alone")
    for metric, figure in FIGURES.items():
        between, among = list(apart(product(one, several), figure)), list(apart(combinations(one, 2), figure))
        if between:
            table.add_row(*row(metric, between, among))
    Console().print(table)


if __name__ == "__main__":
    main()
