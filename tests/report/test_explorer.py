"""What the page's table searches: every choice once, its verdicts those of the rule."""

from pathlib import Path
from typing import Any

import pytest

from pytest_vram.report.cards import GIB, find_card, read_cards
from pytest_vram.report.document import Document
from pytest_vram.report.explorer import COLUMNS, LETTERS, explorer
from pytest_vram.report.render import HEADS
from pytest_vram.report.verdicts import best, judge
from pytest_vram.report.workloads import Choice
from tests.records.test_schema import BARE, FAILURE, MIB, own, record
from tests.report.test_render import H100, a_report, a_run, estimate

CARDS = ["GTX 1650", "GTX 1060 3GB", "RTX 2060 6GB", "RTX 4060", "RTX 3060 12GB", "T4", "A100 80GB", "H100 80GB"]


@pytest.fixture(scope="module")
def made(document: Document) -> dict[str, Any]:
    return explorer(document)


def choices_of(document: Document) -> list[Choice]:
    """Every choice that can be compared."""
    evidence = document.evidence
    return [choice for workload in evidence.choices for _, choices in evidence.groups(workload) for choice in choices]


def by_column(made: dict[str, Any]) -> list[dict[str, Any]]:
    return [dict(zip(made["columns"], row, strict=True)) for row in made["rows"]]


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["model"], row["size"], row["batch"], row["set"], row["run"]


def rows_with_choices(made: dict[str, Any], document: Document) -> list[tuple[dict[str, Any], Choice]]:
    """Each row beside the choice it is of, found by its names."""
    rows = {key(row): row for row in by_column(made)}
    found = []
    for choice in choices_of(document):
        workload = choice.workload
        size, count = workload.size or workload.test, workload.batch_size or None
        found.append((rows[document.name(workload), size, count, choice.name, document.tag(choice)], choice))
    return found


def test_one_row_a_choice(made: dict[str, Any], document: Document) -> None:
    assert made["columns"] == COLUMNS
    rows = by_column(made)
    assert len({key(row) for row in rows}) == len(rows) == len(choices_of(document))
    assert len(rows_with_choices(made, document)) == len(rows)


def test_a_set_that_was_measured_has_no_row_of_its_estimate(made: dict[str, Any], document: Document) -> None:
    measured = {
        (workload.model, workload.label, names)
        for workload, by_gpu in document.evidence.choices.items()
        for gpu, sets in by_gpu.items()
        for names in sets
        if gpu is not None
    }
    for row, choice in rows_with_choices(made, document):
        named = choice.workload.model, choice.workload.label, choice.optimizations
        assert row["estimated"] == (named not in measured)


def test_the_figures_are_those_of_the_records(made: dict[str, Any], document: Document) -> None:
    for row, choice in rows_with_choices(made, document):
        memory, time = choice.record.memory, choice.record.time
        if memory.required_bytes:
            assert row["required"] == pytest.approx(memory.required_bytes / GIB, abs=0.005)
        if memory.nvml_process_peak_bytes:
            assert row["shown"] == pytest.approx(memory.nvml_process_peak_bytes / GIB, abs=0.005)
        if time.full_length_s:
            assert row["seconds"] == pytest.approx(time.full_length_s, abs=0.0005)


def test_every_heading_has_its_column(made: dict[str, Any]) -> None:
    assert {name for name, _, _ in HEADS} - {"verdict"} <= set(made["columns"])


def test_a_letter_for_each_class_of_cards(made: dict[str, Any]) -> None:
    classes = {place for _, _, place in made["cards"]}
    assert classes == set(range(len(classes)))
    assert {len(row["verdicts"]) for row in by_column(made)} == {len(classes)}


def test_every_card_is_there_with_the_memory_it_leaves(made: dict[str, Any], document: Document) -> None:
    assert [name for name, _, _ in made["cards"]] == [card.name for card in document.cards]
    for card, (_, usable, _) in zip(document.cards, made["cards"], strict=True):
        assert usable == pytest.approx(card.usable_bytes / GIB, abs=0.005)


@pytest.mark.parametrize("name", CARDS)
def test_the_letters_are_the_rule_s_verdicts(name: str, made: dict[str, Any], document: Document) -> None:
    card = find_card(name, document.cards)
    [place] = [place for other, _, place in made["cards"] if other == card.name]
    for row, choice in rows_with_choices(made, document):
        assert row["verdicts"][place].lower() == LETTERS[judge(choice, card).outcome]


@pytest.mark.parametrize("name", CARDS)
def test_a_capital_is_the_choice_to_take(name: str, made: dict[str, Any], document: Document) -> None:
    card = find_card(name, document.cards)
    [place] = [place for other, _, place in made["cards"] if other == card.name]
    for row, choice in rows_with_choices(made, document):
        assert row["verdicts"][place].isupper() == (best(choice.workload, card, document.evidence).choice is choice)


def test_one_capital_for_each_workload_and_class(made: dict[str, Any], document: Document) -> None:
    taken: dict[tuple[str, str, int], list[int]] = {}
    for row in by_column(made):
        counts = taken.setdefault((row["model"], row["size"], row["batch"]), [0] * len(row["verdicts"]))
        for place, letter in enumerate(row["verdicts"]):
            counts[place] += letter.isupper()
    assert len(taken) == len(document.evidence.choices)
    assert {count for counts in taken.values() for count in counts} == {1}


def test_every_card_of_a_class_has_the_same_verdicts(made: dict[str, Any], document: Document) -> None:
    first: dict[int, tuple[Any, ...]] = {}
    for card, (_, _, place) in zip(document.cards, made["cards"], strict=True):
        outcomes = tuple(judge(choice, card).outcome for choice in choices_of(document))
        taken = tuple(best(w, card, document.evidence).choice for w in document.evidence.choices)
        assert first.setdefault(place, (outcomes, taken)) == (outcomes, taken), card.name


def test_two_gpus_each_have_their_rows_and_share_one_capital() -> None:
    a100 = {**H100, "gpu": "NVIDIA A100-SXM4-80GB", "gpu_memory_bytes": 81038 * MIB}
    runs = a_run(record(), path="h.json"), a_run(record(), path="a.json", environment=a100)
    made = explorer(a_report(*runs).document())
    rows = by_column(made)
    assert [row["run"] for row in rows] == ["R1", "R2"]
    for one, other in zip(rows[0]["verdicts"], rows[1]["verdicts"], strict=True):
        assert one.isupper() != other.isupper()
    [a100_place] = [place for name, _, place in made["cards"] if name == "A100 80GB"]
    assert rows[1]["verdicts"][a100_place].isupper()


def test_a_pipeline_of_ones_own_has_its_test_for_a_size() -> None:
    [row] = by_column(explorer(a_report(a_run(own())).document()))
    assert (row["model"], row["size"], row["batch"], row["set"]) == ("tests/test_app.py", "test_painter", None, "")


def test_what_is_not_known_is_null() -> None:
    oom = record(status="oom", failure=FAILURE, time={}, memory=BARE)
    [row] = by_column(explorer(a_report(a_run(oom)).document()))
    names = ("required", "saved", "shown", "seconds", "slowdown", "host", "disk")
    assert [row[name] for name in names] == [None] * len(names)
    assert set(row["verdicts"].lower()) <= {"n", "u"}


def test_an_estimate_is_marked() -> None:
    rows = by_column(explorer(a_report(a_run(record(), estimate(case={"batch_size": 4}, id="4"))).document()))
    assert [(row["batch"], row["estimated"]) for row in rows] == [(1, 0), (4, 1)]


def test_what_a_set_saves_is_against_the_plain_dtype() -> None:
    memory = {"need_bytes": 12100 * MIB - GIB, "required_bytes": 12786 * MIB - GIB}
    less = record(case={"optimizations": ["fp16", "vae_tiling"]}, memory=memory, id="less")
    rows = by_column(explorer(a_report(a_run(record(), less)).document()))
    assert {row["set"]: row["saved"] for row in rows} == {"fp16": None, "fp16+vae_tiling": 1.0}


def test_a_card_of_ones_own_is_there(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text('[[cards]]\nname="Ours"\nkind="desktop"\nmemory_gib=64\nvisible_gib=63\n')
    report = a_report(a_run(record()))
    document = Document(report.document().evidence, read_cards(tmp_path / "own.toml"), report.models, Path())
    assert ["Ours", 63.0] in [card[:2] for card in explorer(document)["cards"]]
