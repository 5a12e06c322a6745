"""The search for the need, with processes that are played: one fits under any cap from its need on."""

import itertools
import random
from collections.abc import Callable

import pytest

from pytest_vram.measure.need import (
    ALLOCATED_SPREAD,
    ESTIMATE_SPREAD,
    MIB,
    Need,
    NoNeed,
    Probe,
    search,
    tolerance,
)

GIB = 1 << 30
NEEDS = [1, 15 * MIB, 300 * MIB, 3 * GIB + 12345, 12 * GIB, 71 * GIB]


class Process:
    """Probes of a case with this need. One that completes has taken `takes(cap)`: if not given, its whole cap."""

    def __init__(
        self,
        need: int,
        reserved_peak: int,
        takes: Callable[[int], int | None] = lambda cap: cap,
        phase: Callable[[int], str | None] = lambda cap: "denoise",
    ) -> None:
        self.need, self.reserved_peak = need, reserved_peak
        self.takes, self.phase = takes, phase
        self.probes: list[Probe] = []
        self.caps: list[int] = []

    def __call__(self, cap: int) -> Probe:
        assert len(self.probes) < 50, "it does not end"
        fits = cap >= self.need
        probe = Probe(cap, fits, self.takes(cap)) if fits else Probe(cap, fits, failed_in=self.phase(cap))
        self.probes.append(probe)
        self.caps.append(cap)
        return probe

    def search(self, guess: float, spread: float = ESTIMATE_SPREAD) -> Need:
        return search(self, max(1, int(guess)), spread, self.reserved_peak)


def assert_found(found: Need, process: Process) -> None:
    assert process.need <= found.bytes <= process.need + found.tolerance
    assert found.tolerance == max(16 * MIB, int(0.005 * found.bytes))
    assert found.at in process.probes
    assert found.at.fits
    assert found.probes == len(process.probes)


def assert_caps_in_the_bracket(process: Process) -> None:
    """Each cap lies between the highest that failed and the lowest that fitted, 8 MiB from both, so that it halves."""
    low, high = 0, process.reserved_peak
    for cap in process.caps:
        if high > process.reserved_peak - 1 and cap >= high:  # the last ones, where nothing below fitted
            assert cap in (process.reserved_peak, process.reserved_peak + tolerance(process.reserved_peak))
            assert high - low <= tolerance(high)
            continue
        assert low + 8 * MIB <= cap <= high - 8 * MIB
        if cap >= process.need:
            high = cap
        else:
            low = cap


@pytest.mark.parametrize("need", NEEDS)
@pytest.mark.parametrize("off", [1, 0.98, 1.02, 0.7, 1.3, 0.01, 0.1, 10, 1000])
@pytest.mark.parametrize("room", [0, 1, 5 * MIB, 16 * MIB, 100 * MIB, 0.1, 0.6, 4.0])
def test_it_finds_the_need(need: int, off: float, room: float) -> None:
    process = Process(need, need + int(room * need if isinstance(room, float) else room))
    found = process.search(off * need)
    assert_found(found, process)
    assert_caps_in_the_bracket(process)
    assert found.bytes <= process.reserved_peak
    assert len(process.probes) <= 24


@pytest.mark.parametrize("spread", [ESTIMATE_SPREAD, ALLOCATED_SPREAD])
def test_a_good_guess_needs_few_probes(spread: float) -> None:
    for need, off, room in itertools.product(NEEDS[2:], (0.991, 0.995, 1, 1.005, 1.009), (1.05, 1.3, 2)):
        process = Process(need, int(room * need))
        assert_found(process.search(off * need, spread), process)
        assert len(process.probes) <= (4 if spread == ESTIMATE_SPREAD else 5), (need, off, room)


def test_the_nearer_the_guess_the_fewer_probes() -> None:
    def probes(off: float) -> float:
        draw = random.Random(0)
        processes = [Process(need, 2 * need) for need in (draw.randrange(8 * GIB, 70 * GIB) for _ in range(50))]
        return sum(process.search(off * process.need).probes for process in processes)

    counts = [probes(off) for off in (1, 1.02, 1.05, 1.3)]
    assert counts == sorted(set(counts))


@pytest.mark.parametrize("reserved_peak", [1, 15 * MIB, 16 * MIB])
def test_a_case_below_the_tolerance_is_tried_once(reserved_peak: int) -> None:
    process = Process(1, reserved_peak)
    assert process.search(reserved_peak).bytes == reserved_peak
    assert process.caps == [reserved_peak]


def test_a_need_of_the_reserved_peak_is_seen_to_fit() -> None:
    process = Process(3 * GIB, 3 * GIB)
    found = process.search(3 * GIB)
    assert found.bytes == process.caps[-1] == 3 * GIB
    assert found.at == process.probes[-1]
    assert process.caps.count(3 * GIB) == 1


def test_a_need_just_above_the_reserved_peak_is_found_within_its_tolerance() -> None:
    process = Process(3 * GIB + 1, 3 * GIB)
    found = process.search(3 * GIB)
    assert_found(found, process)
    assert process.caps[-2:] == [3 * GIB, 3 * GIB + tolerance(3 * GIB)]


@pytest.mark.parametrize("asks", [0, 10 * MIB, 42 * MIB])
@pytest.mark.parametrize("off", [0.9, 0.99, 1, 1.01, 1.1])
def test_an_allocator_that_asks_for_more_than_it_reserves(asks: int, off: float) -> None:
    need = 3 * GIB
    process = Process(need, need - asks, takes=lambda cap: need - asks)
    found = search(process, int(off * need), ESTIMATE_SPREAD, process.reserved_peak, 42 * MIB)
    assert_found(found, process)
    assert found.bytes <= need - asks + 42 * MIB


def test_no_need_where_it_fails_under_its_own_reserved_peak() -> None:
    process = Process(4 * GIB, 3 * GIB)
    with pytest.raises(NoNeed, match="its own reserved peak"):
        process.search(3 * GIB)
    assert process.caps[-2:] == [3 * GIB, 3 * GIB + tolerance(3 * GIB)]


def test_no_need_is_said_by_a_probe_too() -> None:
    def probe(cap: int) -> Probe:
        raise NoNeed("shapes")

    with pytest.raises(NoNeed, match="shapes"):
        search(probe, GIB, ESTIMATE_SPREAD, 2 * GIB)


def test_what_a_process_has_taken_is_enough_for_the_next() -> None:
    process = Process(1000 * MIB, 10_000 * MIB, takes=lambda cap: 1004 * MIB)
    found = process.search(2000 * MIB)
    first = process.probes.index(found.at)
    assert found.bytes == 1004 * MIB
    assert found.at.cap == process.caps[first] > 1900 * MIB
    assert all(cap < 1000 * MIB for cap in process.caps[first + 1 :])
    assert len(process.caps) < len(capped(1000 * MIB, 10_000 * MIB, guess=2000 * MIB))


def capped(need: int, reserved_peak: int, guess: int) -> list[int]:
    process = Process(need, reserved_peak)
    process.search(guess)
    return process.caps


@pytest.mark.parametrize("takes", [lambda cap: None, lambda cap: 2 * cap])
def test_a_process_that_fits_has_taken_no_more_than_its_cap(takes: Callable[[int], int | None]) -> None:
    process = Process(1000 * MIB, 1600 * MIB, takes)
    assert_found(process.search(1000 * MIB), process)
    assert process.caps == capped(1000 * MIB, 1600 * MIB, guess=1000 * MIB)


def test_it_is_the_failure_nearest_below_the_need_that_decides() -> None:
    process = Process(3000 * MIB, 5000 * MIB, phase=lambda cap: "load" if cap < 2900 * MIB else "decode")
    found = process.search(2000 * MIB)
    assert {probe.failed_in for probe in process.probes} == {None, "load", "decode"}
    assert found.decided_by == "decode"


def test_nothing_decides_where_nothing_failed() -> None:
    process = Process(1, 5000 * MIB)
    found = process.search(3000 * MIB)
    assert all(probe.fits for probe in process.probes)
    assert found.decided_by is None


@pytest.mark.parametrize(
    ("need", "width"), [(1, 16 * MIB), (3200 * MIB, 16 * MIB), (3400 * MIB, 17 * MIB), (71 * GIB, 71 * GIB // 200)]
)
def test_the_tolerance_is_half_a_percent_and_no_less_than_16_mib(need: int, width: int) -> None:
    assert tolerance(need) == width


def test_any_need_is_found_with_any_guess() -> None:
    draw = random.Random(1)
    for _ in range(1000):
        need = int(10 ** draw.uniform(0, 11))
        process = Process(need, int(need * draw.choice([1, draw.uniform(1, 1.1), draw.uniform(1, 50)])))
        found = process.search(10 ** draw.uniform(0, 12), draw.choice([ESTIMATE_SPREAD, ALLOCATED_SPREAD]))
        assert_found(found, process)
        assert_caps_in_the_bracket(process)
