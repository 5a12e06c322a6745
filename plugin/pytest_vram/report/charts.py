"""The charts, one function each: from the evidence to a figure, or None where there is nothing to show."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_vram.report.cards import GIB, Card
from pytest_vram.report.drawing import COLOURS, DASHES, FAINT, HATCHES, INK, MARKERS, PAPER, png, short, style, svg
from pytest_vram.report.verdicts import best
from pytest_vram.report.workloads import DTYPES, Choice, Evidence, Workload, baseline, frontier

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_ROWS, MOST_LINES, MOST_PANELS = 24, 6, 9  # a chart shows no more, and says so; the tables have everything
TIMED_PHASES = ("encode", "denoise", "decode")


@dataclass(frozen=True)
class Facts:
    """What the charts draw: the evidence, each model's lead workload, and the cards of the documents' columns."""

    evidence: Evidence
    leads: Mapping[str, Workload]
    cards: Sequence[Card]


@dataclass(frozen=True)
class Chart:
    """A drawn chart."""

    name: str
    title: str
    caption: str
    svg: bytes
    png: bytes


def draw(facts: Facts) -> list[Chart]:
    """Every chart that has something to show."""
    drawn = []
    for function, title, caption in CHARTS:
        with style():
            figure = function(facts)
            if figure is not None:
                name = function.__name__.replace("_", "-")
                drawn.append(Chart(name, title, caption, svg(figure), png(figure)))
    return drawn


def required_by_model(facts: Facts) -> "Figure | None":
    """Stacked: weights, activations and workspaces, context; a diamond where the cheapest set of the workload lies."""
    rows = [(workload, choices) for workload in facts.leads.values() if (choices := _choices(workload, facts))]
    if not rows:
        return None
    rows, more = rows[:MOST_ROWS], len(rows) - MOST_ROWS
    figure, axes = _figure(height=1.3 + 0.52 * len(rows))
    names = ("weights", "activations, workspaces, fragmentation", "context")
    for place, (_, choices) in enumerate(rows):
        choice = baseline(choices)
        left = 0.0
        for index, part in enumerate(_parts(choice)):
            label = names[index] if place == 0 else None
            alpha = 0.55 if choice.estimated else 1.0
            axes.barh(place, part, left=left, color=COLOURS[index], hatch=HATCHES[index], alpha=alpha, label=label)
            left += part
        axes.text(left, place, f" {'~' if choice.estimated else ''}{left:.1f}", va="center")
        least = min(choices, key=_required)
        if least is not choice:
            axes.plot(_required(least) / GIB, place, "D", color=PAPER, markeredgecolor=INK, markersize=6, zorder=5)
            axes.annotate(f"{_required(least) / GIB:.1f} {_less(least, choice)}", (_required(least) / GIB, place - 0.43),
                          ha="center", fontsize=7)
    axes.set_yticks(range(len(rows)), [f"{short(w.model)} {baseline(c).name}\n{short(w.label)}" for w, c in rows])
    axes.set_ylim(len(rows) - 0.4, -0.7)
    axes.set_xlabel(_more("required memory, GiB (diamond: the set that requires least)", more, "models"))
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.9 / len(rows) - 0.05), ncols=3, fontsize=8)
    return figure


def memory_by_batch(facts: Facts) -> "Figure | None":
    """A line a model and dtype at its lead resolution; dashed: what cards leave to a program."""
    lines = _lines(facts, lambda w, lead: (w.width, w.height, w.frames) == (lead.width, lead.height, lead.frames),
                   lambda w: float(w.batch_size))
    return _line_chart(facts, lines, "batch size", whole=True)


def memory_by_resolution(facts: Facts) -> "Figure | None":
    """A line a model and dtype at its smallest batch; dashed: what cards leave to a program."""
    lines = _lines(facts, lambda w, lead: (w.batch_size, w.frames) == (lead.batch_size, lead.frames),
                   lambda w: w.width * w.height / 1e6)
    return _line_chart(facts, lines, "resolution, megapixels")


def shown_and_needed(facts: Facts) -> "Figure | None":
    """Required memory, and the peak that nvidia-smi shows of the same case with room."""
    pairs = []
    for workload in facts.evidence.choices:
        measured = [c for c in facts.evidence.measured(workload) if not c.estimated]
        if measured and (shown := (choice := baseline(measured)).record.memory.nvml_process_peak_bytes):
            pairs.append((choice, _required(choice) / GIB, shown / GIB))
    if not pairs:
        return None
    pairs.sort(key=lambda pair: pair[2] / pair[1], reverse=True)
    pairs, more = pairs[:MOST_ROWS], len(pairs) - MOST_ROWS
    figure, axes = _figure(height=1.2 + 0.3 * len(pairs))
    for place, (_, needed, shown) in enumerate(pairs):
        axes.plot((needed, shown), (place, place), color=FAINT, linewidth=3, zorder=1)
        axes.text(max(needed, shown), place, f"   ×{shown / needed:.2f}", va="center", fontsize=8)
    places = range(len(pairs))
    axes.plot([p[1] for p in pairs], places, "o", color=COLOURS[0], label="required")
    axes.plot([p[2] for p in pairs], places, "s", color=COLOURS[1], markerfacecolor="none", markeredgewidth=1.6,
              label="nvidia-smi's peak")
    axes.set_yticks(places, [f"{short(c.workload.model, 24)} {c.name} {short(c.workload.label, 30)}" for c, _, _ in pairs])
    axes.set_ylim(len(pairs) - 0.5, -0.5)
    axes.set_xlim(0, 1.1 * max(p[2] for p in pairs))
    axes.set_xlabel(_more("GiB", more, "cases"))
    axes.legend(loc="lower right")
    return figure


def frontiers(facts: Facts) -> "Figure | None":
    """A panel a model: each set by required memory and time; the line joins those that no other beats in both."""
    panels = []
    for workload in facts.leads.values():
        choices = [c for c in facts.evidence.measured(workload) if not c.estimated and c.call_s]
        if len(choices) > 1:
            panels.append((workload, choices))
    if not panels:
        return None
    panels, more = panels[:MOST_PANELS], len(panels) - MOST_PANELS
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * columns + 0.6, 3.3 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, (workload, choices) in zip(grid.flat, panels, strict=False):
        _frontier_panel(axes, choices)
        axes.set_title(f"{short(workload.model, 34)}\n{short(workload.label, 34)}", fontsize=9)
    for axes in grid.flat[len(panels):]:
        axes.remove()
    figure.supxlabel(_more("required memory, GiB", more, "models"), fontsize=9)
    figure.supylabel("seconds a call", fontsize=9)
    return figure


def phases(facts: Facts) -> "Figure | None":
    """Left: the allocated peak of each phase. Right: the share of each in a call of the native number of steps."""
    rows = []
    for workload in facts.leads.values():
        measured = facts.evidence.measured(workload)
        if measured and (choice := baseline(measured)).record.phases:
            rows.append(choice)
    if not rows:
        return None
    rows, more = rows[:MOST_ROWS], len(rows) - MOST_ROWS
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 1.4 + 0.72 * len(rows)), layout="constrained")
    memory, share = figure.subplots(1, 2, sharey=True)
    names = [n for n in ("load", *TIMED_PHASES, "call") if any(n in c.record.phases for c in rows)]
    for place, choice in enumerate(rows):
        left = 0.0
        seconds = _full_length_phases(choice)
        for index, name in enumerate(names):
            look: dict[str, Any] = {"color": COLOURS[index], "hatch": HATCHES[index]}
            cost = choice.record.phases.get(name)  # type: ignore[call-overload]
            if cost is not None and cost.allocated_peak_bytes:
                y = place + 0.8 * ((index + 0.5) / len(names) - 0.5)
                memory.barh(y, cost.allocated_peak_bytes / GIB, height=0.8 / len(names), **look)
            part = seconds.get(name, 0.0) / (sum(seconds.values()) or 1.0)
            share.barh(place, 100 * part, left=left, height=0.6, **look)
            left += 100 * part
    from matplotlib.patches import Patch

    memory.set_yticks(range(len(rows)), [f"{short(c.workload.model, 26)} {c.name}\n{short(c.workload.label, 30)}" for c in rows])
    memory.set_ylim(len(rows) - 0.5, -0.5)
    memory.set_xlabel("allocated peak, GiB")
    share.set_xlabel(_more("% of a call's time, without the load", more, "models"))
    handles = [Patch(facecolor=COLOURS[i], hatch=HATCHES[i], label=name) for i, name in enumerate(names)]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(names), fontsize=8)
    return figure


def models_on_cards(facts: Facts) -> "Figure | None":
    """A heat map: which model runs on which card, and with which flags."""
    workloads, cards = list(facts.leads.values()), [card for card in facts.cards if card.headline][:16]
    if not (workloads and cards):
        return None
    workloads, more = workloads[: 2 * MOST_ROWS], len(workloads) - 2 * MOST_ROWS
    figure, axes = _figure(width=2.6 + 0.86 * len(cards), height=1.6 + 0.5 * len(workloads))
    fills = {"fits": "#1a7f4b", "tight": "#e3b341", "no": "#f0f1f3", "unsupported": "#c9cdd2"}
    inks = {"fits": "#ffffff", "tight": "#1b1f24", "no": "#57606a", "unsupported": "#1b1f24"}
    words = {"fits": "fits", "tight": "tight", "no": "no", "unsupported": "–"}
    from matplotlib.patches import Rectangle

    for row, workload in enumerate(workloads):
        for column, card in enumerate(cards):
            verdict = best(workload, card, facts.evidence)
            outcome = verdict.outcome
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=fills[outcome], edgecolor=PAPER, linewidth=1.5))
            word = ("~" if verdict.estimated else "") + words[outcome]
            flags = "\n".join(name.replace("_", " ") for name in verdict.choice.flags) if verdict.runs else ""
            text = word + (f"\n{short(flags, 40) if len(verdict.choice.flags) > 2 else flags}" if flags else "")
            axes.text(column, row, text, ha="center", va="center", color=inks[outcome], fontsize=6.5, linespacing=1.05)
    axes.set_xticks(range(len(cards)), [f"{card.name.replace('GeForce ', '')}\n{card.memory_gib:g} GB" for card in cards],
                    rotation=35, ha="left", rotation_mode="anchor", fontsize=7.5)
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(workloads)), [f"{short(w.model, 30)}\n{short(w.label, 30)}" for w in workloads], fontsize=8)
    axes.set_xlim(-0.5, len(cards) - 0.5)
    axes.set_ylim(len(workloads) - 0.5, -0.5)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if more > 0:
        axes.set_xlabel(_more("", more, "models"))
    return figure


def estimates(facts: Facts) -> "Figure | None":
    """The simulated need against the searched one, of every measured case that has both."""
    points = []
    for sets in (sets for by_gpu in facts.evidence.choices.values() for sets in by_gpu.values()):
        for choice in sets.values():
            memory = choice.record.memory
            if not choice.estimated and memory.estimated_need_bytes and memory.need_bytes:
                points.append((memory.need_bytes / GIB, 100 * (memory.estimated_need_bytes / memory.need_bytes - 1), choice))
    if not points:
        return None
    figure, axes = _figure(height=3.6)
    axes.axhspan(-5, 5, color=FAINT, alpha=0.2, linewidth=0)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.plot([p[0] for p in points], [p[1] for p in points], "o", color=COLOURS[0], markersize=4, alpha=0.8)
    for need, error, choice in sorted(points, key=lambda p: -abs(p[1]))[:3]:
        if abs(error) >= 2:
            axes.annotate(f" {short(choice.record.id, 48)}", (need, error), fontsize=7, va="center",
                          ha="left" if need < max(p[0] for p in points) / 2 else "right")
    axes.set_xlim(left=0)
    axes.set_xlabel("need, measured, GiB")
    axes.set_ylabel("estimate's error, %\n(band: 5 %)")
    return figure


CHARTS: tuple[tuple[Callable[[Facts], "Figure | None"], str, str], ...] = (
    (required_by_model, "Required memory by model",
     "What the free memory of a card goes to, at the model's own size with no flags. The diamond: the set that requires least."),
    (models_on_cards, "Models on cards", "The best set for each model at its own size on each card. ~ is estimated."),
    (shown_and_needed, "What nvidia-smi shows, and what is needed",
     "The same case: the peak with the whole GPU to itself, and the free memory it must have."),
    (memory_by_batch, "Required memory by batch size", "Dashed: what a card leaves to a program beside a desktop."),
    (memory_by_resolution, "Required memory by resolution", "Dashed: what a card leaves to a program beside a desktop."),
    (frontiers, "Memory and time", "Each point is a set of optimizations; the line joins those that no other beats in both."),
    (phases, "Phases", "Where the memory peaks, and where the time goes."),
    (estimates, "Estimate and measurement", "The need as simulated with no GPU, against the need that was searched."),
)  # fmt: skip


def _figure(width: float = 7.6, height: float = 4.0) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _choices(workload: Workload, facts: Facts) -> list[Choice]:
    """The measured choices of a workload, else the estimated ones."""
    measured = [choice for choice in facts.evidence.measured(workload) if choice.need_bytes]
    return measured or [choice for choice in facts.evidence.estimated(workload) if choice.need_bytes]


def _parts(choice: Choice) -> tuple[float, float, float]:
    """Weights, activations and context in GiB; of an offload the weights are no more than the need."""
    memory, need = choice.record.memory, choice.need_bytes or 0
    weights = min(memory.weights_bytes or 0, need)
    return weights / GIB, (need - weights) / GIB, (_required(choice) - need) / GIB


def _required(choice: Choice) -> int:
    return choice.required_bytes or 0


def _less(least: Choice, plain: Choice) -> str:
    """What a set has beside the plain one."""
    return ", ".join(name.replace("_", " ") for name in least.optimizations if name not in plain.optimizations)


def _more(label: str, more: int, of: str) -> str:
    """A chart that does not show everything says so."""
    return f"{label}\n({more} more {of} in the tables)" if more > 0 else label


Lines = list[tuple[str, list[tuple[float, float, bool]]]]


def _lines(facts: Facts, belongs: Callable[[Workload, Workload], bool], x: Callable[[Workload], float]) -> Lines:
    """For each model and dtype with two points or more: its name, and x, GiB and whether it is estimated."""
    lines: Lines = []
    for model, lead in facts.leads.items():
        own = [w for w in facts.evidence.choices if w.model == model and w.width and belongs(w, lead)]
        for dtype in DTYPES:
            points = {}
            for workload in own:
                choices = {c.optimizations: c for c in (*facts.evidence.estimated(workload), *facts.evidence.measured(workload))}
                if (choice := choices.get((dtype,))) and choice.need_bytes:
                    points[x(workload)] = (x(workload), _required(choice) / GIB, choice.estimated)
            if len(points) > 1:
                lines.append((f"{short(model, 26)} {dtype}", sorted(points.values())))
    return lines


def _line_chart(facts: Facts, lines: Lines, label: str, *, whole: bool = False) -> "Figure | None":
    if not lines:
        return None
    lines, more = lines[:MOST_LINES], len(lines) - MOST_LINES
    figure, axes = _figure(height=4.4)
    for index, (name, points) in enumerate(lines):
        look = {"color": COLOURS[index], "marker": MARKERS[index], "linestyle": DASHES[index]}
        axes.plot([p[0] for p in points], [p[1] for p in points], label=name, **look)
        estimated = [p for p in points if p[2]]
        axes.plot([p[0] for p in estimated], [p[1] for p in estimated], MARKERS[index], color=PAPER,
                  markeredgecolor=COLOURS[index], zorder=3)
    top = 1.08 * max(point[1] for _, points in lines for point in points)
    axes.set_ylim(0, top)
    axes.set_xlim(left=0)
    _card_lines(axes, facts.cards, top)
    if whole:
        axes.set_xticks(sorted({point[0] for _, points in lines for point in points}))
    axes.set_xlabel(_more(label, more, "lines"))
    axes.set_ylabel("required memory, GiB")
    hollow = any(p[2] for _, points in lines for p in points)
    axes.legend(loc="upper left", fontsize=8, title="hollow: estimated" if hollow else None, title_fontsize=7)
    return figure


def _card_lines(axes: "Axes", cards: Iterable[Card], top: float) -> None:
    """What cards leave to a program, no two lines closer than a label is high."""
    last = 0.0
    for card in sorted((card for card in cards if card.headline), key=lambda card: card.usable_bytes):
        usable = card.usable_bytes / GIB
        if usable > top or usable - last < top / 26:
            continue
        axes.axhline(usable, color=FAINT, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
        axes.annotate(card.name, (1, usable), xycoords=("axes fraction", "data"), xytext=(3, 0),
                      textcoords="offset points", fontsize=7, va="center", annotation_clip=False)
        last = usable


def _frontier_panel(axes: "Axes", choices: Sequence[Choice]) -> None:
    line, plain = frontier(choices), baseline(choices)
    rest = [choice for choice in choices if choice not in line]
    axes.plot([_required(c) / GIB for c in rest], [c.call_s or 0 for c in rest], "o", color=FAINT, markersize=4)
    axes.plot([_required(c) / GIB for c in line], [c.call_s or 0 for c in line], "-s", color=COLOURS[0],
              drawstyle="steps-post", markersize=5)
    largest = max(map(_required, choices)) / GIB
    for choice in dict.fromkeys((*line, plain)):
        x = _required(choice) / GIB
        right = x > 0.6 * largest
        name = _less(choice, plain) or choice.name
        axes.annotate(short(name, 30), (x, choice.call_s or 0), xytext=(-4 if right else 4, 5), textcoords="offset points",
                      fontsize=6.5, ha="right" if right else "left")
    axes.set_yscale("log")
    axes.set_xlim(0, 1.05 * largest)
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _full_length_phases(choice: Choice) -> dict[str, float]:
    """Seconds of each phase of a call with the native number of steps; the load is none of them."""
    seconds = {name: cost.time_s or 0.0 for name, cost in choice.record.phases.items() if name != "load"}
    full = choice.record.time.full_length_s
    if full and "denoise" in seconds:
        seconds["denoise"] = max(0.0, full - sum(s for name, s in seconds.items() if name != "denoise"))
    return dict(seconds)
