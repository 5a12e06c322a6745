"""The charts, one function each: from the evidence to a figure, or None where there is nothing to show."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_vram.report.cards import GIB, Card
from pytest_vram.report.choices import DTYPES, SAME_GPU_TIME, SAME_TIME, Choice, Workload, baseline, frontier
from pytest_vram.report.drawing import COLOURS, DASHES, FAINT, HATCHES, INK, MARKERS, PAPER, png, short, style, svg
from pytest_vram.report.evidence import Evidence
from pytest_vram.report.verdicts import WORDS, best

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# A chart shows no more, and says so; the tables have everything.
MOST_ROWS, MOST_CARDS, MOST_LINES, MOST_PANELS = 40, 16, 6, 9
FILLS = {"fits": "#1a7f4b", "tight": "#e3b341", "no": "#f0f1f3", "unsupported": "#c9cdd2", "unknown": "#c9cdd2"}
FILL_INKS = {"fits": "#fefefe", "tight": "#1b1f24", "no": "#57606a", "unsupported": "#1b1f24", "unknown": "#1b1f24"}
# None of them is INK or PAPER, which follow the reader's scheme as the fills do not.


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
    wide: bool


def draw(facts: Facts) -> list[Chart]:
    """Every chart that has something to show."""
    drawn = []
    for function, title, caption in CHARTS:
        with style():
            figure = function(facts)
            if figure is not None:
                name = function.__name__.replace("_", "-")
                wide = figure.get_figwidth() > 2.2 * figure.get_figheight()
                if layout := figure.get_layout_engine():
                    layout.execute(figure)  # which makes room for all texts, once for both files
                figure.set_layout_engine("none")
                drawn.append(Chart(name, title, caption, svg(figure), png(figure), wide))
    return drawn


def models_on_cards(facts: Facts) -> "Figure | None":
    """A heat map: which model runs on which card, and with which flags."""
    rows, cards = _by_memory(facts), [card for card in facts.cards if card.headline]
    if not (rows and cards):
        return None
    rows, more = rows[:MOST_ROWS], len(rows) - MOST_ROWS
    cards, more_cards = cards[:MOST_CARDS], len(cards) - MOST_CARDS
    figure, axes = _figure(width=2.4 + 1.0 * len(cards), height=1.5 + 0.68 * len(rows))
    from matplotlib.patches import Rectangle

    for place, workload in enumerate(rows):
        for column, card in enumerate(cards):
            verdict = best(workload, card, facts.evidence)
            fill, ink = FILLS[verdict.outcome], FILL_INKS[verdict.outcome]
            axes.add_patch(Rectangle((column - 0.48, place - 0.47), 0.96, 0.94, facecolor=fill))
            if verdict.estimated and verdict.runs:
                frame = Rectangle((column - 0.44, place - 0.41), 0.88, 0.82, fill=False, edgecolor=ink, linestyle="--")
                axes.add_patch(frame)
            names = [_in_a_cell(name) for name in verdict.choice.optimizations] if verdict.runs else []
            names = [*names[:2], f"and {len(names) - 2} more"] if len(names) > 3 else names
            word = ("~" if verdict.estimated else "") + WORDS[verdict.outcome]
            middle = place - 0.06 * len(names)
            axes.text(column, middle, word, ha="center", va="bottom" if names else "center", color=ink, fontsize=9)
            axes.text(column, middle + 0.03, "\n".join(names), ha="center", va="top", color=ink, fontsize=6)
    titles = [f"{short(card.name.replace('GeForce ', ''), 22)}\n{card.memory_gib:g} GB" for card in cards]
    axes.set_xticks(range(len(cards)), titles, rotation=35, ha="left", rotation_mode="anchor", fontsize=8)
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(rows)), [_two_lines(workload) for workload in rows], fontsize=8)
    axes.set_xlim(-0.5, len(cards) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlabel(_more(_more("", more, "models"), more_cards, "cards"))
    return figure


def _in_a_cell(flag: str) -> str:
    """A flag's name with what tells it from others, short enough for a cell."""
    return short(flag.replace("_", " ").removeprefix("text ").removeprefix("group "), 19)


def required_by_model(facts: Facts) -> "Figure | None":
    """Stacked: weights, activations and workspaces, context; a diamond where the cheapest set of the workload lies."""
    rows = [(workload, choices) for workload in _by_memory(facts) if (choices := _choices(workload, facts))]
    if not rows:
        return None
    rows, more = rows[:MOST_ROWS], len(rows) - MOST_ROWS
    figure, axes = _figure(height=1.3 + 0.52 * len(rows))
    for place, (_, choices) in enumerate(rows):
        choice, left = baseline(choices), 0.0
        for index, part in enumerate(_parts(choice)):
            look: dict[str, Any] = {"color": COLOURS[index], "hatch": HATCHES[index]}
            axes.barh(place, part, left=left, alpha=0.55 if choice.estimated else 1.0, **look)
            left += part
        axes.text(left, place, f" {'~' if choice.estimated else ''}{left:.1f}", va="center")
        least = min((*choices, *_known(facts.evidence.estimated(choice.workload))), key=_gib)
        if least is not choice:
            x = _gib(least)
            axes.plot(x, place, "D", color=PAPER, markeredgecolor=INK, markersize=6, zorder=5)
            axes.annotate(
                f"{'~' if least.estimated else ''}{x:.1f} {_beside(least, choice)}",
                (max(x, 0.5), place - 0.43),
                fontsize=7,
            )
    axes.set_yticks(range(len(rows)), [_two_lines(workload, baseline(choices).name) for workload, choices in rows])
    axes.set_ylim(len(rows) - 0.4, -0.7)
    axes.set_xlabel(_more("required memory, GiB (diamond: the set that requires least)", more, "models"))
    _legend(figure, ("weights", "activations, workspaces, fragmentation", "context"))
    return figure


def shown_and_needed(facts: Facts) -> "Figure | None":
    """Required memory, and the peak that nvidia-smi shows of the same case with room."""
    pairs = []
    for workload in facts.evidence.choices:
        measured = [choice for choice in _known(facts.evidence.measured(workload)) if not choice.estimated]
        peak = (choice := baseline(measured)).record.memory.nvml_process_peak_bytes if measured else None
        if peak:
            pairs.append((choice, _gib(choice), peak / GIB))
    if not pairs:
        return None
    pairs.sort(key=lambda pair: pair[2] / pair[1], reverse=True)
    pairs, more = pairs[:MOST_ROWS], len(pairs) - MOST_ROWS
    figure, axes = _figure(height=1.2 + 0.3 * len(pairs))
    places = range(len(pairs))
    for place, (_, needed, peak_gib) in enumerate(pairs):
        axes.plot((needed, peak_gib), (place, place), color=FAINT, linewidth=3, zorder=1)
        axes.text(max(needed, peak_gib), place, f"   ×{peak_gib / needed:.2f}", va="center", fontsize=8)
    axes.plot([pair[1] for pair in pairs], places, "o", color=COLOURS[0], label="required")
    hollow: dict[str, Any] = {"markerfacecolor": "none", "markeredgewidth": 1.6}
    axes.plot([pair[2] for pair in pairs], places, "s", color=COLOURS[1], label="nvidia-smi's peak", **hollow)
    axes.set_yticks(places, [_one_line(choice) for choice, _, _ in pairs])
    axes.set_ylim(len(pairs) - 0.5, -0.5)
    axes.set_xlim(0, 1.1 * max(pair[2] for pair in pairs))
    axes.set_xlabel(_more("GiB", more, "cases"))
    axes.legend(loc="lower right")
    return figure


def memory_by_batch(facts: Facts) -> "Figure | None":
    """A line a model and dtype at its lead resolution; dashed: what cards leave to a program."""

    def belongs(workload: Workload, lead: Workload) -> bool:
        return (workload.width, workload.height, workload.frames) == (lead.width, lead.height, lead.frames)

    lines = _lines(facts, belongs, lambda workload: float(workload.batch_size))
    return _line_chart(facts, lines, "batch size", whole=True)


def memory_by_resolution(facts: Facts) -> "Figure | None":
    """A line a model and dtype at its smallest batch; dashed: what cards leave to a program."""

    def belongs(workload: Workload, lead: Workload) -> bool:
        return (workload.batch_size, workload.frames) == (lead.batch_size, lead.frames)

    lines = _lines(facts, belongs, lambda workload: workload.width * workload.height / 1e6)
    return _line_chart(facts, lines, "resolution, megapixels")


def frontiers(facts: Facts) -> "Figure | None":
    """A panel a model, of the workload and GPU with most sets, and of most sets first: each by required memory and
    time; the line joins those that buy something."""
    panels = []
    for subject, lead in facts.leads.items():
        workloads = dict.fromkeys((lead, *facts.evidence.subjects[subject]))
        groups = ((workload, _known(choices)) for workload in workloads for choices in facts.evidence.by_gpu(workload))
        timed = [(workload, [choice for choice in choices if choice.call_s]) for workload, choices in groups]
        workload, choices = max(timed, key=lambda group: len(group[1]), default=(lead, []))
        if len(choices) > 1:
            panels.append((workload, choices))
    if not panels:
        return None
    panels.sort(key=lambda panel: -len(panel[1]))
    panels, more = panels[:MOST_PANELS], len(panels) - MOST_PANELS
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.5 * columns + 0.6, 3.4 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, (workload, choices) in zip(grid.flat, panels, strict=False):
        axes.set_title(f"{_two_lines(workload)}\n{short(choices[0].gpu or '', 34)}", fontsize=9)
        _frontier_panel(axes, choices)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    simulated = any(choice.estimated for _, choices in panels for choice in choices)
    label = "required memory, GiB" + (" (hollow: simulated)" if simulated else "")
    figure.supxlabel(_more(label, more, "models"), fontsize=9)
    figure.supylabel("seconds a call", fontsize=9)
    return figure


def phases(facts: Facts) -> "Figure | None":
    """Left: the allocated peak of each phase. Right: the share of each in a call of the native number of steps."""
    measured = [choices for workload in _by_memory(facts) if (choices := facts.evidence.measured(workload))]
    rows = [choice for choices in measured if (choice := baseline(choices)).record.phases and choice.own_call_s]
    if not rows:
        return None
    rows, more = rows[:MOST_ROWS], len(rows) - MOST_ROWS
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 1.4 + 0.72 * len(rows)), layout="constrained")
    memory, share = figure.subplots(1, 2, sharey=True)
    costs = [{str(name): cost for name, cost in choice.record.phases.items()} for choice in rows]
    names = [name for name in ("load", "encode", "denoise", "decode", "call") if any(name in cost for cost in costs)]
    for place, (choice, cost) in enumerate(zip(rows, costs, strict=True)):
        left, seconds = 0.0, _full_length_phases(choice)
        for index, name in enumerate(names):
            look: dict[str, Any] = {"color": COLOURS[index], "hatch": HATCHES[index]}
            peak = cost[name].allocated_peak_bytes if name in cost else None
            y = place + 0.8 * ((index + 0.5) / len(names) - 0.5)
            memory.barh(y, (peak or 0) / GIB, height=0.8 / len(names), **look)
            part = 100 * seconds.get(name, 0.0) / (sum(seconds.values()) or 1.0)
            share.barh(place, part, left=left, height=0.6, **look)
            left += part
    memory.set_yticks(range(len(rows)), [_two_lines(choice.workload, choice.name) for choice in rows])
    memory.set_ylim(len(rows) - 0.5, -0.5)
    memory.set_xlabel("allocated peak, GiB")
    share.set_xlabel(_more("% of a call's time, without the load", more, "models"))
    _legend(figure, names)
    return figure


def estimates(facts: Facts) -> "Figure | None":
    """The simulated need against the searched one, of every measured case that has both."""
    points = []
    for sets in (sets for by_gpu in facts.evidence.choices.values() for sets in by_gpu.values()):
        for choice in sets.values():
            need, guess = choice.record.memory.need_bytes, choice.record.memory.estimated_need_bytes
            if not choice.estimated and need and guess:
                points.append((need / GIB, 100 * (guess / need - 1), choice))
    if not points:
        return None
    figure, axes = _figure(height=3.6)
    axes.axhspan(-5, 5, color=FAINT, alpha=0.2, linewidth=0)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.plot([point[0] for point in points], [point[1] for point in points], "o", color=COLOURS[0], markersize=4)
    middle = max(point[0] for point in points) / 2
    for need_gib, error, choice in sorted(points, key=lambda point: -abs(point[1]))[:3]:
        if abs(error) >= 2:
            side = "left" if need_gib < middle else "right"
            name = f"  {short(choice.record.id, 60)}  "
            axes.annotate(name, (need_gib, error), fontsize=7, va="center", ha=side)
    axes.set_xlim(left=0)
    axes.set_xlabel("need, measured, GiB")
    axes.set_ylabel("estimate's error, %\n(band: 5 %)")
    return figure


_CARD_LINES = "Dashed: what a card leaves to a program beside a desktop."
CHARTS: tuple[tuple[Callable[[Facts], "Figure | None"], str, str], ...] = (
    (models_on_cards, "Models on cards", "The best set for each model at its own size on each card. ~ is estimated."),
    (
        required_by_model,
        "Required memory by model",
        "What free memory goes to, at the model's own size with no flags; the diamond is the set that requires least.",
    ),
    (
        shown_and_needed,
        "What nvidia-smi shows, and what is needed",
        "The same case: the peak with the whole GPU to itself, and the free memory it must have.",
    ),
    (memory_by_batch, "Required memory by batch size", _CARD_LINES),
    (memory_by_resolution, "Required memory by resolution", _CARD_LINES),
    (
        frontiers,
        "Memory and time",
        "Each point is a set, the circle the plain dtype; hollow: its need is simulated. The line joins those that are "
        f"more than {SAME_GPU_TIME:g} times faster than all that require less; {SAME_TIME:g} times where the host's "
        "CPU decides.",
    ),
    (phases, "Phases", "Where the memory peaks, and where the time goes."),
    (estimates, "Estimate and measurement", "The need as simulated with no GPU, against the need that was searched."),
)


def _figure(width: float = 7.6, height: float = 4.0) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _legend(figure: "Figure", names: Sequence[str]) -> None:
    """The looks of stacked bars, above them."""
    from matplotlib.patches import Patch

    looks = [Patch(facecolor=COLOURS[i], hatch=HATCHES[i], edgecolor=INK, label=name) for i, name in enumerate(names)]
    figure.legend(handles=looks, loc="outside upper center", ncols=len(names), fontsize=8)


def _two_lines(workload: Workload, name: str = "") -> str:
    return f"{short(workload.model, 30)} {short(name, 30)}\n{short(workload.label, 34)}".replace(" \n", "\n")


def _one_line(choice: Choice) -> str:
    return f"{short(choice.workload.model, 24)} {short(choice.name, 24)} {short(choice.workload.label, 30)}"


def _choices(workload: Workload, facts: Facts) -> list[Choice]:
    """The choices of the first GPU that measured a dtype alone of this workload; without one all, and estimates."""
    groups = [_known(choices) for choices in facts.evidence.by_gpu(workload)]
    plain = next((choices for choices in groups if any(not choice.flags for choice in choices)), None)
    return plain or [*(c for choices in groups for c in choices), *_known(facts.evidence.estimated(workload))]


def _by_memory(facts: Facts) -> list[Workload]:
    """Each model's lead workload, in rising order of what its plain dtype requires; what is not known comes last."""

    def required(workload: Workload) -> float:
        choices = _choices(workload, facts)
        return _gib(baseline(choices)) if choices else math.inf

    return sorted(facts.leads.values(), key=required)


def _known(choices: Iterable[Choice]) -> list[Choice]:
    """Those for one GPU whose required memory is known."""
    return [choice for choice in choices if choice.required_bytes and not choice.gpus]


def _parts(choice: Choice) -> tuple[float, float, float]:
    """Weights, activations and context in GiB; of an offload the weights are no more than the need."""
    need = (choice.need_bytes or 0) / GIB
    weights = min((choice.record.memory.weights_bytes or 0) / GIB, need)
    return weights, need - weights, _gib(choice) - need


def _gib(choice: Choice) -> float:
    """The required memory in GiB."""
    return (choice.required_bytes or 0) / GIB


def _beside(choice: Choice, plain: Choice) -> str:
    """What a set has beside the plain one."""
    names = [name.replace("_", " ") for name in choice.optimizations if name not in plain.optimizations]
    return short(", ".join(names), 44)


def _more(label: str, more: int, of: str) -> str:
    """A chart that does not show everything says so."""
    return f"{label}\n({more} more {of} in the tables)" if more > 0 else label


@dataclass(frozen=True)
class _Line:
    """One line of a chart: x, required GiB, and which of the points are estimated."""

    name: str
    x: list[float]
    y: list[float]
    estimated: list[bool]


def _lines(facts: Facts, belongs: Callable[[Workload, Workload], bool], x: Callable[[Workload], float]) -> list[_Line]:
    """A line for each model and dtype that has two points or more, those with most points first."""
    lines = []
    for model, lead in facts.leads.items():
        own = [w for w in facts.evidence.subjects[model] if w.width and belongs(w, lead)]
        for dtype in DTYPES:
            found: dict[float, Choice] = {}
            for workload in own:
                for choice in (*facts.evidence.estimated(workload), *facts.evidence.measured(workload)):
                    known = facts.evidence.speaks_of(choice) if choice.optimizations == (dtype,) else None
                    if known and known.required_bytes:
                        found[x(workload)] = known
            if len(found) > 1:
                places = sorted(found)
                points = [found[place] for place in places]
                name = f"{short(model, 26)} {dtype}"
                lines.append(_Line(name, places, [_gib(c) for c in points], [c.estimated for c in points]))
    return sorted(lines, key=lambda line: -len(line.x))


def _line_chart(facts: Facts, lines: list[_Line], label: str, *, whole: bool = False) -> "Figure | None":
    if not lines:
        return None
    lines, more = lines[:MOST_LINES], len(lines) - MOST_LINES
    figure, axes = _figure(height=4.4)
    for index, line in enumerate(lines):
        look: dict[str, Any] = {"color": COLOURS[index], "marker": MARKERS[index], "linestyle": DASHES[index]}
        axes.plot(line.x, line.y, label=line.name, **look)
        hollow = [(x, y) for x, y, guess in zip(line.x, line.y, line.estimated, strict=True) if guess]
        look |= {"linestyle": "", "color": PAPER, "markeredgecolor": COLOURS[index]}
        axes.plot([x for x, _ in hollow], [y for _, y in hollow], zorder=3, **look)
    top = 1.08 * max(max(line.y) for line in lines)
    axes.set_ylim(0, top)
    axes.set_xlim(left=0)
    _card_lines(axes, facts.cards, top)
    if whole:
        axes.set_xticks(sorted({x for line in lines for x in line.x}))
    axes.set_xlabel(_more(label, more, "lines"))
    axes.set_ylabel("required memory, GiB")
    title = "hollow: estimated" if any(any(line.estimated) for line in lines) else None
    figure.legend(loc="outside upper center", ncols=3, fontsize=8, title=title, title_fontsize=7)
    return figure


def _card_lines(axes: "Axes", cards: Iterable[Card], top: float) -> None:
    """What cards leave to a program, no two lines closer than a label is high."""
    last = 0.0
    for card in sorted((card for card in cards if card.headline), key=lambda card: card.usable_bytes):
        usable = card.usable_bytes / GIB
        if usable > top or usable - last < top / 26:
            continue
        axes.axhline(usable, color=FAINT, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
        place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "xytext": (3, 0)}
        axes.annotate(short(card.name, 30), (1, usable), fontsize=7, va="center", annotation_clip=False, **place)
        last = usable


def _frontier_panel(axes: "Axes", choices: Sequence[Choice]) -> None:
    from matplotlib.patheffects import withStroke

    line, plain = frontier(choices), baseline(choices)
    steps = [(_gib(choice), choice.call_s or 0.0) for choice in line]
    axes.plot(*zip(*steps, strict=True), drawstyle="steps-post", color=COLOURS[0])
    for choice in choices:
        marker, size, colour = ("s", 5, COLOURS[0]) if choice in line else ("o", 4, FAINT)
        look: dict[str, Any] = {"color": colour, "markerfacecolor": PAPER if choice.estimated else colour}
        look["zorder"] = 4 if choice in line else 2  # above the labels, or beneath
        axes.plot(_gib(choice), choice.call_s or 0.0, marker, markersize=size, **look)
    axes.plot(_gib(plain), plain.call_s or 0, "o", markersize=7, markerfacecolor="none", markeredgecolor=INK, zorder=5)
    largest = max(map(_gib, choices))
    times = [choice.call_s or 0.0 for choice in choices]
    axes.set_yscale("log")
    axes.set_ylim(min(times) / 1.8, max(times) * 1.8)
    axes.set_xlim(0, 1.05 * largest)
    named = sorted(dict.fromkeys((*line, plain)), key=lambda choice: -(choice.call_s or 0.0))
    last = float("inf")
    for choice in named:  # from above; a label that would cover the one above it moves down
        step = (max(times) / min(times) * 3.24) ** (1 / 16)
        y = min((choice.call_s or 0.0) * step**0.7, last / step)
        right = _gib(choice) > 0.55 * largest
        x = _gib(choice) + (-0.015 if right else 0.015) * largest
        name = _beside(choice, plain) or choice.name
        label = axes.text(x, y, short(name, 46), fontsize=6.5, va="center", ha="right" if right else "left")
        label.set_path_effects([withStroke(linewidth=1.5, foreground=PAPER)])
        last = y
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _full_length_phases(choice: Choice) -> dict[str, float]:
    """Seconds of each phase of a call with the native number of steps; load and compilation are none of them."""
    costs = choice.record.phases.items()
    seconds = {str(name): cost.time_s or 0.0 for name, cost in costs if name not in ("load", "compile")}
    full = choice.own_call_s
    if full and "denoise" in seconds:
        seconds["denoise"] = max(0.0, full - sum(s for name, s in seconds.items() if name != "denoise"))
    return seconds
