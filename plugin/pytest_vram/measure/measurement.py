"""One case measured in fresh workers: starts them, talks to them, samples NVML meanwhile, searches the need."""

import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pytest_vram.cases.case import AnyCase, Case
from pytest_vram.errors import StartError
from pytest_vram.measure.channel import Closed, Message
from pytest_vram.measure.conversation import Conversation, Say
from pytest_vram.measure.drift import with_drift, without_drift
from pytest_vram.measure.environment import without_paths
from pytest_vram.measure.exactness import NoReference, References, reference_of
from pytest_vram.measure.forkserver import ALLOCATOR_VARIABLES, PRELOAD_ENVIRON
from pytest_vram.measure.machine import Machine
from pytest_vram.measure.need import ALLOCATED_SPREAD, ESTIMATE_SPREAD, Need, NoNeed, Probe, search
from pytest_vram.measure.recording import (
    record_of,
    skipped,
    why_it_failed,
    with_exactness,
    with_need,
    with_others,
    without_need,
)
from pytest_vram.measure.runs import WorkerRun
from pytest_vram.measure.sampling import MEMORY_INTERVAL_S, Sampler
from pytest_vram.measure.timeout import LATER_FACTOR, LEAST_S, later_timeout_s
from pytest_vram.pipelines.optimizations import chosen, gpus_of, impossible
from pytest_vram.pipelines.optimizations.base import OFFLOAD_FOLDER
from pytest_vram.records.schema import (
    CHECK_INTERRUPTED,
    EXPANDABLE_ASKS_BYTES,
    NOT_COMPARED,
    NOT_FOR_MEMORY,
    NOT_SEARCHED,
    SEARCH_INTERRUPTED,
    Failure,
    GpuMemory,
    Record,
    Wall,
    above_the_card,
)

FOLLOW_S = 30.0  # until the workers beside the first have reported, too
GENERATION = "pytest_vram.measure.generation:run"


@dataclass(frozen=True)
class Settings:
    """How to measure; seconds. `interval_s` None turns sampling off, to see what it costs; `timeout_s` None is what
    measure/timeout.py says of a case without an estimate."""

    rounds: int | None = None
    round_budget_s: float = 3.0
    timeout_s: float | None = None
    save_images: str | None = None
    workers: int = 1
    interval_s: float | None = MEMORY_INTERVAL_S
    need: bool = True
    difference: bool = True
    leak_calls: int | None = None
    task: str = GENERATION


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
    weights = getattr(case, "weights", "pretrained")
    if reason := impossible(case.optimizations, machine.device, weights, len(machine.gpus)):
        return skipped(reason, common)
    lost = len(machine.starter.losses)
    try:
        folder = TemporaryDirectory(prefix="pytest-vram-", ignore_cleanup_errors=True)
    except OSError as error:
        return _not_measured(_no_room(error), common, 0.0)
    with folder as caches:
        measurer = CaseWorkers(case, job, machine, settings, say, Path(caches))
        record = _measured(measurer, estimated, references, common)
        if settings.leak_calls:
            record = _checked_for_leaks(record, measurer)
    if not (lately := machine.starter.losses[lost:]):
        return record
    disturbed = "; ".join(filter(None, [record.disturbed, *lately]))
    return record.model_copy(update={"disturbed": disturbed})


def _measured(
    measurer: "CaseWorkers", estimated: Estimated | None, references: References | None, common: dict[str, Any]
) -> Record:
    case, machine = measurer.case, measurer.machine
    began = time.monotonic()
    try:
        against, no_reference = measurer.compare(references)
        runs = measurer.rounds()
    except KeyboardInterrupt:
        raise CaseInterrupted(_not_measured("interrupted", common, time.monotonic() - began)) from None
    except OSError as error:
        return _not_measured(_no_room(error), common, time.monotonic() - began)
    if runs[-1].outcome["event"] == "skipped":
        return skipped(without_paths(runs[-1].outcome["message"]), common)
    record = record_of(case, machine, runs, time.monotonic() - began, common)
    record = with_exactness(record, runs[-1].outcome, against, no_reference)
    searched = time.monotonic()

    def after_search() -> Record:
        """The record with the wall time of the search, whatever came of it."""
        assert record.wall
        need_s = time.monotonic() - searched
        wall = {"total_s": record.wall.total_s + need_s, "need_s": need_s, "probes": measurer.probes}
        found = record.model_copy(update={"wall": record.wall.model_copy(update=wall)})
        return with_others(found, measurer.others)

    try:
        needs = measurer.needs(record, estimated)
    except KeyboardInterrupt:
        raise CaseInterrupted(without_need(after_search(), SEARCH_INTERRUPTED + measurer.found_so_far())) from None
    except NoNeed as error:
        return without_need(after_search(), without_paths(str(error)))
    except OSError as error:
        return without_need(after_search(), f"{NOT_FOR_MEMORY}: {_no_room(error)}")
    return with_need(after_search(), needs, machine)


def _checked_for_leaks(record: Record, measurer: "CaseWorkers") -> Record:
    if record.status != "ok":
        return record if record.status == "skipped" else without_drift(record, "the case did not complete")
    began = time.monotonic()
    try:
        outcome = measurer.calls_again(record.time.median_s or 0.0)
    except KeyboardInterrupt:
        raise CaseInterrupted(without_drift(record, CHECK_INTERRUPTED)) from None
    if "message" in outcome:
        outcome["message"] = without_paths(outcome["message"])
    assert record.wall
    wall = record.wall.model_copy(update={"total_s": record.wall.total_s + time.monotonic() - began})
    return with_drift(record.model_copy(update={"wall": wall}), outcome, measurer.machine.device)


def _not_measured(message: str, common: dict[str, Any], seconds: float) -> Record:
    """The record of a case of which nothing is known."""
    failure, nothing = Failure(message=message), {"memory": message, "time": message}
    return Record(status="error", failure=failure, wall=Wall(total_s=seconds), unavailable=nothing, **common)


def _no_room(error: OSError) -> str:
    """Why this process could not make what a worker needs, such as a temporary folder."""
    where = f": {without_paths(str(error.filename))}" if error.filename else ""
    return f"{error.strerror or error}{where}"


class CaseWorkers:
    """The workers of one case, one after the other.

    What torch.compile makes they keep in the folder `caches`, empty at first: the first worker compiles, whatever
    the user has compiled before, and those after it, such as probes, find it there. None leaves it to the environment.
    """

    def __init__(
        self,
        case: AnyCase,
        job: Message,
        machine: Machine,
        settings: Settings,
        say: Say,
        caches: Path | None = None,
    ) -> None:
        self.case, self.machine, self.settings, self.say, self.caches = case, machine, settings, say, caches
        self.gpus = gpus_of(case.optimizations)
        self.processes = any(optimization.processes for optimization in chosen(case.optimizations))
        self.probes = 0
        self._tried: dict[int, bool] = {}  # caps of the search that goes on, and whether the case completed under them
        self.timeout_s = settings.timeout_s or LEAST_S
        self._first_s: float | None = None  # what the first worker has taken that completed
        self._more_s = 0.0  # what a worker may take longer than the first
        self.others: set[int] = set()  # processes that were seen on the GPU beside a worker
        self._room = 0
        self._capped = list(range(self.gpus))  # of the GPUs those whose allocator gets the cap
        self._swallows: bool | None = None  # whether the pipeline is known to turn an out-of-memory into another error
        self.job = {
            **job,
            "device": machine.device,
            "rounds": settings.rounds,
            "round_budget_s": settings.round_budget_s,
            "timeout_s": self.timeout_s,
            "save_images": settings.save_images,
            "gpus": 1 if self.processes else self.gpus,
        }

    def compare(self, references: References | None) -> tuple[Case | None, str]:
        """Have the workers keep or compare their output. The case that it is compared with, or why with none."""
        case = self.case
        if references is None or not isinstance(case, Case):
            return None, ""
        if not self.settings.difference:
            return None, NOT_COMPARED if reference_of(case) else ""
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
        return None if run.done else why_it_failed(run.outcome)

    def rounds(self) -> list[WorkerRun]:
        """As many workers as were asked for, or up to the first that fails."""
        runs: list[WorkerRun] = []
        while len(runs) < self.settings.workers and all(run.done for run in runs):
            began = time.monotonic()
            runs.append(self._limited())
            if runs[-1].done and self._first_s is None:
                self._first_s = time.monotonic() - began
        return runs

    def _limited(self) -> WorkerRun:
        """One worker; under a limit once more where its context grew beyond what was set aside for it."""
        limit, context = self.case.limit_bytes, self.machine.context_bytes
        run = self._worker(None if limit is None else limit - context)
        if limit and run.outcome.get("swallowed") and self._worker(None, probe=True).outcome.get("status") == "error":
            run.outcome["status"] = "error"  # not the limit's doing: it comes with room too
        grown = run.context or 0
        reserved = run.outcome.get("reserved_peak_bytes") or 0
        if limit and run.done and grown > context and grown + reserved > limit:
            self.machine.context_bytes = max(context, grown)
            run = self._worker(limit - self.machine.context_bytes)
        return run

    def needs(self, record: Record, estimated: Estimated | None) -> list[Need]:
        """Search the need with fresh workers: on each GPU that the case takes, while the others have room. Where each
        has a process of its own they do the same, and are capped together.

        Raises:
            NoNeed: when it was not to be searched, or cannot be found.
        """
        memory = record.memory
        if self.machine.device != "cuda":
            raise NoNeed("there is no GPU memory to cap")
        if record.status != "ok" or not memory.reserved_peak_bytes or not memory.allocated_peak_bytes:
            raise NoNeed("the case did not complete")
        if not self.settings.need:
            raise NoNeed(NOT_SEARCHED)
        if self.machine.memory_bytes and above_the_card(record, self.machine.memory_bytes):
            raise NoNeed("the case took more than the GPU has: Windows moved memory to the host")
        if any(optimization.trained for optimization in chosen(self.case.optimizations)):
            raise NoNeed("a cache grows for more steps than a probe takes")
        if self.gpus > 1 and not self.processes:
            return [self._need_on(gpu, measured) for gpu, measured in enumerate(record.gpus)]
        guess, spread = memory.allocated_peak_bytes, ALLOCATED_SPREAD
        if estimated:  # what the estimate has wrong of the allocated peak it probably has wrong of the need
            guess = estimated.need * memory.allocated_peak_bytes // estimated.allocated_peak
            spread = ESTIMATE_SPREAD
        return [self._search(guess, spread, memory.reserved_peak_bytes)] * self.gpus

    def _need_on(self, gpu: int, measured: GpuMemory) -> Need:
        if not measured.allocated_peak_bytes or not measured.reserved_peak_bytes:
            raise NoNeed(f"nothing was seen on GPU {gpu}")
        self._capped = [gpu]
        return self._search(measured.allocated_peak_bytes, ALLOCATED_SPREAD, measured.reserved_peak_bytes)

    def _search(self, guess: int, spread: float, reserved_peak: int) -> Need:
        allocator = ",".join(self._environ(self.case).get(name, "") for name in ALLOCATOR_VARIABLES)
        asks = EXPANDABLE_ASKS_BYTES if "expandable_segments:True" in allocator else 0
        if limit := self.case.limit_bytes:  # under which it has completed
            asks = max(0, min(asks, limit - self.machine.context_bytes - reserved_peak))
        self._room, self._tried = reserved_peak + asks, {}
        return search(self.probe, guess, spread, reserved_peak, asks)

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
            self._tried[cap or self._room] = True
            return Probe(
                cap,
                True,
                outcome["reserved_peak_bytes"],
                outcome["second_call"],
                outcome["denoiser_calls"],
                outcome["second_call_steps"].get("later"),
                outcome["second_call_retries"],
            )
        memory_is_why = outcome["status"] == "oom"
        if outcome.get("swallowed") and cap is not None and cap < self._room:
            # memory ran out, and another error ended it: see whether that one comes with room too
            if self._swallows is None:
                self.say(f"need: does it fail within {self._room >> 20} MiB too?")
                self.probes += 1
                self._swallows = self._worker(self._room, probe=True).done
            memory_is_why = self._swallows
        if not memory_is_why:
            raise NoNeed(f"within {room} {NOT_FOR_MEMORY}: {outcome['message']}")
        self._tried[cap or self._room] = False
        return Probe(cap, False, failed_in=outcome.get("phase"))

    def found_so_far(self) -> str:
        """What a search that did not end has found, as the end of a sentence."""
        enough = min((cap for cap, fits in self._tried.items() if fits), default=None)
        too_little = max((cap for cap, fits in self._tried.items() if not fits), default=None)
        parts = [f"the case completed under a cap of {enough >> 20} MiB"] if enough else []
        parts += [f"it ran out of memory under {too_little >> 20} MiB"] if too_little else []
        return "".join(f"; {part}" for part in parts)

    def calls_again(self, call_s: float) -> Message:
        """What one more worker reports that calls the pipeline many times and says what it holds meanwhile. A call is
        known to take `call_s`."""
        calls, limit = self.settings.leak_calls or 0, self.case.limit_bytes
        self._more_s = LATER_FACTOR * calls * call_s
        self.say(f"leak check: {calls} calls in one process")
        return self._worker(None if limit is None else limit - self.machine.context_bytes, leak_calls=calls).outcome

    def _worker(self, cap: int | None, *, subject: AnyCase | None = None, **job: Any) -> WorkerRun:
        names = (subject or self.case).optimizations
        environ = self._environ(subject or self.case)
        if self.processes and gpus_of(names) > 1:
            return self._run_together(environ, cap, job)
        if not any(optimization.on_disk for optimization in chosen(names)):
            return self._run(environ, cap, job)
        with TemporaryDirectory(prefix="pytest-vram-") as folder:  # this process outlives a worker that is killed
            return self._run({**environ, OFFLOAD_FOLDER: folder}, cap, job)

    def _environ(self, case: AnyCase) -> dict[str, str]:
        """What a worker has in its environment beside what this process has."""
        environ = dict(PRELOAD_ENVIRON)
        for optimization in chosen(case.optimizations):
            environ |= optimization.environ
        environ |= self.job.get("environ", {})
        if self.caches:
            environ |= {"TORCHINDUCTOR_CACHE_DIR": str(self.caches), "TRITON_CACHE_DIR": str(self.caches / "triton")}
        return environ

    def _run(self, environ: dict[str, str], cap: int | None, job: Message) -> WorkerRun:
        """One worker, on as many GPUs as the case takes."""
        conversation = self._begin(environ, range(self.job["gpus"]), job)
        if isinstance(conversation, WorkerRun):
            return conversation
        worker, run = conversation.worker, conversation.run
        try:
            worker.channel.send({**self.job, **job})
            conversation.hold(cap, self._capped)
        except Closed:
            conversation.fail("error", conversation.died())
        finally:
            run.output_tail = worker.output_tail()
            worker.kill()
            self.others |= run.others
        return run

    def _run_together(self, environ: dict[str, str], cap: int | None, job: Message) -> WorkerRun:
        """A worker for each GPU, which run the pipeline together. What the first reports counts, and where another one
        fails it fails too."""
        uuids, port = self.machine.uuids, _free_port()
        together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(self.gpus)}
        begun: list[Conversation] = []
        threads: list[threading.Thread] = []
        try:
            for rank in range(self.gpus):
                visible = {"CUDA_VISIBLE_DEVICES": f"GPU-{uuids[rank]}", "RANK": str(rank), "LOCAL_RANK": "0"}
                one = self._begin({**environ, **together, **visible}, [rank], job)
                if isinstance(one, WorkerRun):
                    return one
                begun.append(one)
            first, *others = begun
            first.others = others
            for other in others:
                other.say = lambda _: None
                only_first = dict.fromkeys(("keep_output", "compare_output", "save_images"))
                threads.append(threading.Thread(target=other.follow, args=({**self.job, **job, **only_first}, cap)))
                threads[-1].start()
            try:
                first.worker.channel.send({**self.job, **job})
                first.hold(cap, [0])
            except Closed:
                first.lost = True
                first.fail("error", first.died())
            for thread in threads:
                thread.join(FOLLOW_S if first.run.done else 0)
            first.run.peers = [other.run for other in others]
            if first.run.done and not all(peer.done for peer in first.run.peers):
                lost = next(peer for peer in first.run.peers if not peer.done)
                late = {"event": "failed", "status": "error", "message": "the process on another GPU did not finish"}
                first.run.outcome = dict(lost.outcome) or late
            for other in (other for other in others if other.lost and not first.lost):
                first.run.outcome["message"] = f"on another GPU {other.died()}"
            return first.run
        finally:
            for one in begun:
                one.run.output_tail = one.worker.output_tail()
                one.worker.kill()
            for thread in threads:
                thread.join()
            self.others |= {pid for one in begun for pid in one.run.others}

    def _begin(self, environ: dict[str, str], gpus: Sequence[int], job: Message) -> Conversation | WorkerRun:
        """A new worker that uses these GPUs; a failed run where none could be started."""
        machine, settings = self.machine, self.settings
        interval_s = None if job else settings.interval_s  # what is not timed need not be sampled
        watched = [(machine.gpus[gpu] if settings.interval_s else None, machine.baseline(gpu)) for gpu in gpus]
        samplers = [Sampler(gpu, -1, idle, frozenset(gpu.processes() if gpu else ())) for gpu, idle in watched]
        began = time.monotonic()
        try:
            worker = machine.starter.start(settings.task, environ)
        except StartError as error:
            return WorkerRun({"event": "failed", "status": "error", "message": str(error)}, samplers[0])
        for sampler in samplers:
            sampler.pid = worker.pid
        first, *others = (WorkerRun({}, sampler) for sampler in samplers)
        first.peers = others
        timeout_s = self.timeout_s if self._first_s is None else later_timeout_s(self.timeout_s, self._first_s)
        conversation = Conversation(worker, first, interval_s, self.say, began, timeout_s + self._more_s)
        if job:
            conversation.say = lambda _: None
        return conversation


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])
