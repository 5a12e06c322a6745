"""What the page's table searches: every choice as a row, with its verdict on every card in one letter."""

from collections.abc import Hashable
from typing import Any

from pytest_vram.errors import printable
from pytest_vram.report.cards import GIB, NATIVE_FROM, Card
from pytest_vram.report.choices import Choice, Workload, against, frontier
from pytest_vram.report.document import Document
from pytest_vram.report.evidence import Evidence
from pytest_vram.report.verdicts import WORDS, Outcome, best, judge

LETTERS: dict[Outcome, str] = {"fits": "f", "tight": "t", "no": "n", "unsupported": "u", "unknown": "q"}
COLUMNS = (
    "model", "size", "pixels", "batch", "set", "required", "estimated", "saved", "shown", "seconds", "paid", "slowdown",
    "frontier", "host", "disk", "runs", "remark", "verdicts",
)  # fmt: skip


def explorer(document: Document) -> dict[str, Any]:
    """`cards` have a name, the GiB they leave and the index of their letter; `rows` have the values of `columns`;
    `words` have each letter's outcome and how it is written, best first.

    A letter is the verdict on a choice, a capital where the choice is the one to take for its workload on that card.
    Cards that no verdict can tell apart share a letter.
    """
    evidence = document.evidence
    classes: dict[Hashable, list[Card]] = {}
    for card in document.cards:
        classes.setdefault(_class(card, evidence), []).append(card)
    index = {card.name: number for number, cards in enumerate(classes.values()) for card in cards}
    one_each = [cards[0] for cards in classes.values()]
    rows = [row for workload in evidence.choices for row in _rows(workload, one_each, document)]
    cards = [[printable(card.name), round(card.usable_bytes / GIB, 2), index[card.name]] for card in document.cards]
    words = [[LETTERS[outcome], outcome, word] for outcome, word in WORDS.items()]
    return {"columns": COLUMNS, "cards": cards, "rows": rows, "words": words}


def _class(card: Card, evidence: Evidence) -> Hashable:
    measured = [run.gpu for run in evidence.runs if card.is_gpu(run.gpu, run.gpu_memory_bytes)]
    dtypes = tuple(card.lacks([dtype]) for dtype in NATIVE_FROM)
    return card.usable_bytes, dtypes, tuple(dict.fromkeys(measured))


def _rows(workload: Workload, cards: list[Card], document: Document) -> list[list[Any]]:
    taken = [best(workload, card, document.evidence) for card in cards]
    rows = []
    for plain, choices in document.evidence.groups(workload):
        edge = frontier(choices)
        for choice in choices:
            letters = (
                LETTERS[verdict.outcome].upper() if choice is verdict.choice else LETTERS[judge(choice, card).outcome]
                for card, verdict in zip(cards, taken, strict=True)
            )
            rows.append([*_figures(choice, plain, choice in edge, document), "".join(letters)])
    return rows


def _figures(choice: Choice, plain: Choice, on_the_edge: bool, document: Document) -> list[Any]:
    def gib(value: int | None) -> float | None:
        return None if value is None else round(value / GIB, 2)

    def rounded(value: float | None, digits: int) -> float | None:
        return None if value is None else round(value, digits)

    workload = choice.workload
    saved, paid = against(choice, plain)
    return [
        printable(document.name(workload)),
        printable(workload.size or workload.test),
        workload.pixels,
        workload.batch_size or None,
        printable(choice.name),
        gib(max(choice.required_bytes or 0, choice.at_least_bytes) or None),
        int(choice.estimated),
        gib(saved),
        gib(choice.record.memory.nvml_process_peak_bytes),
        rounded(choice.call_s, 3),
        rounded(paid, 2),
        rounded(choice.slowdown, 2),
        int(on_the_edge),
        gib(choice.host_bytes),
        gib(choice.disk_bytes),
        document.tag(choice),
        printable(choice.remark),
    ]
