"""What the same commit gives again and again: python bench/same_commit.py RUN RUN…

Runs of one commit, sweep and GPU: every pair is compared with the default limits. Prints the verdicts of all pairs, and
by metric the spread of its figures, as shares and as absolute differences.
"""

import argparse
import statistics
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "plugin"))

from pytest_vram.cases.thresholds import Limits
from pytest_vram.compare.comparing import compare
from pytest_vram.compare.finding import read_one
from pytest_vram.compare.timing import host_bound
from pytest_vram.records.reading import ReadRun
from pytest_vram.records.schema import Record

MIB = 1 << 20


def figures(record: Record) -> dict[str, float]:
    """What is compared, and what is not, by name; MiB and milliseconds."""
    memory = record.memory
    found = {
        "allocated MiB": memory.allocated_peak_bytes,
        "need MiB": memory.need_bytes,
        "host MiB": memory.host_peak_bytes,
        "reserved MiB (no gate)": memory.reserved_peak_bytes,
        "NVML MiB (no gate)": memory.nvml_process_peak_bytes,
    }
    sizes = {name: value / MIB for name, value in found.items() if value}
    for phase, cost in record.phases.items():
        if cost.allocated_peak_bytes:
            sizes[f"{phase} MiB"] = cost.allocated_peak_bytes / MIB
    if record.time.median_s:
        bound = {True: "host-bound", False: "GPU-bound", None: "not known"}[host_bound(record)]
        sizes[f"call ms, {bound}"] = record.time.median_s * 1000
        workers = [worker.median_s * 1000 for worker in record.time.workers]
        if len(workers) > 1:
            sizes[f"workers of a run ms, {bound}"] = max(workers) - min(workers)
    return sizes


def spreads(runs: list[ReadRun]) -> None:
    """Prints, by metric, the median and the largest spread over the cases: highest less lowest of all runs."""
    by_case: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        for record in run.records:
            for name, value in figures(record).items():
                by_case.setdefault(name, {}).setdefault(record.id, []).append(value)
    table = Table("metric", "cases", "median spread", "largest", "largest, absolute")
    for name, cases in sorted(by_case.items()):
        whole = {id: values for id, values in cases.items() if len(values) > 1 and min(values) > 0}
        if not whole:
            continue
        shares = {id: max(values) / min(values) - 1 for id, values in whole.items()}
        largest = max(max(values) - min(values) for values in whole.values())
        middle = statistics.median(shares.values())
        table.add_row(name, str(len(whole)), f"{middle:.2%}", f"{max(shares.values()):.2%}", f"{largest:.1f}")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    runs = [read_one(path) for path in parser.parse_args().runs]
    words: Counter[str] = Counter()
    metrics: Counter[str] = Counter()
    for base, head in combinations(runs, 2):
        for one, other in ((base, head), (head, base)):
            for case in compare(one, other, Limits()).cases:
                words[case.verdict] += 1
                for change in case.changes:
                    if change.verdict not in ("same", "not comparable"):
                        metrics[f"{change.verdict}: {change.metric}: {change.reason or 'figures'}"] += 1
                        if change.verdict == "worse":
                            print(f"FALSE: {case.id}: {change}")
    pairs = len(runs) * (len(runs) - 1)
    print(f"{len(runs)} runs, {pairs} comparisons (each pair both ways): {dict(words)}")
    for text, count in metrics.most_common():
        print(f"  {count} {text}")
    spreads(runs)


if __name__ == "__main__":
    main()
