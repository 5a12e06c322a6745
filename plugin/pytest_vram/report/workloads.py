"""From records to choices: for each workload the sets of optimizations to choose from, each by its best record."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from pytest_vram.cases.case import Case, OwnCase
from pytest_vram.cases.models import Model
from pytest_vram.records.reading import ReadRun
from pytest_vram.records.schema import ASSUMED_CONTEXT_BYTES, Record

# How much the time of one case differs from run to run: of the 32 cases that results/ has several times, 30 stay within
# this factor and half within 1.2. Small batches are bound by the host's CPU; the needs are the same to 0.2 %.
SAME_TIME = 1.6
UNNAMED = "a GPU that its run does not name"
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

    @property
    def size(self) -> str:
        """`1024x1024`, with the frames of a video; nothing for a pipeline of one's own."""
        if not self.width:
            return ""
        return f"{self.width}x{self.height}" + (f", {self.frames} frames" if self.frames else "")

    @property
    def label(self) -> str:
        """What follows the model's name."""
        return f"{self.size}, batch {self.batch_size}" if self.width else self.test


@dataclass(frozen=True, eq=False)
class Choice:
    """One set of optimizations for one workload, and the record that says what it costs."""

    workload: Workload
    record: Record
    run: ReadRun
    ran_out_bytes: int = 0  # the largest cap on the allocator under which it was seen to run out of memory

    @cached_property
    def optimizations(self) -> tuple[str, ...]:
        return self.record.case.optimizations

    @property
    def name(self) -> str:
        """The set as people write it; empty for a pipeline of one's own."""
        return "+".join(self.optimizations)

    @cached_property
    def flags(self) -> tuple[str, ...]:
        """The optimizations beside the dtype."""
        return tuple(name for name in self.optimizations if name not in DTYPES)

    @cached_property
    def estimated(self) -> bool:
        """Whether the need was simulated and not searched."""
        memory = self.record.memory
        only_simulated = memory.required_bytes is None and memory.estimated_need_bytes is not None
        return self.record.method == "estimated" or only_simulated

    @cached_property
    def need_bytes(self) -> int | None:
        """The need, searched or else simulated; None where it was more than the GPU has, and never simulated."""
        memory = self.record.memory
        return memory.estimated_need_bytes if self.estimated else memory.need_bytes

    @cached_property
    def required_bytes(self) -> int | None:
        """What it requires on the GPU where it was measured; estimates take the context measured there, or assumed."""
        memory = self.record.memory
        if not self.estimated:
            return memory.required_bytes
        return None if self.need_bytes is None else self.need_bytes + (memory.context_bytes or ASSUMED_CONTEXT_BYTES)

    @property
    def at_least_bytes(self) -> int:
        """What the GPU had when the case ran out of memory on it, else 0."""
        return (self.run.gpu_memory_bytes or 0) if self.record.status == "oom" else 0

    @cached_property
    def call_s(self) -> float | None:
        """Seconds of one call with the model's native number of steps, with room; of one's own pipeline as it is."""
        time = self.record.time
        return time.full_length_s or time.median_s

    @cached_property
    def slowdown(self) -> float | None:
        """The time of a call with no more memory than required, over its time with room."""
        time = self.record.time
        return time.at_need_s / time.median_s if time.at_need_s and time.median_s else None

    @property
    def offloads(self) -> bool:
        """Whether weights stay in host memory."""
        return any("offload" in name for name in self.optimizations)

    @property
    def host_bytes(self) -> int | None:
        """Host memory: the process's peak; and the weights, which go through it from a checkpoint to the GPU, where the
        measured process made random ones on the GPU."""
        memory, case = self.record.memory, self.record.case
        if memory.host_peak_bytes is None:
            return None
        made_on_the_gpu = isinstance(case, Case) and case.weights == "random" and not self.offloads
        return memory.host_peak_bytes + (memory.weights_bytes or 0 if made_on_the_gpu else 0)

    @property
    def disk_bytes(self) -> int | None:
        """The weights on disk, saved in the dtype they run in."""
        return self.record.memory.weights_bytes

    @cached_property
    def no_effect(self) -> tuple[str, ...]:
        """The flags that were seen to change nothing."""
        return tuple(name for name, effect in self.record.effects.items() if effect == "no_effect")

    @property
    def remark(self) -> str:
        """What a person should know before taking it."""
        remarks = [f"no effect: {', '.join(self.no_effect)}"] if self.no_effect else []
        remarks += ["not exact"] if self.record.exact is False else []
        remarks += ["out of memory"] if self.record.status == "oom" else []
        return "; ".join(remarks)


@dataclass(frozen=True, eq=False)
class Evidence:
    """What all runs together say.

    `choices` has, for each workload and each GPU (None: estimated with none), the choices by their set. `checks` are
    the cases that ran under a limit: they say no need, but what ran out of memory counts against the choice. `failed`
    has what ended in no figures.
    """

    runs: Sequence[ReadRun]
    choices: Mapping[Workload, Mapping[str | None, Mapping[tuple[str, ...], Choice]]]
    checks: Sequence[Choice] = ()
    failed: Sequence[Choice] = ()
    aliases: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def measured(self, workload: Workload) -> list[Choice]:
        """The choices of the GPU that measured most of this workload; the last of equals."""
        by_gpu = [list(sets.values()) for gpu, sets in self.choices[workload].items() if gpu is not None]
        return max(reversed(by_gpu), key=len, default=[])

    def estimated(self, workload: Workload) -> list[Choice]:
        """The choices that were estimated with no GPU, and measured on none."""
        by_gpu = self.choices[workload]
        measured = {names for gpu, sets in by_gpu.items() if gpu is not None for names in sets}
        return [choice for names, choice in by_gpu.get(None, {}).items() if names not in measured]

    def groups(self, workload: Workload) -> list[tuple[Choice, list[Choice]]]:
        """The choices of each GPU, and the estimates, each group after the choice that it is compared with."""
        measured = [list(sets.values()) for gpu, sets in self.choices[workload].items() if gpu is not None]
        groups = [(baseline(choices), choices) for choices in measured]
        if estimated := self.estimated(workload):
            groups.append((baseline([*self.measured(workload), *estimated]), estimated))
        return groups

    def models(self) -> list[str]:
        """The models in the order of their names."""
        return list(dict.fromkeys(workload.model for workload in self.choices))


def gather(runs: Sequence[ReadRun]) -> Evidence:
    """The evidence of these runs, oldest first.

    Where several records speak of the same set on the same GPU, a searched need beats a simulated one, and among equals
    the newest wins.
    """
    found: dict[Workload, dict[str | None, dict[tuple[str, ...], Choice]]] = {}
    checks, failed = [], []
    aliases: dict[str, Sequence[str]] = {}
    for run in runs:
        aliases |= run.run.aliases
        for record in run.records:
            choice = Choice(workload_of(record), record, run)
            gpu = (run.gpu or UNNAMED) if record.method == "measured" else None
            if record.status in ("error", "timeout", "skipped"):
                failed.append(choice)
            elif record.case.limit_bytes is not None:
                checks.append(choice)
            elif choice.need_bytes is not None or choice.at_least_bytes:
                sets = found.setdefault(choice.workload, {}).setdefault(gpu, {})
                before = sets.get(choice.optimizations)
                if before is None or before.estimated >= choice.estimated:
                    sets[choice.optimizations] = choice
            else:
                failed.append(choice)  # measured with no need, neither searched nor simulated
    known = {(c.workload, c.optimizations) for sets in found.values() for s in sets.values() for c in s.values()}
    unknown = {(c.workload, c.optimizations): c for c in failed if (c.workload, c.optimizations) not in known}
    for check in checks:
        _count_against(check, found.get(check.workload, {}))
    return Evidence(runs, dict(sorted(found.items())), checks, list(unknown.values()), aliases)


def _count_against(check: Choice, by_gpu: Mapping[str | None, dict[tuple[str, ...], Choice]]) -> None:
    """Where a check ran out of memory, the choices that it checked are known to."""
    cap = (check.record.case.limit_bytes or 0) - (check.record.memory.context_bytes or 0)
    if check.record.status != "oom" or check.record.method != "measured":
        return
    for sets in by_gpu.values():
        known = sets.get(check.optimizations)
        if known is not None and cap > known.ran_out_bytes:
            sets[check.optimizations] = replace(known, ran_out_bytes=cap)


def workload_of(record: Record) -> Workload:
    """The workload of a record."""
    case = record.case
    if isinstance(case, OwnCase):
        return Workload(case.model, 0, test=case.test)
    frames = case.frames or 0
    pixels = case.width * case.height * max(1, frames)
    return Workload(case.model, pixels, case.width, case.height, frames, case.batch_size)


def lead(model: str, workloads: Iterable[Workload], evidence: Evidence, models: Mapping[str, Model]) -> Workload:
    """The workload by which a model is known: its native size and the smallest batch; else, of the smallest batch,
    the one with most choices, and the larger of equals."""
    own = [workload for workload in workloads if workload.model == model]
    native = models[model].native if model in models else None
    size = (native.width, native.height, native.frames or 0) if native else None

    def rank(workload: Workload) -> tuple[bool, int, int, int]:
        at_native = (workload.width, workload.height, workload.frames) == size
        several = max(map(len, evidence.choices[workload].values()))
        return at_native, -workload.batch_size, several, workload.pixels

    return max(own, key=rank)


def baseline(choices: Sequence[Choice]) -> Choice:
    """The choice that the others of a workload are compared with: a dtype alone, else the fewest optimizations."""
    by_set = {choice.optimizations: choice for choice in choices}
    plain = [by_set[(dtype,)] for dtype in DTYPES if (dtype,) in by_set]
    return plain[0] if plain else min(choices, key=lambda choice: len(choice.optimizations))


def without_idle_flags(choices: Sequence[Choice]) -> list[Choice]:
    """The choices less those with a flag that was seen to change nothing, where the set without it is there too."""
    if not any(choice.no_effect for choice in choices):
        return list(choices)
    sets = {choice.optimizations for choice in choices}

    def idle(choice: Choice) -> bool:
        without = tuple(name for name in choice.optimizations if name not in choice.no_effect)
        return without != choice.optimizations and without in sets

    return [choice for choice in choices if not idle(choice)]


def frontier(choices: Sequence[Choice]) -> list[Choice]:
    """Those that no other beats in both required memory and time, least memory first; the time must be better by more
    than identical work was seen to differ."""
    found: list[Choice] = []
    figures = [(c.required_bytes, c.call_s, c) for c in without_idle_flags(choices) if not c.estimated]
    known = [(required, seconds, c) for required, seconds, c in figures if required and seconds]
    for _, seconds, choice in sorted(known, key=lambda known: known[:2]):
        if not found or seconds * SAME_TIME < (found[-1].call_s or 0):
            found.append(choice)
    return found
