"""From what the workers of a case reported to its record."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from pydantic import ValidationError

from pytest_vram.cases.case import AnyCase, Case
from pytest_vram.measure.channel import Message
from pytest_vram.measure.energy import energy_per_image
from pytest_vram.measure.environment import without_paths
from pytest_vram.measure.machine import Machine
from pytest_vram.measure.need import Need
from pytest_vram.measure.readings import nvml_memory, process_peak, untold
from pytest_vram.measure.runs import WorkerRun
from pytest_vram.pipelines.optimizations import claims_exact
from pytest_vram.records.schema import (
    Exactness,
    Failure,
    GpuMemory,
    Memory,
    Phase,
    PhaseCost,
    Record,
    Telemetry,
    Time,
    Wall,
    WorkerTime,
    above_the_card,
)

ONE_STEP = "no network of the denoiser ran twice: what an offload moves for it is not known apart from the step"
NEED_FIELDS = (
    "memory.need_bytes",
    "memory.need_tolerance_bytes",
    "memory.required_bytes",
    "memory.at_need_alloc_retries",
    "time.at_need_s",
)


def record_of(case: AnyCase, machine: Machine, runs: list[WorkerRun], seconds: float, common: dict[str, Any]) -> Record:
    """The record; where the figures cannot be true it says so instead of showing them."""
    try:
        record = _found(case, machine, runs, seconds, common)
        problem = above_the_card(record, machine.memory_bytes) if machine.memory_bytes else None
        if problem and machine.spills:
            said = f"{problem}: Windows moved memory to the host"
            return record.model_copy(update={"disturbed": "; ".join(filter(None, [record.disturbed, said]))})
    except ValidationError as error:
        places = (".".join(str(part) for part in e["loc"]) for e in error.errors())
        messages = (e["msg"].removeprefix("Value error, ") for e in error.errors())
        problem = "; ".join(f"{at}: {text}" if at else text for at, text in zip(places, messages, strict=True))
    if not problem:
        return record
    failure = Failure(message=f"impossible figures: {problem}", output_tail=without_paths(runs[-1].output_tail))
    wall = Wall(total_s=seconds)
    reason = {"memory": "impossible figures", "time": "impossible figures"}
    return Record(status="error", failure=failure, wall=wall, unavailable=reason, **common)


def _found(case: AnyCase, machine: Machine, runs: list[WorkerRun], seconds: float, common: dict[str, Any]) -> Record:
    outcome = runs[-1].outcome
    done = outcome["event"] == "done"
    memory, unavailable = _memory(machine, runs)
    fields: dict[str, Any] = {
        **common,
        "status": "ok" if done else outcome["status"],
        "memory": memory,
        "gpus": _gpus(machine, runs[-1]),
        "phases": _phases(runs),
        "effects": outcome.get("effects", {}),
        "telemetry": Telemetry(rounds=[state for run in runs for state in run.telemetry]),
        "disturbed": _disturbed(runs),
        "wall": Wall(
            total_s=seconds,
            load_s=sum(run.outcome.get("load_s", 0.0) for run in runs),
            warmup_s=sum(run.outcome.get("warmup_s", 0.0) for run in runs),
            rounds_s=sum(run.outcome.get("rounds_wall_s", 0.0) for run in runs),
        ),
    }
    if done and all(run.outcome["rounds"] for run in runs):
        fields["time"] = _time(case, machine.device, runs)
        if any(len(run.throttled) == len(run.outcome["rounds"]) for run in runs):
            throttled = "every round of a worker ran on a throttled GPU"
            fields["disturbed"] = "; ".join(filter(None, [fields["disturbed"], throttled]))
        fields["energy_j_per_image"], why = energy_per_image(machine, runs)
        unavailable |= {"energy_j_per_image": why} if why else {}
        unavailable |= untold(machine, runs)
        own = "it is not known of a pipeline of one's own"
        if not isinstance(case, Case):
            without = dict.fromkeys(("full_length_s", "images_per_s", "step_s"), own)
        elif outcome["native_denoiser_calls"] is None:
            without = {"full_length_s": "the scheduler does not say how often it calls the denoiser"}
        else:
            without = dict.fromkeys(("full_length_s", "step_s"), ONE_STEP)
        unavailable |= {f"time.{key}": why for key, why in without.items() if getattr(fields["time"], key) is None}
        if "images_error" in outcome:
            unavailable["images"] = f"not saved: {without_paths(outcome['images_error'])}"
    elif not done:
        unavailable["time"] = unavailable["energy_j_per_image"] = f"no round was completed: {fields['status']}"
        fields["failure"] = Failure(
            phase=outcome.get("phase"),
            requested_bytes=outcome.get("requested_bytes"),
            limit_bytes=case.limit_bytes or (machine.memory_bytes if outcome["status"] == "oom" else None),
            message=why_it_failed(outcome)[:2000],
            output_tail=without_paths(runs[-1].output_tail),
        )
    return Record(unavailable=unavailable, **fields)


def why_it_failed(outcome: Message) -> str:
    """What a worker that failed reported, with no paths."""
    swallowed = outcome.get("swallowed") and outcome.get("status") == "oom"
    return without_paths(("out of memory, and then: " if swallowed else "") + outcome["message"])


def skipped(reason: str, common: dict[str, Any]) -> Record:
    """The record of a case that cannot be run."""
    nothing = {"memory": "skipped", "time": "skipped"}
    return Record(status="skipped", reason=reason, unavailable=nothing, **common)


def with_exactness(record: Record, outcome: Message, against: Case | None, no_reference: str) -> Record:
    """The record with what the comparison of its output gave, or why there was none."""
    if against is None and not no_reference:
        return record

    def without(reason: str) -> Record:
        reason = without_paths(reason)[:2000]
        return record.model_copy(update={"unavailable": {**record.unavailable, "exactness": reason}})

    if against is None:
        return without(no_reference)
    if record.status != "ok":
        return without("the case did not complete")
    if "difference" not in outcome:
        return without(outcome.get("difference_error", "it was not reported"))
    found = {**outcome["difference"], "against": against.id, "claimed": claims_exact(record.case.optimizations)}
    try:
        return record.model_copy(update={"exactness": Exactness.model_validate(found)})
    except ValidationError as error:
        return without(f"impossible figures: {error.errors()[0]['msg']}")


def with_need(record: Record, needs: Sequence[Need], machine: Machine) -> Record:
    """The record with what the search found, on each GPU that the case takes; without it where that cannot be true."""
    contexts = [gpu.context_bytes for gpu in record.gpus] or [record.memory.context_bytes]
    need, context = max(zip(needs, contexts, strict=True), key=lambda pair: pair[0].bytes + (pair[1] or 0))
    at = need.at
    calls = record.time.denoiser_calls or at.denoiser_calls
    step = at.step_s or _only_step(record.case, at.seconds, at.denoiser_calls)
    found = record.model_dump()
    found["memory"] |= {
        "need_bytes": need.bytes,
        "need_tolerance_bytes": need.tolerance,
        "required_bytes": None if context is None else need.bytes + context,
        "at_need_alloc_retries": at.retries,
    }
    for gpu, its, held in zip(found["gpus"], needs, contexts, strict=False):
        gpu |= {"need_bytes": its.bytes, "required_bytes": None if held is None else its.bytes + held}
    found["need_phase"] = need.decided_by
    found["time"]["at_need_s"] = _of_length(at.seconds, step, at.denoiser_calls, calls)
    if context is None:
        found["unavailable"]["memory.required_bytes"] = "the context is not known"
    else:
        del found["unavailable"]["memory.required_bytes"]
    for key in NEED_FIELDS:
        if key != "memory.required_bytes":
            found["unavailable"].pop(key, None)
    if found["time"]["at_need_s"] is None:
        found["unavailable"]["time.at_need_s"] = ONE_STEP
    try:
        whole = Record.model_validate(found)
        problem = above_the_card(whole, machine.memory_bytes) if machine.memory_bytes else None
    except ValidationError as error:
        problem = error.errors()[0]["msg"].removeprefix("Value error, ")
    return without_need(record, f"impossible figures: {problem}") if problem else whole


def without_need(record: Record, reason: str) -> Record:
    """The record, with the reason why it has no need."""
    return record.model_copy(update={"unavailable": {**record.unavailable, **dict.fromkeys(NEED_FIELDS, reason)}})


def _memory(machine: Machine, runs: list[WorkerRun]) -> tuple[Memory, dict[str, str]]:
    outcome = runs[-1].outcome
    unavailable = {
        **machine.cannot,
        "memory.estimated_need_bytes": "not estimated",
    }

    every = [one for run in runs for one in (run, *run.peers)]

    def most(key: str) -> int | None:
        return max((run.outcome.get(key) or 0 for run in every), default=0) or None

    reserved = most("reserved_peak_bytes")
    if machine.device == "cpu":
        counted = ("allocated_peak_bytes", "reserved_peak_bytes", "alloc_retries")
        for key in (*counted, "nvml_process_peak_bytes", "nvml_device_peak_bytes"):
            unavailable[f"memory.{key}"] = "the CPU has no allocator statistics; host_peak_bytes is the process's RSS"
        unavailable["memory.context_bytes"] = "there is no GPU context on the CPU"
    nvml, reasons = nvml_memory(machine, runs, reserved)
    unavailable |= reasons
    memory = Memory(
        weights_bytes=outcome.get("weights_bytes"),
        allocated_peak_bytes=most("allocated_peak_bytes"),
        reserved_peak_bytes=reserved,
        **nvml,
        host_peak_bytes=most("host_peak_bytes"),
        alloc_retries=outcome.get("alloc_retries"),
    )
    missing = "the worker did not get so far" if outcome["event"] != "done" else "it was not reported"
    for key, value in memory.model_dump().items():
        if value is None and key != "estimated_allocated_peak_bytes":
            unavailable.setdefault(f"memory.{key}", missing)
    return memory, unavailable


def _gpus(machine: Machine, run: WorkerRun) -> list[GpuMemory]:
    """What each GPU held, where the case takes several."""
    if not run.peers:
        return []
    firsts = (run.outcome.get("gpus") or [run.outcome])[0]
    return [
        GpuMemory(
            allocated_peak_bytes=figures.get("allocated_peak_bytes"),
            reserved_peak_bytes=figures.get("reserved_peak_bytes"),
            nvml_process_peak_bytes=process_peak(machine, [one], figures.get("reserved_peak_bytes"))[0],
            context_bytes=one.context,
        )
        for one, figures in zip((run, *run.peers), (firsts, *(peer.outcome for peer in run.peers)), strict=True)
    ]


def _phases(runs: list[WorkerRun]) -> dict[str, PhaseCost]:
    """Median seconds over the rounds that count, of all workers, and the highest allocated peak."""
    rounds = [r for run in runs for r in run.kept]
    phases = {}
    for name in get_args(Phase):
        peaks = [run.outcome.get("phase_peaks", {}).get(name, 0) for run in runs]
        if name == "load":
            times = [run.outcome["load_s"] for run in runs if "load_s" in run.outcome]
        elif name == "compile":  # by the first worker, for all of them
            times = [seconds for run in runs[:1] if (seconds := run.outcome.get("compile_s"))]
        else:
            times = [r[name] for r in rounds if name in r]
        if times or any(peaks):
            time_s = statistics.median(times) if times else None
            phases[name] = PhaseCost(time_s=time_s, allocated_peak_bytes=max(peaks) or None)
    return phases


def _time(case: AnyCase, device: str, runs: list[WorkerRun]) -> Time:
    """Rounds of a throttled GPU are discarded, unless no other is left."""
    workers: list[WorkerTime] = []
    kept_rounds = [r for run in runs for r in run.kept]
    discarded = sum(len(run.outcome["rounds"]) - len(run.kept) for run in runs)
    for run in runs:
        seconds = [sum(r.values()) for r in run.kept]
        workers.append(WorkerTime(rounds_s=seconds, median_s=statistics.median(seconds)))
    median = statistics.median(worker.median_s for worker in workers)
    phase = {name: statistics.median(r.get(name, 0.0) for r in kept_rounds) for name in ("encode", "denoise", "decode")}
    calls, native_calls = (runs[-1].outcome[f"{length}denoiser_calls"] for length in ("", "native_"))
    steps = [one for run in runs for one in run.kept_steps]
    first, later = (_median(one[kind] for one in steps if kind in one) for kind in ("first", "later"))
    images = runs[-1].outcome["images"]
    lags = [run.outcome["gpu_lag_s"] for run in runs if "gpu_lag_s" in run.outcome]
    step = later or _only_step(case, phase, calls)
    full_length = None if native_calls is None else _of_length(phase, step, calls, native_calls)
    return Time(
        cold_s=runs[0].outcome["cold_s"],
        median_s=median,
        step_s=step or None,
        first_step_s=first or None,
        images_per_s=None if images is None else images / median,
        full_length_s=full_length,
        full_length_steps=None if full_length is None else runs[-1].outcome["native_steps"],
        denoiser_calls=calls,
        gpu_lag_s=statistics.median(lags) if lags and device != "cpu" else None,
        workers=workers,
        rounds_discarded=discarded,
    )


def _only_step(case: AnyCase, phases: Mapping[str, float], calls: int) -> float | None:
    """Seconds of a call of the denoiser where it ran but once: what denoising took. None of an offloaded one, whose
    weights were moved meanwhile."""
    moves = any("offload" in name for name in case.optimizations)
    return None if moves else phases.get("denoise", 0.0) / max(1, calls)


def _of_length(phases: Mapping[str, float], step_s: float | None, calls: int, wanted: int) -> float | None:
    """Seconds of a call in which the denoiser runs `wanted` times, from the phases of one in which it ran `calls`
    times. A step more or less is `step_s`: what an offload moves once a call is in the phase, and not in that. None
    where that is not known, and wanted."""
    denoise = phases.get("denoise", 0.0)
    beside = sum(phases.get(name, 0.0) for name in ("encode", "decode", "call"))
    if wanted == calls:
        return beside + denoise
    return None if step_s is None else beside + max(step_s, denoise + (wanted - calls) * step_s)


def _median(values: Iterable[float]) -> float | None:
    known = list(values)
    return statistics.median(known) if known else None


def _disturbed(runs: list[WorkerRun]) -> str | None:
    reasons = []
    if others := {pid for run in runs for pid in run.others}:
        reasons.append(f"other processes used the GPU meanwhile ({_pids(others)})")
    if again_s := sum(run.outcome.get("compiled_again_s", 0.0) for run in runs):
        reasons.append(f"torch.compile compiled again within the rounds, for {again_s:.1f} s")
    return "; ".join(reasons) or None


def with_others(record: Record, pids: set[int]) -> Record:
    """The record, with the processes beside a worker that were first seen while the need was searched."""
    said = record.disturbed or ""
    if not pids or "other processes used the GPU meanwhile" in said:
        return record
    met = f"other processes used the GPU while the need was searched ({_pids(pids)})"
    return record.model_copy(update={"disturbed": f"{said}; {met}" if said else met})


def _pids(pids: set[int]) -> str:
    return f"pid {', '.join(str(pid) for pid in sorted(pids))}"
