"""The need: the smallest allocator cap under which a fresh process loads the pipeline and completes two calls."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

MIB = 1 << 20
REASON_LENGTH = 2000
LEAST_TOLERANCE = 16 * MIB
RELATIVE_TOLERANCE = 0.005
ESTIMATE_SPREAD = 0.005  # at least half of the estimates are nearer to the need; docs/architecture.md
ALLOCATED_SPREAD = 0.03  # the same for the allocated peak, where there is no estimate


@dataclass(frozen=True)
class Probe:
    """One fresh process under a cap, in bytes. `seconds` is its warm second call, phase by phase; `step_s` is one call
    of the denoiser in it, but for the first."""

    cap: int | None
    fits: bool
    reserved_peak: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    denoiser_calls: int = 0
    step_s: float | None = None
    retries: int | None = None
    failed_in: str | None = None


@dataclass(frozen=True)
class Need:
    """Bytes; `at` is the probe that completed within this need, `decided_by` the phase in which the one below ended."""

    bytes: int
    tolerance: int
    at: Probe
    probes: int
    decided_by: str | None


class NoNeed(Exception):
    """No need was found; the message says why."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason[:REASON_LENGTH])


def tolerance(need: int) -> int:
    """How wide the last bracket may be, in bytes."""
    return max(LEAST_TOLERANCE, int(RELATIVE_TOLERANCE * need))


def search(probe: Callable[[int], Probe], guess: int, spread: float, reserved_peak: int, asks: int = 0) -> Need:
    """Halve what the need may be until the bracket is as narrow as the tolerance.

    What it may be is a Cauchy distribution about `guess`, half of it within `spread` times the guess: near the guess it
    bisects finely, and where the guess is wrong its steps grow. `reserved_peak` is what the case took with room, so
    under that cap it would go the same way. A process that completes shows the same of its own reserved peak. `asks`
    is how many bytes its allocator may ask for beyond what it then reserves.

    Raises:
        NoNeed: when the case fails even under a cap of its own reserved peak.
    """
    guess = max(guess, MIB)
    most = reserved_peak + asks
    low, high = 0, most
    at: Probe | None = None
    decided_by: str | None = None
    probes = 0
    scale = spread * guess

    def try_cap(cap: int) -> Probe:
        nonlocal probes
        probes += 1
        return probe(cap)

    while high - low > tolerance(high):
        middle = guess + scale * math.tan((math.atan((low - guess) / scale) + math.atan((high - guess) / scale)) / 2)
        cap = min(max(int(middle), low + LEAST_TOLERANCE // 2), high - LEAST_TOLERANCE // 2)
        result = try_cap(cap)
        if result.fits:
            at, high = result, min(cap, max((result.reserved_peak or cap) + asks, low + 1))
        else:
            low, decided_by = cap, result.failed_in
    if at is None:  # nothing below fitted: see that it does fit
        for high in (most, most + tolerance(most)):
            at = try_cap(high)
            if at.fits:
                break
            decided_by = at.failed_in
        else:
            raise NoNeed("it fails even under a cap of its own reserved peak")
    return Need(high, tolerance(high), at, probes, decided_by)
