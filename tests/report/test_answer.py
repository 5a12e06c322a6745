"""The short answer: the known case is in it, it keeps to 100 columns, and it prints no control characters."""

import re
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_vram.errors import UsageError
from pytest_vram.report.answer import answer, find_model
from pytest_vram.report.cards import Card, find_card
from pytest_vram.report.document import Document
from pytest_vram.report.verdicts import best
from tests.records.test_schema import BARE, FAILURE, MIB, own, record
from tests.report.test_render import HOSTILE, a_report, a_run, estimate, hostile_run

MODELS = ["sdxl", "sdxl-turbo", "stable-diffusion-v1-5"]
CARDS = ["GTX 1650", "RTX 4060", "RTX 3060 12GB", "T4", "H100 80GB", "GTX 1060 3GB"]


def width(line: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in line)


def row(text: str, start: str) -> list[str]:
    """The cells of the one row that starts so."""
    [found] = [line for line in text.splitlines() if line.strip().startswith(start)]
    return re.split(r"\s{2,}", found.strip())


@pytest.mark.parametrize("card", [None, *CARDS])
@pytest.mark.parametrize("model", [None, *MODELS])
def test_no_line_is_wider_than_100_columns(model: str | None, card: str | None, document: Document) -> None:
    text = answer(document, model, find_card(card, document.cards) if card else None)
    assert max(map(width, text.splitlines())) <= 100
    assert "Traceback" not in text
    for name in MODELS if model is None else [model]:
        assert name in text


@pytest.mark.parametrize("card", CARDS)
def test_the_verdict_the_set_what_it_requires_and_the_run(card: str, document: Document) -> None:
    found = find_card(card, document.cards)
    text = answer(document, "sdxl", found)
    assert found.name in text.splitlines()[0]
    workload = document.leads["sdxl"]
    verdict = best(workload, found, document.evidence)
    cells = row(text, "1024x1024 b1")
    assert cells[1] == {"fits": "fits", "tight": "tightly", "no": "no", "unsupported": "no dtype"}[verdict.outcome]
    assert f"{(verdict.required_bytes or 0) / 2**30:.2f}" in cells
    assert verdict.choice.name in cells
    assert cells[-1] == document.tag(verdict.choice)
    whole = text.replace("\n", "")
    assert f"{document.tag(verdict.choice)}: " in text
    assert str(verdict.choice.run.path) in whole


def test_every_headline_card_has_a_row(document: Document) -> None:
    text = answer(document, "sdxl", None)
    for card in document.headline:
        assert row(text, card.name + "  ")[0] == card.name


def test_the_smallest_card_is_said(document: Document) -> None:
    [said] = [found for found in document.answers() if found["model"] == "sdxl"]
    text = " ".join(answer(document, "sdxl", None).split())
    assert f"at least {said['minimum']['memory']}, such as {said['minimum']['card']}" in text
    assert f"Recommended: {said['recommended']['memory']}, such as {said['recommended']['card']}" in text


def test_a_card_that_runs_nothing_gets_a_no(document: Document) -> None:
    tiny = Card(name="Tiny", kind="desktop", memory_gib=1, visible_gib=0.9)
    text = answer(document, "sdxl", tiny)
    assert row(text, "1024x1024 b1")[1] == "no"
    assert "−" in row(text, "1024x1024 b1")[4]


def test_what_no_card_runs_is_said() -> None:
    huge = dict.fromkeys(("need_bytes", "reserved_peak_bytes", "nvml_process_peak_bytes"), 70000 * MIB)
    report = a_report(a_run(record(memory={**huge, "required_bytes": 70_686 * MIB})))
    few = replace(report, cards=[card for card in report.cards if card.memory_gib < 64])
    assert "no card" in answer(few.document(), "sdxl", None)


def test_an_estimate_is_marked_and_explained() -> None:
    document = a_report(a_run(estimate())).document()
    for card in (None, find_card("RTX 4090", document.cards)):
        text = answer(document, "sdxl", card)
        assert "~12.47" in text
        assert "~: estimated" in text
    measured = answer(a_report(a_run(record())).document(), "sdxl", None)
    assert "~" not in measured


def test_an_oom_is_no_figure() -> None:
    document = a_report(a_run(record(status="oom", failure=FAILURE, time={}, memory=BARE))).document()
    cells = row(answer(document, "sdxl", find_card("T4", document.cards)), "1024x1024 b1")
    assert cells[1].lstrip("~") == "no"
    assert not re.search(r"\d\.\d\d", " ".join(cells[3:]))


def test_a_pipeline_of_ones_own_is_answered_for() -> None:
    document = a_report(a_run(own())).document()
    text = answer(document, find_model("tests/test_app.py", document), find_card("RTX 4090", document.cards))
    assert row(text, "test_painter")[1] == "fits"


@pytest.mark.parametrize("text", ["stable-diffusion-v1-5", "sd-food", "diffusion", "DIFFUSION"])
def test_a_model_is_found_by_its_name_its_alias_or_a_part(text: str, document: Document) -> None:
    assert find_model(text, document) == "stable-diffusion-v1-5"


def test_a_whole_name_comes_before_those_it_is_a_part_of(document: Document) -> None:
    assert find_model("sdxl", document) == "sdxl"


@pytest.mark.parametrize(
    ("text", "near"), [("sdxl-trubo", "sdxl-turbo"), ("sdfood", "sd-food"), ("stable-difusion-v1-5", "v1-5")]
)
def test_an_unknown_model_gets_the_nearest_name(text: str, near: str, document: Document) -> None:
    with pytest.raises(UsageError, match=r"^--model: ") as caught:
        find_model(text, document)
    assert re.search(f"did you mean '[^']*{re.escape(near)}'", str(caught.value))


@pytest.mark.parametrize("text", ["", "zzzz", "\x1b[31m\n", "x" * 10_000])
def test_a_model_like_no_other_is_told_what_there_is(text: str, document: Document) -> None:
    with pytest.raises(UsageError, match=r"^--model: ") as caught:
        find_model(text, document)
    message = str(caught.value)
    assert message.isprintable()
    assert "sdxl" in message


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_names_print_no_control_characters(kind: str) -> None:
    document = a_report(hostile_run(HOSTILE[kind], "a\x1b[31m\nb.json")).document()
    for card in (None, find_card("RTX 4090", document.cards)):
        for model in (None, HOSTILE[kind], HOSTILE[kind] + ".py"):
            lines = answer(document, model, card).splitlines()
            assert [line for line in lines if not line.isprintable()] == []
            assert max(map(width, lines)) <= 100


@pytest.mark.parametrize("kind", [kind for kind in HOSTILE if kind != "long"])
def test_hostile_cards_print_no_control_characters(kind: str, document: Document) -> None:
    card = Card(name=HOSTILE[kind], kind="desktop", memory_gib=1.6, visible_gib=1.5, headline=True)
    with_it = Document(document.evidence, [card, *document.cards], {}, Path())
    for asked in (None, card):
        lines = answer(with_it, "stable-diffusion-v1-5", asked).splitlines()
        assert [line for line in lines if not line.isprintable()] == []
        assert max(map(width, lines)) <= 100
