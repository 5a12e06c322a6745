"""The short answer: the known case is in it, it keeps to 100 columns, and it prints no control characters."""

import re
import unicodedata
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from pytest_vram.errors import UsageError
from pytest_vram.report.answer import answer, find_model
from pytest_vram.report.cards import Card, find_card
from pytest_vram.report.document import Document
from pytest_vram.report.verdicts import best
from tests.records.test_schema import BARE, FAILURE, MIB, facts, own, record
from tests.report.test_render import H100, HOSTILE, a_report, a_run, estimate, hostile_run

MODELS = ["sdxl", "sdxl-turbo", "stable-diffusion-v1-5"]
CARDS = ["GTX 1650", "RTX 4060", "RTX 3060 12GB", "T4", "H100 80GB", "GTX 1060 3GB"]


def width(line: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in line)


COLUMNS = ("name", "verdict", "with", "required", "free", "s", "host", "run")
LEFT, RIGHT = ("verdict", "with"), ("required", "free", "s", "host")


def row(text: str, start: str) -> dict[str, str]:
    """The cells of the one row of the table whose first cell is this, each in one line."""
    lines = text.splitlines()
    ruled = next(place for place, line in enumerate(lines) if line.startswith("──"))
    heads = lines[ruled - 1]
    assert tuple(heads.split())[1:] == COLUMNS[1:]
    ends = [re.search(rf"\b{name}\b", heads[20:]).end() + 20 for name in RIGHT]  # type: ignore[union-attr]
    edges = [0, *(heads.index(f" {name}") for name in (*LEFT, "required")), *ends, 200]
    cells: dict[str, list[str]] = {}
    mine = False
    for line in lines[ruled + 1 :]:
        parts = [line[one:other].strip() for one, other in pairwise(edges)]
        if line[:1] != " ":
            mine = False  # the name above rows, or what follows the table
        elif parts[0]:
            mine = parts[0] == start
            assert not (mine and cells), f"{start} has two rows"
        if mine:
            for name, part in zip(COLUMNS, parts, strict=True):
                cells.setdefault(name, []).extend([part] if part else [])
    return {name: " ".join(parts) for name, parts in cells.items()}


def unspaced(text: str) -> str:
    """Without the spaces and breaks, which depend on where a line is full."""
    return "".join(text.split())


@pytest.mark.parametrize("card", [None, *CARDS])
@pytest.mark.parametrize("model", [None, *MODELS])
def test_no_line_is_wider_than_100_columns(model: str | None, card: str | None, document: Document) -> None:
    text = answer(document, model, find_card(card, document.cards) if card else None)
    assert max(map(width, text.splitlines())) <= 100
    assert "Traceback" not in text
    for name in MODELS if model is None else [model]:
        assert name in text


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("card", CARDS)
def test_the_verdict_the_set_what_it_requires_and_the_runs(card: str, model: str, document: Document) -> None:
    found = find_card(card, document.cards)
    text = answer(document, model, found)
    assert found.name in text.splitlines()[0]
    for workload in document.evidence.subjects[model]:
        verdict = best(workload, found, document.evidence)
        choice, required = verdict.choice, verdict.required_bytes
        assert required is not None
        mark = "~" if verdict.estimated else ""
        cells = row(text, f"{workload.size} b{workload.batch_size}")
        words = {"fits": "fits", "tight": "tight", "no": "no", "unsupported": "–", "unknown": "?"}
        assert cells["verdict"] == mark + words[verdict.outcome]
        assert cells["required"] == f"{mark}{required / 2**30:.2f}"
        free = (found.usable_bytes - required) / 2**30
        assert float(cells["free"].replace("−", "-")) == pytest.approx(free, abs=0.01)
        assert (cells["s"] == "–") == (not verdict.runs or verdict.call_s is None)
        assert cells["s"] == "–" or float(cells["s"]) == pytest.approx(verdict.call_s, rel=0.01)
        assert cells["host"] == ("–" if choice.host_bytes is None else f"{choice.host_bytes / 2**30:.2f}")
        larger = f"from {choice.workload.label}" if choice.workload != workload else ""
        why = "; ".join(filter(None, (larger, verdict.reason)))
        assert unspaced(cells["with"]) == unspaced(f"{choice.name} ({why})" if why else choice.name)
        assert cells["run"] == document.memory_tag(choice)
        whole = text.replace("\n", "")
        assert f"{document.tags[choice.memory_run.path]}: {choice.memory_run.path}" in whole
        for tag in re.findall(r"\bR\d+\b", text):
            assert f"\n{tag}: " in text, "every run that is named is listed"


def test_a_choice_for_a_larger_workload_is_said_to_be_one() -> None:
    memory = {"need_bytes": 4000 * MIB, "required_bytes": 4686 * MIB}
    case = {"optimizations": ["fp16", "model_offload"], "batch_size": 4}
    more = a_run(record(case=case, memory=memory, id="more"), path="more.json")
    document = a_report(a_run(record()), more).document()
    text = answer(document, "sdxl", find_card("RTX 4060", document.cards))
    cells = row(text, "1024x1024 b1")
    assert (cells["verdict"], cells["required"], cells["run"]) == ("fits", "4.66", "R2")
    assert unspaced(cells["with"]) == unspaced("fp16+model_offload (from 1024x1024, batch 4)")
    assert row(text, "1024x1024 b4")["with"] == "fp16+model_offload"
    said = "such as RTX A2000 6GB, with fp16+model_offload, tightly: required 4.66 of 4.76 GiB, "
    said += f"{facts()['memory']['weights_bytes'] / 2**30:.2f} GiB of weights in host memory, 2.000 s on "
    assert unspaced(f"{said}{H100['gpu']} (1024x1024, batch 4) (R2).") in unspaced(text)
    assert "Recommended: 16 GB, such as T4, with fp16: " in text, "offload is not"
    assert text.endswith("\nR2: more.json\nR1: run.json")
    own = row(answer(document, "sdxl", find_card("RTX 4090", document.cards)), "1024x1024 b1")
    assert (own["with"], own["run"]) == ("fp16", "R1")
    none = row(answer(document, "sdxl", find_card("GTX 1060 3GB", document.cards)), "1024x1024 b1")
    assert (none["verdict"], none["with"], none["run"]) == ("no", "fp16", "R1")


def test_every_headline_card_has_a_row(document: Document) -> None:
    text = answer(document, "sdxl", None)
    for card in document.headline:
        verdict = best(document.leads["sdxl"], card, document.evidence)
        cells = row(text, card.name)
        assert cells["required"].lstrip("~") == f"{(verdict.required_bytes or 0) / 2**30:.2f}"
        assert cells["run"] == document.memory_tag(verdict.choice)


def test_the_cards_are_said_as_the_document_says_them(document: Document) -> None:
    for model, said in zip(document.leads, document.answers, strict=True):
        text = unspaced(answer(document, model, None))
        workload = document.leads[model]
        for start, it in (
            (f"{model}, {workload.label}: at least", said["minimum"]),
            ("Recommended:", said["recommended"]),
        ):
            sentence = f"{start} {it['memory']}, such as {it['card']}, with {it['set']}{it['so']}."
            assert unspaced(sentence) in text


def test_a_card_that_runs_nothing_gets_a_no(document: Document) -> None:
    tiny = Card(name="Tiny", kind="desktop", memory_gib=1, visible_gib=0.9)
    text = answer(document, "sdxl", tiny)
    cells = row(text, "1024x1024 b1")
    assert cells["verdict"] == "no"
    assert cells["free"].startswith("−")
    assert cells["s"] == "–"


def test_what_no_card_runs_is_said() -> None:
    huge = dict.fromkeys(("need_bytes", "reserved_peak_bytes", "nvml_process_peak_bytes"), 70000 * MIB)
    report = a_report(a_run(record(memory={**huge, "required_bytes": 70_686 * MIB})))
    few = replace(report, cards=[card for card in report.cards if card.memory_gib < 64])
    text = answer(few.document(), "sdxl", None)
    assert "\nsdxl, 1024x1024, batch 1: no card of the list is known to run it.\n" in text
    assert "Recommended" not in text
    assert "full speed" not in text


def test_what_no_card_runs_at_full_speed_is_said() -> None:
    slow = estimate(
        case={"optimizations": ["fp16", "model_offload"]},
        memory=dict.fromkeys(("need_bytes", "estimated_need_bytes"), 4000 * MIB) | {"required_bytes": 4768 * MIB},
        id="slow",
    )
    report = a_report(a_run(estimate(), slow))
    few = replace(report, cards=[card for card in report.cards if card.memory_gib < 12])
    for one, expected in ((report, False), (few, True)):
        text = answer(one.document(), "sdxl", None)
        assert ("\nNo card of the list runs it comfortably.\n" in text) == expected
        assert ("\nRecommended: " in text) != expected
        assert "batch 1: at least " in text


def test_an_estimate_is_marked_and_explained() -> None:
    document = a_report(a_run(estimate())).document()
    for card in (None, find_card("RTX 4090", document.cards)):
        text = answer(document, "sdxl", card)
        assert "~12.47" in text
        assert "~: estimated" in text
        assert "s: one call" not in text
    measured = answer(a_report(a_run(record())).document(), "sdxl", None)
    assert "~" not in measured
    assert f"s: one call on {H100['gpu']}, " in measured


@pytest.mark.parametrize(
    ("card", "word", "why"),
    [("T4", "no", "it ran out of memory with as much"), ("B200", "?", "its need is not known")],
)
def test_an_oom_is_no_figure(card: str, word: str, why: str) -> None:
    document = a_report(a_run(record(status="oom", failure=FAILURE, time={}, memory=BARE))).document()
    cells = row(answer(document, "sdxl", find_card(card, document.cards)), "1024x1024 b1")
    assert cells["verdict"] == word
    assert unspaced(cells["with"]) == unspaced(f"fp16 ({why})")
    assert [cells[name] for name in ("required", "free", "s", "host")] == ["–"] * 4


def test_a_pipeline_of_ones_own_is_answered_for() -> None:
    document = a_report(a_run(own())).document()
    text = answer(document, find_model("tests/test_app.py", document), find_card("RTX 4090", document.cards))
    assert row(text, "test_painter")["verdict"] == "fits"
    assert "\ntests/test_app.py::test_painter: at least 16 GB, " in text


def test_each_test_of_a_file_is_answered_for_by_itself() -> None:
    other = own()
    other = other.model_copy(update={"case": other.case.model_copy(update={"test": "test_other"})})
    document = a_report(a_run(own(), other)).document()
    for name in ("test_painter", "test_other"):
        for text in (name, f"tests/test_app.py::{name}", name.upper()):
            assert find_model(text, document) == f"tests/test_app.py::{name}"
    text = answer(document, "tests/test_app.py::test_other", find_card("RTX 4090", document.cards))
    assert row(text, "test_other")["verdict"] == "fits"
    assert "test_painter" not in text
    with pytest.raises(UsageError, match=r"test_other.*test_painter"):
        find_model("tests/test_app.py", document)


@pytest.mark.parametrize(
    "text", ["stable-diffusion-v1-5", "Stable-Diffusion-V1-5", "sd-food", "SD-Food", "fusion-v1", "FUSION-V1"]
)
def test_a_model_is_found_by_its_name_its_alias_or_a_part(text: str, document: Document) -> None:
    assert find_model(text, document) == "stable-diffusion-v1-5"


def test_a_whole_name_comes_before_those_it_is_a_part_of(document: Document) -> None:
    assert find_model("sdxl", document) == "sdxl"
    assert find_model("SDXL", document) == "sdxl"


def models(*names: str) -> Document:
    return a_report(a_run(*(record(case={"model": name}, id=name) for name in names))).document()


def test_names_that_differ_by_case_alone_are_told_apart() -> None:
    document = models("Flux", "FLUX", "flux")
    for name in ("Flux", "FLUX", "flux"):
        assert find_model(name, document) == name


def test_the_nearest_of_many_names_is_found() -> None:
    document = models(*(f"model-{number:02}" for number in range(30)), "zebra")
    with pytest.raises(UsageError, match="did you mean 'zebra'"):
        find_model("zebar", document)


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
    assert min(document.leads) in message


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_names_print_no_control_characters(kind: str) -> None:
    document = a_report(hostile_run(HOSTILE[kind], "a\x1b[31m\nb.json")).document()
    for card in (None, find_card("RTX 4090", document.cards)):
        for model in (None, HOSTILE[kind], f"{HOSTILE[kind]}.py::{HOSTILE[kind]}"):
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
