"""What the page's table searches: every choice once, its verdicts those of the rule."""

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from pytest_vram.records.schema import Record
from pytest_vram.report.cards import GIB, find_card, read_cards
from pytest_vram.report.choices import Choice, against, frontier, move_is_in_the_steps
from pytest_vram.report.document import Document
from pytest_vram.report.explorer import COLUMNS, LETTERS, explorer
from pytest_vram.report.render import HEADS
from pytest_vram.report.verdicts import best, judge
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
    return row["model"], row["size"], row["batch"], row["set"], row["runs"]


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
        assert row["estimated"] == choice.estimated  # on a GPU too, where the need was not searched
        assert (choice.gpu is None) == (named not in measured)


def test_the_figures_are_those_of_the_records(made: dict[str, Any], document: Document) -> None:
    for row, choice in rows_with_choices(made, document):
        memory = choice.record.memory
        if memory.required_bytes:
            assert row["required"] == pytest.approx(memory.required_bytes / GIB, abs=0.005)
        if memory.nvml_process_peak_bytes:
            assert row["shown"] == pytest.approx(memory.nvml_process_peak_bytes / GIB, abs=0.005)
        same = [choice.record, *(record for _, record in others_of(choice, document))]
        if any(map(move_is_in_the_steps, same)):  # test_evidence.py has how those are mended
            assert all(map(move_is_in_the_steps, same)) is (row["slowdown"] is None)
            assert row["seconds"] == (choice.call_s and round(choice.call_s, 3))
            continue
        times = [record.time for record in same]
        for column, values, digits in (
            ("seconds", [time.full_length_s or time.median_s for time in times], 3),
            ("slowdown", [time.at_need_s and time.median_s and time.at_need_s / time.median_s for time in times], 2),
        ):
            known = [value for value in values if value]
            assert row[column] == (round(statistics.median(known), digits) if known else None)


def others_of(choice: Choice, document: Document) -> list[tuple[str, Record]]:
    """The other records of the same set on such a GPU with the same software, beside the tags of their runs."""

    def software(environment: dict[str, Any]) -> list[Any]:
        return [environment.get(name) for name in ("gpu", "torch", "diffusers", "driver")]

    def case(record: Record) -> dict[str, Any]:
        names = {"model", "test", "width", "height", "frames", "batch_size", "optimizations", "limit_bytes"}
        return record.case.model_dump(include=names)

    return [
        (document.tags[run.path], record)
        for run in document.evidence.runs
        if software(run.run.environment) == software(choice.run.run.environment)
        for record in run.records
        if record is not choice.record and record.method == choice.record.method and record.status in ("ok", "oom")
        if record.case.limit_bytes is None and case(record) == case(choice.record)
    ]


def test_a_row_names_every_run_that_its_figures_come_from(made: dict[str, Any], document: Document) -> None:
    several = 0
    for row, choice in rows_with_choices(made, document):
        first, *others = row["runs"].split()
        assert first == document.tags[choice.memory_run.path], "that of its need"
        assert len({first, *others}) == 1 + len(others)
        same = others_of(choice, document)
        timed = {document.tags[choice.run.path], *(tag for tag, record in same if record.time.median_s is not None)}
        if choice.unmoved and any(map(move_is_in_the_steps, (choice.record, *(record for _, record in same)))):
            timed |= {document.tags[c.run.path] for c in (choice.unmoved, *choice.unmoved.timed)}
        assert set(others) == timed - {first}
        several += len(others) > 1
    assert several > 0


def test_what_is_saved_and_paid_and_the_frontier_are_of_the_row_s_group(
    made: dict[str, Any], document: Document
) -> None:
    rows = {choice: row for row, choice in rows_with_choices(made, document)}
    for workload in document.evidence.choices:
        for plain, choices in document.evidence.groups(workload):
            for choice in choices:
                saved, paid = against(choice, plain)
                assert rows[choice]["saved"] == (None if saved is None else round(saved / GIB, 2))
                assert rows[choice]["paid"] == (None if paid is None else round(paid, 2))
            assert [rows[choice]["frontier"] for choice in choices] == [int(c in frontier(choices)) for c in choices]


def test_every_heading_has_its_column(made: dict[str, Any]) -> None:
    assert {name for name, _, _ in HEADS} - {"verdict"} <= set(made["columns"])


def test_every_letter_has_its_word_best_first(made: dict[str, Any]) -> None:
    assert made["words"] == [
        ["f", "fits", "fits"],
        ["t", "tight", "tight"],
        ["q", "unknown", "?"],
        ["n", "no", "no"],
        ["u", "unsupported", "–"],
    ]
    assert {letter.lower() for row in by_column(made) for letter in row["verdicts"]} <= set("ftqnu")


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


def letters(rows: Iterable[dict[str, Any]], place: int) -> str:
    return "".join(row["verdicts"][place] for row in rows)


def test_one_capital_for_each_workload_and_class_unless_a_larger_one_does_better(
    made: dict[str, Any], document: Document
) -> None:
    of: dict[Any, list[dict[str, Any]]] = {}
    for row, choice in rows_with_choices(made, document):
        of.setdefault(choice.workload, []).append(row)
    assert list(of) == list(document.evidence.choices)
    for workload, rows in of.items():
        larger = [row for other in of if other != workload and other.holds(workload) for row in of[other]]
        for place in range(len(rows[0]["verdicts"])):
            own, others = letters(rows, place), letters(larger, place)
            fits, runs = "f" in own.lower(), set(own.lower()) & set("ft")
            better = "f" in others.lower() if runs else set(others.lower()) & set("ft")
            capitals = [letter for letter in own if letter.isupper()]
            assert len(capitals) == (1 if fits or not better else 0)
            assert set(capitals) <= set("F" if fits else "T" if runs else "NQU")


@pytest.mark.parametrize(
    ("name", "small", "large"), [("RTX 4060", "n", "F"), ("RTX 4090", "F", "F"), ("GTX 1060 3GB", "N", "N")]
)
def test_no_capital_where_only_a_larger_workload_runs(name: str, small: str, large: str) -> None:
    memory = {"need_bytes": 4000 * MIB, "required_bytes": 4686 * MIB}
    case = {"optimizations": ["fp16", "model_offload"], "batch_size": 4}
    document = a_report(a_run(record(), record(case=case, memory=memory, id="more"))).document()
    made = explorer(document)
    card = find_card(name, document.cards)
    [place] = [place for other, _, place in made["cards"] if other == card.name]
    assert [(row["batch"], row["verdicts"][place]) for row in by_column(made)] == [(1, small), (4, large)]


def test_every_card_of_a_class_has_the_same_verdicts(made: dict[str, Any], document: Document) -> None:
    first: dict[int, tuple[Any, ...]] = {}
    for card, (_, _, place) in zip(document.cards, made["cards"], strict=True):
        outcomes = tuple(judge(choice, card).outcome for choice in choices_of(document))
        taken = tuple(best(w, card, document.evidence).choice for w in document.evidence.choices)
        assert first.setdefault(place, (outcomes, taken)) == (outcomes, taken), card.name


def on(gpu: str, mib: int) -> dict[str, Any]:
    return {**H100, "gpu": gpu, "gpu_memory_bytes": mib * MIB}


def test_two_gpus_each_have_their_rows_and_share_one_capital() -> None:
    a100 = on("NVIDIA A100-SXM4-80GB", 81038)
    runs = a_run(record(), path="h.json"), a_run(record(), path="a.json", environment=a100)
    made = explorer(a_report(*runs).document())
    rows = by_column(made)
    assert [row["runs"] for row in rows] == ["R2", "R1"], "the last of equals first"
    assert [row["paid"] for row in rows] == [None, None], "times of two GPUs are not compared"
    for one, other in zip(rows[0]["verdicts"], rows[1]["verdicts"], strict=True):
        assert one.isupper() != other.isupper()
    for name, taken in (("A100 80GB", 0), ("H100 80GB", 1), ("GeForce RTX 4090", 0)):
        [place] = [place for other, _, place in made["cards"] if other == name]
        assert [row["verdicts"][place].isupper() for row in rows] == [taken == 0, taken == 1], name


def test_two_sizes_of_one_gpu_are_two_gpus() -> None:
    name = "NVIDIA GeForce RTX 3060"
    small, large, again = (on(name, mib) for mib in (8192 - 20, 12288 - 370, 12288 - 390))
    used = {"allocated_peak_bytes": 7200, "reserved_peak_bytes": 7300, "nvml_process_peak_bytes": 7990}
    used |= {"need_bytes": 7200, "required_bytes": 7886}
    memory = {key: mib * MIB for key, mib in used.items()}

    def timed(seconds: float) -> Record:
        workers = [{"rounds_s": [seconds], "median_s": seconds}]
        return record(memory=memory, time={"median_s": seconds, "workers": workers})

    runs = [
        a_run(timed(seconds), path=f"{seconds}.json", environment=environment)
        for seconds, environment in ((9.0, small), (3.0, large), (4.0, again))
    ]
    rows = by_column(explorer(a_report(*runs).document()))
    assert [(row["runs"], row["seconds"]) for row in rows] == [("R3 R2", 3.5), ("R1", 9.0)]


def test_a_pipeline_of_ones_own_has_its_test_for_a_size() -> None:
    [row] = by_column(explorer(a_report(a_run(own())).document()))
    assert (row["model"], row["size"], row["batch"], row["set"]) == ("tests/test_app.py", "test_painter", None, "")


def test_what_is_not_known_is_null() -> None:
    oom = record(status="oom", failure=FAILURE, time={}, memory=BARE)
    document = a_report(a_run(oom)).document()
    made = explorer(document)
    [row] = by_column(made)
    names = ("saved", "shown", "seconds", "paid", "slowdown", "host", "disk")
    assert [row[name] for name in names] == [None] * len(names)
    assert (row["frontier"], row["remark"]) == (0, "out of memory")
    assert row["required"] == round(81079 / 1024, 2), "what the GPU had"
    for card, (_, _, place) in zip(document.cards, made["cards"], strict=True):
        assert row["verdicts"][place] == ("N" if card.usable_bytes <= 81079 * MIB else "Q"), card.name
    assert set(row["verdicts"]) == {"N", "Q"}


def test_what_ran_out_of_memory_requires_more_than_the_gpu_had() -> None:
    oom = record(status="oom", failure=FAILURE, time={})
    for gpu_mib, expected in ((11000, 12786), (16000, 16000)):
        run = a_run(oom, environment=on("NVIDIA RTX A4000", gpu_mib))
        [row] = by_column(explorer(a_report(run).document()))
        assert row["required"] == round(expected / 1024, 2)


def test_an_estimate_is_marked() -> None:
    rows = by_column(explorer(a_report(a_run(record(), estimate(case={"batch_size": 4}, id="4"))).document()))
    assert [(row["batch"], row["estimated"]) for row in rows] == [(1, 0), (4, 1)]


def test_what_a_set_saves_and_costs_is_against_the_plain_dtype() -> None:
    def less(name: str, mib: int, seconds: float) -> Record:
        memory = {"need_bytes": (12100 - mib) * MIB, "required_bytes": (12786 - mib) * MIB}
        time = {"median_s": seconds, "workers": [{"rounds_s": [seconds], "median_s": seconds}]}
        return record(case={"optimizations": ["fp16", name]}, memory=memory, time=time, id=name)

    sets = less("vae_tiling", 1024, 2.5), less("model_offload", 6144, 10.0), less("sequential_offload", 5120, 9.0)
    rows = by_column(explorer(a_report(a_run(record(), *sets)).document()))
    assert {row["set"]: (row["saved"], row["paid"], row["frontier"]) for row in rows} == {
        "fp16": (None, None, 0),
        "fp16+vae_tiling": (1.0, 0.5, 1),
        "fp16+model_offload": (6.0, 8.0, 1),
        "fp16+sequential_offload": (5.0, 7.0, 0),
    }


def test_a_card_of_ones_own_is_there(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text('[[cards]]\nname="Ours"\nkind="desktop"\nmemory_gib=64\nvisible_gib=63\n')
    report = a_report(a_run(record()))
    for headless, usable in ((False, 62.0), (True, 63.0)):
        cards = read_cards(tmp_path / "own.toml", headless=headless)
        document = Document(report.document().evidence, cards, report.models, Path())
        assert ["Ours", usable] in [card[:2] for card in explorer(document)["cards"]]
