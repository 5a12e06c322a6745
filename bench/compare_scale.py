"""What comparing two runs of many records costs: python bench/compare_scale.py

The records are made up from a real run's in a temporary folder; seconds are those of fresh processes, imports included.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from report_scale import ROOT, make
from rich.console import Console
from rich.table import Table


def main() -> None:
    table = Table("records a side", "table s", "markdown s", "json s", "json MB")
    for count in (100, 1_000, 10_000):
        with tempfile.TemporaryDirectory() as name:
            sides = [Path(name, side) for side in ("base", "head")]
            for side in sides:
                side.mkdir()
                make(side, count, 10)
            files = [str(next(side.glob("*.json"))) for side in sides]
            figures = []
            size = 0
            for form in ("table", "markdown", "json"):
                command = [sys.executable, "-m", "pytest_vram.cli", "compare", *files, "--format", form]
                began = time.perf_counter()
                done = subprocess.run(command, capture_output=True, check=True, cwd=ROOT / "plugin")
                figures.append(time.perf_counter() - began)
                size = len(done.stdout)
            table.add_row(f"{count:,}", *(f"{figure:.2f}" for figure in figures), f"{size / 1e6:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
