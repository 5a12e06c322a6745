"""Verdicts: the rule of the module's docstring, clause by clause and at its boundaries."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest

from pytest_vram.records.reading import ReadRun
from pytest_vram.records.schema import ASSUMED_CONTEXT_BYTES, Memory, Record
from pytest_vram.report.cards import GIB, Card
from pytest_vram.report.choices import SAME_TIME, Choice, Workload, workload_of
from pytest_vram.report.evidence import Evidence, gather
from pytest_vram.report.verdicts import WORDS, Verdict, best, judge, largest, minimum, recommended
from tests.records.test_schema import MIB, own
from tests.report.test_evidence import (
    H100,
    RTX_4090,
    WORKLOAD,
    choice,
    estimated,
    idle,
    measured,
    only,
    out_of_memory,
    run,
    unsearched,
)

CONTEXT = 686 * MIB  # of `measured`
ORDER = tuple(WORDS)
U = 20_000 * MIB


def card(usable: int, name: str = "", **changes: Any) -> Card:
    """A card that gives so many bytes to a program; another GPU than any that was measured."""
    gib = usable / GIB
    facts = {"name": name or f"{gib:g} GiB", "kind": "datacenter", "memory_gib": gib, "visible_gib": gib}
    made = Card.model_validate({**facts, **changes})
    assert made.usable_bytes == usable or changes
    return made


def needs(required: int, **changes: Any) -> Record:
    """A record of a need that requires so much on any other card."""
    return measured(need=required - ASSUMED_CONTEXT_BYTES, **changes)


def outcome(found: Record, on: Card, **changes: Any) -> str:
    return judge(choice(found, **changes), on).outcome


@pytest.mark.parametrize(
    ("required", "expected", "reason"),
    [
        (U * 95 // 100, "fits", ""),
        (U * 95 // 100 + 1, "tight", "under 5 % free"),
        (U, "tight", "under 5 % free"),
        (U + 1, "no", ""),
    ],
)
def test_five_percent_stay_free(required: int, expected: str, reason: str) -> None:
    verdict = judge(choice(needs(required)), card(U))
    assert (verdict.outcome, verdict.required_bytes, verdict.reason) == (expected, required, reason)
    assert verdict.runs is (expected in ("fits", "tight"))


def test_what_a_desktop_holds_is_not_given() -> None:
    screen = card(U, visible_gib=(U + GIB) / GIB, memory_gib=24, desktop_reserve_gib=1.0)
    assert screen.usable_bytes == U
    assert outcome(needs(U * 95 // 100), screen) == "fits"
    assert outcome(needs(U * 95 // 100 + 1), screen) == "tight"


THE_H100: dict[str, Any] = {"reported_as": H100}


@pytest.mark.parametrize(
    ("context", "there", "elsewhere"),
    [
        (400 * MIB, 400 * MIB, 768 * MIB),
        (768 * MIB, 768 * MIB, 768 * MIB),
        (900 * MIB, 900 * MIB, 900 * MIB),
        (None, 768 * MIB, 768 * MIB),
    ],
)
def test_the_context_is_known_where_it_was_measured(context: int | None, there: int, elsewhere: int) -> None:
    found = choice(measured(need=10 * GIB, memory={"context_bytes": context}))
    assert judge(found, card(80 * GIB, **THE_H100)).required_bytes == 10 * GIB + there
    for other in (card(80 * GIB), card(60 * GIB, **THE_H100), card(80 * GIB, reported_as=RTX_4090)):
        assert judge(found, other).required_bytes == 10 * GIB + elsewhere


def test_required_is_never_less_on_another_card_than_on_the_measured_one() -> None:
    for need, context, kind in product(
        (MIB, 7 * GIB, 79 * GIB), (1, 300 * MIB, 800 * MIB, None), (measured, unsearched)
    ):
        found = choice(kind(need=need, memory={"context_bytes": context}))
        there = judge(found, card(80 * GIB, **THE_H100)).required_bytes
        elsewhere = judge(found, card(80 * GIB)).required_bytes
        assert there is not None
        assert elsewhere is not None
        assert need < there <= elsewhere
        assert elsewhere >= need + ASSUMED_CONTEXT_BYTES


# 5 % of the card and 10 % of the need: 602 + 970 MiB of free memory beside 9700 + 768
SMALL, NEED = 12_040 * MIB, 9_700 * MIB


@pytest.mark.parametrize("kind", [estimated, unsearched])
@pytest.mark.parametrize(
    ("usable", "expected", "reason"),
    [
        (SMALL + MIB, "fits", ""),
        (SMALL - MIB, "tight", "within the estimate's error"),
        (11_019 * MIB, "tight", "within the estimate's error"),
        (11_018 * MIB, "tight", "under 5 % free"),
        (10_468 * MIB, "tight", "under 5 % free"),
        (10_468 * MIB - 1, "no", ""),
    ],
)
def test_an_estimate_leaves_a_tenth_of_itself_free(kind: Any, usable: int, expected: str, reason: str) -> None:
    verdict = judge(choice(kind(need=NEED)), card(usable))
    assert (verdict.outcome, verdict.reason, verdict.estimated) == (expected, reason, True)
    assert verdict.required_bytes == NEED + 768 * MIB


def test_a_searched_need_leaves_no_tenth_free() -> None:
    assert outcome(measured(need=NEED), card(11_019 * MIB)) == "fits"


ROOM = 15 * GIB  # what `slow` reserved when it was timed


def slow(at_need: float | None, **changes: Any) -> Record:
    """A call of 2 s with room, and so many at its need of 10 GiB."""
    return measured(
        need=10 * GIB, seconds=2.0, time={"at_need_s": at_need}, memory={"reserved_peak_bytes": ROOM}, **changes
    )


@pytest.mark.parametrize(
    ("at_need", "usable", "expected"),
    [
        (2.5, ROOM, "fits"),
        (2.51, ROOM, "tight"),
        (2.51, ROOM + 768 * MIB, "fits"),
        (2.51, ROOM + 768 * MIB - 1, "tight"),
        (None, ROOM, "fits"),
        (1.9, ROOM, "fits"),
    ],
)
def test_a_slower_call_is_tight_without_the_room_that_it_had(at_need: float | None, usable: int, expected: str) -> None:
    verdict = judge(choice(slow(at_need)), card(usable))
    assert verdict.outcome == expected
    assert verdict.reason == ("up to 1.3 times slower without more room" if expected == "tight" else "")


def test_the_room_on_the_measured_gpu_has_the_measured_context() -> None:
    h100: dict[str, Any] = {"gpu": H100, "memory": ROOM + CONTEXT}
    assert outcome(slow(5.0), card(ROOM + CONTEXT, **THE_H100), **h100) == "fits"
    assert outcome(slow(5.0), card(ROOM + CONTEXT - 1, **THE_H100), **h100) == "tight"


def test_a_tight_call_takes_as_long_as_it_did_without_room() -> None:
    assert judge(choice(slow(5.0)), card(ROOM)).call_s == 5.0
    assert judge(choice(slow(5.0)), card(2 * ROOM)).call_s == 2.0
    assert judge(choice(slow(1.0)), card(11 * GIB)).call_s == 2.0, "never faster than with room"
    assert judge(choice(needs(U)), card(U)).call_s == 2.0
    assert judge(choice(estimated(need=NEED)), card(SMALL - MIB)).call_s is None


@pytest.mark.parametrize(
    ("set_", "capability", "expected"),
    [
        ("bf16", "7.5", "unsupported"),
        ("bf16", "8.0", "fits"),
        ("bf16", None, "fits"),
        ("fp16", "6.1", "fits"),
        ("fp8+vae_tiling", "8.6", "unsupported"),
    ],
)
@pytest.mark.parametrize("kind", [measured, estimated])
def test_a_dtype_that_the_hardware_lacks_is_not_supported(kind: Any, set_: str, capability: str, expected: str) -> None:
    verdict = judge(choice(kind(set_)), card(40 * GIB, compute_capability=capability))
    assert verdict.outcome == expected
    if expected == "unsupported":
        assert verdict.reason == f"no {set_.split('+')[0]} in hardware"
        assert (verdict.runs, verdict.required_bytes) == (False, None)


def test_not_supported_comes_before_memory() -> None:
    assert outcome(measured("bf16"), card(GIB, compute_capability="7.5")) == "unsupported"


@pytest.mark.parametrize(("usable", "expected"), [(1000 * GIB, "unknown"), (80 * GIB, "no"), (8 * GIB, "no")])
def test_out_of_memory_of_an_unknown_need_is_known_only_below_what_it_had(usable: int, expected: str) -> None:
    verdict = judge(choice(out_of_memory()), card(usable))
    assert (verdict.outcome, verdict.required_bytes, verdict.runs) == (expected, None, False)


def sized(found: Record, width: int, batch: int = 1) -> Record:
    """The record at another size."""
    case = found.case.model_copy(update={"width": width, "height": width, "batch_size": batch})
    return found.model_copy(update={"case": case})


def test_what_another_gpu_measured_speaks_where_the_first_has_nothing_that_runs() -> None:
    heavy = run([measured("fp16", 30 * GIB), measured("bf16", 28 * GIB), measured("fp32", 40 * GIB)])
    light = run([measured("fp16+model_offload", 6 * GIB)], gpu=RTX_4090, memory=24 * GIB)
    for runs in ([heavy, light], [light, heavy]):
        assert taken(gather(runs), card(12 * GIB)) == ("fp16+model_offload", "fits")


def test_a_card_that_ran_out_of_memory_itself_is_told_what_others_measured_of_other_sets() -> None:
    others = run([measured("fp16", 10 * GIB), measured("fp16+vae_slicing", 12 * GIB)])
    its_own = run([out_of_memory("fp16")], gpu=RTX_4090, memory=24 * GIB)
    on = card(24 * GIB, reported_as=RTX_4090)
    assert taken(gather([others, its_own]), on) == ("fp16+vae_slicing", "fits")


@pytest.mark.parametrize(("width", "batch", "expected"), [(1024, 4, True), (1536, 1, True), (512, 8, False)])
def test_a_choice_for_more_of_the_same_has_room_for_less(width: int, batch: int, expected: bool) -> None:
    more = sized(measured("fp16+model_offload", 6 * GIB), width, batch)
    evidence = gather([run([measured("fp16", 30 * GIB), more])])
    verdict = best(workload_of(measured()), card(12 * GIB), evidence)
    assert verdict.runs is expected
    if expected:
        assert (verdict.choice.name, verdict.choice.workload.batch_size) == ("fp16+model_offload", batch)


def test_its_own_choices_come_before_those_for_more() -> None:
    more = sized(measured("fp16", 4 * GIB), 1536)
    evidence = gather([run([measured("fp16+model_offload", 6 * GIB), more])])
    assert best(workload_of(measured()), card(12 * GIB), evidence).choice.name == "fp16+model_offload"


@pytest.mark.parametrize(
    ("need", "required"), [(70 * GIB, 80 * GIB), (100 * GIB, 100 * GIB + 768 * MIB), (GIB, 80 * GIB)]
)
def test_out_of_memory_of_a_simulated_need_takes_at_least_what_the_gpu_had(need: int, required: int) -> None:
    found = choice(out_of_memory(need=need))
    assert judge(found, card(200 * GIB)).required_bytes == required
    assert judge(found, card(200 * GIB)).outcome == "fits"
    assert judge(found, card(79 * GIB)).outcome == "no"


@pytest.mark.parametrize("visible", [80 * GIB, 80 * GIB + 200 * MIB], ids=["as measured", "other driver"])
def test_what_ran_out_of_memory_does_not_run_on_that_gpu(visible: int) -> None:
    assert outcome(out_of_memory(need=70 * GIB), card(visible, **THE_H100)) == "no"


def limited(limit: int, status: str, context: int = CONTEXT, **changes: Any) -> Record:
    """The plain case under a limit."""
    case = {"optimizations": ["fp16"], "limit_bytes": limit}
    if status == "ok":
        return measured(case=case, **changes)
    return out_of_memory(case=case, **changes).model_copy(update={"memory": Memory(context_bytes=context)})


@pytest.mark.parametrize(
    ("checks", "usable", "expected"),
    [
        ([], 14 * GIB, "fits"),
        ([limited(14 * GIB, "oom")], 14 * GIB, "no"),
        ([limited(14 * GIB, "oom")], 14 * GIB + ASSUMED_CONTEXT_BYTES - CONTEXT, "no"),
        ([limited(14 * GIB, "oom")], 14 * GIB + ASSUMED_CONTEXT_BYTES - CONTEXT + MIB, "fits"),
        ([limited(14 * GIB, "oom"), limited(13 * GIB, "oom")], 14 * GIB, "no"),
        ([limited(14 * GIB, "ok")], 14 * GIB, "fits"),
        ([limited(14 * GIB, "oom", CONTEXT, id="other").model_copy(update={"method": "estimated"})], 14 * GIB, "fits"),
    ],
    ids=["no check", "as much", "as much less the context", "more", "two", "completed", "estimated"],
)
def test_what_ran_out_of_memory_under_a_limit_does_not_fit_where_there_is_no_more(
    checks: list[Record], usable: int, expected: str
) -> None:
    evidence = of(measured(need=10 * GIB), *checks)
    assert best(only(evidence), card(usable), evidence).outcome == expected


@pytest.mark.parametrize(
    ("check", "usable", "expected"),
    [
        (None, 12 * GIB, "tight"),
        (limited(12 * GIB, "ok"), 12 * GIB, "fits"),
        (limited(12 * GIB, "ok"), 12 * GIB - 1, "tight"),
        (limited(12 * GIB, "oom"), 12 * GIB, "no"),
    ],
)
def test_an_estimate_is_trusted_where_the_case_was_seen_to_complete(
    check: Record | None, usable: int, expected: str
) -> None:
    evidence = of(unsearched(need=10 * GIB), *filter(None, [check]))
    assert best(only(evidence), card(usable), evidence).outcome == expected


def test_of_several_limits_the_least_tells() -> None:
    evidence = of(unsearched(need=10 * GIB), limited(12 * GIB, "ok"), limited(20 * GIB, "ok", id="b"))
    assert [choice.completed_within for choice in evidence.measured(only(evidence))] == [12 * GIB]


@pytest.mark.parametrize(("simulated", "expected"), [(12 * GIB, "fits"), (12 * GIB + MIB, "tight"), (None, "fits")])
def test_a_simulation_that_asks_for_more_than_was_found_makes_it_tight(simulated: int | None, expected: str) -> None:
    found = measured(need=10 * GIB, memory={"estimated_need_bytes": simulated})
    assert outcome(found, card(12 * GIB + ASSUMED_CONTEXT_BYTES)) == expected


@pytest.mark.parametrize(("since", "before"), list(product([10, 14, None], repeat=2)))
def test_of_several_simulations_the_newest_asks(since: int | None, before: int | None) -> None:
    found = measured(need=10 * GIB, memory={"estimated_need_bytes": 12 * GIB})
    guesses = [run([estimated(need=need * GIB)], gpu=None, memory=None) if need else None for need in (before, since)]
    runs = [one for one in (guesses[0], run([found]), guesses[1]) if one]
    verdict = best(WORKLOAD, card(13 * GIB), gather(runs))
    assert verdict.outcome == ("tight" if since == 14 else "fits")
    verdict = best(WORKLOAD, card(11 * GIB + ASSUMED_CONTEXT_BYTES), gather(runs))
    assert verdict.outcome == ("fits" if since == 10 else "tight")
    assert (verdict.choice.need_bytes, verdict.choice.estimated) == (10 * GIB, False)
    assert verdict.choice.memory_run.records == [found], "whose need was searched stays its own"


def test_a_simulated_need_is_that_of_the_newest_simulation() -> None:
    found, newer = run([unsearched(need=12 * GIB)]), run([estimated(need=9 * GIB)], gpu=None, memory=None)
    for runs, need, source in (([found, newer], 9 * GIB, newer), ([newer, found], 12 * GIB, found)):
        [choice] = gather(runs).measured(WORKLOAD)
        assert (choice.need_bytes, choice.estimated, choice.memory_run) == (need, True, source)


SIZES = [gib * GIB // 4 for gib in range(2, 120)]
KINDS: dict[str, list[Record]] = {
    "measured": [measured(need=n * GIB) for n in (1, 7, 20)],
    "slow": [slow(at_need) for at_need in (2.0, 2.6, 9.0)],
    "estimated": [estimated(need=n * GIB) for n in (1, 7, 20)],
    "unsearched": [unsearched(need=n * GIB) for n in (1, 7, 20)],
    "out of memory": [out_of_memory(need=n) for n in (None, 5 * GIB, 26 * GIB)],
    "bf16": [measured("bf16", need=5 * GIB)],
}


def ranks(verdicts: Sequence[Verdict]) -> list[int]:
    return [ORDER.index(verdict.outcome) for verdict in verdicts]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("capability", ["7.5", "8.9"])
def test_more_usable_memory_never_makes_a_verdict_worse(kind: str, capability: str) -> None:
    for found in KINDS[kind]:
        judged = [judge(choice(found, memory=24 * GIB), card(size, compute_capability=capability)) for size in SIZES]
        assert ranks(judged) == sorted(ranks(judged), reverse=True)
        times = [verdict.call_s or 0.0 for verdict in judged if verdict.runs]
        assert times == sorted(times, reverse=True)


def test_more_usable_memory_never_makes_the_best_verdict_worse() -> None:
    runs = [
        run(
            [
                measured("fp16", 20 * GIB, 1.0),
                measured("fp16+vae_tiling", 12 * GIB, 2.0, time={"at_need_s": 6.0}),
                measured("fp16+model_offload", 6 * GIB, 9.0),
                out_of_memory("fp32", 26 * GIB),
            ]
        ),
        run([measured("fp16+vae_slicing", 9 * GIB)], gpu=RTX_4090, memory=24 * GIB),
        no_gpu(estimated("fp16+sequential_offload", 2 * GIB), estimated("fp16+expandable_segments", 10 * GIB)),
    ]
    for several in (runs[:1], runs[1:], runs):
        evidence = gather(several)
        for plainly in (False, True):
            judged = [best(only(evidence), card(size), evidence, plainly=plainly) for size in SIZES]
            assert ranks(judged) == sorted(ranks(judged), reverse=True)
            assert len({verdict.choice.name for verdict in judged if verdict.runs}) >= 2 - plainly


def test_nor_where_what_is_known_of_a_larger_size_speaks() -> None:
    """The larger one fits where the smaller one's own sets fit tightly, or not at all."""
    evidence = of(measured("fp16", 14 * GIB), sized(measured("fp16+vae_tiling", 6 * GIB), 2048))
    judged = [best(workload_of(measured()), card(size), evidence) for size in SIZES]
    assert ranks(judged) == sorted(ranks(judged), reverse=True)
    assert {verdict.choice.name for verdict in judged if verdict.runs} == {"fp16", "fp16+vae_tiling"}


def of(*records: Record, **changes: Any) -> Evidence:
    """The evidence of one run."""
    return gather([run(records, **changes)])


def no_gpu(*records: Record) -> ReadRun:
    return run(records, gpu=None, memory=None)


def taken(evidence: Evidence, on: Card) -> tuple[str, str]:
    """The set to take for the only workload, and its verdict."""
    verdict = best(only(evidence), on, evidence)
    return verdict.choice.name, verdict.outcome


DROPPED = "fp16+text_encoders_dropped"
EXACT = "fp16+vae_tiling+vae_slicing"
EXACT = "fp16+vae_tiling+vae_slicing"
FAST, SLOW, TINY = (
    measured("fp16", 20 * GIB, 1.0),
    measured("fp16+vae_tiling", 12 * GIB, 2.5),
    measured("fp16+model_offload", 6 * GIB, 9.0),
)


@pytest.mark.parametrize(
    ("usable", "expected"),
    [
        (80 * GIB, ("fp16", "fits")),
        (21 * GIB, ("fp16+vae_tiling", "fits")),
        (13 * GIB, ("fp16+model_offload", "fits")),
        (7 * GIB, ("fp16+model_offload", "tight")),
        (4 * GIB, ("fp16+model_offload", "no")),
    ],
)
def test_what_fits_comes_before_what_fits_tightly_and_then_the_fastest(usable: int, expected: tuple[str, str]) -> None:
    assert taken(of(FAST, SLOW, TINY), card(usable)) == expected
    assert taken(of(TINY, SLOW, FAST), card(usable)) == expected


def test_of_tight_ones_the_fastest_without_room_is_taken() -> None:
    a = measured("fp16", 10 * GIB, 1.0, time={"at_need_s": 8.0})
    b = measured("fp16+vae_tiling", 10 * GIB, 2.0)
    assert taken(of(a, b), card(11 * GIB)) == ("fp16+vae_tiling", "tight")


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([measured("fp16+a+b", seconds=1.0), measured("fp16+a", seconds=SAME_TIME)], "fp16+a"),
        ([measured("fp16+a+b", seconds=1.0), measured("fp16+a", seconds=SAME_TIME + 0.01)], "fp16+a+b"),
        ([measured("fp16", 9 * GIB, 1.0), measured("bf16", 8 * GIB, 1.2)], "bf16"),
        ([measured("fp16", 9 * GIB, 1.2), measured("bf16", 9 * GIB, 1.0)], "bf16"),
        ([measured("fp16+a", 5 * GIB, 1.0), measured("fp32", 9 * GIB, 1.0)], "fp32"),
        ([measured("fp16", seconds=None), measured("fp16+a", seconds=50.0)], "fp16+a"),
        ([measured("fp16+a", 8 * GIB, seconds=None), measured("fp16+b", 7 * GIB, seconds=None)], "fp16+b"),
        ([measured("fp16+tiny_vae", 5 * GIB), measured("fp16+vae_tiling+vae_slicing", 8 * GIB)], EXACT),
        ([measured("fp16+tiny_vae", seconds=1.0), measured(EXACT, seconds=SAME_TIME + 0.01)], "fp16+tiny_vae"),
        (
            [measured(s, seconds=None) for s in ("fp16+tiny_vae", "fp16+text_encoders_dropped")],
            "fp16+text_encoders_dropped",
        ),
        ([measured(s, seconds=None) for s in ("fp16+tiny_vae", "fp16+sequential_offload")], "fp16+tiny_vae"),
        (
            [
                measured("fp16+sequential_offload", 4 * GIB, seconds=None),
                measured("fp16+group_offload_leaf_stream", 5 * GIB, seconds=None),
            ],
            "fp16+group_offload_leaf_stream",
        ),
    ],
)
def test_of_those_as_fast_fewest_flags_then_least_memory_then_the_fastest(records: list[Record], expected: str) -> None:
    for order in (records, records[::-1]):
        assert taken(of(*order), card(40 * GIB)) == (expected, "fits")


def test_of_those_as_fast_the_one_that_moves_weights_least_often_is_taken() -> None:
    """Both have one flag, and the second requires less; its time, which the host decides, tells nothing."""
    dropped = measured(DROPPED, 11 * GIB, 1.0)
    offloaded = measured("fp16+group_offload_leaf_stream", 5 * GIB, 1.5)
    assert taken(of(dropped, offloaded), card(40 * GIB)) == (DROPPED, "fits")


@pytest.mark.parametrize(("seconds", "expected"), [(2 * SAME_TIME, "fp16"), (2 * SAME_TIME + 0.01, "fp16+vae_tiling")])
def test_a_set_stands_back_for_a_part_of_it_that_is_as_fast(seconds: float, expected: str) -> None:
    """Beside the fastest the part counts as slower; beside the set itself it does not."""
    compiled = measured("fp16+compile", seconds=1.9)
    evidence = of(measured("fp16+vae_tiling", 9 * GIB, 2.0), measured(seconds=seconds), compiled)
    assert taken(evidence, card(40 * GIB))[0] == expected


def test_a_set_stands_back_for_a_part_of_it_that_moves_no_weights_however_fast_it_is() -> None:
    """Its encoding is not in its time."""
    evidence = of(measured(DROPPED, 9 * GIB, 1.0), measured("fp16", 15 * GIB, 9.0))
    assert taken(evidence, card(40 * GIB))[0] == "fp16"
    assert taken(evidence, card(12 * GIB))[0] == DROPPED


def test_of_the_parts_that_move_no_weights_the_fastest_is_taken() -> None:
    on_gpu = {"gpu_lag_s": 9.0}
    plain, last = measured("fp16", seconds=3.0, time=on_gpu), measured("fp16+channels_last", seconds=1.0, time=on_gpu)
    both = measured("fp16+channels_last+text_encoders_dropped", seconds=0.85, time=on_gpu)
    for records in ((plain, last), (plain, last, both)):
        assert taken(of(*records), card(40 * GIB))[0] == "fp16+channels_last"


def test_what_is_no_slower_than_one_that_is_as_fast_is_as_fast() -> None:
    """The GPU decides the times of two, which then tell; the host that of the third, which does not."""
    on_gpu = {"gpu_lag_s": 9.0}
    compiled = measured("fp16+compile_blocks", seconds=3.8, time=on_gpu)
    plain = measured("fp16", seconds=5.0, time=on_gpu)
    quantized = measured("fp16+int8_weight_only", 5 * GIB, seconds=6.1)
    assert taken(of(compiled, plain), card(40 * GIB))[0] == "fp16+compile_blocks"
    assert taken(of(compiled, plain, quantized), card(40 * GIB))[0] == "fp16"


@pytest.mark.parametrize(
    ("timed", "untimed", "expected"),
    [
        ("fp16+group_offload_leaf_stream", "fp16+text_encoders_dropped", "fp16+text_encoders_dropped"),
        ("fp16+sequential_offload", "fp16+model_offload", "fp16+model_offload"),
        ("fp16+sequential_offload", "fp16+bnb_4bit", "fp16+sequential_offload"),
        ("fp16+sequential_offload", "fp16+group_offload_leaf", "fp16+sequential_offload"),
        ("fp16+model_offload", "fp16+text_encoders_dropped", "fp16+model_offload"),
        ("fp16+text_encoders_dropped", "fp16", "fp16"),
        ("fp16+vae_tiling+model_offload", "fp16+vae_tiling", "fp16+vae_tiling"),
        ("fp16+vae_tiling", "fp16", "fp16+vae_tiling"),
        ("fp16+bnb_4bit+text_encoders_dropped", "fp16+bnb_4bit", "fp16+bnb_4bit+text_encoders_dropped"),
    ],
)
def test_what_moves_weights_stands_back_for_what_was_not_timed_and_moves_them_less(
    timed: str, untimed: str, expected: str
) -> None:
    evidence = gather([run([measured(timed, 3 * GIB)]), run([estimated(untimed, 9 * GIB)], gpu=None)])
    assert taken(evidence, card(20 * GIB))[0] == expected
    assert taken(evidence, card(5 * GIB))[0] == timed


@pytest.mark.parametrize("plain_s", [None, 90.0])
def test_a_set_stands_back_again_for_what_that_stands_back_for(plain_s: float | None) -> None:
    offload = run([measured("fp16+model_offload", 3 * GIB)], gpu=RTX_4090)
    plain = run([measured("fp16", 4 * GIB, seconds=plain_s)], gpu="NVIDIA Later")
    evidence = gather([run([measured("fp16+sequential_offload", GIB), measured("fp16+a", 90 * GIB)]), plain, offload])
    groups = [choices[0].gpu for choices in evidence.candidates(only(evidence)) if choices]
    assert groups == [H100, RTX_4090, "NVIDIA Later"]
    assert taken(evidence, card(20 * GIB))[0] == "fp16"
    assert taken(evidence, card(4 * GIB))[0] == "fp16+model_offload"


def test_the_time_that_counts_is_that_of_the_full_length() -> None:
    a = measured("fp16+a", seconds=1.0, time={"full_length_s": 50.0})
    b = measured("fp16+b", seconds=2.0, time={"full_length_s": 20.0})
    assert taken(of(a, b), card(40 * GIB))[0] == "fp16+b"


def test_a_set_with_an_idle_flag_stands_back() -> None:
    a, b = measured("fp16", 10 * GIB, 5.0), measured("fp16+a", 9 * GIB, 1.0, effects={"a": "no_effect"})
    assert taken(of(a, b), card(40 * GIB))[0] == "fp16"
    assert taken(of(b), card(40 * GIB))[0] == "fp16+a"
    assert taken(of(measured("fp16", 50 * GIB), idle("fp16+a", "a")), card(20 * GIB)) == ("fp16", "no")


def test_a_gpu_that_searched_no_need_leaves_the_set_to_one_that_did() -> None:
    """Even where it measured more sets than the other."""
    others = [measured(names, 50 * GIB) for names in ("bf16", "bf16+vae_tiling", "bf16+vae_slicing")]
    newer = run([unsearched("fp16", 5 * GIB), unsearched("fp16+tiny_vae", 5 * GIB), *others], gpu=RTX_4090)
    evidence = gather([run([measured("fp16", 9 * GIB)]), newer])
    assert taken(evidence, card(40 * GIB)) == ("fp16+tiny_vae", "fits")  # nobody searched this one
    assert taken(evidence, card(9 * GIB)) == ("fp16+tiny_vae", "fits")
    (plain, _), *_ = evidence.groups(evidence.subjects["sdxl"][0])
    assert plain.optimizations == ("bf16",)
    evidence = gather([run([measured("fp16", 9 * GIB)]), run([unsearched("fp16", 5 * GIB), *others], gpu=RTX_4090)])
    assert taken(evidence, card(11 * GIB)) == ("fp16", "fits")
    assert taken(evidence, card(8 * GIB)) == ("fp16", "no")


def test_gpus_that_searched_no_need_come_after_those_that_did() -> None:
    newer = run([unsearched("fp16", 5 * GIB), unsearched("fp16+vae_slicing", 5 * GIB)], gpu=RTX_4090)
    evidence = gather([run([measured("fp16", 9 * GIB)]), newer])
    assert taken(evidence, card(40 * GIB)) == ("fp16", "fits")
    assert taken(evidence, card(9 * GIB)) == ("fp16+vae_slicing", "fits")


def test_a_flag_stays_idle_on_a_gpu_that_leaves_the_set_without_it_to_another() -> None:
    idle_one = unsearched("fp16+a", 5 * GIB, effects={"a": "no_effect"})
    newer = run([unsearched("fp16", 5 * GIB), idle_one], gpu=RTX_4090)
    evidence = gather([run([measured("fp16", 6 * GIB)]), newer])
    assert taken(evidence, card(40 * GIB)) == ("fp16", "fits")


def test_a_flag_stays_idle_on_a_gpu_on_which_the_set_without_it_was_not_tried() -> None:
    idle_one = measured("fp16+a", 5 * GIB, effects={"a": "no_effect"})
    newer = run([idle_one, measured("fp16+b", 50 * GIB)], gpu=RTX_4090)
    evidence = gather([run([measured("fp16", 6 * GIB)]), newer])
    assert taken(evidence, card(40 * GIB)) == ("fp16", "fits")


def test_what_was_measured_comes_before_what_was_estimated() -> None:
    evidence = gather([run([SLOW]), no_gpu(estimated("fp16+vae_slicing", 2 * GIB))])
    assert taken(evidence, card(40 * GIB)) == ("fp16+vae_tiling", "fits")
    assert taken(evidence, card(13 * GIB)) == ("fp16+vae_slicing", "fits"), "the other fits tightly"
    assert taken(evidence, card(10 * GIB)) == ("fp16+vae_slicing", "fits")
    evidence = gather([run([SLOW]), no_gpu(estimated("fp16+vae_slicing", 11 * GIB))])
    assert taken(evidence, card(13 * GIB)) == ("fp16+vae_tiling", "tight")


def test_of_what_does_not_fit_the_smallest_measured_one_is_named() -> None:
    evidence = gather([run([FAST, SLOW, out_of_memory("fp32")]), no_gpu(estimated("bf16", 8 * GIB))])
    assert taken(evidence, card(4 * GIB)) == ("fp16+vae_tiling", "no")
    assert taken(of(out_of_memory("fp32"), unsearched("fp16", 30 * GIB)), card(4 * GIB)) == ("fp16", "no")
    assert taken(of(out_of_memory("fp32")), card(4 * GIB)) == ("fp32", "no")


def test_what_is_too_large_is_named_before_what_is_not_supported() -> None:
    turing = card(8 * GIB, compute_capability="7.5")
    assert taken(of(measured("bf16"), FAST), turing) == ("fp16", "no")
    assert taken(of(measured("bf16"), out_of_memory("fp16")), turing) == ("fp16", "no")
    assert best(only(of(measured("bf16"))), turing, of(measured("bf16"))).outcome == "unsupported"


def test_a_pipeline_of_ones_own_is_judged_like_any_other() -> None:
    evidence = of(own())
    assert taken(evidence, card(40 * GIB)) == ("", "fits")
    assert taken(evidence, card(12 * GIB)) == ("", "no")


A_4090 = card(24 * GIB, "RTX 4090", reported_as=RTX_4090)
ITS_OWN: dict[str, Any] = {"gpu": RTX_4090, "memory": 24 * GIB}


def test_what_was_measured_on_the_card_itself_is_preferred() -> None:
    evidence = gather([run([FAST, SLOW, TINY]), run([measured("bf16", 15 * GIB, 30.0)], **ITS_OWN)])
    verdict = best(only(evidence), A_4090, evidence)
    assert (verdict.choice.name, verdict.call_s, verdict.required_bytes) == ("bf16", 30.0, 15 * GIB + CONTEXT)
    assert taken(evidence, card(24 * GIB)) == ("fp16", "fits")
    assert taken(evidence, card(12 * GIB, reported_as=RTX_4090)) == ("fp16+model_offload", "fits"), "another memory"


def test_an_estimate_is_not_taken_for_a_measurement_on_the_card_itself() -> None:
    evidence = gather([run([estimated("bf16", 2 * GIB)], **ITS_OWN), run([SLOW])])
    assert taken(evidence, A_4090) == ("fp16+vae_tiling", "fits")


LADDER = [card(size * GIB) for size in (40, 4, 16, 80, 8, 24)]


def size_of(verdict: Verdict | None) -> tuple[float, str] | None:
    return (verdict.card.memory_gib, verdict.choice.name) if verdict else None


def test_minimum_is_the_smallest_card_that_runs_it_at_all() -> None:
    evidence = of(FAST, SLOW, TINY)
    assert size_of(minimum(only(evidence), LADDER, evidence)) == (8, "fp16+model_offload")
    tight = of(needs(8 * GIB))
    found = minimum(only(tight), LADDER, tight)
    assert size_of(found) == (8, "fp16")
    assert found is not None
    assert found.outcome == "tight"


def test_nothing_runs_what_is_larger_than_every_card() -> None:
    for found in (measured(need=81 * GIB), out_of_memory()):
        evidence = of(found)
        assert minimum(only(evidence), LADDER, evidence) is None
        assert recommended(only(evidence), LADDER, evidence) is None
        assert minimum(only(evidence), [], evidence) is None


@pytest.mark.parametrize("change", [{"vendor": "amd"}, {"vendor": "intel"}, {"kind": "unified"}])
def test_only_cards_that_were_tried_and_have_their_own_memory_are_named(change: dict[str, Any]) -> None:
    evidence = of(FAST)
    cards = [card(22 * GIB, **change), card(40 * GIB)]
    for found in (minimum(only(evidence), cards, evidence), recommended(only(evidence), cards, evidence)):
        assert size_of(found) == (40, "fp16")


def test_of_cards_with_the_same_box_the_better_known_then_the_smaller_is_named() -> None:
    def boxed(name: str, usable: int, headline: bool) -> Card:
        return card(usable * GIB, name, memory_gib=24, headline=headline)

    evidence = of(SLOW)
    cards = [boxed("b", 20, False), boxed("a", 22, True), boxed("c", 21, True), card(30 * GIB, "d", headline=True)]
    for order in (cards, cards[::-1]):
        found = minimum(only(evidence), order, evidence)
        assert found is not None
        assert found.card.name == "c"


def test_recommended_fits_and_runs_at_full_speed() -> None:
    evidence = of(FAST, SLOW, TINY)
    assert size_of(recommended(only(evidence), LADDER, evidence)) == (24, "fp16")


@pytest.mark.parametrize(("seconds", "expected"), [(SAME_TIME, 16), (SAME_TIME + 0.01, 24)])
def test_full_speed_is_within_the_noise_of_the_fastest(seconds: float, expected: int) -> None:
    evidence = of(FAST, measured("fp16+vae_tiling", 12 * GIB, seconds))
    found = recommended(only(evidence), LADDER, evidence)
    assert found is not None
    assert found.card.memory_gib == expected


def test_recommended_keeps_all_weights_on_the_gpu() -> None:
    evidence = of(FAST, measured("fp16+model_offload", 6 * GIB, 1.0), measured(DROPPED, 12 * GIB, 0.4))
    assert size_of(recommended(only(evidence), LADDER, evidence)) == (24, "fp16")
    small = [card(8 * GIB), card(16 * GIB)]
    assert size_of(recommended(only(evidence), small, evidence)) == (16, DROPPED), "where no card runs it so"


def test_recommended_leaves_the_image_alone() -> None:
    compiled, quantized = measured("fp16+compile", 20 * GIB, 0.4), measured("fp16+int8_weight_only", 10 * GIB, 1.0)
    evidence = of(FAST, compiled, quantized)
    found = recommended(only(evidence), LADDER, evidence)
    assert size_of(found) == (24, "fp16"), "although it is slower than the fastest"
    evidence = of(compiled, quantized)
    assert size_of(recommended(only(evidence), LADDER, evidence)) == (24, "fp16+compile"), "nothing else was tried"


def test_where_nothing_leaves_the_image_alone_that_runs_each_may_change_it() -> None:
    quantized = measured("fp16+int8_weight_only", 10 * GIB, 1.0)
    lost = run([out_of_memory("fp16"), quantized], gpu=RTX_4090, memory=24 * GIB)
    each = {"allocated_peak_bytes": GIB, "need_bytes": GIB, "context_bytes": MIB, "required_bytes": GIB + MIB}
    spread = run([measured("fp16+device_map_balanced", 8 * GIB, gpus=[each] * 2), quantized])
    for one in (lost, spread):
        evidence = gather([one])
        assert size_of(recommended(only(evidence), LADDER, evidence)) == (16, "fp16+int8_weight_only")


def test_what_is_known_of_a_larger_size_is_recommended_only_with_the_image_as_it_is() -> None:
    evidence = gather([run([measured("fp16", 20 * GIB), sized(measured("fp16+int8_weight_only", 8 * GIB), 2048)])])
    assert size_of(best(workload_of(measured()), card(12 * GIB), evidence)) == (12, "fp16+int8_weight_only")
    assert size_of(recommended(workload_of(measured()), LADDER, evidence)) == (24, "fp16")


def test_full_speed_is_that_of_the_set_that_is_taken() -> None:
    on_gpu = {"gpu_lag_s": 9.0}
    evidence = of(
        measured("fp16+expandable_segments", 8 * GIB, 1.0, time=on_gpu),
        measured("fp16+vae_slicing", 8 * GIB, 1.6),
        measured("fp16", 8 * GIB, 1.55, time=on_gpu),
    )
    assert taken(evidence, card(40 * GIB)) == ("fp16", "fits")
    assert size_of(recommended(only(evidence), LADDER, evidence)) == (16, "fp16")


def test_a_card_that_nobody_is_recommended_decides_nothing() -> None:
    evidence = of(FAST, measured("fp16+model_offload", 6 * GIB, 9.0))
    cards = [card(8 * GIB), card(40 * GIB, vendor="amd"), card(40 * GIB, kind="unified")]
    assert size_of(recommended(only(evidence), cards, evidence)) == (8, "fp16+model_offload")


def test_recommended_is_not_tight() -> None:
    evidence = of(needs(8 * GIB))
    assert size_of(recommended(only(evidence), LADDER, evidence)) == (16, "fp16")


def test_the_fastest_is_one_that_some_card_runs() -> None:
    evidence = of(measured("fp32", 300 * GIB, 1.0), measured("fp16", 10 * GIB, 5.0))
    assert size_of(recommended(only(evidence), LADDER, evidence)) == (16, "fp16")


def test_the_fastest_is_none_with_an_idle_flag() -> None:
    evidence = of(measured("fp16", 10 * GIB, 5.0), measured("fp16+a", 10 * GIB, 1.0, effects={"a": "no_effect"}))
    assert size_of(recommended(only(evidence), LADDER, evidence)) == (16, "fp16")


def test_a_card_with_measurements_of_its_own_is_compared_with_its_own_fastest() -> None:
    evidence = gather([run([FAST, SLOW]), run([measured("fp16", 20 * GIB, 4.0)], **ITS_OWN)])
    found = recommended(only(evidence), [A_4090, card(80 * GIB)], evidence)
    assert found is not None
    assert (found.card.name, found.call_s) == ("RTX 4090", 4.0)


def test_an_estimate_is_recommended_without_offload() -> None:
    evidence = gather([no_gpu(estimated("fp16", 20 * GIB), estimated("fp16+model_offload", 5 * GIB))])
    assert size_of(minimum(only(evidence), LADDER, evidence)) == (8, "fp16+model_offload")
    assert size_of(recommended(only(evidence), LADDER, evidence)) == (24, "fp16")
    assert size_of(recommended(only(evidence), [card(40 * GIB)], evidence)) == (40, "fp16")
    assert recommended(only(evidence), [card(8 * GIB)], evidence) is None


def batches(*needs_gib: int) -> tuple[list[Workload], Evidence]:
    sizes = [measured(need=need * GIB, case={"batch_size": 1 << n}) for n, need in enumerate(needs_gib)]
    evidence = of(*sizes)
    return list(evidence.choices), evidence


@pytest.mark.parametrize(
    ("needs_gib", "expected"), [((5, 10, 20, 40), 2), ((5, 30, 20), 4), ((30, 40), None), ((1, 2), 2), ((), None)]
)
def test_the_largest_workload_that_runs(needs_gib: tuple[int, ...], expected: int | None) -> None:
    workloads, evidence = batches(*needs_gib)
    found = largest(workloads, card(19 * GIB if 40 in needs_gib else 22 * GIB), evidence)
    assert (found and found[0].batch_size) == expected


def test_a_choice_keeps_its_run() -> None:
    found: Choice = choice(FAST)
    assert judge(found, A_4090).choice is found
