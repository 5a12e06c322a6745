"""Estimates: one worker a case, a few at a time."""

import os
import select
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import psutil

from pytest_vram.cases.case import Case
from pytest_vram.cases.models import Model
from pytest_vram.errors import StartError
from pytest_vram.measure.channel import Closed, Message
from pytest_vram.measure.environment import without_paths
from pytest_vram.measure.forkserver import Starter, Worker
from pytest_vram.measure.job import job_of
from pytest_vram.measure.recording import skipped
from pytest_vram.pipelines.optimizations import impossible
from pytest_vram.records.schema import ASSUMED_CONTEXT_BYTES, Failure, GpuMemory, Memory, PhaseCost, Record, Wall

ESTIMATE = "pytest_vram.measure.probes:estimate"
MOST_WORKERS = 16
WORKER_HOST_BYTES = 2 << 30  # what one simulation may hold, its libraries included


class Estimates:
    """As many workers as CPUs and host memory allow, at most sixteen, that simulate the cases in order.

    `finish` has them all done before anything is timed; `result` waits for one, while the others go on.
    """

    def __init__(
        self,
        cases: Iterable[Case],
        models: dict[str, Model],
        starter: Starter,
        capability: str | None = None,
        *,
        ahead: bool = True,
        beside: int = 1,
    ) -> None:
        """`capability` is the GPU's compute capability, where it is known. `ahead` estimates cases that nobody has
        asked for yet; off where others estimate them too. `beside` is how many such objects share this machine."""
        self._capability = capability
        self._waiting = deque(case for case in cases if impossible(case.optimizations, "meta", case.weights) is None)
        self._models, self._starter = models, starter
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        room = psutil.virtual_memory().available // WORKER_HOST_BYTES
        self._width = max(1, min(MOST_WORKERS, cpus // beside, room // beside))
        self._ahead = ahead
        self._running: dict[Case, tuple[Worker, float]] = {}
        self._done: dict[Case, tuple[Message, float]] = {}

    def _poll(self) -> None:
        """Take in what is finished, start what waits."""
        ready: list[Any] = []
        if self._running:
            ready = select.select([worker.channel for worker, _ in self._running.values()], [], [], 0)[0]
        for case, (worker, began) in list(self._running.items()):
            if worker.channel in ready:
                self._done[case] = self._read(worker), time.monotonic() - began
                worker.kill()
                del self._running[case]
        while self._ahead and self._waiting and len(self._running) < self._width:
            self._start(self._waiting.popleft())

    def _start(self, case: Case) -> None:
        try:
            worker = self._starter.start(ESTIMATE, {})
            worker.channel.send({**job_of(case, self._models[case.model]), "capability": self._capability})
        except (StartError, Closed) as error:
            self._done[case] = {"event": "failed", "message": str(error)}, 0.0
            return
        self._running[case] = worker, time.monotonic()

    @staticmethod
    def _read(worker: Worker) -> Message:
        try:
            message = worker.channel.receive(30)
        except Closed:
            message = None
        if message is None:
            lines = worker.output_tail().splitlines()
            message = {"event": "failed", "message": lines[-1] if lines else "the simulation's process ended"}
            message["output_tail"] = worker.output_tail()
        return message

    def result(self, case: Case, timeout_s: float) -> tuple[Message, float]:
        """The outcome of one case and the seconds it took; waits for it."""
        deadline = time.monotonic() + timeout_s
        if not any(case in known for known in (self._waiting, self._running, self._done)):
            self._waiting.appendleft(case)
        if case in self._waiting and not self._ahead:
            self._waiting.remove(case)
            self._start(case)
        elif case in self._waiting:  # asked out of turn
            self._waiting.remove(case)
            self._waiting.appendleft(case)
        while case not in self._done:
            self._poll()
            if case in self._done:
                break
            if time.monotonic() > deadline:
                worker, _ = self._running.pop(case, (None, 0.0))
                if worker:
                    worker.kill()
                return {"event": "timeout", "message": f"not estimated within {timeout_s:g} s"}, timeout_s
            channels = [worker.channel for worker, _ in self._running.values()]
            select.select(channels, [], [], min(0.5, max(0.0, deadline - time.monotonic())))
        return self._done[case]

    def finish(self, timeout_s: float, say: Callable[[str], None]) -> None:
        """Have every case estimated, or timed out."""
        cases = [*self._running, *self._waiting]
        for number, case in enumerate(cases, 1):
            say(f"estimating {number} of {len(cases)}: {case.id}")
            self._done[case] = self.result(case, timeout_s)

    def done(self) -> dict[Case, Message]:
        """The outcomes so far."""
        return {case: outcome for case, (outcome, _) in self._done.items()}

    def close(self) -> None:
        self._waiting.clear()
        for worker, _ in self._running.values():
            worker.kill()
        self._running.clear()


def estimated_record(case: Case, outcome: Message, seconds: float) -> Record:
    """The record of a case that was estimated and not run."""
    common: dict[str, Any] = {"id": case.id, "case": case, "method": "estimated", "wall": Wall(total_s=seconds)}
    if outcome["event"] == "skipped":
        return skipped(without_paths(outcome["message"]), common)
    if outcome["event"] != "done":
        failure = Failure(
            message=without_paths(outcome["message"]), output_tail=without_paths(outcome.get("output_tail", ""))
        )
        status = "timeout" if outcome["event"] == "timeout" else "error"
        return Record(status=status, failure=failure, unavailable={"memory": "the estimate failed"}, **common)
    required = outcome["need"] + ASSUMED_CONTEXT_BYTES
    memory = Memory(
        weights_bytes=outcome["weights"],
        allocated_peak_bytes=outcome["allocated_peak"],
        reserved_peak_bytes=outcome["reserved_peak"],
        need_bytes=outcome["need"],
        estimated_need_bytes=outcome["need"],
        estimated_allocated_peak_bytes=outcome["allocated_peak"],
        required_bytes=required,
    )
    too_much: Failure | None = None
    if case.limit_bytes is not None and required > case.limit_bytes:
        too_much = Failure(
            limit_bytes=case.limit_bytes,
            message=f"the estimate is {required >> 20} MiB with {ASSUMED_CONTEXT_BYTES >> 20} MiB of context assumed",
        )
    return Record(
        status="oom" if too_much else "ok",
        memory=memory,
        gpus=[_estimated_gpu(gpu) for gpu in outcome.get("gpus", [])],
        phases={name: PhaseCost(allocated_peak_bytes=peak or None) for name, peak in outcome["phases"].items()},
        effects=outcome["effects"],
        failure=too_much,
        unavailable={
            "time": "estimated: nothing was run",
            "memory.context_bytes": f"estimated: required_bytes assumes {ASSUMED_CONTEXT_BYTES >> 20} MiB",
            "memory.nvml_process_peak_bytes": "estimated: nothing was run",
            "memory.nvml_device_peak_bytes": "estimated: nothing was run",
            "memory.host_peak_bytes": "estimated: nothing was run",
            "memory.need_tolerance_bytes": "estimated: the need is simulated, not searched",
        },
        **common,
    )


def with_estimate(record: Record, outcome: Message) -> Record:
    """A measured record with its estimate beside it."""
    key = "memory.estimated_need_bytes"
    unavailable = {k: v for k, v in record.unavailable.items() if k != key}
    if outcome["event"] != "done":
        return record.model_copy(update={"unavailable": {**unavailable, key: without_paths(outcome["message"])}})
    memory = record.memory.model_copy(
        update={
            "estimated_need_bytes": outcome["need"],
            "estimated_allocated_peak_bytes": outcome["allocated_peak"],
        }
    )
    gpus = [
        gpu.model_copy(update={"estimated_need_bytes": its["need"]})
        for gpu, its in zip(record.gpus, outcome.get("gpus", []), strict=False)
    ]
    return record.model_copy(update={"memory": memory, "gpus": gpus, "unavailable": unavailable})


def _estimated_gpu(found: dict[str, int]) -> GpuMemory:
    return GpuMemory(
        allocated_peak_bytes=found["allocated_peak"],
        reserved_peak_bytes=found["reserved_peak"],
        need_bytes=found["need"],
        estimated_need_bytes=found["need"],
        required_bytes=found["need"] + ASSUMED_CONTEXT_BYTES,
    )
