"""What load() and the report cost on 100, 1,000 and 10,000 records: python bench/report_scale.py

The records are made up from a real run's, with other names and sizes, in a temporary folder: ten sets of optimizations
for each workload, or one. Seconds and the peak of resident memory are those of fresh processes, imports included.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
MEMORY = """
import atexit, resource, sys
atexit.register(lambda: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr))
"""
LOAD = "import pytest_vram; pytest_vram.load(sys.argv[1])"
REPORT = """
from pytest_vram.cli import main
sys.argv = ["pytest-vram", "report", sys.argv[1], "-o", sys.argv[1]]
main()
"""


def make(folder: Path, count: int, most_sets: int) -> None:
    """Write one run file with `count` records into `folder`, of up to `most_sets` sets a workload."""
    source = max((ROOT / "results").glob("nvidia-*/*.json"), key=lambda path: path.stat().st_size)
    document = json.loads(source.read_text(encoding="utf-8"))
    originals = document["vram"]["records"]
    by_set = {tuple(record["case"]["optimizations"]): record for record in originals}
    sets = list(by_set.values())[:most_sets]
    records = []
    for number in range(count):
        workload, one = divmod(number, len(sets))
        record = json.loads(json.dumps(sets[one]))
        model, size = divmod(workload, 20)
        case = record["case"]
        case["model"] = f"model-{model:03}"
        case["width"] = case["height"] = 512 + 64 * (size // 4)
        case["batch_size"] = 1 + size % 4
        record["id"] = f"{case['model']}/{one}/{case['width']}x{case['width']}/b{case['batch_size']}"
        records.append(record)
    document["vram"]["records"] = records
    document["benchmarks"] = []
    (folder / source.name).write_text(json.dumps(document, indent=1), encoding="utf-8")


def cost(code: str, folder: Path) -> tuple[float, float]:
    """Seconds and GiB of a fresh interpreter that runs `code` on `folder`."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", f"{MEMORY}\n{code}", str(folder)], capture_output=True, text=True, check=True
    )
    spent = time.perf_counter() - began
    return spent, int(done.stderr.split()[-1]) / 2**20


def main() -> None:
    table = Table("records", "sets", "load s", "load GiB", "report s", "report GiB", "md MB", "html MB")
    for count, sets in ((100, 10), (1_000, 10), (10_000, 10), (10_000, 1)):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            make(folder, count, sets)
            figures = [*cost(LOAD, folder), *cost(REPORT, folder)]
            sizes = [(folder / file).stat().st_size / 1e6 for file in ("HARDWARE.md", "hardware.html")]
            table.add_row(f"{count:,}", str(sets), *(f"{figure:.2f}" for figure in (*figures, *sizes)))
    Console().print(table)


if __name__ == "__main__":
    main()
