"""The workflows and what is said of them: what they call exists, and what can write runs nothing of a pull request.

Syntax, scripts and most of their security are held by actionlint and zizmor.
"""

import re
from pathlib import Path

import pytest
import typer.main

from pytest_vram.cli import app
from pytest_vram.plugin import pytest_addoption

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
CALLERS = [*WORKFLOWS, ROOT / "docs" / "ci.md", ROOT / "tox.ini"]
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in CALLERS}
PINNED = re.compile(r"actions/[a-z-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+")
COMMAND = re.compile(r"(?:bin/|`|-m |^ {4,})pytest(?:-vram|_vram\.cli) ((?:\\\n|[^\n`])+)", re.MULTILINE)


@pytest.fixture(scope="module")
def known() -> set[str]:
    parser = pytest.Parser(_ispytest=True)
    pytest_addoption(parser)
    return {name for option in parser.getgroup("vram").options for name in option.names()}


@pytest.mark.parametrize("name", TEXTS)
def test_the_options_exist(name: str, known: set[str]) -> None:
    assert set(re.findall(r"--vram-[a-z-]+", TEXTS[name])) <= known


@pytest.mark.parametrize("name", TEXTS)
def test_the_commands_exist(name: str) -> None:
    group = typer.main.get_command(app)
    commands = group.commands  # type: ignore[attr-defined]
    for line in COMMAND.findall(TEXTS[name]):
        command, *rest = line.split()
        assert command in commands
        options = {option for parameter in commands[command].params for option in parameter.opts}
        assert {word for word in rest if word.startswith("--")} <= options


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_to_a_commit_and_say_its_version(path: Path) -> None:
    for used in re.findall(r"uses: (.+)", TEXTS[path.name]):
        assert PINNED.fullmatch(used)


def test_what_runs_for_a_stranger_with_a_token_that_can_write_has_no_code() -> None:
    [path] = [path for path in WORKFLOWS if "pull_request_target" in TEXTS[path.name]]
    assert "uses:" not in TEXTS[path.name]


def test_the_comment_is_made_by_the_default_branch() -> None:
    text = TEXTS["comment.yml"]
    assert text.count("actions/checkout@") == 1
    assert not re.search(r"^ +(ref|repository): ", text, re.MULTILINE)
    assert "actions/download-artifact" not in text  # it unpacks to paths that the archive names
