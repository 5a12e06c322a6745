"""The short answer in the terminal: this model, this card, or both; at most 100 columns."""

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from io import StringIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pytest_vram.errors import UsageError, printable
from pytest_vram.report.cards import Card
from pytest_vram.report.choices import Workload
from pytest_vram.report.document import Document
from pytest_vram.report.text import gib, seconds
from pytest_vram.report.verdicts import WORDS, Verdict, best, minimum, recommended

WIDTH = 100


def find_model(text: str, document: Document) -> str:
    """The model that a person means, by its name or alias.

    Raises:
        UsageError: with the nearest name.
    """
    names = {name: name for name in document.leads}
    names |= {alias: name for name in document.leads for alias in document.evidence.aliases.get(name, ())}
    if text in names:
        return names[text]
    by_key = {name.lower(): subject for name, subject in names.items()}
    if text.lower() in by_key:
        return by_key[text.lower()]
    part = [name for name in document.leads if text and text.lower() in name.lower()]
    if len(part) == 1:
        return part[0]
    near = get_close_matches(text, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    some = ", ".join(sorted(names)[:20]) + (", ..." if len(names) > 20 else "")
    raise UsageError(f"--model: no run has a model called {text!r}{hint} (there are: {some})")


def answer(document: Document, model: str | None, card: Card | None) -> str:
    """What `pytest-vram report --model NAME --card NAME` prints."""
    out = StringIO()
    console = Console(file=out, width=WIDTH, color_system=None, legacy_windows=False, highlight=False)
    models = [model] if model else list(document.leads)
    if card is not None:
        told = f"{card.visible_gib:g} GiB as PyTorch sees it"
        if card.desktop_reserve_gib:
            told += f", {gib(card.usable_bytes)} beside a desktop"
        console.print(Text(printable(f"{card.name}: {told}{'; memory only' if card.memory_only else ''}")))
        workloads = [workload for name in models for workload in document.evidence.subjects[name]]
        judged = [(workload, best(workload, card, document.evidence)) for workload in workloads]
    else:
        leads = [document.leads[name] for name in models]
        judged = [(lead, best(lead, one, document.evidence)) for lead in leads for one in document.headline]
    console.print(_table(judged, document, card_column=card is None))
    verdicts = [verdict for _, verdict in judged]
    used = dict.fromkeys(verdict.choice.memory_run.path for verdict in verdicts)
    for name in models[:10]:
        lead = document.leads[name]
        found = [one(lead, document.cards, document.evidence) for one in (minimum, recommended)]
        for line in _sentences(name, found[0], found[1], document):
            console.print(Text(printable(line), overflow="fold"))
        used |= dict.fromkeys(run.path for verdict in found if verdict for run in verdict.choice.runs)
    gpus = dict.fromkeys(verdict.choice.gpu for verdict in verdicts if verdict.choice.gpu)
    if gpus and any(verdict.runs and verdict.call_s is not None for verdict in verdicts):
        console.print(
            Text(
                printable(
                    f"s: one call on {', '.join(gpus)}, with the model's own number of steps; medians over all runs."
                )
            )
        )
    if any(verdict.estimated for verdict in verdicts):
        console.print(Text("~: estimated with no GPU."))
    for path in used:
        console.print(Text(f"{document.tags[path]}: {printable(str(path))}", overflow="fold"))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _table(judged: Sequence[tuple[Workload, Verdict]], document: Document, *, card_column: bool) -> Table:
    """A row a verdict under its model's name; of several cards the first column names the card."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0, collapse_padding=True, show_edge=False)
    table.add_column("card" if card_column else "size", overflow="fold", max_width=30)
    table.add_column(" verdict", no_wrap=True)
    table.add_column(" with", overflow="fold", ratio=1)
    for heading in ("required", "free", "s", "host"):
        table.add_column(f" {heading}", justify="right", no_wrap=True)
    table.add_column(" run", justify="right", no_wrap=True)
    above = None
    for workload, verdict in judged:
        choice, mark = verdict.choice, "~" if verdict.estimated else ""
        under = f"{document.name(workload)}, {workload.label}" if card_column else document.name(workload)
        if under != above:
            table.add_row(Text(printable(under), overflow="fold"))
            above = under
        size = f"{workload.size} b{workload.batch_size}" if workload.width else workload.test
        room = None if verdict.required_bytes is None else verdict.card.usable_bytes - verdict.required_bytes
        larger = f"from {choice.workload.label}" if verdict.runs and choice.workload != workload else ""
        why = "; ".join(filter(None, (larger, verdict.reason)))
        cells = [
            verdict.card.name if card_column else size,
            f"{mark}{WORDS[verdict.outcome]}",
            f"{choice.name} ({why})" if why else choice.name,
            f"{mark}{gib(verdict.required_bytes)}",
            "–" if room is None else f"{'−' if room < 0 else ''}{gib(abs(room))}",
            seconds(verdict.call_s) if verdict.runs else "–",
            gib(choice.host_bytes),
            document.memory_tag(choice),
        ]
        table.add_row(*(Text(f" {printable(cell)}") for cell in cells))
    return table


def _sentences(subject: str, least: Verdict | None, good: Verdict | None, document: Document) -> Iterator[str]:
    """What card to get for a model, in the words of the document."""
    workload = document.leads[subject]
    named = f"{subject}, {workload.label}" if workload.width else subject
    yield f"{named}: " + (
        f"at least {_said(least, workload, document)}." if least else "no card of the list is known to run it."
    )
    if good is not None:
        yield f"Recommended: {_said(good, workload, document)}."
    elif least is not None:
        yield "No card of the list runs it comfortably."


def _said(verdict: Verdict, workload: Workload, document: Document) -> str:
    it = document.said(verdict, workload)
    with_set = f", with {it['set']}" if it["set"] else ""
    return f"{it['memory']}, such as {it['card']}{with_set}{it['so']}"
