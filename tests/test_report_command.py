"""The commands report, check and cards, from the options to the exit code: bad input is one line that names it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pytest_vram.cli import app, main
from pytest_vram.records.files import Journal, write_run
from pytest_vram.records.schema import Record, Run
from tests.records.test_schema import MIB, facts, own, record

ENVIRONMENT = {"gpu": "NVIDIA H100 80GB HBM3", "gpu_memory_bytes": 81079 * MIB, "commit": "1a2b3c4"}
CARDS = '[[cards]]\nname = "Our Box"\naliases = ["box"]\nkind = "desktop"\nmemory_gib = 20\nvisible_gib = 19.5\n'

runner = CliRunner()
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def pytest_vram_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Calls the command as the shell does: its exit code, stdout and stderr."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pytest-vram", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        code = ended.value.code
        assert isinstance(code, int)
        return code, out, err

    return call


def put(path: Path, *records: Record, **changes: Any) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    write_run(path, Run(**{"environment": ENVIRONMENT, "sweep": "default", **changes}, records=list(records)))
    return path


def put_json(path: Path, *records: Any, **changes: Any) -> Path:
    """A run file as a stranger writes it, checked by nobody."""
    path.parent.mkdir(exist_ok=True, parents=True)
    vram = {"schema": 1, "environment": ENVIRONMENT, "sweep": "default", "records": list(records), **changes}
    path.write_text(json.dumps({"vram": vram}), encoding="utf-8")
    return path


IMPOSSIBLE = facts(id="sdxl/impossible", memory={"allocated_peak_bytes": 15801 * MIB})


@pytest.fixture
def uncharted(monkeypatch: pytest.MonkeyPatch) -> None:
    """No charts, for tests of something else: they take most of the time."""
    monkeypatch.setattr("pytest_vram.report.charts.draw", lambda facts: [])


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder results/ with one run, in a repository that the command runs in."""
    put(tmp_path / "results" / "h100" / "20261123T000000Z_a_0000.json", record(), aliases={"sdxl": ["xl"]})
    monkeypatch.chdir(tmp_path)
    return tmp_path / "results"


def test_report_writes_the_documents_and_names_them_and_they_agree(results: Path, pytest_vram_command: Command) -> None:
    code, out, err = pytest_vram_command("report")
    assert (code, err) == (0, "")
    written = [Path(line) for line in out.splitlines()]
    assert all((results.parent / path).is_file() for path in written)
    names = {path.name for path in written}
    assert {"HARDWARE.md", "hardware.html", "models-on-cards.svg", "records.csv", "records.parquet"} <= names
    assert len(written) == sum(path.suffix != ".json" and path.is_file() for path in results.rglob("*"))

    code, out, err = pytest_vram_command("check", "results/HARDWARE.md")
    assert (code, err) == (0, "")
    assert out.count("\n") == 1

    document = results / "HARDWARE.md"
    document.write_text(document.read_text(encoding="utf-8").replace("| 12.49 |", "| 12.50 |"), encoding="utf-8")
    code, out, err = pytest_vram_command("check", "results/HARDWARE.md")
    assert (code, err) == (1, "")
    assert all(part in out.splitlines()[0] for part in ("sdxl", "fp16", "required GiB", "12.50", "12.49"))


@pytest.mark.usefixtures("uncharted")
def test_report_into_another_folder_with_cards_of_ones_own(results: Path, pytest_vram_command: Command) -> None:
    (results.parent / "own.toml").write_text(CARDS, encoding="utf-8")
    code, _, err = pytest_vram_command("report", "results", "-o", "new/docs", "--cards", "own.toml")
    assert (code, err) == (0, "")
    text = (results.parent / "new" / "docs" / "HARDWARE.md").read_text(encoding="utf-8")
    assert "Our Box" in text
    assert not (results / "HARDWARE.md").exists()
    assert pytest_vram_command("check", "new/docs/HARDWARE.md")[0] == 0
    (results.parent / "own.toml").write_text(CARDS.replace("19.5", "10"), encoding="utf-8")
    code, out, _ = pytest_vram_command("check", "new/docs/HARDWARE.md")
    assert code == 1
    assert "Models on cards" in out


def test_the_command_in_a_shell(results: Path) -> None:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, "-m", "pytest_vram.cli", "report", "--model", "sdxk"],
        cwd=results.parent,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("pytest-vram: --model: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--model", "sdxl"], ["sdxl", "RTX 4090", "fits", "fp16", "12.57", "R1"]),
        (["--model", "xl"], ["sdxl", "RTX 4090"]),
        (["--card", "rtx4090"], ["GeForce RTX 4090", "1024x1024 b1", "fits", "12.57", "R1"]),
        (["--card", "T4", "--model", "sdxl"], ["T4", "1024x1024 b1", "12.57", "h100"]),
        (["--card", "GTX 1650"], ["GTX 1650", "no"]),
        (["--card", "box", "--cards", "own.toml"], ["Our Box", "fits"]),
    ],
)
def test_the_short_answer_writes_nothing(
    options: list[str], expected: list[str], results: Path, pytest_vram_command: Command
) -> None:
    (results.parent / "own.toml").write_text(CARDS, encoding="utf-8")
    before = sorted(results.parent.rglob("*"))
    code, out, err = pytest_vram_command("report", *options)
    assert (code, err) == (0, "")
    assert all(part in out for part in expected), out
    assert max(map(len, out.splitlines())) <= 100
    assert sorted(results.parent.rglob("*")) == before


def test_a_journal_that_is_named_is_read(results: Path, pytest_vram_command: Command) -> None:
    journal = Journal(results / "run.json", Run(environment=ENVIRONMENT, sweep="default"))
    journal.add(own())
    (results / "cut-off.jsonl").write_bytes(journal.path.read_bytes())
    journal.discard()
    code, out, _ = pytest_vram_command("report", "results/cut-off.jsonl", "--card", "T4")
    assert code == 0
    assert "test_painter" in out


# Bad input


def refused(command: Command, *arguments: str | Path) -> str:
    """The one line with which bad input ends: exit code 2, nothing on stdout, no traceback."""
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    line = err.removesuffix("\n")
    assert line.isprintable()
    assert "Traceback" not in line
    return line


def test_no_folder_of_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pytest_vram_command: Command) -> None:
    monkeypatch.chdir(tmp_path)
    assert "results" in refused(pytest_vram_command, "report")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [[], ["--model", "sdxl"], ["--card", "T4"]])
def test_a_folder_with_no_run(options: list[str], tmp_path: Path, pytest_vram_command: Command) -> None:
    (tmp_path / "results" / "empty").mkdir(parents=True)
    assert str(tmp_path / "results") in refused(pytest_vram_command, "report", tmp_path / "results", *options)


def test_a_folder_with_nothing_but_foreign_json(tmp_path: Path, pytest_vram_command: Command) -> None:
    (tmp_path / "a.json").write_text("{}", encoding="utf-8")
    assert str(tmp_path) in refused(pytest_vram_command, "report", tmp_path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"vram": {"schema": 1', "is not JSON"),
        ("", "is not JSON"),
        ('{"benchmarks": []}', "vram"),
        ("[]", "vram"),
        ('{"vram": {}}', "environment"),
        ('{"vram": {"environment": {}, "sweep": "a", "records": 3}}', "records"),
        ("\x1b[31m\n", "is not JSON"),
    ],
)
def test_a_named_file_that_is_no_run(content: str, problem: str, results: Path, pytest_vram_command: Command) -> None:
    path = results / "bad.json"
    path.write_text(content, encoding="utf-8")
    line = refused(pytest_vram_command, "report", path)
    assert str(path) in line
    assert problem in line


def test_truncated_json_in_a_folder_is_named(results: Path, pytest_vram_command: Command) -> None:
    whole = next(results.rglob("*.json"))
    (results / "cut.json").write_text(whole.read_text(encoding="utf-8")[:-200], encoding="utf-8")
    assert "cut.json" in refused(pytest_vram_command, "report")
    assert not (results / "HARDWARE.md").exists()


def test_foreign_json_in_a_folder_is_said_and_passed_over(results: Path, pytest_vram_command: Command) -> None:
    (results / "package.json").write_text('{"name": "x"}', encoding="utf-8")
    code, out, err = pytest_vram_command("report", "--card", "T4")
    assert code == 0
    assert "1024x1024 b1" in out
    assert err.count("\n") == 1
    assert "package.json" in err


@pytest.mark.usefixtures("uncharted")
def test_impossible_figures_are_said_and_their_neighbours_kept(results: Path, pytest_vram_command: Command) -> None:
    path = put_json(results / "h100" / "b.json", IMPOSSIBLE, facts(id="four", case={"batch_size": 4}))
    code, _, err = pytest_vram_command("report")
    assert code == 0
    assert err.count("\n") == 1
    assert all(part in err for part in (path.name, "sdxl/impossible", "allocated_peak_bytes"))
    text = (results / "HARDWARE.md").read_text(encoding="utf-8")
    assert "| 1024x1024 | 4 | `fp16` |" in text
    assert "sdxl/impossible" in text
    assert pytest_vram_command("check", "results/HARDWARE.md")[0] == 0


def test_nothing_but_impossible_figures_is_no_traceback(tmp_path: Path, pytest_vram_command: Command) -> None:
    path = put_json(tmp_path / "a.json", IMPOSSIBLE)
    code, _, err = pytest_vram_command("report", path, "--card", "T4")
    assert "sdxl/impossible" in err
    assert code in (0, 2)


def test_a_newer_schema_beside_ours_is_named(results: Path, pytest_vram_command: Command) -> None:
    newer = put_json(results / "new.json", schema=2, environment={"pytest-vram": "9.0"})
    line = refused(pytest_vram_command, "report")
    assert newer.name in line
    assert "newer" in line
    assert "9.0" in line


def test_a_newer_schema_s_hostile_version_prints_no_control_characters(
    results: Path, pytest_vram_command: Command
) -> None:
    put_json(results / "new.json", schema=2, environment={"pytest-vram": "9\n\x1b[31m\u202e"})
    assert "new.json" in refused(pytest_vram_command, "report")


def test_hostile_models_are_no_part_of_a_refusal(tmp_path: Path, pytest_vram_command: Command) -> None:
    path = put(tmp_path / "a.json", record(case={"model": "sd\n\x1b[31mxl\u202e"}))
    assert "--model" in refused(pytest_vram_command, "report", path, "--model", "zzzzzzzz")
    assert "--model" in refused(pytest_vram_command, "report", path, "--model", "sd31mxm")


def test_a_hostile_id_of_a_refused_record_stays_one_line(tmp_path: Path, pytest_vram_command: Command) -> None:
    path = put_json(tmp_path / "a.json", facts(), {**IMPOSSIBLE, "id": "a\n\x1b[31mb\u202e"})
    code, _, err = pytest_vram_command("report", path, "--card", "T4")
    assert (code, err.count("\n")) == (0, 1)
    assert err.removesuffix("\n").isprintable()


@pytest.mark.parametrize(
    "name", ["gone.json", "a" * 5000, "a\nb", "\x1b[31m"], ids=["gone", "long", "lines", "escapes"]
)
def test_a_run_that_is_not_there(name: str, results: Path, pytest_vram_command: Command) -> None:
    assert "No such file" in refused(pytest_vram_command, "report", name) or len(name) > 255


def test_a_link_to_itself(results: Path, pytest_vram_command: Command) -> None:
    (results / "loop.json").symlink_to("loop.json")
    assert "loop.json" in refused(pytest_vram_command, "report", "results/loop.json")


@pytest.mark.parametrize("out", ["file", "file/below"])
@pytest.mark.usefixtures("uncharted")
def test_documents_on_a_file(out: str, results: Path, pytest_vram_command: Command) -> None:
    (results.parent / "file").write_text("mine", encoding="utf-8")
    line = refused(pytest_vram_command, "report", "-o", out)
    assert line.startswith("pytest-vram: -o: ")
    assert out in line
    assert (results.parent / "file").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("taken", ["HARDWARE.md", "records.csv", "records.parquet"])
@pytest.mark.usefixtures("uncharted")
def test_a_folder_in_a_document_s_place(taken: str, results: Path, pytest_vram_command: Command) -> None:
    (results / taken).mkdir(parents=True)
    assert "-o" in refused(pytest_vram_command, "report")
    assert list(results.rglob("*.part")) == []


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--model", "sdxk"], ["--model", "sdxl"]),
        (["--model", "zzzz"], ["--model", "zzzz"]),
        (["--model", ""], ["--model"]),
        (["--card", "RTX 4091"], ["--card", "RTX 4090"]),
        (["--card", "RTX"], ["--card", "RTX"]),
        (["--card", "zzzz\x1b[31m\n"], ["--card", "zzzz"]),
        (["--card", ""], ["--card"]),
        (["--model", "sdxl", "--card", "zzzz"], ["--card"]),
    ],
)
def test_an_unknown_model_or_card(
    options: list[str], named: list[str], results: Path, pytest_vram_command: Command
) -> None:
    line = refused(pytest_vram_command, "report", *options)
    assert all(part in line for part in named), line


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "cards"),
        ("cards = 3", "cards"),
        ("[[cards]", "own.toml"),
        (CARDS + "colour = 1\n", "colour"),
        (CARDS.replace("20", "-20"), "memory_gib"),
        (CARDS.replace("19.5", "nan"), "visible_gib"),
        (CARDS.replace("19.5", "30"), "visible_gib"),
        (CARDS.replace('"desktop"', '"toaster"'), "kind"),
        (CARDS + "desktop_reserve_gib = 16\n" + CARDS.replace("19.5", "16").replace("Box", "2"), ""),
        (CARDS.replace("19.5", "1") + "desktop_reserve_gib = 1\n", "desktop_reserve_gib"),
        ('"a\\nb\\u001b[31m" = 1\n' + CARDS, ""),
    ],
)
@pytest.mark.parametrize("command", ["cards", "report"])
def test_a_bad_file_of_cards(command: str, text: str, named: str, results: Path, pytest_vram_command: Command) -> None:
    (results.parent / "own.toml").write_text(text, encoding="utf-8")
    if not named and "reserve" in text:
        (results.parent / "own.toml").write_text(text + "desktop_reserve_gib = 16\n", encoding="utf-8")
    line = refused(pytest_vram_command, command, "--cards", "own.toml")
    assert "own.toml" in line
    assert named in line


def test_a_file_of_cards_that_is_not_there(results: Path, pytest_vram_command: Command) -> None:
    assert "gone.toml" in refused(pytest_vram_command, "report", "--cards", "gone.toml")
    assert "results" in refused(pytest_vram_command, "cards", "--cards", "results")


@pytest.mark.parametrize("arguments", [["check"], ["check", "a", "b"], ["report", "--colour"], ["cards", "--cards"]])
def test_a_wrong_use_of_the_command(arguments: list[str], results: Path, pytest_vram_command: Command) -> None:
    code, out, err = pytest_vram_command(*arguments)
    assert (code, out) == (2, "")
    assert "Traceback" not in err


def test_a_document_that_is_none(results: Path, pytest_vram_command: Command) -> None:
    (results / "README.md").write_text("# Results\n", encoding="utf-8")
    assert "README.md" in refused(pytest_vram_command, "check", "results/README.md")
    assert "gone.md" in refused(pytest_vram_command, "check", "gone.md")


# Cards


def test_cards_as_a_table_and_as_json() -> None:
    table = runner.invoke(app, ["cards"], env={"COLUMNS": "200"})
    assert table.exit_code == 0
    found = json.loads(runner.invoke(app, ["cards", "--json"]).stdout)
    assert len(found) > 100
    for card in found:
        assert card["name"] in table.stdout
    usable = [card["usable_bytes"] for card in found]
    assert usable == sorted(usable)
    assert all(0 < card["usable_bytes"] <= card["visible_gib"] * 2**30 for card in found)


def test_a_card_of_ones_own_is_listed_and_replaces_one_of_its_name(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text(CARDS + CARDS.replace("Our Box", "RTX 4090").replace('["box"]', "[]"), encoding="utf-8")
    found = json.loads(runner.invoke(app, ["cards", "--json", "--cards", str(own)]).stdout)
    named = {card["name"]: card for card in found}
    assert named["Our Box"]["visible_gib"] == 19.5
    assert named["RTX 4090"]["visible_gib"] == 19.5
    assert "GeForce RTX 4090" not in named
    assert "Our Box" in runner.invoke(app, ["cards", "--cards", str(own)], env={"COLUMNS": "200"}).stdout


def test_hostile_cards_print_no_control_characters(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text(CARDS.replace("Our Box", "a\\u001b[31m\\nb [red]c"), encoding="utf-8")
    out = runner.invoke(app, ["cards", "--cards", str(own)], env={"COLUMNS": "200"}).stdout
    assert [line for line in out.splitlines() if not line.isprintable()] == []
    assert "b [red]c" in out
