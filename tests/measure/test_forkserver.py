"""Workers, forked and spawned: what they are, how they end, and that nothing of them stays."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pytest_vram.errors import StartError
from pytest_vram.measure import forkserver
from pytest_vram.measure.channel import Channel, Message
from pytest_vram.measure.forkserver import MOST_RESTARTS, TAIL_BYTES, ForkServer, Spawner, Starter, Worker

TASKS = "tests.measure.tasks"
PARENT = """
import json, os, signal, sys, time
from pytest_vram.measure.forkserver import ForkServer, Spawner
starter = ForkServer(["json"]) if sys.argv[1] == "fork" else Spawner()
worker = starter.start("tests.measure.tasks:sleep", {})
worker.channel.send({})
server = worker.channel.receive(20)["parent"]
if sys.argv[2] == "stopped":
    os.kill(worker.pid, signal.SIGSTOP)
print(json.dumps([worker.pid, server]), flush=True)
time.sleep(60)
"""


@pytest.fixture(scope="module", params=["fork", "spawn"])
def starter(request: pytest.FixtureRequest) -> Iterator[Starter]:
    starter: Starter = ForkServer([TASKS]) if request.param == "fork" else Spawner()
    yield starter
    starter.close()


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files, empty."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@contextlib.contextmanager
def working(starter: Starter, task: str, job: Message | None = None, **environ: str) -> Iterator[Worker]:
    worker = starter.start(f"{TASKS}:{task}", environ)
    try:
        worker.channel.send(job or {})
        yield worker
    finally:
        worker.kill()


def heard(worker: Worker) -> dict[str, Any]:
    message = worker.channel.receive(20)
    assert message is not None
    return message


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def gone(pids: Iterable[int], within_s: float = 2.0) -> bool:
    """Whether all have ended in time; those that have not are killed."""
    left = list(pids)
    deadline = time.monotonic() + within_s
    while (left := [pid for pid in left if alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.01)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return not left


# What a worker is


def test_a_worker_is_a_new_process_in_a_session_of_its_own(starter: Starter) -> None:
    with working(starter, "facts", {"argument": 7}) as one, working(starter, "facts") as other:
        first, second = heard(one), heard(other)
    assert (first["pid"], second["pid"]) == (one.pid, other.pid)
    assert first["session"] == first["pid"] != second["session"] == second["pid"]
    assert os.getpid() not in (first["pid"], second["pid"])
    assert first["argument"] == 7
    if starter.name == "fork":
        assert first["parent"] == second["parent"] != os.getpid()


def test_environment_variables_are_given_to_one_worker_only(starter: Starter) -> None:
    job = {"environ": ["VRAM_TEST", "PATH"]}
    with working(starter, "facts", job, VRAM_TEST="a b=ü") as one, working(starter, "facts", job) as other:
        assert heard(one)["environ"] == {"VRAM_TEST": "a b=ü", "PATH": os.environ["PATH"]}
        assert heard(other)["environ"] == {"VRAM_TEST": None, "PATH": os.environ["PATH"]}
    assert "VRAM_TEST" not in os.environ


@pytest.mark.skipif(sys.platform != "linux", reason="the score is Linux's")
def test_a_worker_is_first_in_line_for_the_memory_killer(starter: Starter) -> None:
    with working(starter, "facts") as worker:
        assert heard(worker)["oom_score_adj"] == 1000


def test_a_worker_is_deaf_to_ctrl_c(starter: Starter) -> None:
    with working(starter, "echo", {"n": 1}) as worker:
        assert heard(worker)["message"] == {"n": 1}
        os.kill(worker.pid, signal.SIGINT)
        worker.channel.send({"n": 2})
        assert heard(worker)["message"] == {"n": 2}


# How it ends


@pytest.mark.parametrize(
    ("job", "code", "last"),
    [
        ({}, 0, "to stderr"),
        ({"exit": 3}, 3, "to stderr"),
        ({"exit": None}, 0, "to stderr"),
        ({"exit": "the reason"}, 1, "the reason"),
        ({"raise": "the reason"}, 1, "ValueError: the reason"),
        ({"signal": signal.SIGKILL}, -9, "to stderr"),
        ({"signal": signal.SIGSEGV}, -11, "to stderr"),
    ],
    ids=str,
)
def test_the_return_code_and_the_output_are_known(starter: Starter, job: Message, code: int, last: str) -> None:
    with working(starter, "end", job) as worker:
        assert worker.wait(20) == code
        assert worker.wait(0) == code
        lines = [line.strip() for line in worker.output_tail().splitlines()]
    assert lines[0] == "to stdout"
    assert lines[-1] == last


def test_a_task_that_is_not_there(starter: Starter) -> None:
    with working(starter, "no_such_task") as worker:
        assert worker.wait(20) == 1
        assert "no_such_task" in worker.output_tail()


def test_only_the_end_of_a_long_output_is_kept(starter: Starter) -> None:
    with working(starter, "end", {"filler": 3 * TAIL_BYTES}) as worker:
        worker.wait(20)
        tail = worker.output_tail()
    assert len(tail) < TAIL_BYTES
    assert "to stdout" not in tail
    assert tail.endswith("x\nto stderr")


def test_waiting_for_a_worker_that_goes_on_ends_in_time(starter: Starter) -> None:
    with working(starter, "sleep") as worker:
        heard(worker)
        assert worker.wait(0.05) is None
        worker.kill()
        assert worker.wait(0) == -9


@pytest.mark.parametrize("how", ["kill", "close the channel"])
def test_a_worker_takes_what_it_started_with_it(starter: Starter, how: str) -> None:
    with working(starter, "nest") as worker:
        child = heard(worker)["child"]
        assert alive(child)
        if how == "kill":
            worker.kill()
        else:
            worker.channel.close()
        assert worker.wait(2) == -9
        assert gone([child])


def test_a_worker_ends_when_its_channel_does_and_the_others_go_on(starter: Starter) -> None:
    with working(starter, "sleep") as worker, working(starter, "echo") as other:
        heard(worker), heard(other)
        worker.channel.close()
        assert worker.wait(2) == -9
        other.channel.send({"still": "there"})
        assert heard(other)["message"] == {"still": "there"}


@pytest.mark.parametrize("state", ["running", "stopped"])
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_nothing_outlives_a_killed_parent(start: str, state: str, tmp_path: Path) -> None:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", PARENT, start, state]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environ) as parent:
        assert parent.stdout is not None
        pids = json.loads(parent.stdout.readline())
        assert all(alive(pid) for pid in pids)
        parent.kill()
    assert gone(pids)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_closing_the_starter_ends_its_workers(start: str) -> None:
    starter: Starter = ForkServer(["json"]) if start == "fork" else Spawner()
    worker = starter.start(f"{TASKS}:sleep", {})
    worker.channel.send({})
    server = heard(worker)["parent"]
    starter.close()
    assert gone([worker.pid] if start == "spawn" else [worker.pid, server])
    worker.close()


def test_many_workers_leave_nothing_behind(starter: Starter, temporary: Path) -> None:
    def round_trip() -> int:
        with working(starter, "facts") as worker:
            parent = int(heard(worker)["parent"])
            worker.channel.send({})
            assert worker.wait(20) == 0
        return parent

    server = psutil.Process(round_trip())
    before = psutil.Process().num_fds(), server.num_fds()
    for _ in range(10):
        round_trip()
    assert (psutil.Process().num_fds(), server.num_fds()) == before
    assert list(temporary.iterdir()) == []
    if starter.name == "fork":
        assert server.children() == []


# The server


def test_the_server_imports_once_what_the_workers_use() -> None:
    job = {"modules": ["colorsys", "concurrent.futures.thread", "chunk"]}
    server = ForkServer(["colorsys", "concurrent.futures:ThreadPoolExecutor"])
    try:
        with working(server, "facts", job) as worker:
            assert heard(worker)["modules"] == ["colorsys", "concurrent.futures.thread"]
    finally:
        server.close()


@pytest.mark.parametrize(
    ("preload", "source", "reason"),
    [
        ("no_such_module", None, "ModuleNotFoundError: No module named 'no_such_module'"),
        ("json:no_such_name", None, "AttributeError: module 'json' has no attribute 'no_such_name'"),
        ("broken", "raise OSError('libcuda is gone')", "OSError: libcuda is gone"),
        ("broken", "raise SystemExit('not today')", "SystemExit: not today"),
        ("broken", "import os; os.write(2, b'a library aborts'); os.abort()", "a library aborts"),
    ],
)
def test_a_failed_preload_is_an_error_with_its_reason(
    preload: str, source: str | None, reason: str, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = temporary / "modules"
    modules.mkdir()
    if source:
        (modules / "broken.py").write_text(source)
    monkeypatch.syspath_prepend(modules)
    children = psutil.Process().children()
    with pytest.raises(StartError, match=reason):
        ForkServer(["json", preload])
    assert psutil.Process().children() == children
    assert list(temporary.iterdir()) == [modules]


def test_ctrl_c_during_the_preload_leaves_nothing(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Channel, timeout_s: float | None = None) -> None:
        raise KeyboardInterrupt

    children = psutil.Process().children()
    monkeypatch.setattr(Channel, "receive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ForkServer(["json"])
    assert psutil.Process().children() == children
    assert list(temporary.iterdir()) == []


def test_what_a_preload_prints_is_not_the_workers_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "talkative.py").write_text("print('a word from the library')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    server = ForkServer(["talkative"])
    try:
        with working(server, "quiet") as worker:
            assert worker.wait(20) == 0
            assert worker.output_tail() == "the worker's own"
    finally:
        server.close()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stuck"])
def test_a_server_that_is_lost_is_started_anew(
    how: signal.Signals, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forkserver, "START_TIMEOUT_S", 0.5)
    monkeypatch.setattr(forkserver, "CLOSE_TIMEOUT_S", 0.1)
    server = ForkServer(["colorsys"])
    try:
        with working(server, "facts") as worker, working(server, "echo") as other:
            parent, _ = heard(worker)["parent"], heard(other)
            descriptors = psutil.Process().num_fds()
            os.kill(parent, how)
            with working(server, "facts", {"modules": ["colorsys"]}) as later:
                facts = heard(later)
                assert facts["parent"] != parent
                assert facts["modules"] == ["colorsys"]
            assert not alive(parent)
            assert psutil.Process().num_fds() == descriptors
            other.channel.send({"still": "there"})  # a worker outlives its server
            assert heard(other)["message"] == {"still": "there"}
            other.kill()
            assert not alive(other.pid)
        (loss,) = server.losses
        assert ("killed by signal 9" if how == signal.SIGKILL else "gave no answer within 0.5 s") in loss
    finally:
        server.close()
    assert list(temporary.iterdir()) == []
    assert server.losses == [loss]  # its end is none


def test_a_server_that_is_lost_again_and_again_is_given_up(temporary: Path) -> None:
    server = ForkServer(["json"])
    try:
        for _ in range(MOST_RESTARTS + 1):
            with working(server, "facts") as worker:
                parent = heard(worker)["parent"]
                os.kill(parent, signal.SIGKILL)
                assert gone([parent])
        assert len(server.losses) == MOST_RESTARTS + 1
        descriptors = psutil.Process().num_fds()
        for _ in range(2):
            with pytest.raises(StartError, match=r"^the fork server was killed by signal 9 .*; it has ended 4 times"):
                server.start(f"{TASKS}:facts", {})
        assert psutil.Process().num_fds() <= descriptors
    finally:
        server.close()
    assert list(temporary.iterdir()) == []


def test_a_server_that_cannot_be_started_anew_says_why(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = temporary / "modules" / "once.py"
    module.parent.mkdir()
    module.write_text("")
    monkeypatch.syspath_prepend(module.parent)
    server = ForkServer(["once"])
    try:
        module.write_text("raise OSError('the disk is gone')")
        with working(server, "facts") as worker:
            os.kill(heard(worker)["parent"], signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(StartError, match=r"was killed by signal 9 .*, and then .*OSError: the disk is gone"):
                server.start(f"{TASKS}:facts", {})
    finally:
        server.close()


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_no_room_for_a_workers_output_is_a_start_error(start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    starter: Starter = ForkServer(["json"]) if start == "fork" else Spawner()
    try:
        descriptors = psutil.Process().num_fds()
        monkeypatch.setattr(tempfile, "mkstemp", full)
        with pytest.raises(StartError, match="No space left on device: /"):
            starter.start(f"{TASKS}:facts", {})
        monkeypatch.undo()
        assert psutil.Process().num_fds() == descriptors
        with working(starter, "facts") as worker:
            heard(worker)
    finally:
        starter.close()


def test_a_server_that_dies_takes_no_worker_with_it_unseen(temporary: Path) -> None:
    server = ForkServer(["json"])
    try:
        with working(server, "facts") as worker:
            os.kill(heard(worker)["parent"], signal.SIGKILL)
            worker.kill()
            assert gone([worker.pid])
    finally:
        server.close()
    assert list(temporary.iterdir()) == []
