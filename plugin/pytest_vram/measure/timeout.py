"""How long a worker may take before it counts as hung: from the estimate, where `--vram-timeout` does not say it.

A worker that is only slow must never be ended, so every speed here is one that the slowest machines in use exceed.
"""

import math

from pytest_vram.cases.case import Case
from pytest_vram.measure.channel import Message
from pytest_vram.pipelines.optimizations import chosen

LEAST_S = 600.0  # for whatever an estimate knows nothing of: imports, a first call's kernels, torch.compile
CALLS_BESIDE_ROUNDS, FEWEST_ROUNDS = 2, 5  # a cold and a pilot call; generation.py
SLOWEST_FLOPS = 5e12  # a second in half precision: a T4, of 2018, was sold with 65e12
SLOWEST_LOAD = 50e6  # bytes a second: a hub, or a network file system
SLOWEST_LINK = 1e9  # bytes a second between host and GPU: PCI Express 3.0 with 8 lanes has 8e9
SLOWEST_DISK = 200e6  # bytes a second: a hard disk
LATER_S, LATER_FACTOR = 120.0, 10  # what is known to take so long may take ten times that, and two minutes


def timeout_s(case: Case, estimate: Message, rounds: int | None) -> float:
    """Seconds for a worker that loads a case and calls it, from its estimate; `LEAST_S` where it has none.

    `rounds` are those that were asked for.
    """
    if estimate.get("event") != "done":
        return LEAST_S
    flops: dict[str, float] = estimate["flops"]
    weights: int = estimate["weights"]
    call_s = sum(n * (case.steps if phase == "denoise" else 1) for phase, n in flops.items()) / SLOWEST_FLOPS
    optimizations = chosen(case.optimizations)
    if any(optimization.offloads for optimization in optimizations):  # every step moves them at the worst
        speed = SLOWEST_DISK if any(optimization.on_disk for optimization in optimizations) else SLOWEST_LINK
        call_s += case.steps * weights / speed
    calls = CALLS_BESIDE_ROUNDS + max(FEWEST_ROUNDS, rounds or 0)
    return float(math.ceil(LEAST_S + weights / SLOWEST_LOAD + calls * call_s))


def later_timeout_s(timeout_s: float, first_s: float) -> float:
    """Seconds for a worker that does no more than one that took `first_s`, and was given `timeout_s`."""
    return min(timeout_s, math.ceil(LATER_S + LATER_FACTOR * first_s))
