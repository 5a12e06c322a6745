"""Whether a call has become slower: the unit is the worker, and what explains a difference makes it ambiguous."""

from collections.abc import Sequence
from typing import Any

import pytest

from pytest_vram.cases.thresholds import Limits
from pytest_vram.compare.comparison import Change, Word
from pytest_vram.compare.timing import (
    HOST_BOUND_CALL,
    HOST_BOUND_STEPS,
    MORE_WORKERS,
    WORKERS,
    Again,
    decide,
    host_bound,
    medians,
    screen,
    spread,
    time_change,
    wants_more,
)
from pytest_vram.records.schema import ABNORMAL, Record
from tests.compare.test_comparing import remembered, timed
from tests.records.test_schema import BARE, record

LIMIT = Limits().of("time", "sdxl", "sdxl/fp16")
FASTER = "faster, not decided"
MIRROR = {"worse": "better", "better": "worse", "slower": "faster", "faster": "slower"}


def told(base: Record, head: Record, again: Again | None = None, **limit: Any) -> Change:
    found = time_change(base, head, {**LIMIT, **limit}, again)
    assert found is not None
    return found


def undecided(median: float) -> Word:
    """What nobody could decide about a head with this median, where the base has 2 s: only slower ones matter."""
    return "ambiguous" if median > 2 else "same"


def fresh(base: Sequence[float], head: Sequence[float], **changes: Any) -> Again:
    """One record a worker, as turns of both sides make them; `changes` are of the head's."""
    return Again([timed(median) for median in base], [timed(median, **changes) for median in head])


# The screen


@pytest.mark.parametrize(
    ("base", "head", "expected"),
    [
        (2.0, 2.1, "same"),
        (2.0, 2.1001, "slower"),
        (2.1, 2.0, "same"),
        (2.1001, 2.0, "faster"),
        (0.1, 0.1099, "same"),
        (0.1, 0.1101, "slower"),
        (0.1099, 0.1, "same"),
        (0.1101, 0.1, "faster"),
        (0.001, 0.01, "same"),
        (100.0, 104.9, "same"),
    ],
)
def test_the_screen_is_above_both_limits(base: float, head: float, expected: str) -> None:
    assert screen(timed(base), timed(head), LIMIT) == expected
    assert screen(timed(base, time={"workers": timed(9, 9, 9).time.workers}), timed(head), LIMIT) == expected


def test_the_screen_has_its_limits_from_the_table() -> None:
    loose, coarse = {**LIMIT, "relative": 0.5}, {**LIMIT, "absolute_s": 0.5}
    assert screen(timed(2.0), timed(3.0), loose) == "same"
    assert screen(timed(2.0), timed(3.1), loose) == "slower"
    assert screen(timed(2.0), timed(2.5), coarse) == "same"
    assert screen(timed(2.0), timed(2.6), coarse) == "slower"


def test_the_screen_calls_the_same_what_it_cannot_compare() -> None:
    none = remembered(time={"workers": timed(1.0).time.workers})
    for base, head in ((none, timed(9.0)), (timed(9.0), none), (none, none)):
        assert screen(base, head, LIMIT) == "same"


# Fresh workers of both sides


@pytest.mark.parametrize(
    ("base", "head", "expected"),
    [
        ([2.0, 2.0, 2.0], [2.2, 2.2, 2.2], "worse"),
        ([2.0, 2.0, 2.1999], [2.2, 2.3, 2.4], "worse"),
        ([2.0, 2.0, 2.2], [2.2, 2.3, 2.4], "ambiguous"),
        ([2.0, 2.0, 2.3], [2.2, 2.3, 2.4], "ambiguous"),
        ([2.0, 2.0, 2.0], [2.1, 2.1, 2.1], "same"),
        ([2.0, 2.0, 2.0], [2.1001, 2.1001, 2.1001], "worse"),
        ([2.0, 2.0, 2.0], [1.9, 2.0, 9.0], "same"),
        ([2.0, 2.0, 2.0], [2.05, 2.1, 9.0], "same"),
        ([2.0, 2.0, 2.0], [1.9, 2.2, 2.3], "ambiguous"),
        ([0.1, 0.1, 0.1], [0.1099, 0.1099, 0.1099], "same"),
        ([0.1, 0.1, 0.1], [0.1101, 0.1101, 0.1101], "worse"),
        ([2.0, 2.0, 2.0, 2.0, 2.0], [2.2, 2.2, 2.2, 2.2, 1.99], "ambiguous"),
    ],
)
def test_worse_is_every_worker_and_the_medians(base: list[float], head: list[float], expected: str) -> None:
    assert decide(base, head, 0.05, 0.01) == expected
    assert decide(head, base, 0.05, 0.01) == MIRROR.get(expected, expected)
    assert decide(base[::-1], head[::-1], 0.05, 0.01) == expected


@pytest.mark.parametrize(
    ("base", "head", "expected"),
    [
        ([2.0, 2.0, 2.039], [2.5, 2.5, 2.5], False),
        ([2.0, 2.0, 2.0401], [2.5, 2.5, 2.5], True),
        ([2.0, 2.0, 2.0], [2.5, 2.5, 2.549], False),
        ([2.0, 2.0, 2.0], [2.5, 2.5, 2.5501], True),
        ([2.0, 2.0, 2.3], [2.2, 2.5, 2.8], False),
        ([2.5, 2.5, 2.9], [2.0, 2.0, 2.0], False),
        ([2.0, 2.0, 2.05], [2.05, 2.06, 2.07], False),
        ([2.0, 2.0, 2.0, 2.0, 2.05], [2.5, 2.5, 2.5, 2.5, 2.5], False),
    ],
    ids=["quiet base", "base", "quiet head", "head", "ambiguous", "better", "same", "five"],
)
def test_three_that_differ_among_themselves_want_two_more(base: list[float], head: list[float], expected: bool) -> None:
    assert wants_more(base, head, 0.05, 0.01) is expected


def test_three_workers_a_side_and_two_more() -> None:
    assert (WORKERS, MORE_WORKERS) == (3, 2)


def test_the_spread_is_a_share_of_the_median() -> None:
    assert spread([2.0, 1.0, 4.0]) == pytest.approx(1.5)
    assert spread([3.0]) == 0


def test_each_worker_of_each_record_counts_once() -> None:
    assert medians([timed(1.0), timed(2.0, 3.0), remembered(status="error", failure={"message": "x"}, time={})]) == [
        1.0,
        2.0,
        3.0,
    ]


@pytest.mark.parametrize(
    ("base", "head", "expected"),
    [
        ([2.0, 2.0, 2.0], [2.2, 2.2, 2.2], "worse"),
        ([2.0, 2.0, 2.0], [1.8, 1.8, 1.8], "better"),
        ([2.0, 2.0, 2.0], [2.1, 2.1, 2.1], "same"),
    ],
)
@pytest.mark.parametrize("stored", [(2.0, 3.0), (2.0, 1.0)])
def test_fresh_workers_decide_what_the_stored_ones_only_flag(
    stored: tuple[float, float], base: list[float], head: list[float], expected: str
) -> None:
    found = told(timed(stored[0]), timed(stored[1]), fresh(base, head))
    assert (found.verdict, found.again) == (expected, True)
    assert found.workers == (base, head)
    assert (found.base, found.head) == (sorted(base)[1], sorted(head)[1])
    assert not found.reason


def test_fresh_workers_that_overlap_are_ambiguous() -> None:
    base, head = [2.0, 2.0, 2.3], [2.2, 2.3, 2.4]
    found = told(timed(2.0), timed(3.0), fresh(base, head))
    assert (found.verdict, found.again, found.workers) == ("ambiguous", True, (base, head))
    assert (found.base, found.head) == (2.0, 2.3)
    assert "overlap" in found.reason


def test_what_the_screen_calls_the_same_is_the_same() -> None:
    found = told(timed(2.0), timed(2.1), fresh([2.0] * 3, [3.0] * 3))
    assert (found.verdict, found.again, found.workers) == ("same", False, None)
    assert (found.base, found.head) == (2.0, 2.1)
    assert found.allowed == pytest.approx(0.1)
    assert told(timed(0.02), timed(0.02)).allowed == 0.01


def test_a_time_that_became_null_is_worse_with_its_reason() -> None:
    gone = remembered(time={"workers": timed(1.0).time.workers}, unavailable={"time": "the clock stood still"})
    found = told(timed(1.0), gone)
    assert (found.verdict, found.base, found.head) == ("worse", 1.0, None)
    assert "the clock stood still" in found.reason
    assert told(timed(1.0), gone, fresh([1.0] * 3, [1.0] * 3)).verdict == "worse"


def test_a_time_that_the_base_lacks_says_nothing() -> None:
    none = remembered(time={"workers": timed(1.0).time.workers})
    assert time_change(none, timed(1.0), LIMIT) is None
    assert time_change(none, none, LIMIT) is None


# A stored base


@pytest.mark.parametrize(("base", "head"), [(1, 1), (2, 3), (3, 2), (2, 2)])
@pytest.mark.parametrize("median", [3.0, 1.0])
def test_fewer_than_three_stored_workers_decide_nothing(base: int, head: int, median: float) -> None:
    found = told(timed(*[2.0] * base), timed(*[median] * head))
    assert (found.verdict, found.again) == (undecided(median), False)
    assert found.reason.startswith(FASTER) == (median < 2)
    assert "workers" in found.reason
    assert ("base has" in found.reason, "head has" in found.reason) == (base < 3, head < 3)


@pytest.mark.parametrize(
    ("base", "head", "expected"),
    [
        ([2.0, 2.0, 2.0], [2.3001, 2.3001, 2.3001], "worse"),
        ([2.0, 2.0, 2.0], [2.2999, 2.2999, 2.2999], "ambiguous"),
        ([2.0, 2.0, 2.4], [2.4, 2.4, 2.4], "ambiguous"),
        ([2.0, 2.0, 2.0999], [2.5, 2.5, 2.5], "worse"),
        ([2.0, 2.0, 2.1001], [2.5, 2.5, 2.5], "ambiguous"),
        ([2.0, 2.0, 2.0], [2.4, 2.5, 2.519], "worse"),
        ([2.0, 2.0, 2.0], [2.4, 2.5, 2.5251], "ambiguous"),
        ([2.5, 2.5, 2.6], [2.0, 2.0, 2.0], "better"),
        ([2.5, 2.5, 2.7], [2.0, 2.0, 2.0], "not decided"),
        ([2.3001, 2.3001, 2.3001], [2.0, 2.0, 2.0], "better"),
        ([2.2999, 2.2999, 2.2999], [2.0, 2.0, 2.0], "not decided"),
        ([2.1001, 2.1001, 2.1001], [2.0, 2.0, 2.0], "not decided"),
        ([2.1, 2.1, 2.1], [2.0, 2.0, 2.0], "same"),
        ([2.0, 2.0, 2.0], [2.1001, 2.1001, 2.1001], "ambiguous"),
        ([2.0, 2.0, 2.0], [2.1, 2.1, 2.1], "same"),
        ([2.0, 2.0, 2.0], [2.09, 2.09, 2.09], "same"),
    ],
)
def test_a_stored_base_has_a_wider_threshold_and_takes_quiet_workers(
    base: list[float], head: list[float], expected: str
) -> None:
    found = told(timed(*base), timed(*head))
    assert (found.verdict, found.again) == ("same" if expected == "not decided" else expected, False)
    if expected in ("worse", "better"):
        assert found.workers == (base, head)
        assert found.allowed == pytest.approx(0.15 * base[1])
    assert bool(found.reason) == (expected in ("ambiguous", "not decided"))
    assert found.reason.startswith(FASTER) == (expected == "not decided")


def test_a_small_difference_from_a_stored_base_is_not_called_the_same() -> None:
    found = told(timed(2.0, 2.0, 2.0), timed(2.2, 2.2, 2.2))
    assert found.verdict == "ambiguous"
    assert "again" in found.reason


@pytest.mark.parametrize(
    ("head", "expected"),
    [(2.0, "same"), (2.1, "same"), (2.1001, "ambiguous"), (2.3, "ambiguous"), (2.3001, "worse")],
)
def test_fresh_workers_of_the_head_that_are_as_fast_as_the_stored_base_are_the_same(head: float, expected: str) -> None:
    found = told(timed(2.0, 2.0, 2.0), timed(2.5), Again((), [timed(head)] * 3))
    assert (found.verdict, found.head, found.again) == (expected, head, False)
    assert bool(found.reason) == (expected == "ambiguous")


def test_the_medians_and_not_the_workers_say_whether_a_stored_base_is_as_fast() -> None:
    found = told(timed(2.0, 2.0, 2.0), timed(2.5), Again((), [timed(2.05), timed(2.1), timed(9.0)]))
    assert (found.verdict, found.head, found.workers) == ("same", 2.1, ([2.0, 2.0, 2.0], [2.05, 2.1, 9.0]))
    few = told(timed(2.0, 2.0, 2.0), timed(2.5), Again((), [timed(2.0, 2.0)]))
    assert few.verdict == "ambiguous", "two workers do not decide that either"


def test_a_stored_base_is_as_fast_within_the_limits_of_the_table() -> None:
    base, head = timed(2.0, 2.0, 2.0), timed(3.0)
    for value, expected in ((2.4, "same"), (2.4001, "ambiguous")):
        assert told(base, head, Again((), [timed(value)] * 3), relative=0.2, stored_relative=0.3).verdict == expected
    for value, expected in ((2.4999, "same"), (2.5001, "worse")):
        assert told(base, head, Again((), [timed(value)] * 3), absolute_s=0.5).verdict == expected


# Faster


@pytest.mark.parametrize(
    ("base", "head", "reason"),
    [
        (timed(2.0), timed(1.0), "--vram-workers"),
        (timed(2.0, 2.0, 2.0), timed(1.8, 1.8, 1.8), "stored base"),
        (timed(2.0, 2.0, 2.4), timed(1.0, 1.0, 2.2), "overlap"),
        (timed(2.0, 2.0, 2.2), timed(1.0, 1.0, 1.0), "too much"),
        (timed(*[2.0] * 3), timed(*[1.0] * 3, disturbed="somebody came"), "somebody came"),
    ],
    ids=["few", "little", "overlap", "spread", "trouble"],
)
def test_what_is_faster_but_not_decided_is_the_same_and_says_why(base: Record, head: Record, reason: str) -> None:
    found = told(base, head)
    assert (found.verdict, found.reason.startswith(FASTER)) == ("same", True)
    assert reason in found.reason
    assert (found.base, found.head) == (base.time.median_s, head.time.median_s)


def test_what_is_slower_but_not_decided_does_not_say_faster() -> None:
    for base, head in ((timed(2.0), timed(3.0)), (timed(2.0, 2.0, 2.0), timed(2.2, 2.2, 2.2))):
        found = told(base, head)
        assert found.verdict == "ambiguous"
        assert "faster" not in found.reason


@pytest.mark.parametrize(
    "again",
    [
        Again((), [timed(1.8)] * 3),
        Again((), [timed(1.0, disturbed="somebody")] * 3),
        Again([timed(2.0), timed(2.0), timed(2.3)], [timed(1.6), timed(1.7), timed(2.1)]),
    ],
    ids=["little", "trouble", "both sides"],
)
def test_what_looked_slower_and_is_faster_when_measured_again_is_not_ambiguous(again: Again) -> None:
    found = told(timed(2.0, 2.0, 2.0), timed(2.5), again)
    assert (found.verdict, found.reason.startswith(FASTER)) == ("same", True)


def test_a_stored_base_and_fresh_workers_of_the_head() -> None:
    base, head = timed(2.0, 2.0, 2.0), timed(2.5)
    found = told(base, head, Again((), [timed(2.5, 2.5, 2.5)]))
    assert (found.verdict, found.again, found.head) == ("worse", False, 2.5)
    assert told(base, head, Again((), [timed(2.5), timed(2.5), timed(2.5)])).verdict == "worse"
    assert told(base, head, Again((), [timed(2.5, 2.5)])).verdict == "ambiguous"
    assert told(base, head, Again((), ())).verdict == "ambiguous"
    assert told(timed(2.0), head, Again((), [timed(2.5, 2.5, 2.5)])).verdict == "ambiguous"


def test_the_stored_threshold_comes_from_the_table_and_is_no_narrower_than_the_other() -> None:
    base, head = timed(2.0, 2.0, 2.0), timed(2.5, 2.5, 2.5)
    assert told(base, head, stored_relative=0.2).verdict == "worse"
    assert told(base, head, stored_relative=0.26).verdict == "ambiguous"
    assert told(base, head, relative=0.2, stored_relative=0.1).verdict == "worse"
    assert told(base, head, relative=0.3, stored_relative=0.1).verdict == "same"
    assert told(base, timed(2.21, 2.21, 2.21), stored_relative=0.1).verdict == "worse"
    assert told(base, head, absolute_s=0.6, stored_relative=0.1).verdict == "same"


# The host's CPU

STEPS = {"step_s": 0.2}


STEP, CALL = HOST_BOUND_STEPS * 0.2, HOST_BOUND_CALL * 2.0  # of `STEPS`, and of a call of two seconds


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ({"gpu_lag_s": STEP - 1e-4, **STEPS}, True),
        ({"gpu_lag_s": STEP, **STEPS}, False),
        ({"gpu_lag_s": 0.0, **STEPS}, True),
        ({"gpu_lag_s": None, **STEPS}, None),
        ({"gpu_lag_s": CALL - 1e-4}, True),
        ({"gpu_lag_s": CALL + 1e-4}, False),
        ({"gpu_lag_s": 0.0, "median_s": None}, None),
    ],
)
def test_a_gpu_that_waits_for_the_host(time: dict[str, Any], expected: bool | None) -> None:
    assert host_bound(timed(2.0, time=time)) is expected


@pytest.mark.parametrize(("first_s", "expected"), [(None, False), (0.25, False), (0.35, False), (0.36, True)])
def test_the_host_decides_where_weights_are_moved_for_the_first_step(first_s: float | None, expected: bool) -> None:
    time = {"gpu_lag_s": 1.0, "step_s": 0.25, "first_step_s": first_s}
    assert host_bound(timed(2.0, time=time, case={"optimizations": ["fp16", "model_offload"]})) is expected
    assert host_bound(timed(2.0, time=time, case={"optimizations": ["fp16", "cache_faster"]})) is False


@pytest.mark.parametrize("bound", ["base", "head"])
@pytest.mark.parametrize("median", [3.0, 1.0])
def test_a_host_bound_case_is_at_most_ambiguous_against_a_stored_base(bound: str, median: float) -> None:
    behind = {name: {"gpu_lag_s": 0.0 if name == bound else 1.0, **STEPS} for name in ("base", "head")}
    base, head = timed(*[2.0] * 3, time=behind["base"]), timed(*[median] * 3, time=behind["head"])
    found = told(base, head)
    assert found.verdict == undecided(median)
    assert "CPU" in found.reason
    busy = {"gpu_lag_s": 1.0, **STEPS}
    clear = told(timed(*[2.0] * 3, time=busy), timed(*[median] * 3, time=busy))
    assert clear.verdict == ("worse" if median > 2 else "better")
    both = Again([base] * 3, [head] * 3)
    assert told(base, head, both).verdict == clear.verdict, "measured again in turn, it is decided"


@pytest.mark.parametrize("busy", [(), ("base",), ("head",), ("base", "head")])
@pytest.mark.parametrize("gpu", [True, False])
def test_where_it_is_not_known_whose_time_it_is_a_stored_base_of_a_gpu_does_not_decide(
    busy: tuple[str, ...], gpu: bool
) -> None:
    base, head = (
        timed(*[median] * 3, time={"gpu_lag_s": 1.0 if side in busy else None, **STEPS})
        for side, median in (("base", 2.0), ("head", 3.0))
    )
    for side in (base, head):
        side.memory.allocated_peak_bytes = 1 << 30 if gpu else None
        side.phases.clear()
    assert told(base, head).verdict == ("worse" if busy or not gpu else "ambiguous")
    assert told(base, head, Again([base] * 3, [head] * 3)).verdict == "worse", "measured again in turn, it is decided"


def test_what_is_known_of_one_side_decides_for_both() -> None:
    base, head = (timed(*[median] * 3, time={"gpu_lag_s": lag, **STEPS}) for median, lag in ((2.0, None), (3.0, 0.0)))
    for side in (base, head):
        side.memory.allocated_peak_bytes = None
    found = told(base, head)
    assert (found.verdict, "CPU" in found.reason) == ("ambiguous", True)


# What explains a difference


def state(clock: int | None = None, *throttle: str) -> dict[str, Any]:
    return {"telemetry": {"rounds": [{"sm_clock_mhz": clock, "throttle": list(throttle)}]}}


def sides(median: float, base: dict[str, Any], head: dict[str, Any]) -> list[Change]:
    """What is said of two sides against a stored base, and with fresh workers of both."""
    stored = timed(2.0, 2.0, 2.0, **base), timed(median, median, median, **head)
    again = Again([timed(2.0, **base)] * 3, [timed(median, **head)] * 3)
    return [told(*stored), told(timed(2.0), timed(median), again)]


@pytest.mark.parametrize(("median", "otherwise"), [(3.0, "worse"), (1.0, "better")])
@pytest.mark.parametrize(
    ("base", "head", "ambiguous"),
    [
        (2000, 2039, False),
        (2000, 2041, True),
        (2000, 1961, False),
        (2000, 1959, True),
        (2000, None, False),
        (None, 1000, False),
        (None, None, False),
        (0, 2000, False),
    ],
)
def test_another_clock_explains_a_difference(
    median: float, otherwise: Word, base: int | None, head: int | None, ambiguous: bool
) -> None:
    for found in sides(median, state(base), state(head)):
        assert found.verdict == (undecided(median) if ambiguous else otherwise)
        assert ("MHz" in found.reason, f"{head} MHz" in found.reason) == (ambiguous, ambiguous)


def test_the_clock_is_the_median_of_all_rounds() -> None:
    rounds = [{"sm_clock_mhz": clock} for clock in (2000, 2000, 2000, 500, None)]
    for found in sides(3.0, state(2000), {"telemetry": {"rounds": rounds}}):
        assert found.verdict == "worse"


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize(("median", "otherwise"), [(3.0, "worse"), (1.0, "better")])
@pytest.mark.parametrize(
    ("trouble", "word"),
    [
        *((state(2000, reason), "throttled") for reason in sorted(ABNORMAL)),
        ({"time": {"rounds_discarded": 1}}, "throttled"),
        ({"disturbed": "another process came"}, "another process came"),
    ],
    ids=[*sorted(ABNORMAL), "discarded", "disturbed"],
)
def test_trouble_on_either_side_makes_it_ambiguous(
    side: int, median: float, otherwise: Word, trouble: dict[str, Any], word: str
) -> None:
    calm = state(2000)
    both = [calm, calm]
    both[side] = {**calm, **trouble}
    for found in sides(median, both[0], both[1]):
        assert found.verdict == undecided(median)
        assert word in found.reason
    for found in sides(median, calm, calm):
        assert (found.verdict, found.reason) == (otherwise, "")


def test_a_disturbance_is_named_before_the_clock() -> None:
    for found in sides(3.0, {**state(2000), "disturbed": "another process came"}, state(1000)):
        assert (found.verdict, found.reason) == ("ambiguous", "another process came")


def test_the_power_cap_is_no_trouble() -> None:
    for found in sides(3.0, state(2000), state(2000, "sw_power_cap", "gpu_idle")):
        assert found.verdict == "worse"


def test_one_worker_in_trouble_is_enough() -> None:
    calm, hot = timed(3.0), timed(3.0, **state(2000, "hw_thermal_slowdown"))
    assert told(timed(2.0), timed(3.0), Again([timed(2.0)] * 3, [calm, calm, calm])).verdict == "worse"
    assert told(timed(2.0), timed(3.0), Again([timed(2.0)] * 3, [calm, calm, hot])).verdict == "ambiguous"


def test_trouble_in_what_was_stored_does_not_matter_once_both_are_measured_again() -> None:
    stored = timed(2.0, disturbed="somebody"), timed(3.0, disturbed="somebody")
    assert told(*stored, fresh([2.0] * 3, [3.0] * 3)).verdict == "worse"


@pytest.mark.parametrize("trouble", [state(1000), state(2000, "hw_slowdown"), {"disturbed": "somebody"}])
def test_trouble_does_not_make_the_same_ambiguous(trouble: dict[str, Any]) -> None:
    assert told(timed(2.0, **state(2000)), timed(2.0, **trouble)).verdict == "same"
    again = Again([timed(2.0, **state(2000))] * 3, [timed(2.0, **trouble)] * 3)
    found = told(timed(2.0), timed(3.0), again)
    assert (found.verdict, found.reason) == ("same", "")


def test_a_record_without_telemetry_is_compared_by_its_times() -> None:
    base, head = (record(memory=BARE, time=timed(*[m] * 3).time.model_dump()) for m in (2.0, 3.0))
    assert told(base, head).verdict == "worse"
