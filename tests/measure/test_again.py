"""Both sides' checkouts: which folder, interpreter and PYTHONPATH, and what comes of a pytest that is run in one."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from pytest_vram.errors import UsageError
from pytest_vram.measure import again
from pytest_vram.measure.again import Checkout, NotMeasured, other_checkout, this_checkout
from tests.measure.test_environment import git
from tests.records.test_reading import put
from tests.records.test_schema import facts

PLUGIN = Path(__file__).parents[2] / "plugin"

# Which working copy


@pytest.fixture
def head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository in which nothing of Python's is, with a rootdir in a subfolder."""
    folder = tmp_path.resolve() / "head"
    (folder / "app").mkdir(parents=True)
    (folder / "app" / "test_it.py").write_text("")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "one")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(folder.parent))
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return folder


@pytest.fixture
def base(head: Path) -> Path:
    """Another working copy of its commit."""
    git(head, "clone", "-q", ".", str(head.parent / "base"))
    return head.parent / "base"


def commit_of(folder: Path) -> str:
    return git(folder, "rev-parse", "HEAD")


def refusal(folder: Path, root: Path, commit: str | None = None) -> str:
    """The one line with which a folder is refused."""
    with pytest.raises(UsageError) as caught:
        other_checkout(folder, root, commit)
    message = str(caught.value)
    assert message.startswith("--vram-base-checkout: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("length", [7, 10, 40])
def test_a_checkout_of_the_base_s_commit(head: Path, base: Path, length: int) -> None:
    found = other_checkout(base, head, commit_of(head)[:length])
    assert found == Checkout(base, sys.executable, "")


def test_the_rootdir_in_a_subfolder_is_that_of_the_base(head: Path, base: Path) -> None:
    assert other_checkout(base, head / "app", commit_of(base)).root == base / "app"


def test_a_rootdir_that_the_base_has_not_is_its_top(head: Path, base: Path) -> None:
    (head / "new").mkdir()
    assert other_checkout(base, head / "new", commit_of(base)).root == base


def test_a_folder_as_seen_from_here(head: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(head)
    assert other_checkout(Path("../base"), head, commit_of(base)).root == base


def test_the_checkout_that_is_measured_is_refused(head: Path) -> None:
    (head.parent / "link").symlink_to(head)
    for folder, root in [
        (head, head),
        (head, head / "app"),
        (head / "app", head / "app"),
        (head.parent / "link", head),
    ]:
        assert "is the checkout that is measured" in refusal(folder, root, commit_of(head))


def test_another_commit_is_refused(head: Path, base: Path) -> None:
    before = commit_of(head)
    git(base, "commit", "-q", "--allow-empty", "-m", "two")
    message = refusal(base, head, before[:7])
    assert before[:7] in message
    assert commit_of(base)[:7] in message
    assert other_checkout(base, head, commit_of(base)).root == base


def test_changes_are_refused_and_files_beside_them_are_not(head: Path, base: Path) -> None:
    (base / "results.json").write_text("{}")
    assert other_checkout(base, head, commit_of(base)).root == base
    (base / "app" / "test_it.py").write_text("changed")
    assert "changes that are not committed" in refusal(base, head, commit_of(head))


def test_a_base_of_no_commit_is_refused_where_there_is_git(head: Path, base: Path) -> None:
    assert "does not name the commit" in refusal(base, head, None)


@pytest.mark.parametrize("name", ["nowhere", "file"])
def test_no_folder(head: Path, name: str) -> None:
    (head.parent / "file").write_text("")
    assert f"{name} is no folder" in refusal(head.parent / name, head)


def test_no_git_at_all(head: Path) -> None:
    plain = {name: head.parent / name for name in ("one", "two")}
    for folder in plain.values():
        folder.mkdir()
    assert other_checkout(plain["two"], plain["one"], None).root == plain["two"]
    assert other_checkout(plain["two"], plain["one"], "1234567").root == plain["two"]
    assert this_checkout(plain["one"]) == Checkout(plain["one"], sys.executable, "")


def test_this_checkout(head: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(head / "lib")
    assert this_checkout(head / "app") == Checkout(head / "app", sys.executable, str(head / "lib"))


# What it imports


def python_path(checkout: Checkout) -> list[Path]:
    return [Path(entry) for entry in checkout.python_path.split(os.pathsep) if entry]


def test_paths_inside_the_head_s_checkout_are_moved_to_the_base_s(
    head: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = head.parent / "elsewhere"
    given = [str(head / "given"), str(elsewhere), str(head)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(given))
    sys.path[:0] = [str(head / "app"), str(head / "src"), *given]
    for root in (head, head / "app"):
        moved = python_path(other_checkout(base, root, commit_of(base)))
        assert moved == [base / "app", base / "src", base / "given", base, elsewhere]
        assert python_path(this_checkout(root)) == [head / "app", head / "src", head / "given", head, elsewhere]


def test_what_is_outside_and_not_in_the_variable_is_the_interpreter_s_own(head: Path, base: Path) -> None:
    sys.path.insert(0, str(head.parent / "elsewhere"))
    assert other_checkout(base, head, commit_of(base)).python_path == ""


def test_the_working_folder_s_entries_are_understood(head: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(head / "app")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["../lib", ""]))
    sys.path.insert(0, "")
    assert python_path(other_checkout(base, head, commit_of(base))) == [base / "app", base / "lib"]


def test_a_name_that_begins_like_the_checkout_s_is_another_folder(
    head: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{head}-lib")
    assert other_checkout(base, head, commit_of(base)).python_path == f"{head}-lib"


def test_the_head_s_own_virtual_environment_is_not_moved(
    head: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "prefix", str(head / ".venv"))
    sys.path[:0] = [str(head / ".venv" / "lib" / "site-packages"), str(head / "src")]
    assert python_path(other_checkout(base, head, commit_of(base))) == [base / "src"]


@pytest.mark.parametrize("prefix", ["prefix", "base_prefix"])
def test_a_checkout_below_the_interpreter_s_prefix(
    head: Path, base: Path, monkeypatch: pytest.MonkeyPatch, prefix: str
) -> None:
    """As /usr/src/app is for /usr/bin/python3, and ENV/src/NAME for `pip install -e git+URL`."""
    monkeypatch.setattr(sys, prefix, str(head.parent))
    sys.path.insert(0, str(head / "src"))
    assert python_path(other_checkout(base, head, commit_of(base))) == [base / "src"]


def test_the_base_s_own_interpreter_has_its_own_packages(
    head: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = base / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to("nothing")
    assert other_checkout(base, head, commit_of(base)).python == sys.executable, "it was removed"
    python.unlink()
    python.symlink_to(sys.executable)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(head / "lib"), str(head.parent / "tools")]))
    sys.path.insert(0, str(head / "src"))
    found = other_checkout(base, head / "app", commit_of(base))
    assert (found.root, found.python, found.shared) == (base / "app", str(python), False)
    assert python_path(found) == [base / "lib", head.parent / "tools"]


# What comes of it

WRITES = """
folder = results / "cpu"
folder.mkdir(parents=True, exist_ok=True)
document = (here / "run.json").read_text()
(folder / f"{len(list(folder.iterdir()))}.json").write_text(document)
"""
HANGS = """
child = subprocess.Popen(["sleep", "600"])
(here / "pids").write_text(f"{os.getpid()} {child.pid}")
child.wait()
"""
Pretend = Callable[..., Checkout]


@pytest.fixture
def pretend(tmp_path: Path) -> Pretend:
    """A checkout whose interpreter notes how it was called, then does `what`, and ends with `code`."""

    def make(what: str, code: int = 0) -> Checkout:
        told = 'json.dumps({"arguments": sys.argv[1:], "folder": os.getcwd(), "environ": dict(os.environ)})'
        lines = [
            f"#!{sys.executable}",
            "import json, os, pathlib, subprocess, sys",
            "here = pathlib.Path(__file__).parent",
            'options = dict(argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument)',
            'results = pathlib.Path(options["--vram-results"])',
            f'(here / "told.json").write_text({told})',
            what,
            f"sys.exit({code})",
        ]
        python = tmp_path / "python"
        python.write_text("\n".join(lines))
        python.chmod(0o755)
        (tmp_path / "root").mkdir(exist_ok=True)
        return Checkout(tmp_path / "root", str(python), "a:b")

    return make


def told(folder: Path) -> Any:
    return json.loads((folder / "told.json").read_text())


def no_records(checkout: Checkout, tmp_path: Path, timeout_s: float = 60) -> str:
    """Why none came, in one line."""
    with pytest.raises(NotMeasured) as caught:
        checkout.measure(["test_it.py::test_it"], [], tmp_path / "results", timeout_s)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("code", [0, 1])
def test_the_run_whatever_its_tests_said(pretend: Pretend, tmp_path: Path, code: int) -> None:
    put(tmp_path / "run.json", facts(id="one"), facts(id="two"))
    checkout = pretend(WRITES, code)
    nodes = ["test_it.py::test_one", "test_it.py::test_two[a b]"]
    run = checkout.measure(nodes, ["--vram-rounds=3"], tmp_path / "results", 60)
    assert [record.id for record in run.records] == ["one", "two"]
    said = told(tmp_path)
    assert said["folder"] == str(checkout.root)
    assert said["arguments"][:2] == ["-m", "pytest"]
    assert said["arguments"][-3:] == ["--vram-rounds=3", *nodes]
    assert f"--rootdir={checkout.root}" in said["arguments"]


def test_the_run_that_was_made_is_told_from_those_before(pretend: Pretend, tmp_path: Path) -> None:
    checkout = pretend(WRITES)
    for name in ("first", "second"):
        put(tmp_path / "run.json", facts(id=name))
        run = checkout.measure([], [], tmp_path / "results", 60)
        assert [record.id for record in run.records] == [name]
    assert len(list((tmp_path / "results").glob("*/*.json"))) == 2


def test_what_belongs_to_this_session_is_not_inherited(
    pretend: Pretend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"PYTEST_ADDOPTS": "--vram-strict", "GITHUB_STEP_SUMMARY": "summary.md", "PYTHONPATH": "head"}
    for name, value in {**given, "MODEL_DIR": "models"}.items():
        monkeypatch.setenv(name, value)
    put(tmp_path / "run.json", facts())
    pretend(WRITES).measure([], [], tmp_path / "results", 60)
    environ = told(tmp_path)["environ"]
    assert not {"PYTEST_ADDOPTS", "GITHUB_STEP_SUMMARY", "PYTEST_CURRENT_TEST"} & environ.keys()
    assert (environ["PYTHONPATH"], environ["MODEL_DIR"]) == ("a:b", "models")


def test_a_pytest_that_writes_no_run(pretend: Pretend, tmp_path: Path) -> None:
    assert "ended with 5: 1 deselected" in no_records(pretend('print("tests\\n\\n1 deselected")', 5), tmp_path)
    assert "ended with 0" in no_records(pretend(""), tmp_path)


def test_a_pytest_that_ends_with_an_error(pretend: Pretend, tmp_path: Path) -> None:
    output = f'print("ERROR: {tmp_path}/a.py", file=sys.stderr); print("one line more " * 100)'
    message = no_records(pretend(output, 4), tmp_path)
    assert "ended with 4: ERROR: " in message
    assert "a.py" in message
    assert str(tmp_path) not in message, "it goes into a pull request"


@pytest.mark.parametrize("other", ["test_two", "test_two[a b]"])
def test_tests_that_a_checkout_does_not_have_are_named(tmp_path: Path, other: str) -> None:
    """Here by pytest itself."""
    (tmp_path / "test_it.py").write_text("def test_known(): pass\n")
    checkout = Checkout(tmp_path, sys.executable, str(PLUGIN))
    nodes = [f"test_it.py::{name}" for name in ("test_one", "test_known", other)]
    with pytest.raises(NotMeasured, match=r"ended with 4: ERROR: ") as caught:
        checkout.measure(nodes, ["-p", "pytest_vram.plugin"], tmp_path / "results", 60)
    assert caught.value.unknown == [nodes[0], nodes[2]]


def test_output_that_is_no_text(pretend: Pretend, tmp_path: Path) -> None:
    message = no_records(pretend('sys.stdout.buffer.write(b"\\xff\\xfe " * 5000)'), tmp_path)
    assert len(message) < 1000


def test_a_run_that_is_broken(pretend: Pretend, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"vram": {')
    assert "is not JSON" in no_records(pretend(WRITES), tmp_path)


@pytest.mark.parametrize("name", ["nowhere", "python"])
def test_an_interpreter_that_cannot_be_started(tmp_path: Path, name: str) -> None:
    (tmp_path / "python").write_text("not executable")
    checkout = Checkout(tmp_path, str(tmp_path / name), "")
    assert f"{name} could not be started" in no_records(checkout, tmp_path)


@pytest.mark.parametrize("error", [subprocess.TimeoutExpired("pytest", 1), KeyboardInterrupt()], ids=["late", "ctrl-c"])
def test_it_is_killed_with_all_that_it_started(
    pretend: Pretend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    waits, pids, waited = subprocess.Popen.wait, tmp_path / "pids", []

    def wait(process: "subprocess.Popen[str]", timeout: float | None = None) -> int:
        if timeout is None:
            return waits(process)
        waited.append(timeout)
        while not pids.exists() or " " not in pids.read_text():
            assert process.poll() is None
            time.sleep(0.01)
        raise error

    monkeypatch.setattr(subprocess.Popen, "wait", wait)
    with pytest.raises((NotMeasured, KeyboardInterrupt)) as caught:
        pretend(HANGS).measure([], [], tmp_path / "results", 20)
    if isinstance(error, KeyboardInterrupt):
        assert caught.value is error
    else:
        assert "did not end in time" in str(caught.value)
    assert waited == [again.START_TIMEOUT_S + 20]
    started = [int(pid) for pid in pids.read_text().split()]
    assert len(started) == 2
    assert not [pid for pid in started if runs(pid, 5)]


def test_it_ends_with_the_pytest_that_started_it(pretend: Pretend, tmp_path: Path) -> None:
    """As a worker does, whatever ends its pytest: a runner that is cancelled, or the kernel's memory killer."""
    checkout = pretend(HANGS)
    code = f"""
import pathlib, time
from pytest_vram.measure.again import Checkout
root = pathlib.Path({str(checkout.root)!r})
Checkout(root, {checkout.python!r}, "").measure([], [], root / "results", 60)
"""
    environ = {**os.environ, "PYTHONPATH": str(PLUGIN)}
    pids = tmp_path / "pids"
    with subprocess.Popen([sys.executable, "-c", code], env=environ) as process:
        while not pids.exists() or " " not in pids.read_text():
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    started, its_own = (int(pid) for pid in pids.read_text().split())
    try:
        assert not runs(started, 2)
    finally:
        for pid in (started, its_own):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def runs(pid: int, patience_s: float) -> bool:
    """Whether a process still runs after so long; what nobody waits for is a zombie."""
    try:
        process = psutil.Process(pid)
        process.wait(patience_s if process.status() != psutil.STATUS_ZOMBIE else 0)
    except psutil.NoSuchProcess:
        return False
    except psutil.TimeoutExpired:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
