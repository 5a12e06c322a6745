"""The short answer in the terminal: this model, this card, or both; at most 100 columns."""

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from io import StringIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pytest_vram.errors import UsageError, unknown
from pytest_vram.report.cards import Card
from pytest_vram.report.document import Document
from pytest_vram.report.text import gib, printable, seconds
from pytest_vram.report.verdicts import Verdict, best, minimum, recommended
from pytest_vram.report.workloads import Workload

WIDTH = 100
WORDS = {"fits": "fits", "tight": "tightly", "no": "no", "unsupported": "no dtype"}


def find_model(text: str, document: Document) -> str:
    """The model that a person means, by its name or alias.

    Raises:
        UsageError: with the nearest name.
    """
    names = {name: name for name in document.leads}
    names |= {alias: name for name in document.leads for alias in document.evidence.aliases.get(name, ())}
    if text in names:
        return names[text]
    part = [name for name in document.leads if text and text.lower() in name.lower()]
    if len(part) == 1:
        return part[0]
    if not get_close_matches(text, names, n=1, cutoff=0.5):
        raise UsageError(f"--model: no run has a model called {text!r} (there are: {', '.join(sorted(names))[:200]})")
    raise UsageError(f"--model: {unknown('model', text, names)}")


def answer(document: Document, model: str | None, card: Card | None) -> str:
    """What `pytest-vram report --model NAME --card NAME` prints."""
    out = StringIO()
    console = Console(file=out, width=WIDTH, color_system=None, legacy_windows=False, highlight=False)
    models = [model] if model else list(document.leads)
    verdicts: list[Verdict]
    if card is not None:
        told = f"{card.visible_gib:g} GiB as PyTorch sees it"
        if card.desktop_reserve_gib:
            told += f", {gib(card.usable_bytes)} beside a desktop"
        console.print(Text(printable(f"{card.name}: {told}{'; memory only' if card.memory_only else ''}")))
        workloads = [workload for workload in document.evidence.choices if workload.model in models]
        verdicts = [best(workload, card, document.evidence) for workload in workloads]
        console.print(_table(verdicts, document, card_column=False))
    else:
        verdicts = [best(document.leads[name], one, document.evidence) for name in models for one in document.headline]
        console.print(_table(verdicts, document, card_column=True))
    for name in models[:10]:
        for line in _sentences(document.leads[name], document):
            console.print(Text(printable(line), overflow="fold"))
    used = dict.fromkeys(verdict.choice.run.path for verdict in verdicts)
    gpus = dict.fromkeys(verdict.choice.run.gpu for verdict in verdicts if verdict.choice.run.gpu)
    if gpus:
        console.print(Text(f"s: one call on {printable(', '.join(gpus))}, with the model's own number of steps."))
    if any(verdict.estimated for verdict in verdicts):
        console.print(Text("~: estimated with no GPU."))
    for path in used:
        console.print(Text(f"{document.tags[path]}: {printable(str(path))}", overflow="fold"))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _table(verdicts: Sequence[Verdict], document: Document, *, card_column: bool) -> Table:
    """A row a verdict under its model's name; of several cards the first column names the card."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0, collapse_padding=True, show_edge=False)
    table.add_column("card" if card_column else "size", overflow="fold", max_width=30)
    table.add_column(" verdict", no_wrap=True)
    table.add_column(" with", overflow="fold", ratio=1)
    for heading in ("required", "free", "s", "host", "run"):
        table.add_column(f" {heading}", justify="right", no_wrap=True)
    above = None
    for verdict in verdicts:
        choice, mark = verdict.choice, "~" if verdict.estimated else ""
        workload = choice.workload
        under = f"{document.name(workload)}, {workload.label}" if card_column else document.name(workload)
        if under != above:
            table.add_row(Text(printable(under), overflow="fold"))
            above = under
        size = f"{workload.size} b{workload.batch_size}" if workload.width else workload.test
        room = None if verdict.required_bytes is None else verdict.card.usable_bytes - verdict.required_bytes
        cells = [
            f" {verdict.card.name if card_column else size}",
            f" {mark}{WORDS[verdict.outcome]}",
            f" {verdict.reason if verdict.outcome == 'unsupported' else choice.name}",
            f" {mark}{gib(verdict.required_bytes)}",
            " –" if room is None else f" {'−' if room < 0 else ''}{gib(abs(room))}",
            f" {seconds(verdict.call_s) if verdict.runs else '–'}",
            f" {gib(choice.host_bytes)}",
            f" {document.tag(choice)}",
        ]
        table.add_row(*(Text(cell if cell.isspace() else " " + printable(cell)) for cell in cells))
    return table


def _sentences(workload: Workload, document: Document) -> Iterator[str]:
    least = minimum(workload, document.cards, document.evidence)
    good = recommended(workload, document.cards, document.evidence)
    named = f"{workload.model}, {workload.label}"
    if least is None:
        yield f"{named}: no card of the list runs it."
        return
    yield f"{named}: at least {_said(least)}."
    if good is not None:
        yield f"  Recommended: {_said(good)}."


def _said(verdict: Verdict) -> str:
    with_set = f" with {verdict.choice.name}" if verdict.choice.name else ""
    tight = ", tightly" if verdict.outcome == "tight" else ""
    guess = ", as estimated" if verdict.estimated else ""
    return f"{verdict.card.memory_gib:g} GB, such as {verdict.card.name},{with_set}{tight}{guess}"
