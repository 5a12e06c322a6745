"""The worker's task: build a pipeline, call it, and report what that took; or probe whether it fits under a cap."""

import contextlib
import gc
import math
import re
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from pytest_vram.errors import Inapplicable
from pytest_vram.measure.channel import Message
from pytest_vram.measure.device import device_of
from pytest_vram.measure.drift import readings
from pytest_vram.measure.exactness import difference, save_output
from pytest_vram.measure.subject import subject_of
from pytest_vram.measure.worker import Reporter
from pytest_vram.pipelines.optimizations.compiling import compile_seconds

MIN_ROUNDS, MAX_ROUNDS = 5, 30
MOST_REPEATED = 1  # times as many rounds again, at most, in place of those that ran on a throttled GPU
PROBE_STEPS = 2  # memory is the same in every step: the second has whatever the first leaves behind
_UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_OUT_OF_MEMORY = re.compile(r"out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED", re.IGNORECASE)


def run(job: Message, reporter: Reporter) -> None:
    """The task `pytest_vram.measure.generation:run`; reports `done` or `failed`, then waits to be let go."""
    _Generation(job, reporter).run()


class _Generation:
    def __init__(self, job: Message, reporter: Reporter) -> None:
        self.job, self.reporter = job, reporter
        self.subject = subject_of(job)
        self.place: str = job["device"]
        self.device = device_of(self.place, job.get("gpus", 1))
        self.deadline = time.monotonic() + job["timeout_s"]
        self.phase = "load"
        self.peaks: dict[str, int] = {}
        self.marks: list[tuple[str, Any, float]] = []  # phase, the device's mark, the host's clock
        self.returns: list[tuple[bool, Any, float]] = []  # of the denoiser: first of a network?, and the same marks
        self.lags: list[float] = []
        self.steps: list[dict[str, float]] = []  # of each call
        self.track_memory = True
        self.found: dict[str, Any] = {}
        self.output: Any = None

    def run(self) -> None:
        ooms = 0
        try:
            if self.place == "cuda":
                torch.cuda.init()
                torch.cuda.memory_stats()
                answer = self.reporter.ask("context", reserved_bytes=torch.cuda.memory_reserved())
                if answer["cap_bytes"] is not None:
                    for gpu in answer["gpus"]:
                        total = torch.cuda.get_device_properties(gpu).total_memory
                        torch.cuda.set_per_process_memory_fraction(min(1.0, answer["cap_bytes"] / total), gpu)
            pipe = self.load()
            ooms = self.device.out_of_memory_errors()
            if self.job.get("probe"):
                self.probe(pipe)
            elif self.job.get("reference"):
                self.call(pipe, keep_output=True)
                save_output(self.output, Path(self.job["keep_output"]))
            elif calls := self.job.get("leak_calls"):
                gpus = self.job["gpus"] if self.place == "cuda" else 0
                self.found["drift"] = readings(lambda: self.call(pipe), calls, gpus)
            else:
                self.generate(pipe)
        except Inapplicable as error:
            self.reporter.ask("skipped", status="skipped", message=str(error))
        except Exception as error:
            self.fail(error, ooms)
        else:
            self.reporter.ask("done", **{**self.totals(), **self.found})

    def load(self) -> Any:
        """The pipeline in place, its optimizations applied."""
        self.reporter.send("phase", phase="load")
        self.device.take_peak()
        began = time.perf_counter()
        pipe = self.subject.build(self.place)
        self.device.synchronize()
        self.found |= {"load_s": time.perf_counter() - began, "weights_bytes": self.subject.weights(pipe)}
        self.seen = self.subject.watch(pipe)
        self.phases = self.subject.phases(pipe, self.enter, self.queued)
        return pipe

    def probe(self, pipe: Any) -> None:
        """Two calls: small tensors of the second split blocks that the first has left."""
        self.call(pipe, PROBE_STEPS)
        retries = self.device.totals().get("alloc_retries") or 0
        self.found["second_call"] = self.call(pipe, PROBE_STEPS)
        self.found["second_call_steps"] = self.steps[-1]
        self.found["second_call_retries"] = (self.device.totals().get("alloc_retries") or 0) - retries
        self.found["denoiser_calls"] = self.phases.denoiser_calls

    def generate(self, pipe: Any) -> None:
        """Cold call, pilot call, rounds."""
        self.reporter.send("phase", phase="warm-up")
        began, compiled_s = time.perf_counter(), compile_seconds()
        self.call(pipe)
        self.found["cold_s"] = time.perf_counter() - began
        if compile_seconds() > compiled_s:
            self.set_compilation_apart()
        pilot_s = sum(self.call(pipe).values())
        self.found["warmup_s"] = time.perf_counter() - began
        self.found["compile_s"] = compile_seconds() - compiled_s
        self.found["effects"] = {n: "applied" if seen() else "no_effect" for n, seen in self.seen.items()}
        rounds = _agreed(self.job["rounds"] or self.rounds_for(pilot_s))
        self.track_memory = False
        gc.collect()
        gc.freeze()  # what is alive now stays: later collections need not walk it
        self.reporter.send("rounds", count=rounds, pilot_s=pilot_s, found={**self.totals(), **self.found})
        began, compiled_s = time.perf_counter(), compile_seconds()
        durations = self.rounds(pipe, rounds)
        self.found["rounds_wall_s"] = time.perf_counter() - began
        self.found["compiled_again_s"] = compile_seconds() - compiled_s
        self.found["rounds"] = durations
        self.found["steps"] = self.steps[-len(durations) :]
        self.found["gpu_lag_s"] = max(0.0, statistics.median(self.lags[-len(durations) :]))
        self.found["denoiser_calls"] = self.phases.denoiser_calls
        self.found["native_denoiser_calls"] = self.subject.calls_at_native_length(pipe, self.phases.denoiser_calls)
        self.found["native_steps"] = self.subject.native_steps
        self.found["images"] = self.subject.images(self.output)
        self.found |= self.totals()
        self.hand_on()
        if self.job["save_images"]:
            try:
                save_images(self.output, Path(self.job["save_images"]), self.job["id"])
            except Exception as error:  # the measurement is not lost for it
                self.found["images_error"] = f"{type(error).__name__}: {error}"

    def rounds(self, pipe: Any, asked: int) -> list[dict[str, float]]:
        """Seconds by phase of each round: those asked for, and as many again as ran on a throttled GPU, within bounds.

        The pytest process, which watches the GPU, is asked after each batch, so that no round waits for an answer.
        """
        durations: list[dict[str, float]] = []
        began, most = time.monotonic(), asked * (1 + MOST_REPEATED)
        batch = asked
        while batch > 0:
            self.output = None  # an output that is held would take room beside the next
            for number in range(batch):
                durations.append(self.call(pipe, keep_output=number == batch - 1))
                self.reporter.send("round", index=len(durations) - 1)
            throttled = self.reporter.ask("rounds_over")["throttled"]
            each_s = (time.monotonic() - began) / len(durations)
            lost = [int(index in throttled) for index in range(len(durations))]
            *lost, no_room = _highest([*lost, -self.rounds_left(each_s)])
            batch = min(asked + sum(lost), most) - len(durations)
            batch = min(batch, -no_room)
        return durations

    def set_compilation_apart(self) -> None:
        """A call that compiled takes more memory than the next: kernels are tried out in it."""
        peaks = [self.peaks.pop(phase) for phase in tuple(self.peaks) if phase != "load"]
        if peaks:
            self.peaks["compile"] = max(peaks)

    def hand_on(self) -> None:
        """Keep the output for others, or compare it with what another has kept."""
        try:
            if self.job.get("keep_output"):
                save_output(self.output, Path(self.job["keep_output"]))
            if self.job.get("compare_output"):
                self.found["difference"] = difference(self.output, Path(self.job["compare_output"]))
        except (OSError, ValueError) as error:  # the measurement is not lost for it
            self.found["difference_error"] = str(error)

    def rounds_for(self, pilot_s: float) -> int:
        """As many rounds as the budget has, from 5 to 30, but no more than end before the timeout."""
        budget_s: float = self.job["round_budget_s"]
        rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, math.ceil(budget_s / pilot_s)))
        return max(1, min(rounds, self.rounds_left(pilot_s)))

    def rounds_left(self, each_s: float) -> int:
        """How many rounds end before the timeout, with some time to spare."""
        return max(0, int(0.8 * (self.deadline - time.monotonic()) / each_s))

    def call(self, pipe: Any, steps: int | None = None, keep_output: bool = False) -> dict[str, float]:
        """One call from prompts to pixels: seconds by phase."""
        self.marks, self.returns = [], []
        self.device.synchronize()
        self.phases.begin()
        output = self.subject.call(pipe, self.place, steps)
        self.mark("end")
        self.device.synchronize()
        self.take_peak()
        if keep_output:
            self.output = output
        seconds: dict[str, float] = {}
        for (name, begin, _), (_, end, _) in pairwise(self.marks):  # a phase may come again
            seconds[name] = seconds.get(name, 0.0) + self.device.seconds(begin, end)
        self.lags.append(self.gpu_lag())
        self.steps.append(self.step_seconds())
        return seconds

    def gpu_lag(self) -> float:
        """Seconds from when the host had queued the denoiser's last call (or all there is) until the GPU came there."""
        _, mark, at = self.returns[-1] if self.returns else self.marks[-1]
        _, first, began = self.marks[0]
        return self.device.seconds(first, mark) - (at - began)

    def step_seconds(self) -> dict[str, float]:
        """Seconds of the denoiser's first call, and the mean of those after it, but for the first of another network:
        before these an offload may move weights, once however many steps there are. What there was none of is left out.
        """
        begin = next((mark for name, mark, _ in self.marks if name == "denoise"), None)
        if begin is None or not self.returns:
            return {}
        later = [
            self.device.seconds(before, mark)
            for (_, before, _), (first, mark, _) in pairwise(self.returns)
            if not first
        ]
        steps = {"first": self.device.seconds(begin, self.returns[0][1])}
        return steps | ({"later": statistics.fmean(later)} if later else {})

    def queued(self, first: bool) -> None:
        """The denoiser has returned, for the `first` time in this call or again."""
        self.returns.append((first, self.device.mark(), time.perf_counter()))

    def mark(self, name: str) -> None:
        self.marks.append((name, self.device.mark(), time.perf_counter()))

    def enter(self, phase: str) -> None:
        self.mark(phase)
        self.take_peak()
        self.phase = phase

    def take_peak(self) -> None:
        """Reading the counters costs a tenth of a millisecond: in the rounds they run through."""
        if self.track_memory and (peak := self.device.take_peak()):
            self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), peak)

    def totals(self) -> dict[str, Any]:
        kibibytes = 1 if sys.platform == "darwin" else 1024  # getrusage(2): ru_maxrss
        return {
            **self.device.totals(),
            "phase_peaks": self.peaks,
            "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kibibytes,
        }

    def fail(self, error: Exception, ooms_before: int) -> None:
        """A failure is a result: where, why, and what was held until then."""
        plainly = out_of_memory(error)  # some pipelines swallow that error and die of the next one
        try:
            totals, ooms = self.totals(), self.device.out_of_memory_errors()
        except RuntimeError:  # the error has spoilt the CUDA context
            totals, ooms = {}, ooms_before
        swallowed = not plainly and ooms > ooms_before
        with contextlib.suppress(OSError):  # the disk is full
            traceback.print_exception(error)  # into the worker's output, whose end goes into the record
            sys.stderr.flush()
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        self.reporter.ask(
            "failed",
            status="oom" if plainly or swallowed else "error",
            swallowed=swallowed,
            phase=self.phase,
            requested_bytes=requested_bytes(message),
            message=message,
            **{**totals, **self.found},
        )


def _agreed(rounds: int) -> int:
    """What the first of the processes that run a pipeline together says."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return rounds
    said = torch.tensor([rounds], device="cuda" if torch.distributed.get_backend() == "nccl" else "cpu")
    torch.distributed.broadcast(said, 0)
    return int(said)


def _highest(numbers: Sequence[int]) -> list[int]:
    """Each the highest that any of the processes that run a pipeline together says; all of them must come here."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return list(numbers)
    said = torch.tensor(numbers, device="cuda" if torch.distributed.get_backend() == "nccl" else "cpu")
    torch.distributed.all_reduce(said, torch.distributed.ReduceOp.MAX)
    return [int(number) for number in said.tolist()]


def out_of_memory(error: BaseException | None) -> bool:
    """Whether running out of GPU memory is at the root of this exception."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        if isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def requested_bytes(message: str) -> int | None:
    """The bytes that PyTorch's message says it tried to allocate."""
    match = re.search(r"Tried to allocate ([\d.]+) ([KMG]iB)", message)
    return int(float(match[1]) * _UNITS[match[2]]) if match else None


def save_images(output: Any, folder: Path, case_id: str) -> None:
    """Write the images of one call as PNG; the names hold nothing but letters, digits and `+-_.`"""
    import numpy
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^A-Za-z0-9+_-]+", "_", case_id).strip("_")
    images = output.images if hasattr(output, "images") else output.frames[0]
    if isinstance(images, list):  # of PIL's: what a pipeline gives that is not asked for tensors
        for number, image in enumerate(images):
            image.save(folder / f"{stem}_{number}.png")
        return
    pixels = torch.nan_to_num(images.cpu().float()).clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1)
    for number, image in enumerate(numpy.asarray(pixels)):
        Image.fromarray(image).save(folder / f"{stem}_{number}.png")
