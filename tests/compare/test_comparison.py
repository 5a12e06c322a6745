"""What a comparison found, saved and read again; strangers may have written the file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pytest_vram.compare.comparison import (
    FAILS,
    ORDER,
    CaseComparison,
    Comparison,
    Difference,
    Side,
    Word,
    comparison_json,
    read_comparison,
)
from pytest_vram.errors import NotOurs, RunFileError
from pytest_vram.report.comparing import as_markdown, table
from tests.compare.test_comparing import DEFAULT, a_run, failed, fresh_case, remembered, timed, whole
from tests.records.test_schema import MIB, record

HUGE = 10**400


def a_comparison(*words: Word, **changes: Any) -> Comparison:
    """A comparison with one case a verdict."""
    cases = [CaseComparison(id=f"{n}/{word}", verdict=word) for n, word in enumerate(words)]
    known = {"base": Side(name="old.json"), "head": Side(name="new.json"), "sweep": "default", "cases": cases}
    return Comparison(**{**known, **changes})


def document(**changes: Any) -> dict[str, Any]:
    known = {"kind": "pytest-vram comparison", "schema": 1, "sweep": "default"}
    return {**known, "base": {"name": "old.json"}, "head": {"name": "new.json"}, "cases": [], **changes}


def a_case(**changes: Any) -> dict[str, Any]:
    """The document of a comparison of one case with one change."""
    change = {"metric": "memory.need_bytes", "verdict": "worse", "base": 1, "head": 2, **changes}
    return document(cases=[{"id": "sdxl", "verdict": "worse", "changes": [change]}])


def put(path: Path, text: str | bytes | dict[str, Any]) -> Path:
    if isinstance(text, dict):
        text = json.dumps(text)
    path.write_bytes(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
    return path


def refusal(path: Path) -> str:
    """The one line about a file that is no comparison."""
    with pytest.raises(RunFileError) as caught:
        read_comparison(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert line.isprintable()
    assert len(line) < len(str(path)) + 300
    return line.removeprefix(f"{path}: ")


def test_the_words_worst_first() -> None:
    assert ORDER == ("worse", "vanished", "ambiguous", "not comparable", "new", "better", "same")
    assert {"worse", "vanished"} == FAILS


@pytest.mark.parametrize(
    ("words", "fails", "strictly"),
    [
        ((), False, False),
        (("same", "better", "new", "not comparable"), False, False),
        (("same", "ambiguous"), False, True),
        (("same", "worse"), True, True),
        (("better", "vanished"), True, True),
    ],
)
def test_what_fails(words: Sequence[Word], fails: bool, strictly: bool) -> None:
    assert a_comparison(*words).failed is fails
    assert a_comparison(*words, strict=True).failed is strictly


def test_each_verdict_is_counted() -> None:
    assert a_comparison(*ORDER[::-1], *ORDER).counts() == dict.fromkeys(ORDER, 2)


def everything() -> Comparison:
    """A comparison in which there is something of each kind."""
    names = ("worse", "better", "same", "failed", "slower", "gone", "moved")
    base = a_run(
        *(remembered(id=name, allocated=10000 * MIB, need=9000 * MIB) for name in names[:4]),
        timed(2.0, id="slower"),
        record(id="gone"),
        record(id="moved"),
        environment={"diffusers": "0.40.0", "torch": "2.10.0"},
    )
    head = a_run(
        remembered(id="worse", allocated=12000 * MIB, need=9000 * MIB, effects={"vae_tiling": "applied"}),
        remembered(id="better", allocated=8000 * MIB, need=9000 * MIB),
        remembered(id="same", allocated=10000 * MIB, need=9000 * MIB),
        failed("error", id="failed"),
        timed(3.0, id="slower"),
        record(id="moved", case={"steps": 4}),
        record(id="测试 <new>|"),
        environment={"diffusers": "0.42.1"},
    )
    return whole(base, head, DEFAULT, across=["torch"], again={"slower": fresh_case(2.0, 3.0)}, strict=True)


def test_a_saved_comparison_that_is_read_again_shows_the_same(tmp_path: Path) -> None:
    found = everything()
    assert {case.verdict for case in found.cases} == set(ORDER) - {"ambiguous"}
    path = put(tmp_path / "comparison.json", comparison_json(found))
    again = read_comparison(path)
    assert again == found
    assert (table(again), as_markdown(again)) == (table(found), as_markdown(found))
    assert comparison_json(again) == path.read_text(encoding="utf-8")


def test_the_saved_form() -> None:
    saved = json.loads(comparison_json(everything()))
    assert (saved["kind"], saved["schema"], saved["strict"], saved["failed"]) == (
        "pytest-vram comparison",
        1,
        True,
        True,
    )
    assert saved["counts"] == {"worse": 3, "vanished": 1, "better": 1, "same": 1, "new": 1, "not comparable": 1}
    slower = next(case for case in saved["cases"] if case["id"] == "slower")
    [change] = [change for change in slower["changes"] if change["metric"] == "time.median_s"]
    assert (change["verdict"], change["again"], change["workers"]) == ("worse", True, [[2.0] * 3, [3.0] * 3])


def test_whether_it_failed_is_judged_where_it_is_read(tmp_path: Path) -> None:
    lying = document(cases=[{"id": "a", "verdict": "worse"}], failed=False, counts={"same": 1})
    assert read_comparison(put(tmp_path / "a.json", lying)).failed
    lying = document(cases=[{"id": "a", "verdict": "same"}], failed=True, counts={"worse": 1})
    assert not read_comparison(put(tmp_path / "a.json", lying)).failed


def test_unknown_keys_are_ignored(tmp_path: Path) -> None:
    newer = {**a_case(colour="red"), "colour": "red"}
    assert read_comparison(put(tmp_path / "a.json", newer)).counts() == {"worse": 1}


@pytest.mark.parametrize("found", [None, [], 1, "text", {}, {"vram": {}}, {"kind": "comparison"}, {"kind": ["a"]}])
def test_other_json_is_not_ours(found: Any, tmp_path: Path) -> None:
    with pytest.raises(NotOurs, match=r"a\.json: is no comparison"):
        read_comparison(put(tmp_path / "a.json", json.dumps(found)))


@pytest.mark.parametrize("content", [b"", b"hello", b'{"kind": ', b'{"kind": "\xff"}', b"[" * 200_000, b"9" * 5000])
def test_what_is_no_json_is_one_line(content: bytes, tmp_path: Path) -> None:
    assert refusal(put(tmp_path / "a.json", content)).startswith("is not ")


@pytest.mark.parametrize("name", ["gone.json", ".", "x" * 300])
def test_what_is_no_file_is_one_line(name: str, tmp_path: Path) -> None:
    assert refusal(tmp_path / name)


def short(value: Any) -> str:
    return repr(value)[:30]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"schema": 2}, "schema"),
        ({"schema": "1"}, "schema"),
        ({"base": None}, "base"),
        ({"head": {}}, "head.name"),
        ({"sweep": 3}, "sweep"),
        ({"strict": 3}, "strict"),
        ({"notes": "a"}, "notes"),
        ({"across": [{"key": "torch"}]}, "across.0.base"),
        ({"remarks": [{"key": "torch", "base": 1, "head": "2"}]}, "remarks.0.base"),
        ({"cases": None}, "cases"),
        ({"cases": {}}, "cases"),
        ({"cases": ["a"]}, "cases.0"),
        ({"cases": [{"id": "a"}]}, "cases.0.verdict"),
        ({"cases": [{"id": "a", "verdict": "fine"}]}, "cases.0.verdict"),
        ({"cases": [{"id": "a", "verdict": ["worse"]}]}, "cases.0.verdict"),
        ({"cases": [{"id": "a", "verdict": "<b>\x1b[31m@all"}]}, "cases.0.verdict"),
        ({"cases": [{"id": 1, "verdict": "worse"}]}, "cases.0.id"),
        ({"cases": [{"id": "a", "verdict": "worse", "reason": None}]}, "cases.0.reason"),
        ({"cases": [{"id": "a", "verdict": "worse", "changes": {}}]}, "cases.0.changes"),
    ],
    ids=short,
)
def test_a_wrong_type_is_one_line_with_the_key(changes: dict[str, Any], key: str, tmp_path: Path) -> None:
    assert refusal(put(tmp_path / "a.json", document(**changes))).startswith(f"{key}: ")


@pytest.mark.parametrize("key", ["base", "head", "allowed"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), HUGE, 1e18, -1e18, "many", [1], {}])
def test_a_figure_that_is_none_is_one_line_with_the_key(key: str, value: Any, tmp_path: Path) -> None:
    assert refusal(put(tmp_path / "a.json", a_case(**{key: value}))).startswith(f"cases.0.changes.0.{key}: ")


@pytest.mark.parametrize("value", [3, [[1.0]], [[1.0], ["a"]], [[1.0], [float("inf")]], [[1.0], [HUGE]], {"base": [1]}])
def test_workers_that_are_none_are_one_line(value: Any, tmp_path: Path) -> None:
    assert refusal(put(tmp_path / "a.json", a_case(workers=value))).startswith("cases.0.changes.0.workers")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "not known"),
        ("2.11.0", "2.11.0"),
        ("", ""),
        (700.0, "700.0"),
        (True, "true"),
        ({"a": [1]}, '{"a": [1]}'),
        ("x" * 1000, "x" * 200),
        (["x" * 1000], '["' + "x" * 198),
    ],
)
def test_a_difference_of_values_of_any_type(value: Any, expected: str) -> None:
    found = Difference.of("key", value, 1)
    assert (found.key, found.base, found.head) == ("key", expected, "1")


def test_text_that_is_long_or_half_a_character_is_cut(tmp_path: Path) -> None:
    cases = [{"id": "x" * 20_001, "verdict": "worse", "reason": "\ud800"}]
    found = read_comparison(put(tmp_path / "a.json", document(cases=cases, notes=["y" * 20_001])))
    assert (len(found.cases[0].id), len(found.notes[0])) == (2_000, 2_000)
    assert found.cases[0].reason == "?"
