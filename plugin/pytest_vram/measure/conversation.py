"""What the session and a worker say to each other while a case is measured."""

import signal
import time
from collections.abc import Callable, Sequence

from pytest_vram.measure.channel import Closed, Message
from pytest_vram.measure.forkserver import Worker
from pytest_vram.measure.runs import WorkerRun
from pytest_vram.measure.timeout import LATER_FACTOR, LEAST_S

Say = Callable[[str], None]
"""Told what the worker does now, for a line of progress."""


class Conversation:
    """With one worker, from the job to the outcome, sampling between the messages."""

    def __init__(
        self, worker: Worker, run: WorkerRun, interval_s: float | None, say: Say, began: float, timeout_s: float
    ) -> None:
        self.worker, self.run, self.interval_s, self.say = worker, run, interval_s, say
        self.deadline, self.timeout_s = began + timeout_s, timeout_s
        self.phase: str | None = "load"
        self.rounds: int | None = None
        self.found: Message = {}
        self.lost = False  # the worker is gone
        self.others: list[Conversation] = []  # with the workers that run the pipeline together with this one

    def follow(self, job: Message, cap: int | None) -> None:
        """All of the conversation, in a thread of its own."""
        try:
            self.worker.channel.send(job)
            self.hold(cap, [0])
        except (Closed, OSError):
            self.lost = True  # why, the thread that started the worker finds out
            self.fail("error", "the process on another GPU ended")

    def hold(self, cap: int | None, capped: Sequence[int]) -> None:
        """`cap` is for PyTorch's allocator on the GPUs `capped`, in bytes. Raises Closed when the worker dies."""
        channel, samplers = self.worker.channel, [run.sampler for run in (self.run, *self.run.peers)]
        while not self.run.outcome:
            message = channel.receive(self.interval_s or 0.5)
            if self.interval_s:
                for sampler in samplers:
                    sampler.sample(states=self.rounds is not None)
            if lost := next((o.run for o in self.others if o.run.outcome and not o.run.done), None):
                self.run.outcome = dict(lost.outcome)  # this one would wait for it
                return
            if message is None:
                if time.monotonic() > self.deadline:
                    self._time_out()
                continue
            event = message["event"]
            if event == "context":
                channel.send({"cap_bytes": None if cap is None else max(1 << 20, cap), "gpus": list(capped)})
            elif event == "phase":
                self.phase = message["phase"] if message["phase"] == "load" else None
                self.say(message["phase"])
            elif event == "rounds":
                self.rounds, self.found = message["count"], message["found"]
                self.say(f"{self.rounds} rounds of about {message['pilot_s']:.2f} s")
                self._expect(LEAST_S + LATER_FACTOR * self.rounds * message["pilot_s"])
                for sampler in samplers:
                    sampler.begin_batch()
            elif event == "round":
                for sampler in samplers:
                    sampler.end_round()
                self.say(f"round {message['index'] + 1} of {max(self.rounds or 0, message['index'] + 1)}")
            elif event == "rounds_over":
                for sampler in samplers:
                    sampler.end_batch()
                throttled = sorted(self.run.throttled)
                if throttled:
                    self.say(f"{len(throttled)} rounds ran on a throttled GPU")
                for sampler in samplers:
                    sampler.begin_batch()  # of those that are repeated
                channel.send({"throttled": throttled})
            else:
                self._finish(message)

    def _finish(self, message: Message) -> None:
        """The worker waits, holding all it held: the moment to see what is outside the allocator."""
        first, *more = message.get("gpus") or [message]
        for run, figures in zip((self.run, *self.run.peers), (first, *more), strict=False):
            if self.interval_s is None:
                run.sampler.look_around()
            else:
                run.sampler.sample()
                run.context = run.sampler.held_outside(figures.get("reserved_bytes") or 0)
            run.outcome = {"event": message["event"], **figures}
        self.run.outcome = message

    def _expect(self, seconds: float) -> None:
        """The result is to come within these seconds from now, unless it was to come before."""
        sooner_s = self.deadline - time.monotonic() - seconds
        if sooner_s > 0:
            self.deadline, self.timeout_s = self.deadline - sooner_s, self.timeout_s - sooner_s

    def _time_out(self) -> None:
        where = f" in {self.phase}" if self.phase else ""
        self.fail("timeout", f"no result within {self.timeout_s:.4g} s{where} (--vram-timeout)")

    def fail(self, status: str, message: str) -> None:
        """The worker says no more: what it had found before the rounds is kept."""
        self.run.outcome = {
            **self.found,
            "event": "failed",
            "status": status,
            "phase": self.phase,
            "message": message,
        }

    def died(self) -> str:
        """How the worker ended, its last words with it."""
        code = self.worker.wait(5)
        if code is not None and code < 0:
            cause = f"was killed by signal {-code}"
            if code == -signal.SIGKILL:
                cause += " (the kernel does so when the host runs out of memory)"
        elif code is None:
            cause = "ended, nobody knows how: the fork server was gone before it"
        else:
            cause = f"ended with exit code {code}"
        lines = [line for line in self.worker.output_tail().splitlines() if line.strip()]
        last = f": {lines[-1].strip()}" if lines and code not in (-signal.SIGKILL, -signal.SIGSEGV) else ""
        where = f" in {self.phase}" if self.phase else ""
        return f"the worker {cause}{where}{last}"
