"""A document beside its runs: what disagrees is named by its cell, and what a team adds is its own affair."""

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pytest_vram.cli import app
from pytest_vram.errors import RunFileError, UsageError, VramError
from pytest_vram.records.files import read_text, write_run
from pytest_vram.records.schema import Record, Run
from pytest_vram.report.charts import Chart
from pytest_vram.report.checking import MadeFrom, differences, made_from
from pytest_vram.report.document import Document
from pytest_vram.report.render import Report
from pytest_vram.untrusted import MAX_FILE_BYTES
from tests.records.test_schema import BARE, FAILURE, MIB, record
from tests.report.test_render import H100, HOSTILE, a_report, a_run, estimate, hostile_run
from tests.test_report_command import Command, pytest_vram_command

runner = CliRunner()
__all__ = ["pytest_vram_command"]  # a fixture


MADE: dict[int, tuple[Report, str, Any]] = {}  # by the report's identity: it has no hash


def found_in(document: str, report: Report) -> list[str]:
    if id(report) not in MADE:
        fresh = report.document()
        MADE[id(report)] = report, report.markdown(fresh, ()), report.tables(fresh)
    _, markdown, tables = MADE[id(report)]
    return list(differences(document, markdown, tables))


def text_of(report: Report) -> str:
    return report.markdown(report.document(), ())


@pytest.fixture(scope="module")
def text(report: Report, document: Document, pictures: list[Chart]) -> str:
    """The document of the committed runs, charts and all."""
    return report.markdown(document, pictures)


def changed(text: str, row: str, change: Callable[[str], str]) -> str:
    """The text with its one line that matches `row` changed."""
    lines = text.splitlines(keepends=True)
    places = [number for number, line in enumerate(lines) if re.search(row, line)]
    assert len(places) == 1, places
    lines[places[0]] = change(lines[places[0]])
    return "".join(lines)


PLAIN = r"^\| 1024x1024 \| 1 \| `fp16` \|"


def test_a_fresh_document_agrees(text: str, report: Report) -> None:
    assert found_in(text, report) == []


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_fresh_document_of_hostile_names_agrees(kind: str) -> None:
    report = a_report(hostile_run(HOSTILE[kind]), a_run(record(), path="other.json"))
    assert found_in(text_of(report), report) == []


def some_report() -> Report:
    smaller = record(case={"optimizations": ["fp16", "vae_tiling"]}, memory={"required_bytes": 9000 * MIB}, id="2")
    failed = record(case={"batch_size": 8}, status="error", failure=FAILURE, time={}, memory=BARE, id="8")
    return a_report(a_run(record(), smaller, failed, record(case={"batch_size": 4}, id="4")))


SOME_PLAIN = r"^\| 1024x1024 \| 1 \| `fp16` \|"


@pytest.mark.parametrize(
    ("row", "old", "new", "named"),
    [
        (SOME_PLAIN, "12.49", "13.49", ["sdxl", "1024x1024", "fp16", "required GiB", "13.49", "12.49"]),
        (SOME_PLAIN, " 2.000 ", " 2.001 ", ["sdxl", "fp16", ": s:", "2.001", "2.000"]),
        (SOME_PLAIN, "16.11", "", ["nvidia-smi GiB", "says nothing", "16.11"]),
        (r"^\| sdxl \| 1024x1024 \| 4 ", "tight", "fits", ["Models on cards", "sdxl", "1024x1024, 4", "fits", "tight"]),
        (r"^\| R1 ", "1a2b3c4", "1a2b3c5", ["Runs", "R1", "commit", "1a2b3c5", "1a2b3c4"]),
        (r"\| error \| out of memory \|", "error", "timeout", ["Cases without figures", "status", "timeout", "error"]),
    ],
)
def test_a_changed_cell_is_named(row: str, old: str, new: str, named: list[str]) -> None:
    report = some_report()
    text = text_of(report)
    [line] = [line for line in text.splitlines() if re.search(row, line)]
    if old not in line:
        old, new = next(cell for cell in ("fits", "no") if f"| {cell} " in line), "absurd"
        named = [*named[:3], "absurd", old]
    [found] = found_in(changed(text, row, lambda line: line.replace(old, new, 1)), report)
    assert "\n" not in found
    assert all(part in found for part in named), found


def test_a_changed_cell_of_the_committed_document_is_found(text: str, report: Report) -> None:
    line = next(line for line in text.splitlines() if line.startswith("| sdxl | 1024x1024 | 1 |"))
    cells = line.split(" | ")
    for place in range(3, len(cells) - 1, 2):
        other = " | ".join([*cells[:place], "absurd", *cells[place + 1 :]])
        [found] = found_in(text.replace(line, other, 1), report)
        assert "absurd" in found
        assert cells[place] in found


def test_a_removed_row_is_named(text: str, report: Report) -> None:
    lines = text.splitlines(keepends=True)
    [*_, last] = [line for line in lines if re.search(PLAIN, line)]  # there is one for each GPU
    del lines[lines.index(last)]
    [found] = found_in("".join(lines), report)
    assert all(part in found for part in ("1024x1024", "1", "`fp16`", "missing")), found


def test_an_added_row_is_named() -> None:
    report = some_report()
    more = changed(text_of(report), SOME_PLAIN, lambda line: line + line.replace("`fp16`", "`int3`"))
    [found] = found_in(more, report)
    assert all(part in found for part in ("sdxl", "1024x1024", "1", "`int3`")), found


def test_a_row_that_is_there_twice_is_named() -> None:
    report = some_report()
    [found] = found_in(changed(text_of(report), SOME_PLAIN, lambda line: line + line), report)
    assert "`fp16`" in found


def test_rows_in_another_order_are_no_disagreement() -> None:
    report = some_report()
    lines = text_of(report).splitlines(keepends=True)
    at = next(number for number, line in enumerate(lines) if re.search(SOME_PLAIN, line))
    lines[at], lines[at + 1] = lines[at + 1], lines[at]
    assert found_in("".join(lines), report) == []


def test_a_changed_column_is_named() -> None:
    report = some_report()
    [found] = found_in(text_of(report).replace("| required GiB | saved ", "| needed GiB | saved "), report)
    assert "sdxl" in found
    assert "required GiB" in found


def test_a_removed_table_is_named(text: str, report: Report) -> None:
    before, _, after = text.partition("## Models on cards")
    table = "\n".join(line for line in after.splitlines() if not line.startswith("| "))
    found = found_in(before + "## Models on cards" + table, report)
    assert "Models on cards: the table is missing" in found


def test_a_changed_sentence_is_named(text: str, report: Report) -> None:
    [line] = [line for line in text.splitlines() if line.startswith("- **sdxl**,")]
    [found] = found_in(text.replace(line, line.replace("GB**", "TB**", 1)), report)
    assert line[:60] in found


def test_a_removed_sentence_is_named(text: str, report: Report) -> None:
    [line] = [line for line in text.splitlines() if line.startswith("- **sdxl**,")]
    [found] = found_in(text.replace(line, ""), report)
    assert line[:60] in found


def test_a_team_s_own_words_and_tables_are_no_disagreement(text: str, report: Report) -> None:
    added = "\n## Ours\n\nWe buy the second.\n\n| card | price |\n| --- | --- |\n| T4 | 900 |\n\n"
    more = text.replace("## Models on cards", added + "## Models on cards") + added.replace("Ours", "Also ours")
    assert found_in(more.replace("## Runs", "Ask Ada.\n\n## Runs"), report) == []


@pytest.mark.parametrize("heading", ["## Models on cards", "### sdxl", "## Runs"])
def test_a_team_s_own_table_below_one_of_ours_is_no_disagreement(heading: str, text: str, report: Report) -> None:
    added = "\nWhat they cost:\n\n| card | price |\n| --- | --- |\n| T4 | 900 |\n"
    before, line, after = text.partition(heading + "\n")
    lines = after.splitlines(keepends=True)
    first = next(number for number, line in enumerate(lines) if line.startswith("|"))
    end = next((number for number in range(first, len(lines)) if not lines[number].startswith("|")), len(lines))
    lines.insert(end, added)
    assert found_in(before + line + "".join(lines), report) == []


def test_line_ends_and_spaces_are_no_disagreement(text: str, report: Report) -> None:
    assert found_in(text.replace("\n", "\r\n").replace("| no |", "|  no  |"), report) == []


# Runs that come and go


def put(folder: Path, name: str, *records: Record, **changes: Any) -> Path:
    run = {"environment": H100, "sweep": "default", **changes}
    write_run(folder / name, Run(**run, records=list(records)))
    return folder / name


def check(document: Path) -> tuple[int, list[str]]:
    """The exit code of `pytest-vram check`, and its lines."""
    result = runner.invoke(app, ["check", str(document)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout.splitlines()


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A folder with two runs and their document; the charts play no part in a check."""
    put(tmp_path, "20261123T000000Z_a_0000.json", record())
    put(tmp_path, "20261124T000000Z_a_0000.json", record(case={"batch_size": 4}, id="4"), environment=later(24))
    return write_document(tmp_path, [tmp_path])


def later(day: int) -> dict[str, Any]:
    return {**H100, "started": f"2026-11-{day}T00:00:00+00:00"}


def write_document(folder: Path, runs: Sequence[Path]) -> Path:
    from pytest_vram.records.reading import read_runs
    from pytest_vram.report.document import seen_from

    report = a_report(*read_runs(runs)[0], folder=folder)
    header = MadeFrom(seen_from(folder, runs), []).header()
    document = report.document()
    text = Report(report.runs, report.cards, report.models, folder, header).markdown(document, ())
    (folder / "HARDWARE.md").write_text(text, encoding="utf-8")
    return folder / "HARDWARE.md"


def test_the_runs_of_the_folder_agree(made: Path) -> None:
    code, lines = check(made)
    assert code == 0
    assert len(lines) == 1
    assert "2 runs" in lines[0]


def test_the_folder_may_move(made: Path) -> None:
    moved = made.parent.parent / f"{made.parent.name}-moved"
    made.parent.rename(moved)
    assert check(moved / "HARDWARE.md")[0] == 0


@pytest.mark.parametrize("name", ["two  spaces", "a-->b", "Übung", "a|b", "emoji 😀", "a\nb", "a`b"])
def test_a_folder_of_any_name_is_found_again(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    put(tmp_path / name, "run.json", record())
    assert check(write_document(tmp_path, [tmp_path / name]))[0] == 0


def test_a_new_run_is_named(made: Path) -> None:
    put(made.parent, "20261125T000000Z_a_0000.json", record(case={"batch_size": 8}, id="8"), environment=later(25))
    code, lines = check(made)
    assert code == 1
    assert any(line.startswith("Runs: R3") for line in lines)
    assert any(line.startswith("Models on cards: ") and "1024x1024, 8" in line for line in lines)


def test_a_removed_run_is_named(made: Path) -> None:
    (made.parent / "20261124T000000Z_a_0000.json").unlink()
    code, lines = check(made)
    assert code == 1
    assert any(line.startswith("Runs: R2") for line in lines)
    assert any(line.startswith("sdxl: ") and "1024x1024, 4" in line for line in lines)


def test_a_newer_figure_is_named_with_both_values(made: Path) -> None:
    memory = {"need_bytes": 12000 * MIB, "required_bytes": 12686 * MIB}
    put(made.parent, "20261125T000000Z_a_0000.json", record(memory=memory), environment=later(25))
    code, lines = check(made)
    assert code == 1
    assert any("required GiB" in line and "12.49" in line and "12.39" in line for line in lines)
    assert lines[0].startswith("Runs: "), "the cause comes first"


def test_no_more_are_named_than_asked_for(made: Path) -> None:
    put(made.parent, "20261125T000000Z_a_0000.json", record(case={"batch_size": 8}, id="8"), environment=later(25))
    everything = len(check(made)[1])
    result = runner.invoke(app, ["check", str(made), "--most", "1"])
    lines = result.stdout.splitlines()
    assert (result.exit_code, len(lines)) == (1, 2)
    assert f"{everything - 1} places" in lines[1]


def test_what_is_not_measured_any_more_is_named() -> None:
    old, new = a_report(a_run(record())), a_report(a_run(estimate()))
    found = found_in(text_of(old), new)
    assert any("required GiB" in line and "12.49" in line and "12.47" in line for line in found)


# Files that are no document


def refusal(path: Path) -> str:
    """The one line with which `check` ends."""
    result = runner.invoke(app, ["check", str(path)])
    assert isinstance(result.exception, VramError), result.exception
    assert isinstance(result.exception, UsageError | RunFileError)
    message = str(result.exception)
    assert "\n" not in message
    return message


def headed(folder: Path, text: str) -> Path:
    path = folder / "HARDWARE.md"
    path.write_text(f"<!-- pytest-vram report {text} -->\n# Title\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "made from"),
        (b"# A readme\n", "made from"),
        (b"\xff\xfe", "UTF-8"),
        (b"<!-- pytest-vram report {} -->\n", "made from"),
        (b"<!-- pytest-vram report [] -->\n", "made from"),
        (b'<!-- pytest-vram report {"runs": 1, "cards": []} -->\n', "made from"),
        (b'<!-- pytest-vram report {"runs": [1], "cards": []} -->\n', "made from"),
        (b'<!-- pytest-vram report {"runs": [' + b"[" * 100_000 + b"]} -->\n", "made from"),
    ],
)
def test_a_file_that_is_no_document(content: bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "HARDWARE.md"
    path.write_bytes(content)
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert problem in message


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "HARDWARE.md"
    with path.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    assert "larger than" in refusal(path)


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.md") == f"{tmp_path / 'none.md'}: No such file or directory"
    assert refusal(tmp_path).startswith(f"{tmp_path}: ")


def test_a_pipe_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def waits(*_: object, **__: object) -> str:
        raise AssertionError("reading a pipe would wait for ever")

    os.mkfifo(tmp_path / "HARDWARE.md")
    monkeypatch.setattr(Path, "read_text", waits)
    with pytest.raises(RunFileError):
        read_text(tmp_path / "HARDWARE.md")


@pytest.mark.parametrize(
    "name",
    ["gone", "../../../gone", "/gone/for/good", "HARDWARE.md", "a" * 5000, "a\0b", "", "~", "line\nfeed", "\x1b[31m"],
    ids=["gone", "above", "absolute", "no JSON", "long", "null", "empty", "home", "lines", "escapes"],
)
def test_runs_that_are_not_there(name: str, tmp_path: Path, pytest_vram_command: Command) -> None:
    document = headed(tmp_path, json.dumps({"runs": [name], "cards": []}))
    code, _, stderr = pytest_vram_command("check", document)
    assert (code, stderr.count("\n")) == (2, 1)
    assert stderr.rstrip("\n").isprintable()


@pytest.mark.parametrize(
    "name",
    ["gone.toml", "a" * 5000, "a\0b", "HARDWARE.md", "line\nfeed", "\x1b[31m"],
    ids=["gone", "long", "null", "no TOML", "lines", "escapes"],
)
def test_cards_that_are_not_there(name: str, tmp_path: Path, pytest_vram_command: Command) -> None:
    put(tmp_path, "run.json", record())
    document = headed(tmp_path, json.dumps({"runs": ["run.json"], "cards": [name]}))
    code, _, stderr = pytest_vram_command("check", document)
    assert (code, stderr.count("\n")) == (2, 1)
    assert stderr.rstrip("\n").isprintable()


def test_what_it_is_made_from_comes_back() -> None:
    made = MadeFrom(["results", "a b", 'q"uote', "ü"], ["cards.toml"])
    assert made_from(f"<!-- {made.header()} -->\n# Title", Path("x")) == made
