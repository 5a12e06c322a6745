"""From records to choices: which record speaks for a set, and what it says."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pytest_vram.cases.models import Model
from pytest_vram.records.reading import ReadRun
from pytest_vram.records.schema import ASSUMED_CONTEXT_BYTES, Record, Run
from pytest_vram.report.choices import (
    SAME_TIME,
    Choice,
    Workload,
    against,
    baseline,
    frontier,
    without_idle_flags,
    workload_of,
)
from pytest_vram.report.evidence import Evidence, gather, lead
from tests.records.test_schema import FAILURE, MIB, facts, own, record

GIB = 1 << 30
H100 = "NVIDIA H100 80GB HBM3"
RTX_4090 = "NVIDIA GeForce RTX 4090"
NOTHING = dict.fromkeys(facts()["memory"])


def run(
    records: Iterable[Record],
    gpu: Any = H100,
    memory: Any = 80 * GIB,
    started: str = "2026-11-24T08:00:00",
    **changes: Any,
) -> ReadRun:
    environment = {"gpu": gpu, "gpu_memory_bytes": memory, "started": started}
    return ReadRun(Path("run.json"), Run(environment=environment, sweep="default", records=list(records), **changes))


def measured(names: str = "fp16", need: int = 10 * GIB, seconds: float | None = 2.0, **changes: Any) -> Record:
    """A record with a searched need; `case`, `memory` and `time` in `changes` are added to its own."""
    figures = {
        "weights_bytes": min(need, 5 * GIB),
        "allocated_peak_bytes": need,
        "reserved_peak_bytes": need + GIB,
        "nvml_process_peak_bytes": None,
        "need_bytes": need,
        "context_bytes": 686 * MIB,
        "required_bytes": need + 686 * MIB,
    }
    rounds = {"rounds_s": [seconds or 1.0], "median_s": seconds or 1.0}
    times = {"median_s": seconds, "workers": [rounds], **changes.pop("time", {})}
    case = {"optimizations": names.split("+"), **changes.pop("case", {})}
    memory = {**figures, **changes.pop("memory", {})}
    return record(case=case, memory=memory, time=times, **changes)


def unsearched(names: str = "fp16", need: int | None = 10 * GIB, **changes: Any) -> Record:
    """A measured record whose need is only simulated."""
    memory = {"need_bytes": None, "required_bytes": None, "estimated_need_bytes": need, **changes.pop("memory", {})}
    return measured(names, need or GIB, memory=memory, **changes)


def estimated(names: str = "fp16", need: int = 10 * GIB, **changes: Any) -> Record:
    """A record of a run with no GPU."""
    required = need + ASSUMED_CONTEXT_BYTES
    memory = {**NOTHING, "need_bytes": need, "estimated_need_bytes": need, "required_bytes": required}
    case = {"optimizations": names.split("+"), **changes.pop("case", {})}
    return record(method="estimated", case=case, memory=memory, time={}, **changes)


def out_of_memory(names: str = "fp16", need: int | None = None, **changes: Any) -> Record:
    """A record that ran out of memory, with its need as simulated."""
    case = {"optimizations": names.split("+"), **changes.pop("case", {})}
    memory = {**NOTHING, "estimated_need_bytes": need}
    return record(status="oom", failure=FAILURE, case=case, memory=memory, time={}, **changes)


def choice(found: Record, **changes: Any) -> Choice:
    return Choice(workload_of(found), found, run([found], **changes))


def choices(*records: Record, **changes: Any) -> list[Choice]:
    """The choices of one workload on one GPU."""
    [by_gpu] = gather([run(records, **changes)]).choices.values()
    [sets] = by_gpu.values()
    return list(sets.values())


def names(found: Iterable[Choice]) -> list[str]:
    return [one.name for one in found]


def only(evidence: Evidence) -> Workload:
    [workload] = evidence.choices
    return workload


WORKLOAD = workload_of(measured())


@pytest.mark.parametrize(
    ("found", "expected", "size", "label"),
    [
        (measured(), Workload("sdxl", 1 << 20, 1024, 1024, 0, 1), "1024x1024", "1024x1024, batch 1"),
        (
            measured(case={"width": 640, "height": 480, "frames": 9, "batch_size": 2}),
            Workload("sdxl", 640 * 480 * 9, 640, 480, 9, 2),
            "640x480, 9 frames",
            "640x480, 9 frames, batch 2",
        ),
        (own(), Workload("tests/test_app.py", 0, test="test_painter"), "", "test_painter"),
    ],
)
def test_workload(found: Record, expected: Workload, size: str, label: str) -> None:
    workload = workload_of(found)
    assert workload == expected
    assert (workload.size, workload.label) == (size, label)


def test_workloads_come_by_model_then_size_then_batch() -> None:
    shapes = [(512, 4), (1024, 1), (512, 1), (1024, 8)]
    records = [measured(case={"width": s, "height": s, "batch_size": b}) for s, b in shapes]
    records.append(measured(case={"model": "a-model"}))
    found = [(w.model, w.width, w.batch_size) for w in gather([run(records)]).choices]
    assert found == [("a-model", 1024, 1), *(("sdxl", s, b) for s, b in sorted(shapes))]


def test_a_measured_choice() -> None:
    times = {"full_length_s": 12.0, "at_need_s": 3.0}
    found = choice(measured("fp16+vae_tiling", 10 * GIB, 2.0, time=times))
    assert (found.optimizations, found.name, found.flags) == (
        ("fp16", "vae_tiling"),
        "fp16+vae_tiling",
        ("vae_tiling",),
    )
    assert not found.estimated
    assert (found.need_bytes, found.required_bytes) == (10 * GIB, 10 * GIB + 686 * MIB)
    assert (found.call_s, found.slowdown, found.at_least_bytes) == (12.0, 1.5, 0)
    assert found.disk_bytes == 5 * GIB


def test_an_estimated_choice_takes_the_assumed_context_and_has_no_time() -> None:
    found = choice(estimated(need=10 * GIB), gpu=None, memory=None)
    assert found.estimated
    assert (found.need_bytes, found.required_bytes) == (10 * GIB, 10 * GIB + 768 * MIB)
    assert (found.call_s, found.slowdown, found.host_bytes, found.disk_bytes) == (None, None, None, None)


@pytest.mark.parametrize(("context", "expected"), [(400 * MIB, 400 * MIB), (None, 768 * MIB)])
def test_an_unsearched_need_takes_the_context_that_was_measured(context: int | None, expected: int) -> None:
    found = choice(unsearched(memory={"context_bytes": context}))
    assert found.estimated
    assert found.required_bytes == 10 * GIB + expected


def test_a_choice_out_of_memory_needs_more_than_the_gpu_had() -> None:
    found = choice(out_of_memory())
    assert not found.estimated
    assert (found.need_bytes, found.required_bytes, found.at_least_bytes) == (None, None, 80 * GIB)
    assert (found.call_s, found.remark) == (None, "out of memory")
    assert choice(out_of_memory(), memory="80 GiB").at_least_bytes == 0


def test_a_pipeline_of_ones_own_is_a_choice_without_a_name() -> None:
    found = choice(own())
    assert (found.optimizations, found.name, found.flags, found.call_s) == ((), "", (), 2.0)


@pytest.mark.parametrize(("set_", "flags"), [("fp32", ()), ("bf16+a+b", ("a", "b")), ("a+fp16", ("a",))])
def test_flags_are_what_stands_beside_the_dtype(set_: str, flags: tuple[str, ...]) -> None:
    assert choice(measured(set_)).flags == flags


@pytest.mark.parametrize(
    ("set_", "offloads"),
    [("fp16", False), ("fp16+model_offload", True), ("fp16+sequential_offload", True), ("fp16+vae_tiling", False)],
)
def test_offloads(set_: str, offloads: bool) -> None:
    assert choice(measured(set_)).offloads is offloads


@pytest.mark.parametrize(
    ("set_", "moves"),
    [
        ("fp16+vae_tiling", 0),
        ("fp16+model_offload", 2),
        ("fp16+text_encoders_on_cpu", 1),
        ("fp16+text_encoders_dropped", 1),
        ("fp16+group_offload_leaf_stream", 3),
        ("fp16+group_offload_leaf_disk", 4),
        ("fp16+vae_tiling+sequential_offload", 4),
    ],
)
def test_moves(set_: str, moves: int) -> None:
    assert choice(measured(set_)).moves == moves


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (measured(memory={"host_peak_bytes": 3 * GIB}), 8 * GIB),
        (measured(memory={"host_peak_bytes": 3 * GIB, "weights_bytes": None}), 3 * GIB),
        (measured("fp16+model_offload", memory={"host_peak_bytes": 9 * GIB}), 9 * GIB),
        (measured("fp16+text_encoders_dropped", memory={"host_peak_bytes": 9 * GIB}), 9 * GIB),
        (measured(memory={"host_peak_bytes": 8 * GIB}, case={"weights": "pretrained"}), 8 * GIB),
        (own(memory={"host_peak_bytes": 8 * GIB}), 8 * GIB),
        (measured(memory={"host_peak_bytes": None}), None),
    ],
)
def test_weights_made_on_the_gpu_come_through_host_memory_too(found: Record, expected: int | None) -> None:
    assert choice(found).host_bytes == expected


def test_remark() -> None:
    exactness = {"against": "x", "max_abs_difference": 0.9, "mean_abs_difference": 0.5}
    effects = {"vae_tiling": "no_effect", "channels_last": "applied", "vae_slicing": "no_effect"}
    found = choice(measured(effects=effects, exactness=exactness))
    assert found.no_effect == ("vae_tiling", "vae_slicing")
    assert found.remark == "no effect: vae_tiling, vae_slicing; not exact"
    assert choice(measured()).remark == ""
    information = {**exactness, "claimed": False, "psnr_db": 31.4}
    assert choice(measured(exactness=information)).remark == "image 31 dB"


@pytest.mark.parametrize("order", [1, -1])
def test_a_searched_need_beats_a_simulated_one_of_the_same_gpu(order: int) -> None:
    runs = [run([measured(need=10 * GIB)]), run([unsearched(need=9 * GIB)])][::order]
    [found] = gather(runs).measured(WORKLOAD)
    assert (found.estimated, found.need_bytes) == (False, 10 * GIB)


@pytest.mark.parametrize("kind", [measured, unsearched, estimated, out_of_memory])
def test_among_equals_the_newest_wins(kind: Any) -> None:
    runs = [run([kind("fp16", need)]) for need in (8 * GIB, 12 * GIB, 10 * GIB)]
    [found] = [one for sets in gather(runs).choices[WORKLOAD].values() for one in sets.values()]
    assert found.run is runs[-1]
    assert found.record is runs[-1].records[0]


def test_of_two_records_in_one_run_the_later_wins() -> None:
    [found] = choices(measured(need=10 * GIB), measured(need=11 * GIB))
    assert found.need_bytes == 11 * GIB


def test_several_gpus_and_estimates_are_kept_apart() -> None:
    runs = [
        run([measured(need=10 * GIB), measured("bf16", 10 * GIB)]),
        run([measured(need=11 * GIB)], gpu=RTX_4090, memory=24 * GIB),
        run([estimated(need=9 * GIB), estimated("fp16+vae_tiling", 8 * GIB)], gpu=None, memory=None),
    ]
    evidence = gather(runs)
    by_gpu = evidence.choices[only(evidence)]
    needs = {gpu: {found.name: found.need_bytes for found in sets.values()} for gpu, sets in by_gpu.items()}
    assert needs == {
        (H100, 80): {"fp16": 10 * GIB, "bf16": 10 * GIB},
        (RTX_4090, 24): {"fp16": 11 * GIB},
        None: {"fp16": 9 * GIB, "fp16+vae_tiling": 8 * GIB},
    }
    assert names(evidence.measured(WORKLOAD)) == ["fp16", "bf16"]
    assert names(evidence.estimated(WORKLOAD)) == ["fp16+vae_tiling"], "what was measured anywhere is not estimated"
    assert [names(group) for _, group in evidence.groups(WORKLOAD)] == [["fp16", "bf16"], ["fp16"], ["fp16+vae_tiling"]]


def test_of_gpus_with_equally_many_choices_the_last_is_the_measured_one() -> None:
    runs = [run([measured()]), run([measured()], gpu=RTX_4090), run([estimated()], gpu=None)]
    [found] = gather(runs).measured(WORKLOAD)
    assert found.run.gpu == RTX_4090


def test_an_estimate_is_no_gpus_even_where_its_run_had_one() -> None:
    evidence = gather([run([estimated()])])
    assert list(evidence.choices[WORKLOAD]) == [None]
    assert evidence.measured(WORKLOAD) == []
    assert [group for _, group in evidence.groups(WORKLOAD)] == [evidence.estimated(WORKLOAD)]


@pytest.mark.parametrize(("kind", "checks"), [(measured, 1), (out_of_memory, 1), (estimated, 0)])
def test_a_case_with_a_limit_is_no_choice_and_a_check_where_it_ran(kind: Any, checks: int) -> None:
    limited = kind(case={"limit_bytes": 12 * GIB})
    evidence = gather([run([limited])])
    assert [found.record for found in evidence.checks] == [limited] * checks
    assert (evidence.choices, evidence.failed) == ({}, [])


def test_a_check_that_failed_is_told_although_its_need_is_known() -> None:
    failed = record(status="error", failure=FAILURE, time={}, memory=NOTHING, case={"limit_bytes": GIB}, id="limited")
    evidence = gather([run([measured(), failed])])
    assert [found.record for found in evidence.failed] == [failed]


def timed(seconds: float, at_need: float, need: int = 10 * GIB, **changes: Any) -> Record:
    return measured(need=need, seconds=seconds, time={"at_need_s": at_need}, **changes)


def test_times_are_medians_over_runs_of_the_same_software_on_such_a_gpu() -> None:
    runs = [
        run([timed(1.0, 2.0)]),
        run([timed(4.0, 4.0)]),
        run([timed(2.0, 3.0, need=11 * GIB)]),
        run([timed(50.0, 50.0)], gpu=RTX_4090, memory=24 * GIB),
        run([timed(70.0, 70.0)], memory=94 * GIB),
    ]
    newer = run([timed(90.0, 90.0)])
    newer.run.environment["torch"] = "9.9"
    evidence = gather([newer, *runs])
    found = evidence.choices[WORKLOAD][H100, 80]["fp16",]
    assert (found.call_s, found.slowdown, found.need_bytes) == (2.0, 1.5, 11 * GIB)
    assert found.runs == [runs[2], runs[0], runs[1]]


def moved(seconds: float, first_s: float | None, full_s: float, names: str = "fp16+model_offload") -> Record:
    """Two steps of a model of ten: 1 s to encode, `seconds` to denoise, 2 s to decode."""
    phases = {"encode": {"time_s": 1.0}, "denoise": {"time_s": seconds}, "decode": {"time_s": 2.0}}
    time = {"first_step_s": first_s, "step_s": seconds / 2, "full_length_s": full_s, "denoiser_calls": 2}
    return measured(names, seconds=3 + seconds, time={**time, "at_need_s": 50.0}, phases=phases)


def test_files_that_count_a_move_as_a_part_of_each_step_have_it_once_a_call() -> None:
    plain = measured(time={"step_s": 0.5, "full_length_s": 8.0})
    old = moved(20.0, None, 103.0)
    call, slowdown = {}, {}
    for kind, records in {"old": (old, plain), "alone": (old,), "new": (moved(20.0, 19.5, 27.0), plain)}.items():
        found = choices(*records)[0]
        call[kind], slowdown[kind] = found.call_s, found.slowdown
    assert call == {"old": 23.0 + 8 * 0.5, "alone": None, "new": 27.0}
    assert slowdown == {"old": None, "alone": None, "new": 50.0 / 23}
    first, second = run([old]), run([plain])
    offloaded, _ = gather([first, second]).measured(WORKLOAD)
    assert offloaded.runs == [first, second], "the steps are of the second"
    bare = old.model_copy(update={"phases": {}})
    assert choices(bare, plain)[0].call_s is None


def test_a_call_of_the_one_step_of_an_offloaded_denoiser_is_no_full_length() -> None:
    once = moved(20.0, 20.0, 103.0)
    time = once.time.model_copy(update={"step_s": None, "full_length_s": None, "denoiser_calls": 1})
    assert choices(once.model_copy(update={"time": time}))[0].call_s is None


def test_the_steps_are_as_long_whatever_the_vae_does() -> None:
    plain = measured(time={"step_s": 0.5, "full_length_s": 8.0})
    assert choices(moved(20.0, None, 103.0, "fp16+vae_tiling+model_offload"), plain)[0].call_s == 27.0
    casted = moved(20.0, None, 103.0, "fp16+layerwise_casting+model_offload")
    assert choices(casted, plain)[0].call_s is None


def test_of_other_sets_the_full_length_stands() -> None:
    assert choices(moved(20.0, None, 103.0, "fp16+sequential_offload"))[0].call_s == 103.0


def test_a_pipeline_of_ones_own_has_the_times_of_its_newest_run() -> None:
    slow = own().model_copy(update={"time": timed(9.0, 9.0).time})
    [sets] = gather([run([slow]), run([own()])]).choices[workload_of(own())].values()
    assert [(found.call_s, len(found.runs)) for found in sets.values()] == [(own().time.median_s, 1)]


def test_variants_of_one_name_are_kept_apart_and_a_known_need_stands() -> None:
    evidence = gather([run([measured()], memory=12 * GIB), run([out_of_memory()], memory=8 * GIB)])
    assert list(evidence.choices[WORKLOAD]) == [(H100, 12), (H100, 8)]
    evidence = gather([run([measured()]), run([out_of_memory()])])
    assert [found.need_bytes for found in evidence.measured(WORKLOAD)] == [10 * GIB]


def test_a_searched_need_stands_where_the_context_is_not_known() -> None:
    found = choice(measured(memory={"context_bytes": None, "required_bytes": None, "estimated_need_bytes": 5 * GIB}))
    assert (found.estimated, found.need_bytes) == (False, 10 * GIB)
    assert found.required_bytes == 10 * GIB + ASSUMED_CONTEXT_BYTES


def test_what_a_choice_saves_and_costs() -> None:
    plain, other = choice(measured(need=10 * GIB, seconds=2.0)), choice(measured("fp16+a", 7 * GIB, 5.0))
    assert against(other, plain) == (3 * GIB, 3.0)
    assert against(plain, plain) == (None, None)
    assert against(choice(out_of_memory("fp16+a", need=GIB)), plain) == (None, None)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((1024, 1024, 0, 1), True), ((1024, 2048, 0, 4), True), ((2048, 512, 0, 1), False), ((1024, 1024, 9, 1), True)],
)
def test_a_workload_holds_less_of_the_same(shape: tuple[int, int, int, int], expected: bool) -> None:
    width, height, frames, batch = shape
    other = Workload("sdxl", width * height, width, height, frames, batch)
    assert other.holds(WORKLOAD) is expected
    assert not Workload("other", 1 << 20, 1024, 1024, 0, 1).holds(WORKLOAD)


def test_out_of_memory_without_a_limit_is_a_choice() -> None:
    [found] = choices(out_of_memory())
    assert (found.need_bytes, found.at_least_bytes) == (None, 80 * GIB)
    [found] = choices(out_of_memory(need=70 * GIB))
    assert (found.need_bytes, found.at_least_bytes) == (70 * GIB, 80 * GIB)


def test_out_of_memory_of_a_gpu_without_its_memory_says_nothing() -> None:
    evidence = gather([run([out_of_memory()], memory=None)])
    assert (evidence.choices, len(evidence.failed)) == ({}, 1)


@pytest.mark.parametrize("order", [1, -1])
def test_out_of_memory_does_not_beat_a_searched_need(order: int) -> None:
    [found] = gather([run([measured()]), run([out_of_memory(need=9 * GIB)])][::order]).measured(WORKLOAD)
    assert found.need_bytes == 10 * GIB
    assert not found.estimated


FAILED = {
    "error": measured(status="error", failure={"message": "CUDA error"}),
    "timeout": measured(status="timeout", failure={"message": "too long"}),
    "skipped": measured(status="skipped", reason="not here"),
    "no need": unsearched(need=None),
}


@pytest.mark.parametrize("kind", FAILED)
def test_what_failed_is_said_where_nothing_else_is_known(kind: str) -> None:
    evidence = gather([run([FAILED[kind]]), run([FAILED[kind]])])
    assert [found.record for found in evidence.failed] == [FAILED[kind]], "once"
    assert (evidence.choices, evidence.checks) == ({}, [])


@pytest.mark.parametrize("known", [measured(), unsearched(), estimated(), out_of_memory()])
@pytest.mark.parametrize("kind", FAILED)
@pytest.mark.parametrize("order", [1, -1])
def test_what_failed_is_not_said_where_something_is_known(kind: str, known: Record, order: int) -> None:
    evidence = gather([run([known]), run([FAILED[kind]], gpu=RTX_4090)][::order])
    assert evidence.failed == []
    takes_the_estimate = kind == "no need" and known.method == "estimated"
    expected = FAILED[kind] if takes_the_estimate else known
    assert [found.record for found in evidence.groups(WORKLOAD)[0][1]] == [expected]


@pytest.mark.parametrize("order", [1, -1])
def test_what_was_measured_with_no_need_takes_the_newest_estimate(order: int) -> None:
    bare = unsearched(need=None, seconds=3.0)
    estimates = [run([estimated(need=need * GIB)], gpu=None) for need in (8, 9)]
    ran = run([bare, unsearched(need=None, seconds=5.0)])
    evidence = gather([ran, *estimates] if order == 1 else [*estimates, ran])
    [found] = evidence.measured(WORKLOAD)
    assert (found.gpu, found.estimated, found.need_bytes) == (H100, True, 9 * GIB)
    assert found.required_bytes == 9 * GIB + 686 * MIB, "the context that was measured"
    assert found.call_s == 4.0
    assert found.memory_run is estimates[1]
    assert found.runs == [estimates[1], ran]
    assert evidence.failed == evidence.estimated(WORKLOAD) == []


def checked(**changes: Any) -> Record:
    """The plain case, with no need, under a limit of 12 GiB."""
    return unsearched(need=None, seconds=3.0, case={"limit_bytes": 12 * GIB}, **changes)


def test_what_ran_under_a_limit_alone_is_a_choice_where_it_has_an_estimate() -> None:
    evidence = gather([run([checked()]), run([estimated(need=9 * GIB)], gpu=None)])
    [found] = evidence.measured(WORKLOAD)
    assert (found.gpu, found.need_bytes, found.call_s, found.completed_within) == (H100, 9 * GIB, 3.0, 12 * GIB)
    assert found.remark == "under a limit of 12.00"
    assert len(evidence.checks) == 1
    assert evidence.failed == []


@pytest.mark.parametrize("known", [measured(), unsearched()])
def test_what_ran_with_room_speaks_and_not_what_ran_under_a_limit(known: Record) -> None:
    evidence = gather([run([known, checked()]), run([estimated(need=9 * GIB)], gpu=None)])
    assert [choice.record for choice in evidence.measured(WORKLOAD)] == [known]


@pytest.mark.parametrize("check", [checked(), out_of_memory(case={"limit_bytes": 12 * GIB})])
def test_a_limit_alone_is_no_choice(check: Record) -> None:
    assert gather([run([check])]).choices == {}
    if check.status == "oom":
        assert gather([run([check]), run([estimated()], gpu=None)]).measured(WORKLOAD) == []


def test_of_several_limits_the_widest_and_newest_speaks() -> None:
    def within(limit: int, seconds: float, id: str) -> Record:
        return unsearched(seconds=seconds, case={"limit_bytes": limit * GIB}, id=id)

    evidence = gather([run([within(24, 2.0, "a"), within(24, 3.0, "b"), within(20, 9.0, "c")])])
    [found] = evidence.measured(WORKLOAD)
    assert (found.record.id, found.call_s, found.completed_within, found.timed) == ("b", 3.0, 20 * GIB, ())


def test_a_gpu_with_checks_alone_does_not_come_before_one_that_searched_needs() -> None:
    checks = [unsearched(names, case={"limit_bytes": 12 * GIB}) for names in ("fp16", "bf16", "fp32")]
    evidence = gather([run([measured()]), run(checks, gpu=RTX_4090)])
    assert [found.gpu for found in evidence.measured(WORKLOAD)] == [H100]
    assert evidence.speaks_of(evidence.checks[0]) is evidence.measured(WORKLOAD)[0]


def test_what_ran_on_the_host_takes_no_estimate() -> None:
    bare = unsearched(need=None)
    evidence = gather([run([bare], gpu=None, memory=None), run([estimated()], gpu=None)])
    assert evidence.measured(WORKLOAD) == []
    assert [found.call_s for found in evidence.estimated(WORKLOAD)] == [None]
    unnamed = gather([run([bare], gpu=None), run([estimated()], gpu=None)])
    assert [found.need_bytes for found in unnamed.measured(WORKLOAD)] == [10 * GIB]


def test_what_ran_out_of_memory_takes_no_estimate_of_another_run() -> None:
    evidence = gather([run([estimated()], gpu=None), run([out_of_memory()], memory=None)])
    assert evidence.measured(WORKLOAD) == []
    assert [found.record.method for found in evidence.estimated(WORKLOAD)] == ["estimated"]


def test_what_is_known_of_another_set_or_workload_excuses_no_failure() -> None:
    others = [measured("bf16"), measured(case={"batch_size": 2}), measured(case={"limit_bytes": 12 * GIB})]
    assert len(gather([run([*others, FAILED["error"]])]).failed) == 1


def test_pipelines_of_ones_own_are_workloads_of_their_tests() -> None:
    other = own()
    other = other.model_copy(update={"case": other.case.model_copy(update={"test": "test_other"})})
    evidence = gather([run([own(), other])])
    assert [workload.test for workload in evidence.choices] == ["test_other", "test_painter"]
    assert list(evidence.subjects) == ["tests/test_app.py::test_other", "tests/test_app.py::test_painter"]
    assert all(len(evidence.measured(workload)) == 1 for workload in evidence.choices)


def test_aliases_of_all_runs_and_models_by_name() -> None:
    records = [measured(case={"model": model}) for model in ("z", "a", "z")]
    runs = [run(records, aliases={"z": ["old"], "a": ["x"]}), run([], aliases={"z": ["new"]})]
    evidence = gather(runs)
    assert list(evidence.subjects) == ["a", "z"]
    assert evidence.aliases == {"z": ["new"], "a": ["x"]}
    assert evidence.runs == runs


def test_no_runs_are_no_evidence() -> None:
    evidence = gather([])
    assert (evidence.choices, evidence.checks, evidence.failed, evidence.subjects) == ({}, [], [], {})


def test_a_run_of_a_gpu_without_a_name_is_not_taken_for_an_estimate() -> None:
    evidence = gather([run([measured()], gpu=None)])
    assert names(evidence.estimated(WORKLOAD)) == []


def shapes(*wanted: tuple[int, int, int], frames: int | None = None) -> Evidence:
    """Evidence of (size, batch, number of sets)."""
    sets = ("fp16", "bf16", "fp32", "fp16+vae_tiling")
    found = [
        measured(name, case={"width": size, "height": size, "batch_size": batch, "frames": frames})
        for size, batch, number in wanted
        for name in sets[:number]
    ]
    return gather([run(found)])


def made_for(model: Model, size: int, frames: int | None = None) -> dict[str, Model]:
    native = model.native.model_copy(update={"width": size, "height": size, "frames": frames})
    return {"sdxl": model.model_copy(update={"native": native})}


@pytest.mark.parametrize(
    ("wanted", "native", "expected"),
    [
        ([(512, 1, 3), (1024, 1, 1), (1024, 4, 3)], 1024, (1024, 1)),
        ([(512, 1, 3), (1024, 1, 1)], 512, (512, 1)),
        ([(512, 1, 2), (1024, 1, 1), (1024, 4, 4)], None, (512, 1)),
        ([(512, 1, 2), (1024, 1, 1)], 768, (512, 1)),
        ([(512, 1, 2), (1024, 1, 2), (2048, 4, 2)], None, (1024, 1)),
        ([(512, 8, 1)], None, (512, 8)),
        ([(512, 1, 4), (1024, 4, 1), (1024, 8, 3)], 1024, (1024, 4)),
    ],
)
def test_lead(wanted: list[tuple[int, int, int]], native: int | None, expected: tuple[int, int], tiny: Model) -> None:
    evidence = shapes(*wanted)
    found = lead("sdxl", evidence, made_for(tiny, native) if native else {})
    assert (found.width, found.batch_size) == expected


def test_the_native_size_of_a_video_has_its_frames(tiny: Model) -> None:
    both = [
        *(measured(name, case={"frames": 9}) for name in ("fp16", "bf16")),
        measured(case={"frames": 49}),
    ]
    evidence = gather([run(both)])
    assert lead("sdxl", evidence, made_for(tiny, 1024, frames=49)).frames == 49


def test_lead_looks_at_its_own_model_only() -> None:
    evidence = gather([run([measured(), measured(case={"model": "b", "batch_size": 4}), own()])])
    assert lead("b", evidence, {}).batch_size == 4
    assert lead("tests/test_app.py::test_painter", evidence, {}).test == "test_painter"


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        (["fp32", "bf16", "fp16"], "fp16"),
        (["fp32", "bf16", "fp16+vae_tiling"], "bf16"),
        (["fp16+vae_tiling", "fp32"], "fp32"),
        (["fp16+a+b", "bf16+a"], "bf16+a"),
    ],
)
def test_baseline(sets: list[str], expected: str) -> None:
    assert baseline(choices(*map(measured, sets))).name == expected


def test_the_baseline_of_ones_own_pipeline_is_itself() -> None:
    assert baseline(choices(own())).workload.test == "test_painter"


def idle(names: str, *flags: str) -> Record:
    return measured(names, effects=dict.fromkeys(flags, "no_effect"))


@pytest.mark.parametrize(
    ("records", "kept"),
    [
        ([measured("fp16"), idle("fp16+a", "a")], ["fp16"]),
        ([idle("fp16+a", "a"), measured("fp16")], ["fp16"]),
        ([idle("fp16+a", "a")], ["fp16+a"]),
        ([measured("bf16"), idle("fp16+a", "a")], ["bf16", "fp16+a"]),
        ([measured("fp16"), measured("fp16+a")], ["fp16", "fp16+a"]),
        ([measured("fp16"), idle("fp16+a", "b")], ["fp16", "fp16+a"]),
        ([measured("fp16"), idle("fp16+a+b", "a")], ["fp16", "fp16+a+b"]),
        ([measured("fp16+b"), idle("fp16+a+b", "a")], ["fp16+b"]),
        ([measured("fp16"), idle("fp16+a", "a"), idle("fp16+a+b", "a", "b")], ["fp16"]),
    ],
)
def test_a_set_with_an_idle_flag_stands_back_for_the_set_without_it(records: Sequence[Record], kept: list[str]) -> None:
    assert names(without_idle_flags(choices(*records))) == kept


@pytest.mark.parametrize(
    ("load", "need_phase", "said"),
    [(2, None, ""), (9, None, "the load decides"), (9, "decode", ""), (2, "load", "the load decides")],
)
def test_where_the_load_decides_it_is_said(load: int, need_phase: str | None, said: str) -> None:
    phases = {"load": {"allocated_peak_bytes": load * GIB}, "decode": {"allocated_peak_bytes": 5 * GIB}}
    [choice] = choices(measured(phases=phases, need_phase=need_phase))
    assert choice.remark == said


def frontier_of(*points: tuple[str, int, float | None]) -> list[str]:
    return names(frontier(choices(*(measured(name, need * GIB, seconds) for name, need, seconds in points))))


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([("a", 10, 2.0)], ["a"]),
        ([("a", 10, 2.0), ("b", 5, 5.0)], ["b", "a"]),
        ([("a", 10, 2.0), ("b", 5, 2.0)], ["b"]),
        ([("a", 10, 2.0), ("b", 5, 1.0)], ["b"]),
        ([("a", 10, 2.0), ("b", 10, 3.0)], ["a"]),
        ([("a", 10, 2.0), ("b", 5, 2.0 * SAME_TIME)], ["b"]),
        ([("a", 10, 2.0), ("b", 5, 2.0 * SAME_TIME + 0.01)], ["b", "a"]),
        ([("a", 10, 1.0), ("b", 8, 1.5), ("c", 6, 2.1)], ["c", "a"]),
        ([("a", 10, None), ("b", 5, 4.0)], ["b"]),
        ([], []),
    ],
)
def test_frontier(points: list[tuple[str, int, float | None]], expected: list[str]) -> None:
    assert (frontier_of(*points) if points else names(frontier([]))) == expected


@pytest.mark.parametrize(("lag_s", "expected"), [(0.5, ["b", "a"]), (0.01, ["b"]), (None, ["b"])])
def test_times_that_the_gpu_decides_are_told_apart(lag_s: float | None, expected: list[str]) -> None:
    time = {"gpu_lag_s": lag_s, "step_s": 0.5}
    records = (
        measured(name, need * GIB, seconds, time=time) for name, need, seconds in [("a", 10, 2.0), ("b", 5, 2.4)]
    )
    assert names(frontier(choices(*records))) == expected


@pytest.mark.parametrize(("seconds", "expected"), [(3.2, ["b"]), (3.3, ["b", "a"])])
def test_where_one_time_varies_it_varies_less(seconds: float, expected: list[str]) -> None:
    on_gpu = measured("a", 10 * GIB, 2.0, time={"gpu_lag_s": 0.5, "step_s": 0.5})
    assert names(frontier(choices(on_gpu, measured("b", 5 * GIB, seconds)))) == expected


def test_what_was_not_timed_and_idle_flags_are_not_on_the_frontier() -> None:
    records = [measured("a", 2 * GIB, None), out_of_memory("b", 3 * GIB), measured("fp16"), idle("fp16+c", "c")]
    assert names(frontier(choices(*records))) == ["fp16"]


@pytest.mark.parametrize(("need", "expected"), [(19 * GIB // 2 - 1, ["a", "fp16"]), (39 * GIB // 4, ["fp16"])])
def test_what_was_timed_with_a_simulated_need_is_on_the_frontier(need: int, expected: list[str]) -> None:
    records = [unsearched("a", need, seconds=9.0), measured("fp16", 10 * GIB, 1.0)]
    assert names(frontier(choices(*records))) == expected


@pytest.mark.parametrize(("more", "expected"), [(64 * MIB, ["b"]), (65 * MIB, ["a", "b"])])
def test_needs_closer_than_they_are_known_are_one(more: int, expected: list[str]) -> None:
    tolerance = {"memory": {"need_tolerance_bytes": 64 * MIB}}
    slow, fast = measured("a", 10 * GIB, 9.0, **tolerance), measured("b", 10 * GIB + more, 1.0, **tolerance)
    assert names(frontier(choices(slow, fast))) == expected


def test_what_ran_out_of_memory_since_is_not_on_the_frontier() -> None:
    records = [
        unsearched("fp16", 12 * GIB, seconds=1.0),
        measured("fp16+a", 30 * GIB, 9.0),
        out_of_memory(need=12 * GIB),
    ]
    assert names(frontier(choices(*records))) == ["fp16+a"]


def test_a_simulated_need_counts_as_the_most_that_it_may_be() -> None:
    records = [unsearched("fp16+s", 99 * GIB // 10, seconds=3.8), measured("fp16", 10 * GIB, 2.0)]
    assert names(frontier(choices(*records))) == ["fp16"]


@pytest.mark.parametrize(("retries", "expected"), [(0, ["b", "a"]), (1, ["b"])])
def test_a_time_with_retries_of_the_allocator_varies(retries: int, expected: list[str]) -> None:
    on_gpu = {"gpu_lag_s": 0.5, "step_s": 0.5}
    retried = measured("b", 5 * GIB, 3.0, time=on_gpu, memory={"alloc_retries": retries})
    assert names(frontier(choices(measured("a", 10 * GIB, 2.0, time=on_gpu), retried))) == expected


def test_of_two_needs_the_one_that_is_known_less_decides() -> None:
    slow = measured("a", 10 * GIB, 9.0, memory={"need_tolerance_bytes": 64 * MIB})
    fast = measured("b", 10 * GIB + 65 * MIB, 1.0, memory={"need_tolerance_bytes": 66 * MIB})
    assert names(frontier(choices(slow, fast))) == ["b"]


def test_what_is_not_on_the_frontier_is_beaten_by_something_that_is() -> None:
    needs, times = (4, 7, 11, 13), (1.0, 1.1, 1.3, 1.7, 3.0)
    points = [(f"s{need}_{n}", need, times[(need * (n + 3)) % 5]) for need in needs for n in range(3)]
    found = choices(*(measured(name, need * GIB, seconds) for name, need, seconds in points))
    kept = frontier(found)

    def figures(one: Choice) -> tuple[int, float]:
        return one.required_bytes or 0, one.call_s or 0.0

    assert len(kept) < len(found)
    for earlier, later in pairwise(kept):
        assert figures(earlier)[0] < figures(later)[0]
        assert figures(later)[1] * SAME_TIME < figures(earlier)[1]
    for one in set(found) - set(kept):
        required, seconds = figures(one)
        assert any(figures(k)[0] <= required and figures(k)[1] <= seconds * SAME_TIME for k in kept)


def test_estimates_are_compared_with_what_was_measured() -> None:
    evidence = gather([run([measured("fp16"), measured("bf16")]), run([estimated("fp16+vae_tiling")], gpu=None)])
    assert [plain.name for plain, _ in evidence.groups(WORKLOAD)] == ["fp16", "fp16"]
    alone = gather([run([estimated("fp16+vae_tiling"), estimated("bf16")], gpu=None)])
    assert [plain.name for plain, _ in alone.groups(WORKLOAD)] == ["bf16"]


def test_without_a_dtype_alone_on_a_gpu_that_of_another_is_compared_with_and_no_time() -> None:
    flagged = [measured("fp16+a", 7 * GIB), measured("fp16+a+b", 6 * GIB)]
    evidence = gather([run([measured("fp16")]), run(flagged, gpu=RTX_4090)])
    for plain, found in evidence.groups(WORKLOAD):
        assert plain.name == "fp16"
        if found[0].gpu == RTX_4090:
            assert [against(one, plain) for one in found] == [(3 * GIB, None), (4 * GIB, None)]
    later = run([unsearched("fp16", 20 * GIB)], gpu="NVIDIA Later")
    evidence = gather([run([measured("fp16")]), run(flagged[:1], gpu=RTX_4090), later])
    [plain] = [plain for plain, found in evidence.groups(WORKLOAD) if found[0].gpu == RTX_4090]
    assert plain.need_bytes == 10 * GIB, "of the GPU that searched most"
    leads = run([unsearched("fp16", 20 * GIB), measured("fp16+a"), measured("fp16+b")], gpu="NVIDIA Later")
    evidence = gather([run([measured("fp16")]), leads, run([estimated("fp16+c")], gpu=None)])
    [plain] = [plain for plain, found in evidence.groups(WORKLOAD) if found[0].gpu is None]
    assert plain.need_bytes == 10 * GIB, "the one that was searched"
    [(plain, _)] = gather([run([measured("fp16+sequential_offload"), measured("fp16+a+b")])]).groups(WORKLOAD)
    assert plain.name == "fp16+a+b", "which moves no weights"


def test_nothing_is_saved_beside_a_plain_case_that_ran_out_of_memory() -> None:
    plain, other = choice(out_of_memory(need=10 * GIB)), choice(measured("fp16+a", 7 * GIB))
    assert against(other, plain) == (None, None)
