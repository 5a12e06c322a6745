"""A comparison as people read it: in 100 columns, worst first, and nothing in it that a name could become."""

import re
from collections import Counter
from typing import Any

import pytest
from rich.cells import cell_len

from pytest_vram.compare.comparison import (
    FAILS,
    ORDER,
    CaseComparison,
    Change,
    Comparison,
    Difference,
    Side,
    Word,
)
from pytest_vram.errors import printable
from pytest_vram.report.comparing import (
    FAILING_ROWS,
    MARKER,
    MOST_ROWS,
    as_markdown,
    metric_name,
    rows,
    table,
    title,
    verdict_line,
)
from tests.report.test_render import HOSTILE as NAMES
from tests.report.test_text import HOSTILE, MARKDOWN

GIB = 1 << 30
NEED = "memory.need_bytes"


def change(verdict: Word = "worse", **facts: Any) -> Change:
    known = {"metric": NEED, "base": 10 * GIB, "head": 12 * GIB, "allowed": GIB, **facts}
    return Change(verdict=verdict, **known)


def case(
    verdict: Word = "worse", id: str = "sdxl/fp16/1024x1024/b1", *changes: Change, reason: str = ""
) -> CaseComparison:
    return CaseComparison(id=id, verdict=verdict, reason=reason, changes=list(changes))


def a_comparison(*cases: CaseComparison, **facts: Any) -> Comparison:
    sides = {"base": Side(name="old.json"), "head": Side(name="new.json")}
    return Comparison(**{**sides, "sweep": "default", **facts}, cases=list(cases))


def cells(comparison: Comparison) -> list[tuple[str, ...]]:
    """The table's rows, without the lines of text between them."""
    return [row for row in rows(comparison, []) if not isinstance(row, str)]


def lines(comparison: Comparison) -> list[str]:
    """The terminal's table, once each line is known to be text in 100 columns."""
    found = table(comparison).splitlines()
    for line in found:
        assert line.isprintable(), line
        assert cell_len(line) <= 100, line
    return found


def markdown_tables(text: str) -> list[list[list[str]]]:
    """The tables of a Markdown text, of which each row has as many cells as its header."""
    found: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif found[-1]:
            found.append([])
    tables = [rows for rows in found if rows]
    assert all({len(row) for row in rows} == {7} for rows in tables)
    return tables


# Its lines


def test_the_verdict_counts_the_cases_worst_first() -> None:
    found = a_comparison(case("same"), case("same"), case("better"), case("ambiguous"), case("worse"))
    assert verdict_line(found) == "1 worse, 1 ambiguous, 1 better, 2 same"
    assert "strict" in verdict_line(found.model_copy(update={"strict": True}))
    assert "strict" not in verdict_line(a_comparison(case("same"), strict=True))


def test_the_title_names_both_sides_and_what_else_differs() -> None:
    facts = {
        "base": Side(
            name="old.json", commit="1a2b3c4", dirty=True, gpu="NVIDIA H100", started="2026-11-23T10:20:30+00:00"
        ),
        "head": Side(name="new.json"),
        "across": [Difference(key="torch", base="2.11.0", head="2.13.0")],
        "remarks": [Difference(key="diffusers", base="0.40", head="0.42")],
        "notes": ["something else"],
    }
    found = title(a_comparison(**facts))
    said = {line.split()[0].rstrip(":"): line for line in found}
    assert all(part in said["base"] for part in ("1a2b3c4", "changes", "NVIDIA H100", "2026-11-23 10:20", "old.json"))
    assert all(part in said["head"] for part in ("no commit", "new.json"))
    assert all(part in said["ACROSS"] for part in ("torch", "2.11.0", "2.13.0"))
    assert all(part in said["also"] for part in ("diffusers", "0.40", "0.42"))
    assert found[-1] == "note: something else"
    assert len(title(a_comparison())) == 2


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        ("memory.allocated_peak_bytes", "allocated"),
        ("memory.need_bytes", "need"),
        ("memory.host_peak_bytes", "host memory"),
        ("phases.decode.allocated_peak_bytes", "allocated, decode"),
        ("effects.vae_tiling", "vae_tiling"),
        ("memory.colour", "colour"),
        ("memory.old.colour", "colour"),
        ("phases.decode", "decode"),
        ("phases.decode.a.b", "b"),
        ("", ""),
        ("a\x1b[31mb", "a [31mb"),
        ("phases.a\nb.allocated_peak_bytes", "allocated, a b"),
    ],
)
def test_how_a_metric_is_called(metric: str, name: str) -> None:
    assert metric_name(metric) == name


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({}, ("10.00 GiB", "12.00 GiB", "+20.0 %")),
        ({"base": 12 * GIB, "head": 9 * GIB}, ("12.00 GiB", "9.00 GiB", "−25.0 %")),
        ({"head": None}, ("10.00 GiB", "", "")),
        ({"base": None}, ("", "12.00 GiB", "")),
        ({"base": None, "head": None}, ("", "", "")),
        ({"metric": "time.median_s", "base": 1.5, "head": 1.8}, ("1.500 s", "1.800 s", "+20.0 %")),
    ],
)
def test_the_figures_of_a_row(facts: dict[str, Any], expected: tuple[str, str, str]) -> None:
    [row] = cells(a_comparison(case("worse", "a", change(**facts))))
    assert row[3:6] == expected


def test_a_row_tells_the_workers_that_decided() -> None:
    decided = change(metric="time.median_s", base=1.0, head=2.0, workers=([1.0, 1.1], [2.0, 2.2]), again=True)
    [row] = cells(a_comparison(case("worse", "a", decided)))
    assert all(part in row[6] for part in ("1.000, 1.100", "2.000, 2.200", "both measured again"))
    many = change(metric="time.median_s", base=1.0, head=2.0, workers=([1.0] * 500, [2.0] * 500))
    [row] = cells(a_comparison(case("worse", "a", many)))
    assert len(row[6]) < 300
    assert "again" not in row[6]


def test_what_is_the_same_has_no_row() -> None:
    incomparable = change("not comparable", metric="memory.y")
    grown = case("worse", "b", change("same"), incomparable, change("worse", metric="memory.x"))
    found = a_comparison(case("same", "a", change("same")), grown)
    assert [(row[0], row[1], row[2]) for row in cells(found)] == [("worse", "b", "x")]
    assert cells(a_comparison(case("same"))) == []
    assert lines(a_comparison(case("same")))[-1] == "1 same"


@pytest.mark.parametrize("verdict", [word for word in ORDER if word != "same"])
def test_a_case_with_no_figures_has_a_row_with_its_reason(verdict: Word) -> None:
    assert cells(a_comparison(case(verdict, "a", reason="because"))) == [(verdict, "a", "", "", "", "", "because")]
    text = "\n".join(lines(a_comparison(case(verdict, "a", reason="because"))))
    assert verdict in text
    assert "because" in text


def test_the_worst_come_first() -> None:
    found = a_comparison(*(case(word, f"case {word}") for word in ORDER[::-1]))
    shown = [row[0] for row in cells(found)]
    assert shown == [word for word in ORDER if word != "same"]
    at = [next(n for n, line in enumerate(lines(found)) if line.startswith(word)) for word in shown]
    assert at == sorted(at)
    mixed = case("worse", "a", change("better"), change("ambiguous"), change("worse"))
    assert [row[0] for row in cells(a_comparison(mixed))] == ["worse", "ambiguous", "better"]


def test_the_columns() -> None:
    found = a_comparison(case("worse", "sdxl", change()), case("not comparable", "sd", reason="other steps"))
    heading, rule, *_ = lines(found)[3:]
    assert heading.split() == ["verdict", "case", "what", "base", "head", "change"]
    assert set(rule) == {"─"}
    [row] = [line for line in lines(found) if "sdxl" in line]
    assert row.split() == ["worse", "sdxl", "need", "10.00", "GiB", "12.00", "GiB", "+20.0", "%"]
    for name, value in {"base": "10.00 GiB", "head": "12.00 GiB", "change": "+20.0 %"}.items():
        assert heading.index(name) + len(name) == row.index(value) + len(value), "figures stand on the right"


def test_the_columns_in_markdown() -> None:
    found = a_comparison(case("worse", "sdxl", change(reason="why")), case("new", "sd"))
    first, second = markdown_tables(as_markdown(found))
    assert first[0] == second[0] == ["verdict", "case", "what", "base", "head", "change", "why"]
    assert first[1] == ["---", "---", "---", "--:", "--:", "--:", "---"]
    assert first[2:] == [["worse", "`sdxl`", "need", "10.00 GiB", "12.00 GiB", "+20.0 %", "why"]]
    assert second[2:] == [["new", "`sd`", "", "", "", "", ""]]


@pytest.mark.parametrize(("word", "failed"), [("worse", True), ("vanished", True), ("better", False), ("same", False)])
def test_the_heading_in_markdown(word: Word, failed: bool) -> None:
    marker, heading, *_ = as_markdown(a_comparison(case(word))).splitlines()
    assert marker == MARKER
    assert heading.startswith("### ")
    assert heading.endswith(f"1 {word}")
    assert ("nothing worse" in heading) is not failed


def test_markdown_has_its_tables_inside_and_outside_of_what_is_folded() -> None:
    found = a_comparison(case("worse", "a", reason="x"), case("new", "b", reason="x"))
    kinds = [token.type for token in MARKDOWN.parse(as_markdown(found))]
    shape = [kind for kind in kinds if kind in ("html_block", "heading_open", "table_open", "paragraph_open")]
    title = ["html_block", "heading_open", "paragraph_open", "paragraph_open"]
    assert shape == [*title, "table_open", "html_block", "table_open", "html_block", "paragraph_open"]


# How many rows


@pytest.mark.parametrize("word", [word for word in ORDER if word != "same"])
@pytest.mark.parametrize("more", [0, 1, 30])
def test_failing_rows_are_shown_and_of_others_the_first(word: Word, more: int) -> None:
    most = FAILING_ROWS if word in FAILS else MOST_ROWS
    assert most == (200 if word in FAILS else 20)
    found = a_comparison(*(case(word, f"case{n:04}", change(word)) for n in range(most + more)), case("new", "last"))
    for text in (table(found), as_markdown(found)):
        assert re.findall(r"case\d{4}", text) == [f"case{n:04}" for n in range(most)]
        told = re.findall(r"\b(\d+) more", text)
        assert told == ([str(more + (word == "new"))] if more + (word == "new") else [])
        assert ("last" in text) == (word != "new")


def test_each_verdict_has_its_own_rows() -> None:
    found = a_comparison(*(case(word, f"{word}{n}", change(word)) for word in ORDER for n in range(25)))
    counted = Counter(row[0] for row in cells(found) if "more" not in row[1])
    assert counted == {
        "worse": 25,
        "vanished": 25,
        **dict.fromkeys(("ambiguous", "not comparable", "new", "better"), 20),
    }
    assert table(found).count("5 more") == 4


def test_what_does_not_fail_is_folded_in_markdown() -> None:
    found = a_comparison(*(case(word, f"case-{word.replace(' ', '-')}", change(word)) for word in ORDER))
    text = as_markdown(found)
    before, folded = text.split("<details>")
    for word in ORDER[:-1]:
        name = f"`case-{word.replace(' ', '-')}`"
        assert (name in before, name in folded) == (word in FAILS, word not in FAILS)
    assert text.count("<details>") == text.count("</details>") == 1
    [summary] = re.findall("<summary>(.*)</summary>", text)
    assert summary.removesuffix(", same") == "ambiguous, not comparable, new, better"
    some = as_markdown(a_comparison(case("worse"), case("new")))
    assert "<summary>new</summary>" in some
    assert ["new", "`5 more rows`", *[""] * 5] in markdown_tables(as_markdown(a_comparison(*[case("new")] * 25)))[0]
    assert "<details>" not in as_markdown(a_comparison(case("worse"), case("same")))


def test_how_many_failing_rows_are_not_shown_is_not_folded() -> None:
    text = as_markdown(a_comparison(*(case("worse", f"case{n:04}") for n in range(FAILING_ROWS + 7))))
    assert "| worse | `7 more rows` |" in text.split("<details>")[0]


def test_ambiguous_rows_that_fail_are_shown() -> None:
    found = a_comparison(*(case("ambiguous", f"case{n:04}") for n in range(25)), strict=True)
    assert found.failed
    assert len(cells(found)) == 25
    assert "case0000" in as_markdown(found).split("<details>")[0]


# Reasons


def test_a_reason_of_several_rows_is_a_footnote() -> None:
    found = a_comparison(
        case("worse", "a", change(reason="both for this")),
        case("worse", "b", change(reason="both for this")),
        case("worse", "c", change(reason="for that")),
        case("vanished", "d", reason="also two"),
        case("vanished", "e", reason="also two"),
    )
    notes: list[str] = []
    shown = {row[1]: row[6] for row in rows(found, notes) if not isinstance(row, str)}
    assert shown == {"a": "(1)", "b": "(1)", "c": "for that", "d": "(2)", "e": "(2)"}
    assert notes == ["both for this", "also two"]
    for text in ("\n".join(lines(found)), as_markdown(found)):
        assert (text.count("both for this"), text.count("also two"), text.count("for that")) == (1, 1, 1)
        assert re.search(r"^\(1\) both for this", text, re.MULTILINE)
        assert re.search(r"^\(2\) also two", text, re.MULTILINE)


def test_rows_without_a_reason_have_no_footnote() -> None:
    found = a_comparison(case("worse", "a", change()), case("worse", "b", change()), case("new", "c"))
    assert [row[6] for row in cells(found)] == ["", "", ""]
    assert "(1)" not in table(found) + as_markdown(found)


def test_a_footnote_stands_beside_its_case() -> None:
    found = lines(a_comparison(case("worse", "sdxl", reason="both"), case("worse", "sd", reason="both")))
    assert [line.split() for line in found[5:7]] == [["worse", "sdxl", "(1)"], ["worse", "sd", "(1)"]]


def test_rows_that_are_not_shown_have_no_footnotes() -> None:
    found = a_comparison(
        *(case("better", f"a{n}", reason="shown") for n in range(20)),
        *(case("better", f"b{n}", reason="cut") for n in range(5)),
    )
    assert "cut" not in table(found)
    assert re.search(r"^\(1\) shown", table(found), re.MULTILINE)


# 100 columns

CJK = "模型测试" * 40
WIDE = {
    "a long id": case("worse", "sdxl/" + "fp16+vae_tiling+" * 20 + "/1024x1024/b1", change()),
    "a long word": case("not comparable", "x" * 500, reason="y" * 5000),
    "the longest id": case("worse", "x" * 20_000, reason="y" * 20_000),
    "CJK": case("not comparable", CJK, change("not comparable"), change("worse", metric=f"effects.{CJK}"), reason=CJK),
    "thousands of GiB": case("worse", "a" * 120, change(base=1234.56 * GIB, head=9876.54 * GIB)),
    "the largest": case("worse", "a" * 120, change(base=-9.9e17, head=9.9e17, reason="r" * 300)),
    "hours": case(
        "worse", "a" * 120, change(metric="time.median_s", base=1e6, head=9e6, workers=([1e7] * 9, [9e17] * 9))
    ),
    "a long metric": case("not comparable", "sdxl/fp16", change("ambiguous", metric=f"effects.{'m' * 200}")),
    "a long phase": case("worse", "sdxl/fp16", change(metric=f"phases.{'m' * 200}.allocated_peak_bytes")),
    "next to nothing": case("worse", "sdxl/fp16", change(base=5e-324, head=9e17), change(base=1e-290, head=9e17)),
    "nothing": case("worse", "", change(base=0, head=0, metric=""), reason=" "),
    "emoji": case("worse", "😀👩‍👩‍👧🇩🇪é" * 30, reason="️😀" * 200),
}


@pytest.mark.parametrize("name", WIDE)
def test_the_terminal_s_table_has_at_most_100_columns(name: str) -> None:
    wide = "w" * 300
    facts: dict[str, Any] = {
        "base": Side(name=wide, commit=wide, gpu=CJK),
        "remarks": [Difference(key=wide, base=CJK, head=wide)],
        "notes": [wide, CJK],
    }
    shown = case("not comparable", "x" * 500, change("worse", base=1234.56 * GIB, head=9876.54 * GIB))
    found = lines(a_comparison(WIDE[name], shown, case("not comparable", "short"), **facts))
    assert any(line.startswith("not comparable ") for line in found)
    assert any("1234.56 GiB" in line and "9876.54 GiB" in line and "+700.0 %" in line for line in found)


def test_a_long_id_is_folded_and_not_cut() -> None:
    name = "sdxl/" + "+".join(f"optimization{n:02}" for n in range(20)) + "/1024x1024/b1"
    found = lines(
        a_comparison(case("worse", name, change(base=1234.56 * GIB, head=9876.54 * GIB), reason=f"why {CJK} 模"))
    )
    text = "".join("".join(found).split())
    for part in ("1234.56GiB", "9876.54GiB", "+700.0%"):
        assert part in text
    folded = "".join(re.sub("worse|need|host|[0-9.]+ GiB|[+−][0-9.]+ %", "", line).strip() for line in found)
    assert name in folded
    assert CJK in folded


@pytest.mark.parametrize("columns", ["20", "400"])
def test_the_terminal_s_own_width_and_colours_change_nothing(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = a_comparison(case("worse", "sdxl/" + "fp16+" * 40, change(), reason="[red]:smile: not markup[/red]"))
    expected = lines(found)
    for name, value in {
        "COLUMNS": columns,
        "FORCE_COLOR": "1",
        "TERM": "xterm-256color",
        "TTY_COMPATIBLE": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert lines(found) == expected
    assert "[red]:smile: not markup[/red]" in "\n".join(expected)


# Names that mean harm

KINDS = {
    f"text {n}": text for n, text in enumerate(HOSTILE) if "\ud800" not in text
} | NAMES  # which no comparison holds
BLOCKS = ["# heading", "- item", "+ item", "1. one", "1) one", "---", "___", "> quote", "    code", "===", "[ ] todo"]


def hostile(text: str, metric: str = "effects.x") -> Comparison:
    """A comparison with this text wherever it may hold text."""
    side = Side(name=text, commit=text, started=text[:2], gpu=text, dirty=True)
    two = change("ambiguous", metric=metric, reason=f"two: {text}")
    return a_comparison(
        case("worse", text, change(metric=metric, reason=text), reason=f"reason {text}"),
        case("worse", f"{text}2", two),
        case("ambiguous", f"{text}3", two),
        case("new", f"{text}4", reason=text),
        *(case("better", f"more{n}") for n in range(MOST_ROWS + 1)),
        base=side,
        head=side,
        sweep=text,
        across=[Difference(key=text, base=text, head=text)],
        remarks=[Difference(key=text, base=text, head=text)],
        notes=[f"note {text}"],
    )


def blocks(text: str) -> tuple[list[str], list[str]]:
    """The shape of a Markdown text, and what it shows, without spaces; once nothing in it is more than text."""
    shape, shown = [], []
    for token in MARKDOWN.parse(text):
        shape.append(token.type)
        if token.type == "inline":
            children = token.children or []
            kinds = {child.type for child in children}
            assert kinds <= {"text", "text_special", "code_inline", "softbreak", "hardbreak"}, text
            shown.append("".join("".join(child.content for child in children).split()))
        elif token.type == "html_block":
            shape.append(re.sub(">[^<]*</summary", "></summary", token.content.strip()))
    return shape, shown


PLAIN = "plain"


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_names_stay_text_in_markdown(kind: str) -> None:
    text = KINDS[kind]
    shape, shown = blocks(as_markdown(hostile(text)))
    expected_shape, expected = blocks(as_markdown(hostile(PLAIN)))
    assert shape == expected_shape
    squeezed, start = ("".join(printable(part).split()) for part in (text, text[:2]))
    for line, plain in zip((line.replace("\u200b", "") for line in shown), expected, strict=True):
        if plain.startswith(("head:", "base:")):
            assert line.count(squeezed) >= 3, "commit, GPU and file"
            assert start in line
        else:
            assert line == plain.replace(PLAIN, squeezed)


@pytest.mark.parametrize("kind", KINDS)
def test_no_tag_no_link_and_no_control_comes_through(kind: str) -> None:
    metric = f"effects.{KINDS[kind]}"
    text = as_markdown(hostile(KINDS[kind], metric))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]", text)
    assert text.startswith(MARKER + "\n")
    body = re.sub(r"</?(details|summary)>", "", text.removeprefix(MARKER))
    outside = re.sub(r"`[^`\n]*`", "", body)
    assert not re.search(r"<|(?<!\\)[$~]|(?<!\\)\]\(", outside), "no tag, no formula, no link"
    assert not re.search(r"(https?|ftp)://|www\.", outside), "nothing that becomes a link by itself"
    assert [len(rows) for rows in markdown_tables(text)] == [
        len(rows) for rows in markdown_tables(as_markdown(hostile(PLAIN)))
    ]
    blocks(text)


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_names_stay_text_in_the_terminal(kind: str) -> None:
    found = lines(hostile(KINDS[kind], f"effects.{KINDS[kind]}"))
    assert "3 worse" not in found[-1]
    assert found[-1] == verdict_line(hostile(PLAIN))


def test_a_reason_that_looks_like_a_footnote_is_none() -> None:
    found = a_comparison(
        case("worse", "a", reason="(1) see below"), case("worse", "b", reason="x"), case("worse", "c", reason="x")
    )
    notes: list[str] = []
    assert [row[6] for row in rows(found, notes)] == ["(1) see below", "(1)", "(1)"]
    assert notes == ["x"]


@pytest.mark.parametrize("text", BLOCKS)
@pytest.mark.parametrize("place", ["id", "reason", "commit"])
def test_text_that_would_begin_a_block_stays_text(text: str, place: str) -> None:
    def made(text: str) -> Comparison:
        side = Side(name="a.json", commit=text if place == "commit" else "1a2b3c4")
        one = case("worse", text if place == "id" else "a", reason=text if place == "reason" else "because")
        return a_comparison(one, one, base=side, head=side)

    assert blocks(as_markdown(made(text)))[0] == blocks(as_markdown(made(PLAIN)))[0]


@pytest.mark.parametrize("text", ["# heading", "- item", "+ item", "1. one", "1) one", "---"])
def test_a_note_that_would_begin_a_block_stays_text(text: str) -> None:
    found = blocks(as_markdown(a_comparison(case("worse"), notes=[text])))
    assert found[0] == blocks(as_markdown(a_comparison(case("worse"), notes=[PLAIN])))[0]


# GitHub turns these into notifications and references wherever they stand but in code: it looks at what was rendered,
# so that neither a backslash nor an entity prevents it (github/cmark-gfm#181).
ACTED_UPON = re.compile(r"(?<![\w@])@\w|(?<!\w)(?:[\w.-]+/[\w.-]+)?#\d|\bGH-\d|\w@\w+\.\w", re.ASCII)


PLACES = ("id", "reason", "note", "side", "key", "metric")
REFERENCES = ("@octocat", "see @org/team", "#123", "org/repo#123", "(GH-123)", "a@example.com")


@pytest.mark.parametrize(
    ("place", "text"),
    [(place, text) for place in PLACES for text in REFERENCES if (place, text) != ("metric", "a@example.com")],
)
def test_nobody_is_mentioned_and_nothing_referred_to(text: str, place: str) -> None:
    def at(name: str) -> str:
        return text if name == place else "a"

    shown = as_markdown(
        a_comparison(
            case("worse", at("id"), change(metric=f"phases.{at('metric')}.x"), reason=at("reason")),
            base=Side(name=at("side"), commit=at("side"), gpu=at("side")),
            notes=[at("note")],
            remarks=[Difference(key=at("key"), base=at("key"), head="1")],
        )
    )
    for token in MARKDOWN.parse(shown):
        children = token.children or []
        rendered = "".join(" " if child.type == "code_inline" else child.content for child in children)
        assert not ACTED_UPON.search(rendered), rendered
