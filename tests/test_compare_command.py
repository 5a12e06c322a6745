"""The command compare, from the arguments to the exit code: bad input is one line, and never a traceback."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from pytest_vram.compare.comparison import read_comparison
from pytest_vram.report.comparing import MARKER, as_markdown, table
from tests.compare.test_comparing import ENVIRONMENT, failed, remembered, timed
from tests.records.test_reading import journal, put
from tests.records.test_schema import MIB, facts, record
from tests.test_report_command import Command, pytest_vram_command

__all__ = ["pytest_vram_command"]

SMALL = 1000 * MIB
OPTIONS = {"device": "cuda", "tests": ["bench"], "overrides": {}}
Compare = Callable[..., tuple[int, str, str]]


def a_file(path: str, *records: Any, **changes: Any) -> Path:
    """A run file on a GPU; `environment` and `options` in `changes` are added to the usual ones."""
    documents = [one if isinstance(one, dict) else one.model_dump(mode="json") for one in records or (record(),)]
    environment = {**ENVIRONMENT, **changes.pop("environment", {})}
    options = {**OPTIONS, **changes.pop("options", {})}
    return put(Path(path), *documents, environment=environment, options=options, **changes)


@pytest.fixture
def compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pytest_vram_command: Command) -> Compare:
    """Calls `pytest-vram compare` in a folder of its own, in which no git finds a repository."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        code, out, err = pytest_vram_command("compare", *arguments)
        assert "Traceback" not in err
        if code != 2:
            assert err == ""
        else:
            assert out == ""
        return code, out, err

    return call


def line(found: tuple[int, str, str]) -> str:
    """The one line of a refusal."""
    code, _, err = found
    assert code == 2
    assert err.count("\n") == 1
    assert err.startswith("pytest-vram: ")
    assert err[:-1].isprintable()
    return err


# What is worse

GROWN, SHRUNK = remembered(allocated=2 * SMALL), remembered(allocated=SMALL // 2)


@pytest.mark.parametrize(
    ("base", "head", "code", "strict"),
    [
        ([remembered(allocated=SMALL)], [remembered(allocated=SMALL)], 0, 0),
        ([remembered(allocated=SMALL)], [SHRUNK], 0, 0),
        ([remembered(allocated=SMALL)], [GROWN], 1, 1),
        ([record()], [failed("oom")], 1, 1),
        ([record()], [record(), record(id="b4")], 0, 0),
        ([record(), record(id="b4")], [record()], 1, 1),
        ([record(), record(id="b4")], [record(), record(id="b4", case={"steps": 4})], 0, 0),
        ([timed(1.0)], [timed(1.2)], 0, 1),
        ([record(), record(id="b4")], [record(), facts(id="b4", time={})], 1, 1),
        ([record(), facts(id="b4", time={})], [record(), record(id="b4")], 0, 0),
    ],
    ids=["same", "better", "worse", "oom", "new", "vanished", "incomparable", "ambiguous", "impossible", "base"],
)
def test_the_exit_code(base: Any, head: Any, code: int, strict: int, compare: Compare) -> None:
    a_file("base.json", *base)
    a_file("head.json", *head)
    for form in ("table", "markdown", "json"):
        found, out, _ = compare("base.json", "head.json", "--format", form)
        assert (found, bool(out)) == (code, True)
        assert compare("base.json", "head.json", "--format", form, "--strict")[0] == strict


def test_runs_of_which_no_case_is_comparable(compare: Compare) -> None:
    a_file("base.json", record(), record(id="b4"))
    a_file("head.json", *(record(id=one.id, case={"steps": 4}) for one in (record(), record(id="b4"))))
    assert "steps" in line(compare("base.json", "head.json"))


def test_the_table_is_what_is_printed_without_a_format(compare: Compare) -> None:
    a_file("base.json", remembered(allocated=SMALL))
    a_file("head.json", GROWN)
    code, out, _ = compare("base.json", "head.json")
    assert (code, out) == compare("base.json", "head.json", "--format", "table")[:2]
    assert all(part in out for part in ("worse", record().id, "allocated", "0.98 GiB", "1.95 GiB", "+100.0 %"))
    assert max(cell_len(line) for line in out.splitlines()) <= 100


def test_markdown_and_json(compare: Compare) -> None:
    a_file("base.json", remembered(allocated=SMALL))
    a_file("head.json", GROWN)
    _, text, _ = compare("base.json", "head.json", "--format", "markdown")
    assert text.startswith(MARKER)
    assert f"`{record().id}`" in text
    _, text, _ = compare("base.json", "head.json", "--format", "json")
    saved = json.loads(text)
    assert (saved["kind"], saved["failed"], saved["counts"]) == ("pytest-vram comparison", True, {"worse": 1})
    assert (saved["base"]["name"], saved["head"]["name"]) == ("base.json", "head.json")


# A saved comparison


@pytest.mark.parametrize("code", [0, 1])
def test_a_saved_comparison_is_shown_again(code: int, compare: Compare) -> None:
    a_file("base.json", remembered(allocated=SMALL), timed(1.0, id="slower"))
    a_file("head.json", GROWN if code else SHRUNK, timed(1.2, id="slower"))
    _, text, _ = compare("base.json", "head.json", "--format", "json")
    Path("saved.json").write_text(text, encoding="utf-8")
    for form in ("table", "markdown", "json"):
        assert compare("saved.json", "--format", form) == compare("base.json", "head.json", "--format", form)
        assert compare("saved.json", "--format", form)[0] == code
    assert compare("saved.json", "--strict") == compare("base.json", "head.json", "--strict")
    found = read_comparison(Path("saved.json"))
    assert compare("saved.json")[1] == table(found) + "\n"
    assert compare("saved.json", "--format", "markdown")[1] == as_markdown(found)


def test_a_comparison_that_was_strict_stays_so(compare: Compare) -> None:
    a_file("base.json", timed(1.0))
    a_file("head.json", timed(1.2))
    code, text, _ = compare("base.json", "head.json", "--strict", "--format", "json")
    Path("saved.json").write_text(text, encoding="utf-8")
    assert (code, compare("saved.json")[0]) == (1, 1)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "\xff",
        '{"kind": "pytest-vram comparison"}',
        '{"kind": "pytest-vram comparison", "schema": 2}',
        '{"a\\nb\\u001b[31m": 1}',
        "[" * 100_000,
        "9" * 5000,
    ],
    ids=range(10),
)
def test_one_argument_that_is_no_comparison(content: str, compare: Compare) -> None:
    Path("saved.json").write_bytes(content.encode("latin-1"))
    assert "saved.json" in line(compare("saved.json"))


@pytest.mark.parametrize(
    "name",
    ["gone.json", ".", "results", "latest", "HEAD", "a\nb", "\x1b[31m", "", "x" * 5000],
    ids=range(9),
)
def test_one_argument_that_is_no_file(name: str, compare: Compare) -> None:
    a_file("results/gpu/20261101T000000Z_1a2b3c4_0000.json")
    said = line(compare(name))
    assert "BASE and HEAD" in said
    assert name.split("\n")[0].lstrip("\x1b")[:900] in said


def test_a_run_is_no_comparison_and_a_comparison_is_no_run(compare: Compare) -> None:
    a_file("base.json")
    assert "base.json" in line(compare("base.json"))
    Path("saved.json").write_text(compare("base.json", "base.json", "--format", "json")[1], encoding="utf-8")
    assert "saved.json" in line(compare("saved.json", "base.json"))
    assert "saved.json" in line(compare("base.json", "saved.json"))


HARM = "<img src=x onerror=1>|`a`\\|[b](http://c)\x1b[31m\x1b]8;;http://d\x07\u202e\r\n# e"


def test_a_hostile_comparison_is_text(compare: Compare) -> None:
    side = {"name": HARM, "commit": HARM, "gpu": HARM, "started": HARM, "dirty": True}
    one = {"metric": HARM, "verdict": "worse", "base": 1e-300, "head": 1e17, "reason": HARM, "workers": [[1e17], []]}
    cases = [{"id": HARM, "verdict": word, "reason": HARM, "changes": [one]} for word in ("worse", "new", "same")]
    differences = [{"key": HARM, "base": HARM, "head": HARM}]
    known = {"kind": "pytest-vram comparison", "sweep": HARM, "base": side, "head": side, "cases": cases}
    text = json.dumps({**known, "notes": [HARM], "across": differences, "remarks": differences})
    Path("saved.json").write_text(text, encoding="utf-8")
    code, out, _ = compare("saved.json")
    assert code == 1
    assert all(line.isprintable() and cell_len(line) <= 100 for line in out.splitlines())
    code, out, _ = compare("saved.json", "--format", "markdown")
    assert code == 1
    assert not {"\x1b", "\x07", "\r", "\u202e"} & set(out)
    assert "<img" not in out
    assert not re.search(r"(?<!\\)\]\(", out)
    code, out, _ = compare("saved.json", "--format", "json")
    assert (code, out.isascii(), json.loads(out)["cases"][0]["id"]) == (1, True, HARM)


# Not comparable


def test_runs_that_are_not_comparable_are_one_line_with_each_key(compare: Compare) -> None:
    a_file("base.json")
    a_file("head.json", environment={"torch": "2.13.0", "cuda": "13\n.2"})
    said = line(compare("base.json", "head.json"))
    assert all(part in said for part in ("base.json", "head.json", "torch", "2.11.0", "2.13.0", "cuda", "--across"))


@pytest.mark.parametrize(
    "across",
    [["--across", "torch,cuda"], ["--across", "torch", "--across", "cuda"], ["--across", " cuda , torch ,steps"]],
)
def test_a_key_is_lifted_by_name_and_said(across: list[str], compare: Compare) -> None:
    a_file("base.json")
    a_file("head.json", environment={"torch": "2.13.0", "cuda": "13.2"})
    code, out, _ = compare("base.json", "head.json", *across)
    assert code == 0
    [said] = [line for line in out.splitlines() if line.startswith("ACROSS")]
    assert all(part in said for part in ("torch", "2.11.0", "2.13.0", "cuda", "13.0", "13.2"))
    assert "steps" not in said
    line(compare("base.json", "head.json", *across[:1], "torch"))


def test_a_key_of_the_cases_is_lifted_by_name_and_said(compare: Compare) -> None:
    a_file("base.json", remembered(allocated=SMALL), record(id="b4"))
    a_file("head.json", remembered(allocated=2 * SMALL, case={"steps": 4}), record(id="b4"))
    code, out, _ = compare("base.json", "head.json")
    assert (code, "ACROSS" in out, "steps" in out) == (0, False, True)
    code, out, _ = compare("base.json", "head.json", "--across", "steps")
    assert code == 1
    assert any(line.startswith("ACROSS") and "steps" in line for line in out.splitlines())


@pytest.mark.parametrize(("key", "near"), [("torhc", "torch"), ("torch,stepz", "steps"), ("", ""), ("torch,", "")])
def test_an_unknown_key_is_one_line_with_the_nearest(key: str, near: str, compare: Compare) -> None:
    a_file("base.json")
    said = line(compare("base.json", "base.json", "--across", key))
    assert "--across" in said
    assert near in said


def test_runs_of_other_cases(compare: Compare) -> None:
    a_file("base.json", record(id="a"))
    a_file("head.json", record(id="b"))
    assert "base.json" in line(compare("base.json", "head.json"))


# Which runs


def test_runs_by_folder_commit_and_latest(compare: Compare) -> None:
    for day, commit, size in ((1, "aaaa111", 1), (2, "bbbb222", 2), (3, "cccc333", 4)):
        a_file(
            f"results/h100/2026110{day}T000000Z_{commit}_0000.json",
            remembered(allocated=size * SMALL),
            environment={"commit": commit},
        )
    for base, head, code, names in (
        ("aaaa", "bbbb222", 1, ("20261101", "20261102")),
        ("cccc333", "bbbb222", 0, ("20261103", "20261102")),
        ("latest", "latest", 1, ("20261102", "20261103")),
        ("results", "results/h100", 1, ("20261102", "20261103")),
        ("aaaa111", "latest", 1, ("20261101", "20261103")),
        ("latest", "results/h100/20261101T000000Z_aaaa111_0000.json", 0, ("20261103", "20261101")),
    ):
        found, out, _ = compare(base, head)
        assert found == code
        assert all(re_side in out for re_side in names)
        assert [line.split(": ")[1].split(",")[-1].strip()[:8] for line in sorted(out.splitlines()[:2])] == list(names)


def test_the_latest_is_not_another_run_of_the_head_s_commit(compare: Compare) -> None:
    for day, commit, size in ((1, "aaaa111", 1), (2, "bbbb222", 2), (3, "bbbb222", 2)):
        a_file(
            f"results/2026110{day}T000000Z_{commit}_0000.json",
            remembered(allocated=size * SMALL),
            environment={"commit": commit, "started": f"2026-11-0{day}T00:00:00+00:00"},
        )
    code, out, _ = compare("latest", "latest")
    assert (code, "20261101" in out, "20261102" in out) == (1, True, False)
    code, out, _ = compare("latest", "bbbb222")
    assert (code, "20261101" in out) == (1, True)


def test_where_runs_are_looked_for(compare: Compare) -> None:
    for day in (1, 2):
        a_file(f"elsewhere/2026110{day}T000000Z_a_0000.json")
    assert "results" in line(compare("latest", "latest"))
    assert compare("latest", "latest", "--results", "elsewhere")[0] == 0


def test_a_folder_has_the_base_like_the_head(compare: Compare) -> None:
    a_file("results/20261101T000000Z_a_0000.json", remembered(allocated=SMALL))
    a_file("results/20261102T000000Z_a_0000.json", GROWN, environment={"gpu": "NVIDIA L4"})
    a_file("head.json", remembered(allocated=SMALL))
    assert "20261101" in compare("latest", "head.json")[1]
    assert "20261102" in compare("latest", "head.json", "--across", "gpu")[1]


def test_a_journal_is_compared_as_far_as_it_came(compare: Compare) -> None:
    a_file("base.json", record(), record(id="b4"))
    head = journal(Path("head.jsonl"), facts())
    first, *rest = head.read_text(encoding="utf-8").splitlines()
    known = {**json.loads(first), "environment": ENVIRONMENT, "options": OPTIONS}
    head.write_text("\n".join([json.dumps(known), *rest]) + "\n", encoding="utf-8")
    code, out, _ = compare("base.json", "head.jsonl")
    assert code == 1
    assert all(part in out for part in ("vanished", "b4", "not complete"))


@pytest.mark.parametrize(
    ("content", "part"), [("{", "torn.json"), ('{"vram": {"schema": 9}}', "newer"), ("{}", "no run file"), ("", "JSON")]
)
def test_a_broken_run_is_one_line(content: str, part: str, compare: Compare) -> None:
    a_file("base.json")
    Path("torn.json").write_text(content, encoding="utf-8")
    for arguments in (("torn.json", "base.json"), ("base.json", "torn.json")):
        said = line(compare(*arguments))
        assert "torn.json" in said
        assert part in said


@pytest.mark.parametrize("name", ["gone", "deadbeef", "latest", "a\0b", "a\nb", "\x1b[31m", "HEAD", "empty"])
def test_a_run_that_is_not_there_is_one_line(name: str, compare: Compare) -> None:
    a_file("base.json")
    Path("empty").mkdir()
    line(compare(name, "base.json"))
    line(compare("base.json", name))


@pytest.mark.parametrize("name", ["x" * 300, "x" * 5000], ids=len)
def test_a_name_that_no_file_can_have_is_one_line(name: str, compare: Compare) -> None:
    a_file("base.json")
    line(compare("base.json", name))


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["a", "b", "c"],
        ["--colour"],
        ["base.json", "base.json", "--format", "yaml"],
        ["base.json", "base.json", "--across"],
        ["--all", "base.json"],
    ],
    ids=" ".join,
)
def test_a_wrong_use_of_the_command(arguments: list[str], compare: Compare) -> None:
    a_file("base.json")
    assert compare(*arguments)[0] == 2


def test_long_text_in_a_run_file_is_no_accident(compare: Compare) -> None:
    a_file("base.json", environment={"commit": "a" * 30_000})
    a_file("head.json", failed("error", failure={"message": "x" * 20_000}))
    assert compare("base.json", "head.json")[0] == 1


# Thresholds

SWEEP = '[sweeps.default.blocks.a]\nmodels = ["sdxl"]\noptimizations = ["fp16"]\n'
LOOSE = "allocated = { relative = 2 }\n"


@pytest.mark.parametrize(
    ("files", "options", "code"),
    [
        ({}, [], 1),
        ({"pyproject.toml": f"[tool.pytest-vram.thresholds]\n{LOOSE}"}, [], 0),
        ({"bench/matrix.toml": f"{SWEEP}[thresholds]\n{LOOSE}"}, [], 0),
        ({"bench/matrix.toml": SWEEP}, [], 1),
        ({"other.toml": f"{SWEEP}[thresholds]\n{LOOSE}"}, [], 1),
        ({"other.toml": f"{SWEEP}[thresholds]\n{LOOSE}"}, ["--matrix", "other.toml"], 0),
        (
            {"bench/matrix.toml": f"{SWEEP}[thresholds]\n{LOOSE}", "other.toml": SWEEP},
            ["--matrix", "other.toml"],
            1,
        ),
        (
            {
                "pyproject.toml": f"[tool.pytest-vram.thresholds]\n{LOOSE}",
                "bench/matrix.toml": f"{SWEEP}[thresholds]\nallocated = {{ relative = 0.5 }}\n",
            },
            [],
            1,
        ),
    ],
)
def test_thresholds_of_the_project_and_the_matrix(
    files: dict[str, str], options: list[str], code: int, compare: Compare
) -> None:
    a_file("base.json", remembered(allocated=SMALL))
    a_file("head.json", GROWN)
    for name, text in files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text, encoding="utf-8")
    assert compare("base.json", "head.json", *options)[0] == code


@pytest.mark.parametrize(
    ("name", "text", "key"),
    [
        ("pyproject.toml", "[tool.pytest-vram.thresholds]\nhost = { relative = 0 }", "host.relative"),
        ("pyproject.toml", "[tool.pytest-vram]\ncolour = 1", "colour"),
        ("pyproject.toml", "[", "pyproject.toml"),
        ("bench/matrix.toml", f"{SWEEP}[thresholds]\nhost = {{ absolute = 3 }}", "host.absolute"),
        ("bench/matrix.toml", "[thresholds]", "sweeps"),
        ("bench/matrix.toml", '"a\\nb\\u001b[31m" = 1', "matrix.toml"),
    ],
)
def test_bad_thresholds_are_one_line_with_file_and_key(name: str, text: str, key: str, compare: Compare) -> None:
    a_file("base.json")
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text(text, encoding="utf-8")
    said = line(compare("base.json", "base.json"))
    assert name in said
    assert key in said


@pytest.mark.parametrize("name", ["gone.toml", "bench", "x" * 300], ids=["gone", "a folder", "long"])
def test_a_matrix_that_is_not_there(name: str, compare: Compare) -> None:
    a_file("base.json")
    Path("bench").mkdir()
    assert name in line(compare("base.json", "base.json", "--matrix", name))


# What it takes


def test_the_command_takes_neither_torch_nor_pandas(tmp_path: Path) -> None:
    """The workflow that comments, and tox's upgrade, install pydantic, rich and typer alone."""
    a_file(str(tmp_path / "base.json"), remembered(allocated=SMALL))
    a_file(str(tmp_path / "head.json"), GROWN)
    code = (
        "import sys\n"
        "for name in ('torch', 'pandas', 'diffusers', 'matplotlib', 'pytest', 'pytest_benchmark', 'pynvml'):\n"
        "    sys.modules[name] = None\n"
        "from pytest_vram.cli import main; main()"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", code, "compare", "base.json", "head.json", "--format", "json"]
    saved = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert (saved.returncode, saved.stderr) == (1, "")
    (tmp_path / "saved.json").write_text(saved.stdout, encoding="utf-8")
    command = [sys.executable, "-c", code, "compare", "saved.json", "--format", "markdown"]
    shown = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert (shown.returncode, shown.stderr) == (1, "")
    assert shown.stdout.startswith(MARKER)
