"""What the page's table searches: every choice as a row, with its verdict on every card in one letter."""

from collections.abc import Hashable
from typing import Any

from pytest_vram.report.cards import GIB, NATIVE_FROM, Card
from pytest_vram.report.document import Document
from pytest_vram.report.verdicts import Outcome, best, judge
from pytest_vram.report.workloads import Choice, Evidence, Workload

LETTERS: dict[Outcome, str] = {"fits": "f", "tight": "t", "no": "n", "unsupported": "u"}
COLUMNS = ("model", "size", "pixels", "batch", "set", "required", "estimated", "saved", "shown", "seconds", "slowdown",
           "host", "disk", "run", "remark", "verdicts")  # fmt: skip


def explorer(document: Document) -> dict[str, Any]:
    """`cards` have a name, the GiB they leave and the index of their letter; `rows` have the values of `columns`.

    A letter is a verdict (`f` fits, `t` tightly, `n` no, `u` not supported), a capital where the choice is the one to
    take for its workload on that card. Cards that no verdict can tell apart share a letter.
    """
    evidence = document.evidence
    classes: dict[Hashable, list[Card]] = {}
    for card in document.cards:
        classes.setdefault(_class(card, evidence), []).append(card)
    index = {card.name: number for number, cards in enumerate(classes.values()) for card in cards}
    one_each = [cards[0] for cards in classes.values()]
    rows = [row for workload in evidence.choices for row in _rows(workload, one_each, document)]
    cards = [[card.name, round(card.usable_bytes / GIB, 2), index[card.name]] for card in document.cards]
    return {"columns": COLUMNS, "cards": cards, "rows": rows}


def _class(card: Card, evidence: Evidence) -> Hashable:
    measured = [run.gpu for run in evidence.runs if card.is_gpu(run.gpu, run.gpu_memory_bytes)]
    dtypes = tuple(card.lacks([dtype]) for dtype in NATIVE_FROM)
    return card.usable_bytes, dtypes, tuple(dict.fromkeys(measured))


def _rows(workload: Workload, cards: list[Card], document: Document) -> list[list[Any]]:
    taken = [best(workload, card, document.evidence).choice for card in cards]
    rows = []
    for plain, choices in document.evidence.groups(workload):
        for choice in choices:
            letters = (
                letter.upper() if choice is take else letter
                for card, take in zip(cards, taken, strict=True)
                for letter in [LETTERS[judge(choice, card).outcome]]
            )
            rows.append([*_figures(choice, plain, document), "".join(letters)])
    return rows


def _figures(choice: Choice, plain: Choice, document: Document) -> list[Any]:
    def gib(value: int | None) -> float | None:
        return None if value is None else round(value / GIB, 2)

    def rounded(value: float | None, digits: int) -> float | None:
        return None if value is None else round(value, digits)

    workload, required, compared = choice.workload, choice.required_bytes, plain.required_bytes
    same = choice is plain or required is None or compared is None
    return [
        document.name(workload),
        workload.size or workload.test,
        workload.pixels,
        workload.batch_size or None,
        choice.name,
        gib(required),
        int(choice.estimated),
        None if same else gib((compared or 0) - (required or 0)),
        gib(choice.record.memory.nvml_process_peak_bytes),
        rounded(choice.call_s, 3),
        rounded(choice.slowdown, 2),
        gib(choice.host_bytes),
        gib(choice.disk_bytes),
        document.tag(choice),
        choice.remark,
    ]
