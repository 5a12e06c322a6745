"""How often the rule for times is wrong, simulated: python bench/time_verdicts.py [--trials N]

Workers of one side differ by a spread (the standard deviation of their logarithms); `outliers` are workers that some
disturbance makes up to 1.8 times slower. A case is screened with one worker a side and decided by fresh ones in turn.
Prints how many of all cases are called worse, by the true slowdown; and what three workers alone would have said.
"""

import argparse
import math
import random
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "plugin"))

from pytest_vram.cases.thresholds import DEFAULTS
from pytest_vram.compare.timing import MORE_WORKERS, WORKERS, decide, wants_more

SLOWDOWNS = (1.0, 1.05, 1.1, 1.25)
MACHINES = [(0.005, 0.0), (0.01, 0.0), (0.02, 0.0), (0.04, 0.0), (0.08, 0.0), (0.15, 0.0), (0.02, 0.2), (0.1, 0.3)]
RELATIVE, ABSOLUTE_S = DEFAULTS.time.relative or 0.0, DEFAULTS.time.absolute_s or 0.0


def worker(spread: float, outliers: float, slowdown: float = 1.0) -> float:
    """The median of one worker, of a call that takes a second."""
    disturbed = 1 + 0.8 * random.random() if random.random() < outliers else 1.0
    return slowdown * disturbed * math.exp(random.gauss(0, spread))


def verdicts(spread: float, outliers: float, slowdown: float) -> tuple[bool, bool]:
    """Whether one case is called worse by three workers a side, and by the rule."""
    if worker(spread, outliers, slowdown) <= (1 + RELATIVE) * worker(spread, outliers):
        return False, False
    base = [worker(spread, outliers) for _ in range(WORKERS)]
    head = [worker(spread, outliers, slowdown) for _ in range(WORKERS)]
    three = decide(base, head, RELATIVE, ABSOLUTE_S) == "worse"
    if wants_more(base, head, RELATIVE, ABSOLUTE_S):
        base += [worker(spread, outliers) for _ in range(MORE_WORKERS)]
        head += [worker(spread, outliers, slowdown) for _ in range(MORE_WORKERS)]
    return three, decide(base, head, RELATIVE, ABSOLUTE_S) == "worse"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=50_000)
    trials = parser.parse_args().trials
    random.seed(0)
    table = Table("spread", "outliers", *(f"+{slowdown - 1:.0%}, three" for slowdown in SLOWDOWNS[:1]))
    for slowdown in SLOWDOWNS:
        table.add_column(f"+{slowdown - 1:.0%}")
    for spread, outliers in MACHINES:
        shares = []
        for slowdown in SLOWDOWNS:
            found = [verdicts(spread, outliers, slowdown) for _ in range(trials)]
            shares.append([sum(side) / trials for side in zip(*found, strict=True)])
        row = [shares[0][0], *(share[1] for share in shares)]
        table.add_row(f"{spread:.1%}", f"{outliers:.0%}", *(f"{share:.2%}" for share in row))
    Console().print(table)


if __name__ == "__main__":
    main()
