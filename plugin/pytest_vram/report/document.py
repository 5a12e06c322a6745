"""What the hardware-requirements document says: tables and sentences, ready for Markdown and HTML."""

import os
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

from pytest_vram.cases.models import Model
from pytest_vram.records.caveats import caveats
from pytest_vram.records.reading import ReadRun
from pytest_vram.records.schema import ASSUMED_CONTEXT_BYTES
from pytest_vram.report.cards import GIB, Card
from pytest_vram.report.choices import (
    SAME_GPU_TIME,
    SAME_TIME,
    Choice,
    Workload,
    against,
    baseline,
    frontier,
    same_time,
    without_idle_flags,
)
from pytest_vram.report.evidence import Evidence, lead
from pytest_vram.report.text import display_name, gib, seconds, signed
from pytest_vram.report.verdicts import ESTIMATE_SHARE, FREE_SHARE, WORDS, Verdict, best, largest, minimum, recommended

NOTHING = "–"
MOST_NAMES = 8  # of a set whose parts are looked at
SAME_MEMORY = 0.01  # of the required memory: two searches were seen to differ by a fifth of it
LIKE_BYTES = 12 << 20  # cards whose usable memory is written with the same two digits


@dataclass(frozen=True)
class Cell:
    """One cell: `text`, then `name` in code, then `remark`; `kind` is for its looks, `note` for who asks further."""

    text: str
    kind: str = ""
    note: str = ""
    name: str = ""
    remark: str = ""


@dataclass(frozen=True)
class Table:
    """A table whose first `keys` columns name the row."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    keys: int


METHOD = {
    "Case": "one model, set of optimizations, resolution and batch size. Each ran in fresh processes.",
    "Peak": "what nvidia-smi shows. It grows because the card has room: PyTorch keeps what was freed, and cuDNN takes "
    "large workspaces.",
    "Need": "the smallest cap on PyTorch's allocator under which a fresh process loads the pipeline and completes two "
    "calls.",
    "Context": "what a process holds outside that allocator: the CUDA context, kernels, libraries.",
    "Required": "need + context. A card fits where it gives that much: what PyTorch sees of it, less what a desktop "
    "holds.",
    "Other cards": "the context counts as it was measured, but as no less than "
    f"{ASSUMED_CONTEXT_BYTES >> 20} MiB, and {FREE_SHARE * 100:.0f} % of what the card gives must stay free. "
    "Without CUDA (Radeon, Arc) only the memory is judged.",
    "Estimated": f"the need as simulated with no GPU; another {ESTIMATE_SHARE * 100:.0f} % of it must stay free, but "
    "where the case was seen to complete under a limit of no more.",
    "Seconds": "medians over all runs of the same software on such a GPU; the first run named is that of the memory. A "
    f"call of the same differs by up to {SAME_TIME:g} times from run to run where the host's CPU decides, and by less "
    f"than {SAME_GPU_TIME:g} where the GPU does: of the sets that fit and are closer than that to the fastest, one "
    "that leaves the image alone is taken, then the one that moves weights least often, then the one with fewest "
    "flags, then the one that requires least. To a call of fewer steps the rest is added, each as long as those that "
    "were timed (of model offload, whose first files do not tell, as without it). Offloads are as fast as the copies "
    "of the machine that was measured. With text_encoders_dropped the encoding, done once before, is not in it.",
    "Recommended": "the smallest card that runs, at full speed, a set that leaves the image alone and all weights on "
    "the GPU (any that was timed, where none of those fits a card).",
    "Weights": "random unless a run says otherwise: memory and time depend on shapes and dtypes, not on training.",
    "Host, disk": "host memory is the process's peak, with the weights on their way to the GPU; disk is the weights in "
    "the dtype they run in, without what else a repository holds.",
}


class Document:
    """Everything that the templates say. `base` is the folder that the document will stand in."""

    def __init__(self, evidence: Evidence, cards: Sequence[Card], models: Mapping[str, Model], base: Path) -> None:
        self.evidence, self.cards, self.base = evidence, cards, base
        self.headline = [card for card in cards if card.headline]
        self.leads = {subject: lead(subject, evidence, models) for subject in evidence.subjects}
        self.tags = {run.path: f"R{number}" for number, run in enumerate(evidence.runs, 1)}

    # The runs

    def runs(self) -> Table:
        """The run files, by the tags that every row names."""
        columns = ("run", "file", "GPU", "software", "commit", "date", "cases", "remarks")
        return Table("Runs", columns, [self._run(run) for run in self.evidence.runs], 2)

    def _run(self, run: ReadRun) -> list[Cell]:
        environment = run.run.environment

        def said(key: str) -> str:
            value = environment.get(key)
            return value[:100] if isinstance(value, str) else NOTHING

        remarks = [] if run.run.complete else ["not complete"]
        remarks += [f"{len(run.refused)} refused"] if run.refused else []
        remarks += caveats(environment)
        software = f"torch {said('torch')}, diffusers {said('diffusers')}"
        return [
            Cell(self.tags[run.path]),
            Cell("", name=relative(run.path, self.base)),
            Cell(f"{run.gpu[:100]}, {gib(run.gpu_memory_bytes)} GiB" if run.gpu else "none: estimated"),
            Cell(f"driver {said('driver')}, {software}" if run.gpu else software),
            Cell(said("commit")[:12] + (" and changes" if environment.get("dirty") is True else "")),
            Cell(f"{run.started:%Y-%m-%d}" if run.started else NOTHING),
            Cell(str(len(run.records))),
            Cell("; ".join(remarks)),
        ]

    @property
    def caveats(self) -> dict[str, str]:
        """What must be said of the memory of the machines that were measured."""
        return {what: why for run in self.evidence.runs for what, why in caveats(run.run.environment).items()}

    def tag(self, *choices: Choice) -> str:
        """The runs that the figures of choices come from, each once: those of memory first."""
        return " ".join(dict.fromkeys(self.tags[run.path] for choice in choices for run in choice.runs))

    def memory_tag(self, *choices: Choice) -> str:
        """The runs that the memory of choices comes from, each once."""
        return " ".join(dict.fromkeys(self.tags[choice.memory_run.path] for choice in choices))

    def name(self, workload: Workload) -> str:
        """The model with its aliases; of a pipeline of one's own the test's file."""
        return display_name(workload.model, self.evidence.aliases)

    def title(self, subject: str) -> str:
        """The model with its aliases, or the test of a pipeline of one's own."""
        return display_name(subject, self.evidence.aliases)

    @property
    def estimates(self) -> bool:
        """Whether anything here was estimated and not measured."""
        return any(self.evidence.estimated(workload) for workload in self.evidence.choices)

    @property
    def elsewhere_mib(self) -> int:
        """By how much the assumed context is above the least one that was measured."""
        contexts = [
            context
            for workload in self.evidence.choices
            for choices in self.evidence.by_gpu(workload)
            for choice in choices
            if (context := choice.record.memory.context_bytes)
        ]
        return max(0, ASSUMED_CONTEXT_BYTES - min(contexts, default=ASSUMED_CONTEXT_BYTES)) >> 20

    @property
    def gpus(self) -> list[str]:
        """The GPUs that were measured."""
        return self.evidence.gpus

    # Answers

    @cached_property
    def answers(self) -> list[dict[str, Any]]:
        """For each model: the smallest card that runs it, and the smallest that runs it well."""
        found = []
        for subject, workload in self.leads.items():
            least = minimum(workload, self.cards, self.evidence)
            good = recommended(workload, self.cards, self.evidence)
            found.append(
                {
                    "model": self.title(subject),
                    "workload": workload.label if workload.width else "",
                    "minimum": least and self.said(least, workload),
                    "recommended": good and self.said(good, workload),
                    "same": bool(least and good and least.card is good.card and least.choice is good.choice),
                }
            )
        return found

    def said(self, verdict: Verdict, workload: Workload) -> dict[str, Any]:
        """What sentences say of a verdict on a workload."""
        choice, required = verdict.choice, verdict.required_bytes
        so = [", tightly"] if verdict.outcome == "tight" else []
        so.append(
            f": required {'~' if verdict.estimated else ''}{gib(required)} of {gib(verdict.card.usable_bytes)} GiB"
        )
        if choice.offloads and choice.host_bytes:
            so.append(f", {gib(choice.host_bytes)} GiB of host memory")
        elif choice.offloads and (weights := choice.record.memory.weights_bytes):
            so.append(f", {gib(weights)} GiB of weights in host memory")
        so += [f", {seconds(verdict.call_s)} s on {choice.gpu}"] if verdict.call_s is not None else []
        so += [f" ({choice.workload.label})"] if choice.workload != workload else []
        return {
            "card": verdict.card.name,
            "memory": f"{verdict.card.memory_gib:g} GB",
            "set": choice.name,
            "so": f"{''.join(so)} ({self.tag(choice)})",
            "host": gib(choice.host_bytes) if choice.host_bytes is not None else None,
            "disk": gib(choice.disk_bytes) if choice.disk_bytes is not None else None,
        }

    # Tables

    def matrix(self, workloads: Iterable[Workload] | None = None) -> Table:
        """Workloads × the cards that documents show."""
        rows = []
        for workload in self.evidence.choices if workloads is None else workloads:
            verdicts = [best(workload, card, self.evidence) for card in self.headline]
            cells = [self.verdict_cell(verdict, workload) for verdict in verdicts]
            runs = self.tag(*(verdict.choice for verdict in verdicts))
            rows.append([*self._keys(workload), *cells, Cell(runs, "runs")])
        columns = [f"{c.name}, {gib(c.usable_bytes)}" for c in self.headline]
        return Table("Models on cards", ["model", "size", "batch", *columns, "runs"], rows, 3)

    def verdict_cell(self, verdict: Verdict, workload: Workload) -> Cell:
        """`fits` with the flags it takes; `~` marks an estimate. A choice for a larger workload says so."""
        text = ("~" if verdict.estimated else "") + WORDS[verdict.outcome]
        kind = verdict.outcome + (" estimated" if verdict.estimated else "")
        name = verdict.choice.name if verdict.runs else ""
        note = f"{verdict.choice.name}: required {gib(verdict.required_bytes)} GiB; " if verdict.required_bytes else ""
        note += f"{verdict.reason}; " if verdict.reason else ""
        larger = verdict.runs and verdict.choice.workload != workload
        remark = f"(from {verdict.choice.workload.label})" if larger else ""
        return Cell(text, kind, note + self.tag(verdict.choice), name, remark)

    def requirements(self, subject: str) -> Table:
        """What each set costs and buys, for each workload of a model."""
        rows = []
        for workload in self.evidence.subjects[subject]:
            for plain, choices in self.evidence.groups(workload):
                edge = frontier(choices)
                ordered = sorted(choices, key=lambda choice: (-(choice.required_bytes or 0), choice.name))
                rows += [self._requirement(choice, plain, choice in edge) for choice in ordered]
        columns = (
            "size", "batch", "optimizations", "required GiB", "saved", "nvidia-smi GiB", "s", "paid", "at need",
            "frontier", "host GiB", "disk GiB", "on", "runs",
        )  # fmt: skip
        return Table(self.title(subject), columns, rows, 3)

    def all_requirements(self) -> list[Table]:
        """That of every model."""
        return [self.requirements(model) for model in self.leads]

    def _requirement(self, choice: Choice, plain: Choice, on_the_edge: bool) -> list[Cell]:
        kind, mark = ("estimated", "~") if choice.estimated else ("", "")
        needed, lost = choice.required_bytes, choice.at_least_bytes
        saved, paid = against(choice, plain)
        return [
            *self._keys(choice.workload)[1:],
            Cell("", name=choice.name, remark=f"({choice.remark})" if choice.remark else ""),
            Cell(f"> {gib(max(lost, needed or 0))}" if lost else mark + gib(needed), kind),
            Cell(NOTHING if saved is None else signed(saved / GIB), kind),
            Cell(gib(choice.record.memory.nvml_process_peak_bytes)),
            Cell(seconds(choice.call_s)),
            Cell(NOTHING if paid is None else signed(paid)),
            Cell(f"×{choice.slowdown:.2f}" if choice.slowdown else NOTHING),
            Cell("●" if on_the_edge else ""),
            Cell(gib(choice.host_bytes)),
            Cell(gib(choice.disk_bytes)),
            Cell(choice.gpu or NOTHING),
            Cell(self.tag(choice), "runs"),
        ]

    def worse(self) -> Table:
        """The measured sets that buy nothing: beside the plain dtype on that GPU, or a set of some of their flags, they
        require more or take longer, and neither less."""
        rows = []
        for workload in (w for subject in self.leads for w in self.evidence.subjects[subject]):
            for choices in self.evidence.by_gpu(workload):
                plain = baseline(choices)
                by_set = {frozenset(choice.optimizations): choice for choice in without_idle_flags(choices)}
                for names, choice in by_set.items():
                    for other in (plain, *filter(None, map(by_set.get, _parts(names)))):
                        if cost := _for_nothing(choice, other):
                            each = f"(each of {len(choice.gpus)} GPUs)" if choice.gpus else ""
                            sets = [Cell("", name=choice.name, remark=each), Cell("", name=other.name)]
                            found_on = [Cell(choice.gpu or ""), Cell(self.tag(choice, other), "runs")]
                            rows.append([*self._keys(workload), *sets, *cost, *found_on])
                            break
        columns = ("model", "size", "batch", "optimizations", "than", "required GiB", "time", "on", "runs")
        return Table("What made it worse", columns, rows, 5)

    def largest(self) -> Table:
        """For each model and card the largest batch at the lead size, and the largest size at the smallest batch."""
        rows = []
        for subject, first in self.leads.items():
            own = [workload for workload in self.evidence.subjects[subject] if workload.width]
            at_size = [w for w in own if (w.width, w.height, w.frames) == (first.width, first.height, first.frames)]
            at_batch = [w for w in own if (w.batch_size, w.frames) == (first.batch_size, first.frames)]
            if len(at_size) < 2 and len(at_batch) < 2:
                continue
            cells, taken = [], []
            for card in self.headline:
                batch, size = (largest(w, card, self.evidence) for w in (at_size, at_batch))
                taken += [verdict.choice for found in (batch, size) if found for _, verdict in [found]]
                parts = (
                    "no batch" if batch is None else _marked(*batch, f"batch {batch[0].batch_size}", at_size[-1]),
                    "no size" if size is None else _marked(*size, size[0].size, at_batch[-1]),
                )
                cells.append(Cell("; ".join(parts) if batch or size else "no", "" if batch or size else "no"))
            if not taken:  # no card: what was tried
                taken = [choice for w in (*at_size, *at_batch) for choice in self.evidence.tried(w)]
            keys = [Cell(self.title(subject)), Cell(first.size), Cell(str(first.batch_size))]
            rows.append([*keys, *cells, Cell(self.tag(*taken), "runs")])
        columns = ["model", "batches at", "sizes at batch", *(card.name for card in self.headline), "runs"]
        return Table("Largest batch and resolution", columns, rows, 3)

    def checks(self) -> Table:
        """The cases that ran with no more memory than a limit, beside what their need says of it: that of the same GPU,
        else of another, else the simulated one."""
        rows = []
        for check in self.evidence.checks:
            limit = check.record.case.limit_bytes or 0
            known = self.evidence.speaks_of(check)
            needed = known.required_bytes if known else None
            mark = "~" if known and known.estimated else ""
            found = "completes" if check.record.status == "ok" else "out of memory"
            expected = free = agree = NOTHING
            if needed is not None:
                expected = "completes" if needed <= limit else "out of memory"
                free = signed(100 * (limit - needed) / limit, 1)
                agree = "yes" if expected == found else "NO"
            rows.append(
                [
                    *self._keys(check.workload),
                    Cell("", name=check.name),
                    Cell(gib(limit)),
                    Cell(" or ".join(self._cards_with(limit)[:2]) or NOTHING),
                    Cell(mark + gib(needed)),
                    Cell(free),
                    Cell(expected),
                    Cell(found),
                    Cell(agree),
                    Cell(self.memory_tag(*filter(None, (check, known))), "runs"),
                ]
            )
        columns = ("model", "size", "batch", "optimizations", "limit GiB", "as on", "required GiB", "free %",
                   "expected", "found", "agree", "runs")  # fmt: skip
        return Table("Verdicts that were checked", columns, rows, 5)

    def _cards_with(self, usable: int) -> list[str]:
        """The cards that leave so much to a program, those that people know first."""
        cards = [card for card in self.cards if abs(card.usable_bytes - usable) < LIKE_BYTES]
        return [card.name for card in sorted(cards, key=lambda card: not card.headline)]

    def failed(self) -> Table:
        """The cases that gave no figures."""
        rows = []
        for choice in self.evidence.failed:
            record = choice.record
            failure = record.failure.message if record.failure else None
            why = record.reason or failure or record.unavailable.get("memory.need_bytes") or "no need was searched"
            rows.append([Cell("", name=record.id), Cell(record.status), Cell(why[:300]), Cell(self.tag(choice))])
        return Table("Cases without figures", ("case", "status", "why", "run"), rows, 1)

    def accuracy(self) -> dict[str, Any] | None:
        """How far the simulated needs are from the searched ones."""
        known = [
            (choice, memory.estimated_need_bytes / memory.need_bytes - 1)
            for workload in self.evidence.choices
            for choices in self.evidence.by_gpu(workload)
            for choice in choices
            if not choice.estimated and (memory := choice.record.memory).estimated_need_bytes and memory.need_bytes
        ]
        if not known:
            return None
        errors = [error for _, error in known]
        sizes = [abs(error) for error in errors]
        return {
            "cases": len(errors),
            "median": f"{100 * statistics.median(sizes):.1f}",
            "close": sum(size <= 0.05 for size in sizes),
            "low": signed(100 * min(errors), 1),
            "high": signed(100 * max(errors), 1),
            "runs": self.memory_tag(*(choice for choice, _ in known)),
        }

    def _keys(self, workload: Workload) -> list[Cell]:
        if not workload.width:
            return [Cell(self.name(workload)), Cell(workload.test), Cell(NOTHING)]
        return [Cell(self.name(workload)), Cell(workload.size), Cell(str(workload.batch_size))]


def _parts(names: frozenset[str]) -> Iterator[frozenset[str]]:
    """The smaller sets within this one, the largest first; of a set of many names, as nobody makes it, none."""
    for size in range(len(names) - 1 if len(names) <= MOST_NAMES else 0, 0, -1):
        yield from map(frozenset, combinations(sorted(names), size))


def _for_nothing(choice: Choice, other: Choice) -> list[Cell]:
    """What a choice requires and takes more than another, of which it requires and takes nothing less; else nothing, as
    where one of them was timed under a limit."""
    saved, paid = against(choice, other)
    limited = choice.record.case.limit_bytes or other.record.case.limit_bytes
    if limited or saved is None or paid is None or not choice.call_s or not other.call_s:
        return []
    share, times, noise = saved / (other.required_bytes or 1), choice.call_s / other.call_s, same_time(choice, other)
    if (share < -SAME_MEMORY and times > 1 / noise) or (times > noise and share < SAME_MEMORY):
        differs = not 1 / noise <= times <= noise
        return [Cell(signed(-saved / GIB)), Cell(f"×{times:.2f}" if differs else "the same")]
    return []


def _marked(workload: Workload, verdict: Verdict, words: str, last: Workload) -> str:
    """What runs at most: `~` where it is estimated, + where nothing larger was tried."""
    more = "+" if workload == last else ""
    return ("~" if verdict.estimated else "") + words + more + (" (tight)" if verdict.outcome == "tight" else "")


def relative(path: Path, base: Path) -> str:
    """How a document in `base` names a file: its path where it is below, else its name alone."""
    try:
        return path.resolve().relative_to(base.resolve()).as_posix()
    except ValueError:
        return path.name


def seen_from(base: Path, paths: Iterable[Path]) -> list[str]:
    """The paths as seen from `base`, for whoever makes the document again."""
    return [Path(os.path.relpath(os.path.realpath(path), os.path.realpath(base))).as_posix() for path in paths]
