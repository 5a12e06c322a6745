"""What the hardware-requirements document says: tables and sentences, ready for Markdown and HTML."""

import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_vram.cases.models import Model
from pytest_vram.records.reading import ReadRun
from pytest_vram.records.schema import ASSUMED_CONTEXT_BYTES
from pytest_vram.report.cards import GIB, Card
from pytest_vram.report.text import display_name, gib, seconds, signed
from pytest_vram.report.verdicts import ESTIMATE_SHARE, FREE_SHARE, Verdict, best, largest, minimum, recommended
from pytest_vram.report.workloads import Choice, Evidence, Workload, frontier, lead

NOTHING = "–"
LIKE_BYTES = 12 << 20  # cards whose usable memory is written with the same two digits
WORDS = {"fits": "fits", "tight": "tight", "no": "no", "unsupported": NOTHING}


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
    note: str = ""


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
    f"{ASSUMED_CONTEXT_BYTES >> 20} MiB; {FREE_SHARE * 100:.0f} % of what the card gives must stay free.",
    "Estimated": f"the need as simulated with no GPU; another {ESTIMATE_SHARE * 100:.0f} % of it must stay free.",
    "Radeon, Arc": "without CUDA only the memory is judged.",
    "Weights": "random unless a run says otherwise: memory and time depend on shapes and dtypes, not on training.",
    "Host, disk": "host memory is the process's peak, with the weights on their way to the GPU; disk is the weights in "
    "the dtype they run in, without what else a repository holds.",
}


class Document:
    """Everything that the templates say. `base` is the folder that the document will stand in."""

    def __init__(self, evidence: Evidence, cards: Sequence[Card], models: Mapping[str, Model], base: Path) -> None:
        self.evidence, self.cards, self.base = evidence, cards, base
        self.headline = [card for card in cards if card.headline]
        workloads = list(evidence.choices)
        self.leads: dict[str, Workload] = {}
        for model in evidence.models():
            self.leads[model] = lead(model, workloads, evidence, models)
        self.tags = {run.path: f"R{number}" for number, run in enumerate(evidence.runs, 1)}

    # The runs

    def runs(self) -> Table:
        """The run files, by the tags that every row names."""
        columns = ("run", "file", "GPU", "software", "commit", "date", "cases", "remarks")
        return Table("Runs", columns, [self._run(run) for run in self.evidence.runs], 1)

    def _run(self, run: ReadRun) -> list[Cell]:
        environment = run.run.environment

        def said(key: str) -> str:
            value = environment.get(key)
            return value[:100] if isinstance(value, str) else NOTHING

        remarks = [] if run.run.complete else ["not complete"]
        remarks += [f"{len(run.refused)} refused"] if run.refused else []
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

    def tag(self, choice: Choice) -> str:
        """The run that a choice comes from."""
        return self.tags[choice.run.path]

    def name(self, workload: Workload) -> str:
        """The model with its aliases."""
        return display_name(workload.model, self.evidence.aliases)

    @property
    def estimates(self) -> bool:
        """Whether anything here was estimated and not measured."""
        return any(self.evidence.estimated(workload) for workload in self.evidence.choices)

    @property
    def gpus(self) -> list[str]:
        """The GPUs that were measured."""
        return list(dict.fromkeys(run.gpu for run in self.evidence.runs if run.gpu))

    # Answers

    def answers(self) -> list[dict[str, Any]]:
        """For each model: the smallest card that runs it, and the smallest that runs it well."""
        found = []
        for model, workload in self.leads.items():
            least = minimum(workload, self.cards, self.evidence)
            good = recommended(workload, self.cards, self.evidence)
            found.append(
                {
                    "model": display_name(model, self.evidence.aliases),
                    "workload": workload.label,
                    "minimum": least and self.said(least),
                    "recommended": good and self.said(good),
                    "same": bool(least and good and least.card is good.card and least.choice is good.choice),
                }
            )
        return found

    def said(self, verdict: Verdict) -> dict[str, Any]:
        """What sentences say of a verdict."""
        choice = verdict.choice
        return {
            "card": verdict.card.name,
            "memory": f"{verdict.card.memory_gib:g} GB",
            "set": choice.name,
            "so": "".join(
                (
                    ", tightly" if verdict.outcome == "tight" else "",
                    f": required {'~' if verdict.estimated else ''}{gib(verdict.required_bytes)}",
                    f" of {gib(verdict.card.usable_bytes)} GiB",
                    f", {seconds(verdict.call_s)} s on {choice.run.gpu}" if verdict.call_s is not None else "",
                    f" ({self.tag(choice)})",
                )
            ),
            "host": gib(choice.host_bytes) if choice.host_bytes is not None else None,
            "disk": gib(choice.disk_bytes) if choice.disk_bytes is not None else None,
        }

    # Tables

    def matrix(self, workloads: Iterable[Workload] | None = None) -> Table:
        """Workloads × the cards that documents show."""
        rows = []
        for workload in self.evidence.choices if workloads is None else workloads:
            verdicts = [best(workload, card, self.evidence) for card in self.headline]
            used = dict.fromkeys(self.tag(v.choice) for v in verdicts)
            rows.append([*self._keys(workload), *map(self.verdict_cell, verdicts), Cell(" ".join(used))])
        columns = [f"{c.name}, {gib(c.usable_bytes)}" for c in self.headline]
        return Table("Models on cards", ["model", "size", "batch", *columns, "runs"], rows, 3)

    def verdict_cell(self, verdict: Verdict) -> Cell:
        """`fits` with the flags it takes; `~` marks an estimate."""
        mark = "~" if verdict.estimated else ""
        text = mark + WORDS[verdict.outcome]
        name = verdict.choice.name if verdict.runs else ""
        note = f"{verdict.choice.name}: required {gib(verdict.required_bytes)} GiB" if verdict.required_bytes else ""
        note += f"; {verdict.reason}" if verdict.reason else ""
        return Cell(
            text,
            verdict.outcome + (" estimated" if verdict.estimated else ""),
            f"{note} [{self.tag(verdict.choice)}]",
            name,
        )

    def requirements(self, model: str) -> Table:
        """What each set costs and buys, for each workload of a model."""
        rows = []
        for workload in (workload for workload in self.evidence.choices if workload.model == model):
            for plain, choices in self.evidence.groups(workload):
                edge = frontier(choices)
                ordered = sorted(choices, key=lambda choice: (-(choice.required_bytes or 0), choice.name))
                rows += [self._requirement(choice, plain, choice in edge) for choice in ordered]
        columns = (
            "size", "batch", "optimizations", "required GiB", "saved", "nvidia-smi GiB", "s", "paid", "at need",
            "frontier", "host GiB", "disk GiB", "run",
        )  # fmt: skip
        return Table(display_name(model, self.evidence.aliases), columns, rows, 3)

    def all_requirements(self) -> list[Table]:
        """That of every model."""
        return [self.requirements(model) for model in self.leads]

    def _requirement(self, choice: Choice, plain: Choice, on_the_edge: bool) -> list[Cell]:
        memory = choice.record.memory
        kind = "estimated" if choice.estimated else ""
        mark = "~" if choice.estimated else ""
        needed, compared, lost = choice.required_bytes, plain.required_bytes, choice.at_least_bytes
        saved = paid = NOTHING
        if choice is not plain:
            if needed and compared:
                saved = signed((compared - needed) / GIB)
            if choice.call_s and plain.call_s:
                paid = signed(choice.call_s - plain.call_s)
        slower = f"×{choice.slowdown:.2f}" if choice.slowdown else NOTHING
        return [
            *self._keys(choice.workload)[1:],
            Cell("", name=choice.name, remark=f"({choice.remark})" if choice.remark else ""),
            Cell(f"> {gib(max(lost, needed or 0))}" if lost else mark + gib(needed), kind),
            Cell(saved, kind),
            Cell(gib(memory.nvml_process_peak_bytes)),
            Cell(seconds(choice.call_s)),
            Cell(paid),
            Cell(slower),
            Cell("●" if on_the_edge else ""),
            Cell(gib(choice.host_bytes)),
            Cell(gib(choice.disk_bytes)),
            Cell(self.tag(choice)),
        ]

    def largest(self) -> Table:
        """For each model and card the largest batch at the lead size, and the largest size at the smallest batch."""
        rows = []
        for model, first in self.leads.items():
            own = [workload for workload in self.evidence.choices if workload.model == model and workload.width]
            at_size = [w for w in own if (w.width, w.height, w.frames) == (first.width, first.height, first.frames)]
            at_batch = [w for w in own if (w.batch_size, w.frames) == (first.batch_size, first.frames)]
            if len(at_size) < 2 and len(at_batch) < 2:
                continue
            cells: list[Cell] = []
            used: dict[str, None] = {}
            for card in self.headline:
                batch, size = (largest(w, card, self.evidence) for w in (at_size, at_batch))
                used |= {self.tag(v.choice): None for v in (batch, size) if v}
                cells.append(self._largest_cell(batch, size, at_size[-1], at_batch[-1]))
            key = Cell(display_name(model, self.evidence.aliases))
            rows.append([key, Cell(first.label), *cells, Cell(" ".join(used))])
        columns = ["model", "sizes start from", *(card.name for card in self.headline), "runs"]
        return Table("Largest batch and resolution", columns, rows, 2)

    @staticmethod
    def _largest_cell(batch: Verdict | None, size: Verdict | None, last_batch: Workload, last_size: Workload) -> Cell:
        if batch is None or size is None:
            return Cell("no", "no")

        def text(verdict: Verdict, words: str, last: Workload) -> str:
            more = "+" if verdict.choice.workload == last else ""
            return ("~" if verdict.estimated else "") + words + more

        parts = (
            text(batch, f"batch {batch.choice.workload.batch_size}", last_batch),
            text(size, size.choice.workload.size, last_size),
        )
        return Cell("; ".join(parts), "estimated" if batch.estimated or size.estimated else "")

    def checks(self) -> Table:
        """The cases that ran with no more memory than a limit, beside what their need says of that limit."""
        rows = []
        for check in self.evidence.checks:
            limit = check.record.case.limit_bytes or 0
            known = self.evidence.choices.get(check.workload, {}).get(check.run.gpu, {}).get(check.optimizations)
            needed = known.required_bytes if known else None
            expected = NOTHING if needed is None else "completes" if needed <= limit else "out of memory"
            found = "completes" if check.record.status == "ok" else "out of memory"
            agree = NOTHING if needed is None else "yes" if expected == found else "NO"
            free = NOTHING if needed is None else signed(100 * (limit - needed) / limit, 1)
            rows.append(
                [
                    *self._keys(check.workload),
                    Cell("", name=check.name),
                    Cell(gib(limit)),
                    Cell(" or ".join(self._cards_with(limit)[:2]) or NOTHING),
                    Cell(gib(needed)),
                    Cell(free),
                    Cell(expected),
                    Cell(found),
                    Cell(agree),
                    Cell(" ".join(dict.fromkeys([self.tag(check), *([self.tag(known)] if known else [])]))),
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
        errors: list[float] = []
        used: dict[str, None] = {}
        for sets in (sets for by_gpu in self.evidence.choices.values() for sets in by_gpu.values()):
            for choice in sets.values():
                memory = choice.record.memory
                if not choice.estimated and memory.estimated_need_bytes and memory.need_bytes:
                    errors.append(memory.estimated_need_bytes / memory.need_bytes - 1)
                    used[self.tag(choice)] = None
        if not errors:
            return None
        sizes = [abs(error) for error in errors]
        return {
            "cases": len(errors),
            "median": f"{100 * statistics.median(sizes):.1f}",
            "close": sum(size <= 0.05 for size in sizes),
            "low": signed(100 * min(errors), 1),
            "high": signed(100 * max(errors), 1),
            "runs": " ".join(used),
        }

    def _keys(self, workload: Workload) -> list[Cell]:
        if not workload.width:
            return [Cell(self.name(workload)), Cell(workload.test), Cell(NOTHING)]
        return [Cell(self.name(workload)), Cell(workload.size), Cell(str(workload.batch_size))]


def relative(path: Path, base: Path) -> str:
    """How a document in `base` names a file: its path where it is below, else its name alone."""
    try:
        return path.resolve().relative_to(base.resolve()).as_posix()
    except ValueError:
        return path.name


def seen_from(base: Path, paths: Iterable[Path]) -> list[str]:
    """The paths as seen from `base`, for whoever makes the document again."""
    return [Path(os.path.relpath(path, base)).as_posix() for path in paths]
