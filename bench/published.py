"""Our allocated peaks beside published ones: python bench/published.py RUN…

Takes run files or folders of them, measured or estimated (`pytest bench --vram-sweep published`). published.csv has
what was measured by a named method: torch.cuda.max_memory_allocated, no compilation, half precision.
"""

import csv
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "plugin"))

from pytest_vram.cases.case import Case
from pytest_vram.records.reading import read_runs
from pytest_vram.records.schema import Record

GIB = 1 << 30
HERE = Path(__file__).parent


def key(record: Record) -> tuple[str, ...]:
    """What a row of published.csv and a record have in common."""
    case = record.case
    assert isinstance(case, Case)
    sizes = (case.width, case.height, case.frames or "", case.batch_size)
    return (case.model, "+".join(case.optimizations), *map(str, sizes))


def main() -> None:
    runs, _ = read_runs([Path(name) for name in sys.argv[1:] or ["results"]])
    records = [r for run in runs for r in run.records if isinstance(r.case, Case) and r.memory.allocated_peak_bytes]
    ours = {(key(record), record.method): record for record in records if record.status == "ok"}
    table = Table("case", "published GiB", "on", "measured", "ratio", "estimated", "ratio")
    with (HERE / "published.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            names = ("model", "optimizations", "width", "height", "frames", "batch_size")
            published = float(row["allocated_gib"])
            cells = []
            for method in ("measured", "estimated"):
                found = ours.get((tuple(row[name] for name in names), method))
                gib = (found.memory.allocated_peak_bytes or 0) / GIB if found else None
                cells += ["", ""] if gib is None else [f"{gib:.2f}", f"{gib / published:.3f}"]
            frames = f" f{row['frames']}" if row["frames"] else ""
            case = f"{row['model']} {row['optimizations']} {row['width']}x{row['height']}{frames} b{row['batch_size']}"
            table.add_row(case, f"{published:.2f}", row["gpu"], *cells)
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
