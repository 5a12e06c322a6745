"""Choices: a set of optimizations for a workload, with the record that says what it costs; and what two of them say."""

import statistics
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from pytest_vram.cases.case import Case, OwnCase
from pytest_vram.compare.timing import host_bound
from pytest_vram.pipelines.optimizations import OPTIMIZATIONS
from pytest_vram.records.reading import ReadRun
from pytest_vram.records.schema import ASSUMED_CONTEXT_BYTES, GpuMemory, Phase, Record
from pytest_vram.report.text import gib

# How much the time of one case differs from run to run. Of the cases that results/ has several times and whose time the
# host's CPU decides (small batches, offloads), nine in ten stay within a factor of 2.5 and half within 1.8; those where
# the GPU decides, within 1.02. The needs are the same to 0.2 %.
SAME_TIME = 2.0
SAME_GPU_TIME = 1.1
SAME_TIME_OF_ONE = (
    SAME_TIME**0.5**0.5
)  # where one of two times varies so: the spread of a ratio is √2 times that of each
SIMULATED_SHARE = 0.05  # by which 19 of 20 simulated needs in results/ miss the searched one at most
ONCE_A_CALL, IN_EACH_STEP = 2, 3  # of `Choice.moves`
MOVES_ONCE = "model_offload"  # brings the denoiser once a call
_OF_A_CALL: tuple[Phase, ...] = ("encode", "denoise", "decode")
UNNAMED = "a GPU that its run does not name"
GpuKey = tuple[str, int] | None  # name and GiB, since variants share a name; None: estimated with no GPU
DTYPES = ("fp16", "bf16", "fp32")  # in the order in which a plain case is looked for, to compare others with


@dataclass(frozen=True, order=True)
class Workload:
    """What somebody wants to run: a model at a resolution (× frames) and batch size, or a pipeline of their own."""

    model: str
    pixels: int  # width × height × frames: smaller ones come first
    width: int = 0
    height: int = 0
    frames: int = 0
    batch_size: int = 0
    test: str = ""

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Workloads are looked up a million times in a large report."""
        return hash((self.model, self.width, self.height, self.frames, self.batch_size, self.test))

    @property
    def size(self) -> str:
        """`1024x1024`, with the frames of a video; nothing for a pipeline of one's own."""
        if not self.width:
            return ""
        return f"{self.width}x{self.height}" + (f", {self.frames} frames" if self.frames else "")

    @property
    def subject(self) -> str:
        """The model, or the one test that measures a pipeline of its own."""
        return f"{self.model}::{self.test}" if self.test else self.model

    def holds(self, other: "Workload") -> bool:
        """Whether this is at least as much of the same: what has room for it has room for the other."""
        own = (self.width, self.height, self.frames, self.batch_size)
        others = (other.width, other.height, other.frames, other.batch_size)
        return self.subject == other.subject and all(a >= b for a, b in zip(own, others, strict=True))

    @property
    def label(self) -> str:
        """What follows the model's name."""
        return f"{self.size}, batch {self.batch_size}" if self.width else self.test


@dataclass(frozen=True, eq=False)
class Choice:
    """One set of optimizations for one workload, and the record that says what it costs.

    `timed` are other runs of the same on such a GPU with the same software: one call differs much more from run to run
    than memory does, so times are medians over all of them. `ran_out_bytes` is the largest cap on the allocator under
    which the case was seen to run out of memory, `completed_within` the least limit, context included, under which it
    was seen to complete. `simulated` is the newest estimate of the same, of another run: where a record has no estimate
    of its own, or an older one. `unmoved` is the set without model offload, where this one has it.
    """

    workload: Workload
    record: Record
    run: ReadRun
    timed: "tuple[Choice, ...]" = ()
    ran_out_bytes: int = 0
    completed_within: int | None = None
    simulated: "Choice | None" = None
    unmoved: "Choice | None" = None

    @cached_property
    def optimizations(self) -> tuple[str, ...]:
        return self.record.case.optimizations

    @cached_property
    def name(self) -> str:
        """The set as people write it; empty for a pipeline of one's own."""
        return "+".join(self.optimizations)

    @cached_property
    def flags(self) -> tuple[str, ...]:
        """The optimizations beside the dtype."""
        return tuple(name for name in self.optimizations if name not in DTYPES)

    @cached_property
    def gpu(self) -> str | None:
        """The GPU that it was measured on; None where nothing ran."""
        return None if self.record.method == "estimated" else self.run.gpu or UNNAMED

    @cached_property
    def gpu_key(self) -> GpuKey:
        """What tells GPUs apart."""
        return None if self.gpu is None else (self.gpu, round((self.run.gpu_memory_bytes or 0) / (1 << 30)))

    @cached_property
    def estimated(self) -> bool:
        """Whether the need was simulated and not searched."""
        only_simulated = self.record.memory.need_bytes is None and self.simulated_need_bytes is not None
        return self.record.method == "estimated" or only_simulated

    @property
    def simulated_need_bytes(self) -> int | None:
        """The need by the newest simulation."""
        return (self.simulated or self).record.memory.estimated_need_bytes

    @cached_property
    def need_bytes(self) -> int | None:
        """The need, searched or else simulated; None where it was more than the GPU has, and never simulated."""
        return self.simulated_need_bytes if self.estimated else self.record.memory.need_bytes

    @cached_property
    def required_bytes(self) -> int | None:
        """The need and the context, as it was measured there or else assumed."""
        memory = self.record.memory
        if not self.estimated and memory.required_bytes is not None:
            return memory.required_bytes
        return None if self.need_bytes is None else self.need_bytes + (memory.context_bytes or ASSUMED_CONTEXT_BYTES)

    @property
    def at_least_bytes(self) -> int:
        """What the GPU had when the case ran out of memory on it, else 0."""
        return (self.run.gpu_memory_bytes or 0) if self.record.status == "oom" else 0

    @cached_property
    def call_s(self) -> float | None:
        """Seconds of one call with the model's native number of steps, with room; of one's own pipeline as it is."""
        return _median(self._length_s(choice.record) for choice in (self, *self.timed))

    @property
    def own_call_s(self) -> float | None:
        """The same, of its own record alone."""
        return self._length_s(self.record)

    def _length_s(self, record: Record) -> float | None:
        time, unmoved = record.time, self.unmoved
        if time.full_length_s is None and time.step_s is None and time.denoiser_calls:
            return None  # one step, and what was moved for it
        if time.full_length_s is None or not move_is_in_the_steps(record):
            return time.full_length_s or time.median_s
        timed_s = [record.phases[name].time_s for name in _OF_A_CALL if name in record.phases]
        if unmoved is None or time.median_s is None or not time.step_s or len(timed_s) < len(_OF_A_CALL):
            return None
        step_s = _median(choice.record.time.step_s for choice in (unmoved, *unmoved.timed))
        more = (time.full_length_s - sum(seconds or 0.0 for seconds in timed_s)) / time.step_s
        return step_s and time.median_s + round(more) * step_s

    @cached_property
    def slowdown(self) -> float | None:
        """The time of a call with no more memory than required, over its time with room."""
        times = [c.record.time for c in (self, *self.timed) if not move_is_in_the_steps(c.record)]
        return _median(time.at_need_s / time.median_s for time in times if time.at_need_s and time.median_s)

    @property
    def memory_run(self) -> ReadRun:
        """The run that its need comes from."""
        return self.simulated.run if self.simulated and self.estimated else self.run

    @property
    def runs(self) -> list[ReadRun]:
        """The runs that its figures come from: that of its need first."""
        unmoved = self.unmoved if any(move_is_in_the_steps(c.record) for c in (self, *self.timed)) else None
        steps = () if unmoved is None else (unmoved, *unmoved.timed)
        others = [choice.run for choice in (*self.timed, *steps) if choice.record.time.median_s is not None]
        return list(dict.fromkeys((self.memory_run, self.run, *others)))

    @property
    def offloads(self) -> bool:
        """Whether weights stay in host memory."""
        return any("offload" in name for name in self.optimizations)

    @property
    def moves(self) -> int:
        """How often weights that wait in host memory are used: 0 never, 1 once a prompt (text encoders alone), 2 once a
        call, 3 in each step, on a stream of their own, 4 in each step, and the GPU waits for them: such calls took 3 to
        8 times as long, of the four models that were measured with both."""
        in_each_step = any(name.startswith(("sequential_", "group_")) for name in self.optimizations)
        encoders = any(name.startswith("text_encoders_") for name in self.optimizations)
        if self.offloads and in_each_step:
            return IN_EACH_STEP if any(name.endswith("_stream") for name in self.optimizations) else IN_EACH_STEP + 1
        return ONCE_A_CALL if self.offloads else int(encoders)

    @property
    def changes_image(self) -> bool:
        """Whether a flag is among its own that does not claim to leave the image as it is."""
        known = (OPTIMIZATIONS.get(name) for name in self.flags)
        return not all(flag is not None and flag.exact for flag in known)

    @property
    def host_bytes(self) -> int | None:
        """Host memory: the process's peak; and the weights, which go through it from a checkpoint to the GPU, where the
        measured process made random ones on the GPU."""
        memory, case = self.record.memory, self.record.case
        if memory.host_peak_bytes is None:
            return None
        made_on_the_gpu = isinstance(case, Case) and case.weights == "random" and not self.moves
        return memory.host_peak_bytes + (memory.weights_bytes or 0 if made_on_the_gpu else 0)

    @property
    def disk_bytes(self) -> int | None:
        """The weights on disk, saved in the dtype they run in."""
        return self.record.memory.weights_bytes

    @cached_property
    def no_effect(self) -> tuple[str, ...]:
        """The flags that were seen to change nothing."""
        return self.record.no_effect

    @property
    def gpus(self) -> Sequence[GpuMemory]:
        """Of a set that takes several GPUs what each holds, else nothing."""
        return self.record.gpus

    @property
    def _load_decides(self) -> bool:
        """Whether the weights, on their way, need more than a call: as where they are quantized on the GPU."""
        peaks = {name: cost.allocated_peak_bytes or 0 for name, cost in self.record.phases.items()}
        highest = max(peaks, key=lambda name: peaks[name], default=None)
        return (self.record.need_phase or highest) == "load"

    @property
    def leaks(self) -> tuple[str, ...]:
        """What was seen to grow from call to call."""
        return () if self.record.drift is None else tuple(self.record.drift.leaks)

    @property
    def remark(self) -> str:
        """What a person should know before taking it."""
        each = " + ".join(gib(gpu.required_bytes) for gpu in self.gpus)
        limit = self.record.case.limit_bytes
        remarks = [f"under a limit of {gib(limit)}"] if limit else []
        remarks += [f"{len(self.gpus)} GPUs: {each}"] if each else []
        remarks += [f"no effect: {', '.join(self.no_effect)}"] if self.no_effect else []
        remarks += ["the load decides"] if self._load_decides else []
        remarks += ["not exact"] if self.record.exact is False else []
        exactness = self.record.exactness
        if exactness and not exactness.claimed and exactness.psnr_db is not None:
            remarks.append(f"image {exactness.psnr_db:.0f} dB")
        remarks += [f"leaks: {', '.join(self.leaks)}"] if self.leaks else []
        remarks += ["out of memory"] if self.record.status == "oom" else []
        return "; ".join(remarks)


def workload_of(record: Record) -> Workload:
    """The workload of a record."""
    case = record.case
    if isinstance(case, OwnCase):
        return Workload(case.model, 0, test=case.test)
    frames = case.frames or 0
    pixels = case.width * case.height * max(1, frames)
    return Workload(case.model, pixels, case.width, case.height, frames, case.batch_size)


def move_is_in_the_steps(record: Record) -> bool:
    """Whether the record counts what it moves once a call as a part of each step: the first files did."""
    return MOVES_ONCE in record.case.optimizations and record.time.first_step_s is None


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def against(choice: Choice, plain: Choice) -> tuple[int | None, float | None]:
    """What a choice saves and costs beside the plain one: bytes of required memory, and seconds a call, where both were
    timed on such a GPU."""
    if choice is plain:
        return None, None
    required, compared = choice.required_bytes, plain.required_bytes
    lost = choice.at_least_bytes or plain.at_least_bytes  # what ran out of memory requires more than is known
    saved = None if required is None or compared is None or lost else compared - required
    alike = choice.gpu_key == plain.gpu_key and choice.call_s is not None and plain.call_s is not None
    return saved, (choice.call_s or 0.0) - (plain.call_s or 0.0) if alike else None


def baseline(choices: Sequence[Choice]) -> Choice:
    """The choice that the others of a workload are compared with: a dtype alone, else what moves weights least often,
    with the fewest optimizations, on one GPU before on several."""
    by_set = {choice.optimizations: choice for choice in choices}
    plain = [by_set[(dtype,)] for dtype in DTYPES if (dtype,) in by_set]
    plain.sort(key=lambda choice: choice.gpu is not None and choice.estimated)  # timed, but its need not searched
    return plain[0] if plain else min(choices, key=lambda c: (len(c.gpus), c.moves, len(c.optimizations)))


def without_idle_flags(choices: Sequence[Choice], searched: Collection[tuple[str, ...]] = ()) -> list[Choice]:
    """The choices less those with a flag that was seen to change nothing, where the set without it is there too, or
    among those that were `searched` on another GPU."""
    if not any(choice.no_effect for choice in choices):
        return list(choices)
    sets = {*searched, *(choice.optimizations for choice in choices)}

    def idle(choice: Choice) -> bool:
        without = tuple(name for name in choice.optimizations if name not in choice.no_effect)
        return without != choice.optimizations and without in sets

    return [choice for choice in choices if not idle(choice)]


def for_one_gpu(choices: Sequence[Choice], searched: Collection[tuple[str, ...]] = ()) -> list[Choice]:
    """Those that take one GPU, without idle flags."""
    return [choice for choice in without_idle_flags(choices, searched) if not choice.gpus]


def same_time(*choices: Choice) -> float:
    """The factor by which the times of these may differ and say nothing: those that the host's CPU decides, and those
    whose allocator had to free and try again, by more."""
    vary = [bool(c.record.memory.alloc_retries) or host_bound(c.record) is not False for c in choices]
    return SAME_TIME if all(vary) else SAME_TIME_OF_ONE if any(vary) else SAME_GPU_TIME


def frontier(choices: Sequence[Choice]) -> list[Choice]:
    """Of those that were timed the ones that buy something, least memory first: each is faster than all that require
    less, by more than identical work was seen to differ, and those require less by more than the needs are known to. A
    simulated need counts as the most that it may be."""
    found: list[Choice] = []
    completed = [choice for choice in for_one_gpu(choices) if choice.gpu is not None and not choice.at_least_bytes]
    figures = [(c.required_bytes, c.call_s, _known_to(c) if c.estimated else 0, c) for c in completed]
    known = [(required + more, seconds, c) for required, seconds, more, c in figures if required and seconds]
    for _, seconds, choice in sorted(known, key=lambda known: known[:2]):
        if not found or seconds * same_time(choice, found[-1]) < (found[-1].call_s or 0):
            found.append(choice)
    kept: list[Choice] = []
    for choice in reversed(found):
        apart = (kept[-1].required_bytes or 0) - (choice.required_bytes or 0) if kept else 0
        if not kept or apart > max(_known_to(choice), _known_to(kept[-1])):
            kept.append(choice)
    return kept[::-1]


def _known_to(choice: Choice) -> float:
    """Bytes by which the need may differ from what is said."""
    if choice.estimated:
        return SIMULATED_SHARE * (choice.need_bytes or 0)
    return choice.record.memory.need_tolerance_bytes or 0
