"""The rule of comparing, clause by clause: just within a limit is the same, just above it is not."""

import random
from pathlib import Path
from typing import Any

import pytest

from pytest_vram.cases.thresholds import Limits, Thresholds
from pytest_vram.compare.comparing import check_comparable, compare, compare_case, flagged
from pytest_vram.compare.comparison import ORDER, CaseComparison, Change, Comparison, Word
from pytest_vram.compare.timing import Again
from pytest_vram.errors import NotComparable
from pytest_vram.records.files import Refused
from pytest_vram.records.reading import ReadRun
from pytest_vram.records.schema import NOT_SEARCHED, Record, Run
from tests.records.test_schema import BARE, FAILURE, MIB, OWN, facts, own, record

ENVIRONMENT: dict[str, Any] = {
    "gpu": "NVIDIA H100 80GB HBM3",
    "mig": False,
    "power_limit_w": 700.0,
    "driver": "580.159.04",
    "torch": "2.11.0",
    "cuda": "13.0",
    "start": "fork",
    "variables": {},
    "commit": "1a2b3c4",
    "dirty": False,
    "started": "2026-11-23T00:00:00+00:00",
}
OPTIONS: dict[str, Any] = {"device": "cuda", "tests": ["bench"], "overrides": {}, "deselected": []}
MEMORY = {
    "allocated": "memory.allocated_peak_bytes",
    "need": "memory.need_bytes",
    "host": "memory.host_peak_bytes",
}
ID = "sdxl/fp16/1024x1024/b1"
DEFAULT = Limits()


def a_run(*records: Record, name: str = "run.json", refused: tuple[Refused, ...] = (), **changes: Any) -> ReadRun:
    """A run of these records; `environment` and `options` in `changes` are added to the usual ones."""
    environment = {**ENVIRONMENT, **changes.pop("environment", {})}
    options = {**OPTIONS, **changes.pop("options", {})}
    facts: dict[str, Any] = {"sweep": "default", "environment": environment, "options": options, **changes}
    return ReadRun(Path(name), Run(**facts, records=list(records)), refused)


def remembered(**changes: Any) -> Record:
    """A record that knows only this of its memory: `allocated`, `need` and `host` in bytes, or a metric's own name."""
    memory = changes.pop("memory", {})
    for name, metric in MEMORY.items():
        if name in changes:
            memory = {**memory, metric.removeprefix("memory."): changes.pop(name)}
    return record(memory={**BARE, **memory}, **changes)


def timed(*medians: float, time: dict[str, Any] | None = None, **changes: Any) -> Record:
    """A record of workers with these medians, of which the first is the case's."""
    workers = [{"rounds_s": [median], "median_s": median} for median in medians]
    known = {"median_s": sorted(medians)[len(medians) // 2], "workers": workers, **(time or {})}
    return record(memory=BARE, time=known, **changes)


def fresh_case(base: float, head: float) -> Again:
    """Three fresh workers a side."""
    return Again([timed(base)] * 3, [timed(head)] * 3)


def failed(status: str, **changes: Any) -> Record:
    reason = "bf16 is not for it" if status == "skipped" else None
    known = {"status": status, "reason": reason, "failure": FAILURE, "time": {}, "memory": BARE, **changes}
    return record(**known)


def limits(**table: Any) -> Limits:
    return Limits([Thresholds.model_validate(table)])


def compared(base: Record, head: Record, limits: Limits = DEFAULT, **more: Any) -> CaseComparison:
    return compare_case(base, head, limits, **more)


def change(case: CaseComparison, metric: str) -> Change:
    [found] = [change for change in case.changes if change.metric == metric]
    return found


def whole(base: ReadRun, head: ReadRun, limits: Limits = DEFAULT, **more: Any) -> Comparison:
    return compare(base, head, limits, **more)


def verdicts(comparison: Comparison) -> dict[str, Word]:
    assert len({case.id for case in comparison.cases}) == len(comparison.cases)
    return {case.id: case.verdict for case in comparison.cases}


# Memory

LARGE, SMALL = 10000 * MIB, 1000 * MIB  # of which 2 % are above and below 32 MiB, 5 % above and below 256 MiB


@pytest.mark.parametrize(
    ("metric", "base", "allowed"),
    [
        ("allocated", LARGE, 200 * MIB),
        ("allocated", SMALL, 32 * MIB),
        ("need", LARGE, 200 * MIB),
        ("need", SMALL, 20 * MIB),
        ("host", LARGE, 500 * MIB),
        ("host", SMALL, 256 * MIB),
    ],
)
@pytest.mark.parametrize(
    ("sign", "more", "verdict"), [(1, 0, "same"), (1, 1, "worse"), (-1, 0, "same"), (-1, 1, "better")]
)
def test_memory_changes_where_the_difference_is_above_both_limits(
    metric: str, base: int, allowed: int, sign: int, more: int, verdict: Word
) -> None:
    head = base + sign * (allowed + more)
    found = compared(remembered(**{metric: base}), remembered(**{metric: head}))
    told = change(found, MEMORY[metric])
    assert (found.verdict, told.verdict) == (verdict, verdict)
    assert (told.base, told.head, told.allowed) == (base, head, allowed)


@pytest.mark.parametrize("phase", ["load", "encode", "denoise", "decode", "call"])
@pytest.mark.parametrize(
    ("grown", "verdict"),
    [(32 * MIB, "same"), (32 * MIB + 1, "worse"), (-32 * MIB, "same"), (-32 * MIB - 1, "better")],
)
def test_each_phase_has_the_limit_of_the_whole(phase: str, grown: int, verdict: Word) -> None:
    before, now = (remembered(phases={phase: {"allocated_peak_bytes": value}}) for value in (SMALL, SMALL + grown))
    found = compared(before, now)
    assert (found.verdict, change(found, f"phases.{phase}.allocated_peak_bytes").verdict) == (verdict, verdict)


def test_a_peak_that_stays_hides_no_phase_that_grew_under_it() -> None:
    phases = {"denoise": {"allocated_peak_bytes": LARGE}, "decode": {"allocated_peak_bytes": SMALL}}
    grown = {**phases, "decode": {"allocated_peak_bytes": 2 * SMALL}}
    found = compared(remembered(allocated=LARGE, phases=phases), remembered(allocated=LARGE, phases=grown))
    assert found.verdict == "worse"
    assert [c.metric for c in found.changes if c.verdict == "worse"] == ["phases.decode.allocated_peak_bytes"]


def test_a_phase_that_grew_outweighs_a_peak_that_shrank() -> None:
    phases = [{"decode": {"allocated_peak_bytes": value}} for value in (SMALL, 2 * SMALL)]
    found = compared(remembered(allocated=LARGE, phases=phases[0]), remembered(allocated=SMALL, phases=phases[1]))
    assert {c.verdict for c in found.changes} >= {"better", "worse"}
    assert found.verdict == "worse"


@pytest.mark.parametrize("tolerances", [(64, 16), (16, 64), (64, None), (None, 64), (64, 64)])
@pytest.mark.parametrize(
    ("sign", "more", "verdict"), [(1, 0, "same"), (1, 1, "worse"), (-1, 0, "same"), (-1, 1, "better")]
)
def test_a_need_may_move_by_twice_the_larger_tolerance_of_its_searches(
    tolerances: tuple[int | None, int | None], sign: int, more: int, verdict: Word
) -> None:
    before, now = (
        remembered(need=need, memory={"need_tolerance_bytes": tolerance and tolerance * MIB})
        for need, tolerance in zip((SMALL, SMALL + sign * (128 * MIB + more)), tolerances, strict=True)
    )
    assert compared(before, now).verdict == verdict


def test_a_need_whose_search_was_fine_may_still_move_by_its_share() -> None:
    fine = {"need_tolerance_bytes": 16 * MIB}
    base = remembered(need=LARGE, memory=fine)
    assert compared(base, remembered(need=LARGE + 200 * MIB, memory=fine)).verdict == "same"
    assert compared(base, remembered(need=LARGE + 200 * MIB + 1, memory=fine)).verdict == "worse"


@pytest.mark.parametrize(
    "metric",
    [
        "weights_bytes",
        "reserved_peak_bytes",
        "nvml_process_peak_bytes",
        "nvml_device_peak_bytes",
        "context_bytes",
        "required_bytes",
        "estimated_need_bytes",
        "estimated_allocated_peak_bytes",
        "alloc_retries",
        "at_need_alloc_retries",
    ],
)
def test_what_gates_nothing(metric: str) -> None:
    figures = remembered(memory={metric: SMALL}), remembered(memory={metric: 4 * SMALL}), remembered()
    for base in figures:
        for head in figures:
            found = compared(base, head)
            assert found.verdict == "same"
            assert not any(metric in c.metric for c in found.changes)


@pytest.mark.parametrize("metric", MEMORY)
@pytest.mark.parametrize("key", ["the metric", "its group"])
def test_a_figure_that_became_null_is_worse_with_its_reason(metric: str, key: str) -> None:
    name = MEMORY[metric] if key == "the metric" else "memory"
    head = remembered(unavailable={name: "a probe hung", "time": "another reason"})
    found = compared(remembered(**{metric: SMALL}), head)
    told = change(found, MEMORY[metric])
    assert (found.verdict, told.verdict, told.base, told.head) == ("worse", "worse", SMALL, None)
    assert "a probe hung" in told.reason
    assert "null" in told.reason


def test_a_figure_that_became_null_for_no_reason_is_worse() -> None:
    found = compared(remembered(host=SMALL), remembered())
    assert (found.verdict, change(found, MEMORY["host"]).verdict) == ("worse", "worse")
    assert "not reported" in change(found, MEMORY["host"]).reason


@pytest.mark.parametrize("phases", [{}, {"decode": {}}, {"encode": {"allocated_peak_bytes": SMALL}}])
def test_a_phase_that_became_null_is_worse_with_its_reason(phases: Any) -> None:
    before = remembered(phases={"decode": {"allocated_peak_bytes": SMALL}})
    found = compared(before, remembered(phases=phases, unavailable={"phases": "no VAE was called"}))
    told = change(found, "phases.decode.allocated_peak_bytes")
    assert (found.verdict, told.verdict) == ("worse", "worse")
    assert "no VAE was called" in told.reason


def test_a_figure_that_the_base_lacks_says_nothing() -> None:
    found = compared(remembered(), remembered(allocated=SMALL, need=SMALL, host=SMALL))
    assert (found.verdict, [c for c in found.changes if c.metric in MEMORY.values()]) == ("same", [])


def test_a_need_that_nobody_searched_is_no_failure() -> None:
    base = remembered(allocated=SMALL, need=SMALL)
    head = remembered(allocated=SMALL, unavailable={MEMORY["need"]: NOT_SEARCHED})
    found = compared(base, head)
    assert (found.verdict, change(found, MEMORY["need"]).verdict) == ("same", "not comparable")
    assert any("--vram-no-need" in note for note in whole(a_run(base), a_run(head)).notes)
    grown = remembered(allocated=2 * SMALL, unavailable={MEMORY["need"]: NOT_SEARCHED})
    assert compared(base, grown).verdict == "worse"


# Status

STATUSES = ("ok", "oom", "skipped", "timeout", "error")
BECAME: dict[str, tuple[Word, ...]] = {  # what each of them became
    "ok": ("same", "worse", "worse", "worse", "worse"),
    "oom": ("better", "same", "worse", "worse", "worse"),
    "skipped": ("new", "new", "same", "worse", "worse"),
    "timeout": ("better", "better", "same", "same", "same"),
    "error": ("better", "better", "same", "same", "same"),
}


@pytest.mark.parametrize("before", STATUSES)
@pytest.mark.parametrize("now", STATUSES)
def test_the_status_of_a_case(before: str, now: str) -> None:
    sides = {"ok": record(), **{name: failed(name) for name in STATUSES if name != "ok"}}
    found = compared(sides[before], sides[now])
    assert found.verdict == BECAME[before][STATUSES.index(now)]
    if (before, now) != ("ok", "ok"):
        said = {"oom": "out of memory"}
        assert found.reason.index(said.get(before, before)) <= found.reason.rindex(said.get(now, now))
        assert found.changes == []


@pytest.mark.parametrize("now", ["ok", "oom"])
def test_a_case_that_ran_for_the_first_time_fails_nothing(now: str) -> None:
    first = record(id="b4") if now == "ok" else failed("oom", id="b4")
    found = whole(a_run(record(), failed("skipped", id="b4")), a_run(record(), first))
    assert (verdicts(found), found.failed) == ({ID: "same", "b4": "new"}, False)


def test_a_base_that_skipped_every_case_is_no_base_of_other_cases() -> None:
    found = whole(a_run(failed("skipped"), record(id="b4")), a_run(record()))
    assert verdicts(found) == {ID: "new", "b4": "vanished"}


@pytest.mark.parametrize(
    ("head", "why"),
    [
        (failed("error", failure={"phase": "decode", "message": "CUDA broke"}), ("CUDA broke", "decode")),
        (failed("timeout", failure={"message": "600 s"}), ("600 s",)),
        (failed("skipped", reason="bf16 is not for it"), ("bf16 is not for it",)),
        (failed("oom", failure={"phase": "denoise", "message": "x"}), ("denoise",)),
    ],
)
def test_why_a_case_does_not_complete_any_more(head: Record, why: tuple[str, ...]) -> None:
    assert all(part in compared(record(), head).reason for part in why)


def test_a_failure_in_no_phase_names_none() -> None:
    assert "None" not in compared(record(), failed("error", failure={"message": "CUDA broke"})).reason


def test_a_case_that_completed_with_no_figures_is_the_same() -> None:
    bare = remembered(time={"workers": timed(1.0).time.workers})
    found = compared(bare, bare)
    assert (found.verdict, found.changes) == ("same", [])


# Effects


@pytest.mark.parametrize(
    ("before", "now", "verdict"),
    [
        ("applied", "no_effect", "worse"),
        ("no_effect", "applied", "better"),
        ("applied", "applied", "same"),
        ("no_effect", "no_effect", "same"),
    ],
)
def test_an_optimization_that_no_longer_takes_effect(before: str, now: str, verdict: Word) -> None:
    found = compared(remembered(effects={"vae_tiling": before}), remembered(effects={"vae_tiling": now}))
    assert found.verdict == verdict
    assert [c.metric for c in found.changes if "vae_tiling" in c.metric] == ["effects.vae_tiling"] * (before != now)


@pytest.mark.parametrize("effect", ["applied", "no_effect"])
def test_an_effect_that_one_side_did_not_watch_says_nothing(effect: str) -> None:
    watched, not_watched = remembered(effects={"vae_tiling": effect}), remembered()
    for pair in ((watched, not_watched), (not_watched, watched)):
        assert compared(*pair).verdict == "same"


def test_the_worst_of_several_metrics_is_the_verdict() -> None:
    base = remembered(allocated=LARGE, need=LARGE, effects={"vae_tiling": "no_effect"})
    better = remembered(allocated=SMALL, need=LARGE, effects={"vae_tiling": "applied"})
    worse = remembered(allocated=SMALL, need=2 * LARGE, effects={"vae_tiling": "applied"})
    assert compared(base, better).verdict == "better"
    assert compared(base, worse).verdict == "worse"


# Time: the rule is timing.py's


def test_a_slower_case_of_single_workers_is_ambiguous_and_of_fresh_ones_worse() -> None:
    base, head = timed(1.0), timed(1.2)
    found = compared(base, head)
    assert (found.verdict, change(found, "time.median_s").verdict) == ("ambiguous", "ambiguous")
    again = fresh_case(1.0, 1.2)
    assert compared(base, head, again=again).verdict == "worse"
    assert verdicts(whole(a_run(base), a_run(head), again={ID: again})) == {ID: "worse"}
    assert verdicts(whole(a_run(base), a_run(head), again={"another": again})) == {ID: "ambiguous"}


def test_memory_that_grew_outweighs_an_ambiguous_time() -> None:
    before, now = ({**BARE, "allocated_peak_bytes": value} for value in (SMALL, 2 * SMALL))
    base = record(memory=before, time=timed(1.0).time.model_dump())
    head = record(memory=now, time=timed(1.2).time.model_dump())
    assert compared(base, head).verdict == "worse"


def test_the_cases_that_fresh_workers_should_decide() -> None:
    cases = {
        "slower": (timed(1.0), timed(1.06)),
        "same": (timed(1.0), timed(1.05)),
        "faster": (timed(1.0), timed(0.5)),
        "other steps": (timed(1.0), timed(2.0, case={"steps": 9})),
        "failed": (timed(1.0), failed("error")),
        "failed before": (failed("error"), timed(1.0)),
        "failed after a while": (timed(1.0), failed("error", time=timed(2.0).time.model_dump())),
        "no time": (remembered(time={"workers": [{"rounds_s": [1.0], "median_s": 1.0}]}), timed(2.0)),
    }
    base, head = (
        a_run(*(both[side].model_copy(update={"id": name}) for name, both in cases.items())) for side in (0, 1)
    )
    new = timed(9.0, id="new")
    head.run.records.append(new)
    assert flagged(base, head, DEFAULT) == ["slower"]
    assert flagged(base, head, DEFAULT, across=["steps"]) == ["slower", "other steps"]
    assert flagged(base, head, limits(time={"relative": 0.01})) == ["slower", "same"]
    assert flagged(base, head, limits(only=[{"ids": ["slow*"], "time": {"relative": 0.5}}])) == []


def test_it_is_said_whether_the_base_was_measured_again() -> None:
    slow = {name: (timed(1.0, id=name), timed(1.2, id=name)) for name in ("a", "b")}
    base, head = (a_run(*(both[side] for both in slow.values())) for side in (0, 1))
    again = dict.fromkeys(slow, fresh_case(1.0, 1.2))

    def said(comparison: Comparison) -> str:
        return "; ".join(note for note in comparison.notes if "again" in note)

    assert "not measured again" in said(whole(base, head))
    assert "some" not in said(whole(base, head))
    assert "some" in said(whole(base, head, again={"a": again["a"]}))
    assert "some" in said(whole(base, head, again={"a": fresh_case(1.0, 1.0)}))
    assert said(whole(base, head, again=again)) == ""
    assert said(whole(base, base)) == ""


# Limits of one's own


@pytest.mark.parametrize("metric", MEMORY)
def test_a_metric_has_its_own_limit(metric: str) -> None:
    others = {name: {"relative": 1e-9, "absolute": "1B"} for name in MEMORY if name != metric}
    base, head = remembered(**{metric: LARGE}), remembered(**{metric: LARGE + 2000 * MIB})
    assert compared(base, head).verdict == "worse"
    assert compared(base, head, limits(**others, **{metric: {"relative": 0.2}})).verdict == "same"
    assert compared(base, head, limits(**{metric: {"absolute": "2000MiB"}})).verdict == "same"
    assert compared(base, head, limits(**{metric: {"absolute": "1999MiB"}})).verdict == "worse"


def test_the_limit_of_the_allocated_peak_is_that_of_the_phases_too() -> None:
    base, head = (remembered(phases={"decode": {"allocated_peak_bytes": value}}) for value in (SMALL, 2 * SMALL))
    assert compared(base, head, limits(allocated={"relative": 1})).verdict == "same"
    assert compared(base, head, limits(need={"relative": 1})).verdict == "worse"


def test_a_need_s_own_limit_does_not_undercut_the_tolerance_of_its_search() -> None:
    strict = limits(need={"relative": 1e-9, "absolute": "1B"})
    base = remembered(need=SMALL, memory={"need_tolerance_bytes": 64 * MIB})
    assert compared(base, remembered(need=SMALL + 128 * MIB), strict).verdict == "same"
    assert compared(base, remembered(need=SMALL + 129 * MIB), strict).verdict == "worse"


@pytest.mark.parametrize("only", [{"models": ["sdxl"]}, {"ids": ["sdxl/*/b1"]}])
def test_limits_of_some_cases_only(only: Any) -> None:
    loose = limits(only=[{**only, "allocated": {"relative": 1.0}}])
    two = {"id": "sdxl-turbo/fp16/512x512/b4", "case": {"model": "sdxl-turbo"}}
    base = a_run(remembered(allocated=SMALL), remembered(allocated=SMALL, **two))
    head = a_run(remembered(allocated=2 * SMALL), remembered(allocated=2 * SMALL, **two))
    assert verdicts(whole(base, head, loose)) == {ID: "same", two["id"]: "worse"}


def test_a_limit_that_nothing_reaches() -> None:
    assert compared(remembered(host=SMALL), remembered(host=LARGE), limits(host={"absolute": "1000TB"})).verdict == (
        "same"
    )


# Comparable cases


@pytest.mark.parametrize(
    ("case", "key", "values"),
    [
        ({"steps": 4}, "steps", ("8", "4")),
        ({"scheduler": "PNDMScheduler"}, "scheduler", ("EulerDiscreteScheduler", "PNDMScheduler")),
        ({"guidance_scale": 7.5}, "guidance_scale", ("5.0", "7.5")),
        ({"seed": 1}, "seed", ("0", "1")),
        ({"weights": "pretrained"}, "weights", ("random", "pretrained")),
        ({"sequence_length": 77}, "sequence_length", ("not known", "77")),
    ],
)
def test_a_case_of_other_terms_is_not_comparable_unless_that_is_lifted(
    case: Any, key: str, values: tuple[str, str]
) -> None:
    base, head = remembered(allocated=SMALL), remembered(allocated=2 * SMALL, case=case)
    found = compared(base, head)
    assert (found.verdict, found.changes) == ("not comparable", [])
    assert all(part in found.reason for part in (key, *values))
    assert compared(base, head, across=[key]).verdict == "worse"
    assert compared(base, head, across=["torch"]).verdict == "not comparable"
    [lifted] = whole(a_run(base), a_run(head), across=[key]).across
    assert (lifted.key, lifted.base, lifted.head) == (key, *values)


def test_another_method_is_not_comparable_unless_that_is_lifted() -> None:
    base, head = remembered(allocated=SMALL), remembered(allocated=2 * SMALL, method="estimated")
    assert compared(base, head).verdict == "not comparable"
    assert all(word in compared(base, head).reason for word in ("method", "measured", "estimated"))
    assert compared(base, head, across=["method"]).verdict == "worse"
    assert [d.key for d in whole(a_run(base), a_run(head), across=["method"]).across] == ["method"]


def test_every_key_that_differs_must_be_lifted() -> None:
    base, head = record(), record(case={"steps": 4, "seed": 1})
    assert compared(base, head, across=["steps"]).verdict == "not comparable"
    assert "seed" in compared(base, head, across=["steps"]).reason
    assert compared(base, head, across=["steps", "seed"]).verdict == "same"
    found = whole(a_run(base), a_run(head), across=["seed", "steps"])
    assert {d.key for d in found.across} == {"steps", "seed"}


def test_a_failure_of_other_terms_is_not_comparable_either() -> None:
    assert compared(record(), failed("error", case={"steps": 4})).verdict == "not comparable"


@pytest.mark.parametrize("across", [["torch"], ["scheduler"], ["method"]])
def test_a_key_that_was_not_lifted_is_not_said_to_be(across: list[str]) -> None:
    other = a_run(record(case={"steps": 4, "scheduler": "PNDMScheduler"}), record(id="two"))
    found = whole(a_run(record(), record(id="two")), other, across=across)
    assert verdicts(found)[ID] == "not comparable"
    assert "steps" not in {d.key for d in found.across}


# A pipeline of one's own


def test_the_functions_of_a_test_may_be_renamed() -> None:
    renamed = {**OWN, "build": "painter.py:make", "call": "painter.py:use"}
    head = Record.model_validate({**facts(id=own().id, memory={"allocated_peak_bytes": 15000 * MIB}), "case": renamed})
    assert compared(own(), head).verdict == "worse"
    assert compared(own(), Record.model_validate({**facts(id=own().id), "case": renamed})).verdict == "same"


def test_a_test_s_own_pipeline_is_not_a_sweep_s_case() -> None:
    for base, head in ((own(), record()), (record(), own())):
        found = compared(base, head)
        assert found.verdict == "not comparable"
        assert "case" in found.reason


def test_which_side_is_the_test_s_own() -> None:
    reason = compared(own(), record()).reason
    assert reason.index("own in the base") < reason.index("in the head")


# New, vanished, refused


def test_a_case_that_the_base_lacks_is_new() -> None:
    found = whole(a_run(record()), a_run(record(), record(id="b4")))
    assert verdicts(found) == {ID: "same", "b4": "new"}
    assert not found.failed


def test_a_case_that_the_head_lacks_has_vanished() -> None:
    found = whole(a_run(record(), record(id="b4")), a_run(record()))
    assert verdicts(found) == {ID: "same", "b4": "vanished"}
    assert found.failed
    assert not any("fewer" in note for note in found.notes)


ASKED = [
    {"options": {"tests": ["bench/test_generation.py"]}},
    {"options": {"overrides": {"models": ["sdxl"]}}},
    {"options": {"selection": {"keyword": "b1"}}},
    {"options": {"selection": {"lf": True}}},
    {"options": {"selection": {"ignore": ["bench/video"]}}},
    {"sweep": "quick"},
]


@pytest.mark.parametrize("changed", ASKED)
@pytest.mark.parametrize("side", ["base", "head"])
def test_what_was_not_asked_for_has_not_vanished_but_is_counted(changed: dict[str, Any], side: str) -> None:
    records = record(), record(id="b4"), record(id="b8")
    base = a_run(*records, **(changed if side == "base" else {}))
    found = whole(base, a_run(record(), **(changed if side == "head" else {})))
    assert (verdicts(found), found.failed) == ({ID: "same"}, False)
    assert any("2 cases" in note for note in found.notes)
    both = whole(a_run(*records, **changed), a_run(record(), **changed))
    assert verdicts(both) == {ID: "same", "b4": "vanished", "b8": "vanished"}


def test_the_same_was_asked_for_whether_the_options_come_from_a_session_or_a_file() -> None:
    base = a_run(record(), record(id="b4"), options={"overrides": {"models": ["sdxl"]}})
    head = a_run(record(), options={"overrides": {"models": ("sdxl",)}})
    assert verdicts(whole(base, head)) == {ID: "same", "b4": "vanished"}


@pytest.mark.parametrize("sides", [({}, {"selection": {}}), ({"selection": {}}, {}), ({"selection": None}, {})])
def test_who_selects_nothing_asked_for_the_same_as_an_older_file(sides: tuple[dict[str, Any], dict[str, Any]]) -> None:
    found = whole(a_run(record(), record(id="b4"), options=sides[0]), a_run(record(), options=sides[1]))
    assert verdicts(found) == {ID: "same", "b4": "vanished"}


def test_another_selection_is_not_the_same() -> None:
    base, head = ({"selection": {"keyword": word}} for word in ("b1 or b4", "b1"))
    found = whole(a_run(record(), record(id="b4"), options=base), a_run(record(), options=head))
    assert verdicts(found) == {ID: "same"}


def test_a_deselected_test_that_measures_twice_is_left_out_twice() -> None:
    ids = ["t.py::a", "t.py::a#2", "t.py::a#10", "t.py::a#", "t.py::a#x", "t.py::a#2b", "t.py::ab", "t.py::b#2"]
    base = a_run(record(), *(record(id=name) for name in ids))
    found = whole(base, a_run(record(), options={"deselected": ["t.py::a"]}))
    assert verdicts(found) == {ID: "same", **dict.fromkeys(ids[3:], "vanished")}
    assert any("3 cases" in note for note in found.notes)
    second = whole(base, a_run(record(), options={"deselected": ["t.py::a#2"]}))
    assert verdicts(second) == {ID: "same", **dict.fromkeys([ids[0], *ids[2:]], "vanished")}


def test_what_was_deselected_has_not_vanished() -> None:
    records = record(), record(id="b4"), record(id="b8")
    found = whole(a_run(*records), a_run(record(), options={"deselected": ["b4"]}))
    assert verdicts(found) == {ID: "same", "b8": "vanished"}
    assert any("1 case" in note for note in found.notes)
    before = whole(a_run(*records, options={"deselected": ["b4", "b8"]}), a_run(record()))
    assert verdicts(before) == {ID: "same", "b4": "vanished", "b8": "vanished"}, "it is the head's choice that counts"


@pytest.mark.parametrize("deselected", [None, "b4", 3, [["b4"]], {"b4": 1}, True])
def test_a_list_of_what_was_deselected_that_is_none_leaves_nothing_out(deselected: Any) -> None:
    found = whole(a_run(record(), record(id="b4")), a_run(record(), options={"deselected": deselected}))
    assert verdicts(found) == {ID: "same", "b4": "vanished"}


def test_what_an_incomplete_head_lacks_has_vanished_for_that_reason() -> None:
    found = whole(a_run(record(), record(id="b4")), a_run(record(), complete=False))
    assert verdicts(found) == {ID: "same", "b4": "vanished"}
    assert "not complete" in found.cases[1].reason
    assert any("head" in note and "not complete" in note for note in found.notes)


def test_an_incomplete_base_is_said() -> None:
    found = whole(a_run(record(), complete=False), a_run(record()))
    assert (verdicts(found), found.failed) == ({ID: "same"}, False)
    assert any("base" in note and "not complete" in note for note in found.notes)


BAD = Refused("b4", "b4: status ok with no rounds")


def test_an_impossible_figure_in_the_head_is_worse() -> None:
    found = whole(a_run(record(), record(id="b4")), a_run(record(), refused=(BAD,)))
    assert verdicts(found) == {ID: "same", "b4": "worse"}
    assert "no rounds" in found.cases[1].reason


def test_an_impossible_figure_in_the_base_is_not_comparable() -> None:
    found = whole(a_run(record(), refused=(BAD,)), a_run(record(), record(id="b4")))
    assert (verdicts(found), found.failed) == ({ID: "same", "b4": "not comparable"}, False)
    assert "no rounds" in found.cases[1].reason


def test_impossible_figures_on_both_sides_are_not_new() -> None:
    found = whole(a_run(record(), refused=(BAD,)), a_run(record(), refused=(BAD,)))
    assert verdicts(found)["b4"] in ("not comparable", "worse")


def test_a_case_with_impossible_figures_that_the_head_lacks_is_not_passed_over() -> None:
    found = whole(a_run(record(), refused=(BAD,)), a_run(record()))
    assert "b4" in verdicts(found) or any("b4" in note for note in found.notes)


def test_a_new_case_with_impossible_figures_is_told() -> None:
    found = whole(a_run(record()), a_run(record(), refused=(BAD,)))
    assert verdicts(found)["b4"] in ("new", "worse")
    assert "no rounds" in found.cases[1].reason


@pytest.mark.parametrize("side", ["base", "head"])
def test_a_refused_record_that_names_no_case_is_noted(side: str) -> None:
    broken = a_run(record(), refused=(Refused(None, "records.1: input should be an object"),))
    found = whole(broken, a_run(record())) if side == "base" else whole(a_run(record()), broken)
    assert verdicts(found) == {ID: "same"}
    assert any(note.startswith(side) and "records.1" in note for note in found.notes)


def test_the_cases_come_as_the_head_ran_them() -> None:
    records = [record(id=name) for name in "cab"]
    found = whole(a_run(*records[::-1]), a_run(*records))
    assert [case.id for case in found.cases] == list("cab")


# Comparable runs


@pytest.mark.parametrize(
    ("base", "head"),
    [
        (a_run(record(id="a")), a_run(record(id="b"))),
        (a_run(), a_run(record())),
        (a_run(record()), a_run()),
        (a_run(), a_run()),
    ],
    ids=["other cases", "no base", "no head", "neither"],
)
def test_runs_with_no_case_in_common_are_not_comparable(base: ReadRun, head: ReadRun) -> None:
    with pytest.raises(NotComparable):
        whole(base, head)


def test_runs_that_differ_in_hard_keys_are_not_comparable_and_each_is_named() -> None:
    base = a_run(record(), name="old.json")
    head = a_run(record(), name="new.json", environment={"torch": "2.13.0", "cuda": "13.2"})
    for function in (whole, lambda base, head: check_comparable(base, head)):
        with pytest.raises(NotComparable) as caught:
            function(base, head)
        named = ("old.json", "new.json", "torch", "2.11.0", "2.13.0", "cuda", "13.0", "13.2", "--across torch,cuda")
        assert all(part in str(caught.value) for part in named)
    with pytest.raises(NotComparable) as caught:
        whole(base, head, across=["torch"])
    assert "cuda" in str(caught.value)
    assert "torch" not in str(caught.value)


def test_what_is_lifted_is_kept_with_both_values_and_what_is_the_same_is_not() -> None:
    head = a_run(record(), environment={"torch": "2.13.0"})
    found = whole(a_run(record()), head, across=["torch", "cuda", "steps", "method"])
    assert [(d.key, d.base, d.head) for d in found.across] == [("torch", "2.11.0", "2.13.0")]


def test_what_else_differs_is_remarked() -> None:
    head = a_run(record(), environment={"diffusers": "0.42.1", "driver": "580.200.1"})
    found = whole(a_run(record()), head)
    assert {d.key for d in found.remarks} == {"diffusers", "driver version"}
    assert not found.failed


def test_the_two_sides_are_named() -> None:
    base = a_run(record(), name="results/h100/old.json", environment={"dirty": True})
    found = whole(base, a_run(record(), name="new.json", environment={"commit": "fedcba9"}), strict=True)
    assert (found.base.name, found.base.commit, found.base.dirty) == ("old.json", "1a2b3c4", True)
    assert (found.head.name, found.head.commit, found.head.dirty) == ("new.json", "fedcba9", False)
    assert (found.head.gpu, found.head.started) == ("NVIDIA H100 80GB HBM3", "2026-11-23T00:00:00+00:00")
    assert (found.sweep, found.strict) == ("default", True)
    assert not whole(base, base).strict


@pytest.mark.parametrize("value", [None, 3, ["a"], {"a": 1}, True])
def test_a_commit_or_a_state_that_is_none_is_not_known(value: Any) -> None:
    odd = a_run(record(), environment={"commit": value, "dirty": value, "started": value})
    side = whole(odd, odd).base
    assert (side.commit, side.dirty, side.started) == (None, value if value is True else None, None)


LONG = "x" * 20_000


@pytest.mark.parametrize(
    ("base", "head"),
    [
        (a_run(record(), environment={"commit": LONG + "x"}), a_run(record())),
        (a_run(record(), environment={"gpu": LONG + "x"}), a_run(record(), environment={"gpu": LONG + "x"})),
        (a_run(record()), a_run(failed("error", failure={"message": LONG}))),
        (a_run(record()), a_run(failed("skipped", reason=LONG))),
        (a_run(record()), a_run(remembered(unavailable={"memory": LONG}))),
        (a_run(record(), record(id="b")), a_run(record(), refused=(Refused("b", LONG),))),
        (a_run(record()), a_run(record(), refused=(Refused(LONG + "x", "bad"),))),
        (a_run(record()), a_run(record(), refused=(Refused("\ud800", "bad"),))),
        (a_run(record()), a_run(record(), refused=(Refused(None, LONG),))),
    ],
    ids=["commit", "gpu", "message", "reason", "unavailable", "problem", "id", "half a character", "note"],
)
def test_long_and_odd_text_of_a_run_file_is_no_accident(base: ReadRun, head: ReadRun) -> None:
    assert whole(base, head).cases


def test_a_device_that_is_half_a_character_is_not_comparable() -> None:
    with pytest.raises(NotComparable):
        whole(a_run(record(), options={"device": "\ud800"}), a_run(record()))


# Of any runs


def anything(pick: random.Random, id: str) -> Record:
    """A record of a run on a GPU, as it may come: any status, any figures, or none."""

    def size() -> int | None:
        return pick.choice([None, pick.randrange(1, 100 * MIB), pick.randrange(1, 80_000 * MIB)])

    status = pick.choice(["ok"] * 8 + ["oom", "error", "timeout", "skipped"])
    if status != "ok":
        return failed(status, id=id)
    medians = [pick.uniform(0.01, 9) for _ in range(pick.choice([1, 1, 3, 5]))]
    time = {"gpu_lag_s": pick.choice([None, 0.0, 0.5]), "rounds_discarded": pick.choice([0, 0, 3])}
    state = {"sm_clock_mhz": pick.choice([1980, 1500, None]), "throttle": pick.choice([[], ["hw_slowdown"]])}
    return record(
        id=id,
        memory={**BARE, **{metric.removeprefix("memory."): size() for metric in MEMORY.values()}},
        phases={name: {"allocated_peak_bytes": size()} for name in pick.sample(["load", "denoise", "decode"], 2)},
        effects={name: pick.choice(["applied", "no_effect"]) for name in pick.sample(["a", "b", "c"], 2)},
        telemetry={"rounds": [state] * len(medians)},
        time={**timed(*medians).time.model_dump(), **time},
        disturbed=pick.choice([None, None, "somebody else"]),
        unavailable=pick.choice([{}, {"memory": "not supported"}, {MEMORY["need"]: NOT_SEARCHED}]),
    )


def test_a_run_compared_with_itself_is_the_same_with_nothing_to_say() -> None:
    pick = random.Random(20261124)
    for _ in range(150):
        complete = pick.random() < 0.8
        run = a_run(*(anything(pick, f"case {n}") for n in range(pick.randrange(1, 9))), complete=complete)
        found = whole(run, run, strict=True)
        assert {case.verdict for case in found.cases} == {"same"}
        assert all(c.verdict == "same" for case in found.cases for c in case.changes)
        assert (found.failed, found.across, found.remarks) == (False, [], [])
        assert all("not complete" in note for note in found.notes)
        assert flagged(run, run, DEFAULT) == []


MIRROR: dict[Word, Word] = {"worse": "better", "better": "worse", "same": "same"}


def test_base_and_head_in_each_other_s_place_mirror_what_memory_became() -> None:
    """But for the width of a limit, which is a share of the base's figure and so differs by a share of a share."""
    pick = random.Random(42)
    seen: dict[tuple[Word, Word], int] = {}
    for n in range(3000):
        metric, base = pick.choice(list(MEMORY)), pick.randrange(1, 80_000) * MIB
        share = pick.choice([0.02, 0.05, 0.5, 3])
        head = max(1, base + round(pick.uniform(-share, share) * base) + pick.randrange(-300, 300) * MIB)
        one, other = (remembered(**{metric: value}) for value in (base, head))
        there, back = change(compared(one, other), MEMORY[metric]), change(compared(other, one), MEMORY[metric])
        pair = there.verdict, back.verdict
        seen[pair] = seen.get(pair, 0) + 1
        assert there.allowed is not None
        assert back.allowed is not None
        low, high = sorted((there.allowed, back.allowed))
        if low < abs(head - base) <= high:
            assert set(pair) in ({"worse", "same"}, {"better", "same"}), n
        else:
            assert back.verdict == MIRROR[there.verdict], n
    assert min(seen.get((a, b), 0) for a, b in MIRROR.items()) > 300, "all three were tried"


def test_base_and_head_in_each_other_s_place_mirror_the_status() -> None:
    pick = random.Random(7)
    for _ in range(300):
        one, other = failed(pick.choice(["oom", "error", "timeout"])), anything(pick, ID)
        if other.status == "skipped":
            continue
        if other.status == "ok" or one.status != other.status:
            assert compared(one, other).verdict == MIRROR[compared(other, one).verdict]


def test_a_comparison_of_anything_has_each_case_once_and_its_worst_verdict() -> None:
    pick = random.Random(99)
    for _ in range(150):
        sides = [[anything(pick, f"case {n}") for n in pick.sample(range(9), 6)] for _ in range(2)]
        base, head = (a_run(*records) for records in sides)
        found = whole(base, head)
        ids = [{record.id for record in records} for records in sides]
        told = verdicts(found)
        assert set(told) == ids[0] | ids[1]
        ran_first = {r.id for r in base.records if r.status == "skipped"} & {
            r.id for r in head.records if r.status in ("ok", "oom")
        }
        assert {name for name in told if told[name] == "new"} == (ids[1] - ids[0]) | ran_first
        assert {name for name in told if told[name] == "vanished"} == ids[0] - ids[1]
        for case in found.cases:
            deciding = [c.verdict for c in case.changes if c.verdict != "not comparable"]
            if deciding:
                assert case.verdict == min(deciding, key=ORDER.index)
        assert found.failed == bool(set(told.values()) & {"worse", "vanished"})
