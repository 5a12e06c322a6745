"""One case measured in a fresh worker: talks to the worker, samples NVML meanwhile, and makes the record."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from pytest_vram.cases.case import AnyCase, Case
from pytest_vram.errors import StartError
from pytest_vram.measure import nvml
from pytest_vram.measure.channel import Closed, Message
from pytest_vram.measure.environment import without_paths
from pytest_vram.measure.exactness import NoReference, References
from pytest_vram.measure.forkserver import PRELOAD_ENVIRON, Worker
from pytest_vram.measure.machine import Machine
from pytest_vram.measure.need import ALLOCATED_SPREAD, ESTIMATE_SPREAD, Need, NoNeed, Probe, search
from pytest_vram.measure.sampling import MEMORY_INTERVAL_S, Sampler
from pytest_vram.pipelines.optimizations import chosen, impossible
from pytest_vram.records.schema import (
    NVML_SLACK_BYTES,
    Exactness,
    Failure,
    Memory,
    Phase,
    PhaseCost,
    Record,
    RoundTelemetry,
    Telemetry,
    Time,
    Wall,
    WorkerTime,
    above_the_card,
)

GENERATION = "pytest_vram.measure.generation:run"
NEED_FIELDS = (
    "memory.need_bytes",
    "memory.need_tolerance_bytes",
    "memory.required_bytes",
    "memory.at_need_alloc_retries",
    "time.at_need_s",
)
SEARCH_INTERRUPTED = "the search for the need was interrupted"


@dataclass(frozen=True)
class Settings:
    """How to measure; seconds. `interval_s` None turns sampling off, to see what it costs."""

    rounds: int | None = None
    round_budget_s: float = 3.0
    timeout_s: float = 600.0
    save_images: str | None = None
    workers: int = 1
    interval_s: float | None = MEMORY_INTERVAL_S
    need: bool = True
    task: str = GENERATION


Say = Callable[[str], None]
"""Told what the worker does now, for a line of progress."""


class CaseInterrupted(KeyboardInterrupt):
    """Ctrl-C while a case was measured; `record` is its record."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record


@dataclass(frozen=True)
class Estimated:
    """What the estimate of a case says; bytes."""

    need: int
    allocated_peak: int


@dataclass
class _Run:
    """What one worker reported."""

    outcome: Message
    sampler: Sampler
    telemetry: list[RoundTelemetry] = field(default_factory=list)
    context: int | None = None
    output_tail: str = ""

    @property
    def done(self) -> bool:
        return bool(self.outcome["event"] == "done")


def measure(
    case: AnyCase,
    job: Message,
    machine: Machine,
    settings: Settings,
    say: Say,
    estimated: Estimated | None = None,
    references: References | None = None,
) -> Record:
    """Measure one case; whatever goes wrong in its worker is part of the record.

    `job` describes the case to a worker; `estimated` is where the search for the need starts; among `references` is the
    output with which that of this case is compared.

    Raises:
        CaseInterrupted: at Ctrl-C, with the record; the worker is gone then.
    """
    common: dict[str, Any] = {"id": case.id, "case": case, "method": "measured"}
    if reason := impossible(case.optimizations, machine.device):
        nothing = {"memory": "skipped", "time": "skipped"}
        return Record(status="skipped", reason=reason, unavailable=nothing, **common)
    began = time.monotonic()
    measurer = CaseWorkers(case, job, machine, settings, say)
    try:
        against, no_reference = measurer.compare(references)
        runs = measurer.rounds()
    except KeyboardInterrupt:
        wall = Wall(total_s=time.monotonic() - began)
        failure = Failure(message="interrupted")
        nothing = {"memory": "interrupted", "time": "interrupted"}
        record = Record(status="error", failure=failure, wall=wall, unavailable=nothing, **common)
        raise CaseInterrupted(record) from None
    record = _record(case, machine, runs, time.monotonic() - began, common)
    record = _with_exactness(record, runs[-1].outcome, against, no_reference)
    searched = time.monotonic()

    def after_search() -> Record:
        """The record with the wall time of the search, whatever came of it."""
        assert record.wall
        need_s = time.monotonic() - searched
        wall = {"total_s": record.wall.total_s + need_s, "need_s": need_s, "probes": measurer.probes}
        return record.model_copy(update={"wall": record.wall.model_copy(update=wall)})

    try:
        need = measurer.need(record, estimated)
    except KeyboardInterrupt:
        raise CaseInterrupted(_without_need(after_search(), SEARCH_INTERRUPTED)) from None
    except NoNeed as error:
        return _without_need(after_search(), without_paths(str(error)))
    return _with_need(after_search(), need, machine)


class CaseWorkers:
    """The workers of one case, one after the other."""

    def __init__(self, case: AnyCase, job: Message, machine: Machine, settings: Settings, say: Say) -> None:
        self.case, self.machine, self.settings, self.say = case, machine, settings, say
        self.probes = 0
        self._room = 0
        self._swallows: bool | None = None  # whether the pipeline is known to turn an out-of-memory into another error
        self.job = {
            **job,
            "device": machine.device,
            "rounds": settings.rounds,
            "round_budget_s": settings.round_budget_s,
            "timeout_s": settings.timeout_s,
            "save_images": settings.save_images,
        }

    def compare(self, references: References | None) -> tuple[Case | None, str]:
        """Have the workers keep or compare their output. The case that it is compared with, or why with none."""
        case = self.case
        if references is None or not isinstance(case, Case):
            return None, ""
        if path := references.keep(case):
            self.job["keep_output"] = str(path)
        try:
            found = references.find(case, self._make_reference)
        except NoReference as error:
            return None, str(error)
        if found is None:
            return None, ""
        against, path = found
        self.job["compare_output"] = str(path)
        return against, ""

    def _make_reference(self, reference: Case, path: Path, on_host: bool) -> str | None:
        """Run a case once for its output. What went wrong, or None."""
        self.say(f"the output of {reference.id}, to compare with")
        job = {"case": reference.model_dump(mode="json"), "reference": True, "on_host": on_host}
        job["keep_output"] = str(path)
        run = self._worker(None, subject=reference, **job)
        return None if run.done else without_paths(run.outcome["message"])

    def rounds(self) -> list[_Run]:
        """As many workers as were asked for, or up to the first that fails."""
        runs: list[_Run] = []
        while len(runs) < self.settings.workers and all(run.done for run in runs):
            runs.append(self._limited())
        return runs

    def _limited(self) -> _Run:
        """One worker; under a limit once more where its context grew beyond what was set aside for it."""
        limit, context = self.case.limit_bytes, self.machine.context_bytes
        run = self._worker(None if limit is None else limit - context)
        if limit and run.outcome.get("swallowed") and self._worker(None, probe=True).outcome.get("status") == "error":
            run.outcome["status"] = "error"  # not the limit's doing: it comes with room too
        grown = run.context or 0
        reserved = run.outcome.get("reserved_peak_bytes") or 0
        if limit and run.done and grown + reserved > limit:
            self.machine.context_bytes = max(context, grown)
            run = self._worker(limit - self.machine.context_bytes)
        return run

    def need(self, record: Record, estimated: Estimated | None) -> Need:
        """Search the need with fresh workers.

        Raises:
            NoNeed: when it was not to be searched, or cannot be found.
        """
        memory = record.memory
        if self.machine.device != "cuda":
            raise NoNeed("there is no GPU memory to cap")
        if record.status != "ok" or not memory.reserved_peak_bytes or not memory.allocated_peak_bytes:
            raise NoNeed("the case did not complete")
        if not self.settings.need:
            raise NoNeed("not searched (--vram-no-need)")
        guess, spread = memory.allocated_peak_bytes, ALLOCATED_SPREAD
        if estimated:  # what the estimate has wrong of the allocated peak it probably has wrong of the need
            guess = estimated.need * memory.allocated_peak_bytes // estimated.allocated_peak
            spread = ESTIMATE_SPREAD
        self._room = memory.reserved_peak_bytes
        return search(self.probe, guess, spread, self._room)

    def probe(self, cap: int | None) -> Probe:
        """Whether a fresh worker completes under a cap in bytes, or with all that the GPU has free.

        Raises:
            NoNeed: when it fails, but not for memory.
        """
        room = "what is free" if cap is None else f"{cap >> 20} MiB"
        self.say(f"need: does it fit into {room}?")
        self.probes += 1
        outcome = self._worker(cap, probe=True).outcome
        if outcome["event"] == "done":
            return Probe(
                cap,
                True,
                outcome["reserved_peak_bytes"],
                outcome["second_call"],
                outcome["denoiser_calls"],
                outcome["second_call_retries"],
            )
        memory_is_why = outcome["status"] == "oom"
        if (
            outcome.get("swallowed") and cap is not None and cap < self._room
        ):  # memory ran out, and another error ended it: see whether
            if self._swallows is None:  # that one comes with room too
                self.say(f"need: does it fail within {self._room >> 20} MiB too?")
                self.probes += 1
                self._swallows = self._worker(self._room, probe=True).done
            memory_is_why = self._swallows
        if not memory_is_why:
            raise NoNeed(f"within {room} it failed, but not for memory: {outcome['message']}")
        return Probe(cap, False, failed_in=outcome.get("phase"))

    def _worker(self, cap: int | None, *, subject: AnyCase | None = None, **job: Any) -> _Run:
        environ = dict(PRELOAD_ENVIRON)
        for optimization in chosen((subject or self.case).optimizations):
            environ |= optimization.environ
        environ |= self.job.get("environ", {})
        machine, settings = self.machine, self.settings
        interval_s = None if job else settings.interval_s  # what is not timed need not be sampled
        sampler = Sampler(machine.gpu if interval_s else None, -1, machine.baseline())
        began = time.monotonic()
        try:
            worker = machine.starter.start(settings.task, environ)
        except StartError as error:
            return _Run({"event": "failed", "status": "error", "message": str(error)}, sampler)
        sampler.pid = worker.pid
        run = _Run({}, sampler)
        conversation = _Conversation(worker, run, interval_s, self.say, began, settings.timeout_s)
        if job:
            conversation.say = lambda _: None
        try:
            worker.channel.send({**self.job, **job})
            conversation.hold(None if cap is None else max(1 << 20, cap))
        except Closed:
            conversation.fail("error", _died(worker, conversation.phase))
        finally:
            run.output_tail = worker.output_tail()
            worker.kill()
        return run


class _Conversation:
    """From the job to the outcome, sampling between the messages."""

    def __init__(
        self, worker: Worker, run: _Run, interval_s: float | None, say: Say, began: float, timeout_s: float
    ) -> None:
        self.worker, self.run, self.interval_s, self.say = worker, run, interval_s, say
        self.deadline, self.timeout_s = began + timeout_s, timeout_s
        self.phase: str | None = "load"
        self.rounds: int | None = None
        self.found: Message = {}

    def hold(self, cap: int | None) -> None:
        """`cap` is for PyTorch's allocator, in bytes. Raises Closed when the worker dies."""
        channel, sampler = self.worker.channel, self.run.sampler
        while not self.run.outcome:
            message = channel.receive(self.interval_s or 0.5)
            if self.interval_s:
                sampler.sample(states=self.rounds is not None)
            if message is None:
                if time.monotonic() > self.deadline:
                    self._time_out()
                continue
            event = message["event"]
            if event == "context":
                channel.send({"cap_bytes": cap})
            elif event == "phase":
                self.phase = message["phase"] if message["phase"] == "load" else None
                self.say(message["phase"])
            elif event == "rounds":
                self.rounds, self.found = message["count"], message["found"]
                self.say(f"{self.rounds} rounds of about {message['pilot_s']:.2f} s")
            elif event == "round":
                self.run.telemetry.append(sampler.end_round())
                self.say(f"round {message['index'] + 1} of {self.rounds}")
            else:
                self._finish(message)

    def _finish(self, message: Message) -> None:
        """The worker waits, holding all it held: the moment to see what is outside the allocator."""
        if self.interval_s:
            self.run.sampler.sample()
            self.run.context = self.run.sampler.held_outside(message.get("reserved_bytes") or 0)
        self.run.outcome = message

    def _time_out(self) -> None:
        where = f" in {self.phase}" if self.phase else ""
        self.fail("timeout", f"no result within {self.timeout_s:g} s{where} (--vram-timeout)")

    def fail(self, status: str, message: str) -> None:
        """The worker says no more: what it had found before the rounds is kept."""
        self.run.outcome = {
            **self.found,
            "event": "failed",
            "status": status,
            "phase": self.phase,
            "message": message,
        }


def _died(worker: Worker, phase: str | None) -> str:
    code = worker.wait(5)
    if code is not None and code < 0:
        cause = f"was killed by signal {-code}"
        if code == -9:
            cause += " (the kernel does so when the host runs out of memory)"
    else:
        cause = f"ended with exit code {code}"
    lines = [line for line in worker.output_tail().splitlines() if line.strip()]
    last = f": {lines[-1].strip()}" if lines and code != -9 else ""
    where = f" in {phase}" if phase else ""
    return f"the worker {cause}{where}{last}"


# From what the workers reported to a record


def _record(case: AnyCase, machine: Machine, runs: list[_Run], seconds: float, common: dict[str, Any]) -> Record:
    """The record; where the figures cannot be true it says so instead of showing them."""
    try:
        record = _found(case, machine, runs, seconds, common)
        problem = above_the_card(record, machine.memory_bytes) if machine.memory_bytes else None
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


def _found(case: AnyCase, machine: Machine, runs: list[_Run], seconds: float, common: dict[str, Any]) -> Record:
    outcome = runs[-1].outcome
    done = outcome["event"] == "done"
    memory, unavailable = _memory(machine, runs)
    fields: dict[str, Any] = {
        **common,
        "status": "ok" if done else outcome["status"],
        "memory": memory,
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
        fields["time"] = _time(case, runs)
        if any(run.telemetry and all(nvml.ABNORMAL & set(s.throttle) for s in run.telemetry) for run in runs):
            throttled = "every round of a worker ran on a throttled GPU"
            fields["disturbed"] = "; ".join(filter(None, [fields["disturbed"], throttled]))
        own = "it is not known of a pipeline of one's own"
        if fields["time"].full_length_s is None:
            unsaid = "the scheduler does not say how often it calls the denoiser"
            unavailable["time.full_length_s"] = unsaid if isinstance(case, Case) else own
        unavailable |= {f"time.{k}": own for k in ("images_per_s", "step_s") if getattr(fields["time"], k) is None}
        if "images_error" in outcome:
            unavailable["images"] = f"not saved: {without_paths(outcome['images_error'])}"
    elif not done:
        unavailable["time"] = f"no round was completed: {fields['status']}"
        fields["failure"] = Failure(
            phase=outcome.get("phase"),
            requested_bytes=outcome.get("requested_bytes"),
            limit_bytes=case.limit_bytes or (machine.memory_bytes if outcome["status"] == "oom" else None),
            message=without_paths(outcome["message"])[:2000],
            output_tail=without_paths(runs[-1].output_tail),
        )
    return Record(unavailable=unavailable, **fields)


def _with_exactness(record: Record, outcome: Message, against: Case | None, no_reference: str) -> Record:
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
    found = {**outcome["difference"], "against": against.id}
    try:
        return record.model_copy(update={"exactness": Exactness.model_validate(found)})
    except ValidationError as error:
        return without(f"impossible figures: {error.errors()[0]['msg']}")


def _with_need(record: Record, need: Need, machine: Machine) -> Record:
    """The record with what the search found; without it where that cannot be true."""
    context = record.memory.context_bytes
    at = need.at
    phase = {name: at.seconds.get(name, 0.0) for name in ("encode", "denoise", "decode", "call")}
    step = phase["denoise"] / max(1, at.denoiser_calls)
    calls = record.time.denoiser_calls or at.denoiser_calls
    found = record.model_dump()
    found["memory"] |= {
        "need_bytes": need.bytes,
        "need_tolerance_bytes": need.tolerance,
        "required_bytes": None if context is None else need.bytes + context,
        "at_need_alloc_retries": at.retries,
    }
    found["need_phase"] = need.decided_by
    found["time"]["at_need_s"] = phase["encode"] + calls * step + phase["decode"] + phase["call"]
    if context is None:
        found["unavailable"]["memory.required_bytes"] = "the context is not known"
    else:
        del found["unavailable"]["memory.required_bytes"]
    for key in NEED_FIELDS:
        if key != "memory.required_bytes":
            found["unavailable"].pop(key, None)
    try:
        whole = Record.model_validate(found)
        problem = above_the_card(whole, machine.memory_bytes) if machine.memory_bytes else None
    except ValidationError as error:
        problem = error.errors()[0]["msg"].removeprefix("Value error, ")
    return _without_need(record, f"impossible figures: {problem}") if problem else whole


def _without_need(record: Record, reason: str) -> Record:
    """The record, with the reason why it has no need."""
    return record.model_copy(update={"unavailable": {**record.unavailable, **dict.fromkeys(NEED_FIELDS, reason)}})


def _memory(machine: Machine, runs: list[_Run]) -> tuple[Memory, dict[str, str]]:
    outcome, sampler = runs[-1].outcome, runs[-1].sampler
    unavailable = {
        **machine.cannot,
        "memory.estimated_need_bytes": "not estimated",
        "energy_j_per_image": "not measured",
    }

    def most(key: str) -> int | None:
        return max((run.outcome.get(key) or 0 for run in runs), default=0) or None

    reserved = most("reserved_peak_bytes")
    process = max((run.sampler.process_peak or 0 for run in runs), default=0) or None
    device = max((run.sampler.device_peak or 0 for run in runs), default=0) or None
    context = max((run.context or 0 for run in runs), default=0) or None
    if machine.device == "cpu":
        counted = ("allocated_peak_bytes", "reserved_peak_bytes", "alloc_retries")
        for key in (*counted, "nvml_process_peak_bytes", "nvml_device_peak_bytes"):
            unavailable[f"memory.{key}"] = "the CPU has no allocator statistics; host_peak_bytes is the process's RSS"
        unavailable["memory.context_bytes"] = "there is no GPU context on the CPU"
    elif sampler.gpu is not None and process is None:
        unavailable["memory.nvml_process_peak_bytes"] = (
            "NVML lists no process with the worker's pid (so in some containers, under MIG and on WSL); "
            "nvml_device_peak_bytes is the device less its idle baseline"
        )
    if process is not None and reserved is not None and process + NVML_SLACK_BYTES < reserved:
        unavailable["memory.nvml_process_peak_bytes"] = (
            f"NVML's highest reading, {process}, is below what PyTorch had reserved: the peak fell between two samples"
        )
        process = None
    memory = Memory(
        weights_bytes=outcome.get("weights_bytes"),
        allocated_peak_bytes=most("allocated_peak_bytes"),
        reserved_peak_bytes=reserved,
        nvml_process_peak_bytes=process,
        nvml_device_peak_bytes=device,
        context_bytes=context,
        host_peak_bytes=most("host_peak_bytes"),
        alloc_retries=outcome.get("alloc_retries"),
    )
    missing = "the worker did not get so far" if outcome["event"] != "done" else "it was not reported"
    if outcome["event"] == "done" and machine.device != "cpu" and sampler.gpu is None:
        missing = machine.cannot.get("memory.nvml_process_peak_bytes", "NVML was not sampled")
    for key, value in memory.model_dump().items():
        if value is None and key != "estimated_allocated_peak_bytes":
            unavailable.setdefault(f"memory.{key}", missing)
    return memory, unavailable


def _phases(runs: list[_Run]) -> dict[str, PhaseCost]:
    """Median seconds over all rounds of all workers, and the highest allocated peak."""
    rounds = [r for run in runs for r in run.outcome.get("rounds", [])]
    phases = {}
    for name in get_args(Phase):
        peaks = [run.outcome.get("phase_peaks", {}).get(name, 0) for run in runs]
        if name == "load":
            times = [run.outcome["load_s"] for run in runs if "load_s" in run.outcome]
        else:
            times = [r[name] for r in rounds if name in r]
        if times or any(peaks):
            time_s = statistics.median(times) if times else None
            phases[name] = PhaseCost(time_s=time_s, allocated_peak_bytes=max(peaks) or None)
    return phases


def _time(case: AnyCase, runs: list[_Run]) -> Time:
    """Rounds of a throttled GPU are discarded, unless no other is left."""
    workers: list[WorkerTime] = []
    kept_rounds: list[dict[str, float]] = []
    discarded = 0
    for run in runs:
        rounds = run.outcome["rounds"]
        states = run.telemetry or [RoundTelemetry()] * len(rounds)
        kept = [r for r, state in zip(rounds, states, strict=True) if not nvml.ABNORMAL & set(state.throttle)]
        discarded += len(rounds) - len(kept) if kept else 0
        kept = kept or rounds
        kept_rounds += kept
        seconds = [sum(r.values()) for r in kept]
        workers.append(WorkerTime(rounds_s=seconds, median_s=statistics.median(seconds)))
    median = statistics.median(worker.median_s for worker in workers)
    phase = {name: statistics.median(r.get(name, 0.0) for r in kept_rounds) for name in ("encode", "denoise", "decode")}
    step = phase["denoise"] / max(1, runs[-1].outcome["denoiser_calls"])
    native_calls = runs[-1].outcome["native_denoiser_calls"]
    images = runs[-1].outcome["images"]
    full_length = None if native_calls is None else phase["encode"] + native_calls * step + phase["decode"]
    return Time(
        cold_s=runs[0].outcome["cold_s"],
        median_s=median,
        step_s=step or None,
        images_per_s=None if images is None else images / median,
        full_length_s=full_length,
        full_length_steps=None if full_length is None else runs[-1].outcome["native_steps"],
        denoiser_calls=runs[-1].outcome["denoiser_calls"],
        workers=workers,
        rounds_discarded=discarded,
    )


def _disturbed(runs: list[_Run]) -> str | None:
    others = sorted({pid for run in runs for pid in run.sampler.others})
    if not others:
        return None
    return f"other processes used the GPU meanwhile (pid {', '.join(str(pid) for pid in others)})"
