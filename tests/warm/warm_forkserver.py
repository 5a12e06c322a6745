"""A pytest plugin for the sessions that tests start: their fork servers are forked, and import nothing anew.

Importing torch, diffusers and transformers takes 7 s of CPU a fork server, and each session starts one. Here they are
imported once, by the interpreter that `environ` starts, for all processes that run tests; sessions find it by
`SOCKET`. All that comes after an interpreter's imports is the fork server's own code, in a process of its own with its
session's environment, folder and path. What is about that process itself is tested without this plugin.
"""

import atexit
import contextlib
import functools
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

SOCKET = "WARM_FORKSERVER"
IMPORTED = ["StableDiffusionPipeline", "AutoencoderKL", "UNet2DConditionModel", "PNDMScheduler", "DDIMScheduler"]


@functools.cache
def environ() -> dict[str, str]:
    """What a session needs in its environment to take part, but for this folder in PYTHONPATH. The warm interpreter is
    the one that the environment names, or ends with this process."""
    takes_part = {"PYTEST_PLUGINS": Path(__file__).stem}
    if SOCKET in os.environ:
        return {SOCKET: os.environ[SOCKET], **takes_part}
    folder = tempfile.mkdtemp(prefix="warm-")
    path = os.path.join(folder, "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        process = subprocess.Popen(
            [sys.executable, __file__, str(listener.fileno()), folder],
            pass_fds=[listener.fileno()],
            stdin=subprocess.PIPE,  # which closes when this process ends
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"},
        )
    atexit.register(end, process)
    return {SOCKET: path, **takes_part}


def end(process: "subprocess.Popen[bytes]") -> None:
    assert process.stdin
    process.stdin.close()
    process.wait(10)


def pytest_configure(config: pytest.Config) -> None:
    """In a session: its fork servers are asked for at the warm interpreter."""
    from pytest_vram.measure import forkserver

    def start(command: list[str], **options: Any) -> Any:
        warm = command[2:3] == [forkserver._SERVE] and os.environ.get(SOCKET)
        return Forked(warm, command, **options) if warm else subprocess.Popen(command, **options)

    kept = {name: getattr(subprocess, name) for name in ("DEVNULL", "TimeoutExpired")}
    patch = pytest.MonkeyPatch()
    patch.setattr(forkserver, "subprocess", SimpleNamespace(Popen=start, **kept))
    config.add_cleanup(patch.undo)


class Forked:
    """A fork server, as far as a `subprocess.Popen` of it is used."""

    def __init__(self, warm: str, command: list[str], *, pass_fds: list[int], stdout: Any, env: Any, **_: Any) -> None:
        self.returncode: int | None = None
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(warm)
        socket.send_fds(self._socket, [b" "], [*pass_fds, stdout.fileno()])
        asked = {"path": json.loads(command[3]), "preload": json.loads(command[5]), "folder": os.getcwd()}
        self._socket.sendall(json.dumps({**asked, "environ": env}).encode() + b"\n")
        self._answers = self._socket.makefile("r")
        self.pid = int(self._answers.readline())

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._socket], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("fork server", timeout or 0)
            self.returncode = int(self._answers.readline())
            self._answers.close()  # holds the socket open, too
            self._socket.close()
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


# The warm interpreter


def main(listening: int, folder: str) -> None:
    import gc

    import diffusers
    import transformers

    for name in IMPORTED:
        getattr(diffusers, name)
    _ = transformers.CLIPTextModel
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = socket.socket(fileno=listening)
    while sys.stdin not in (select.select([listener, sys.stdin], [], [])[0]):
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            keep(connection)
        connection.close()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)  # what was imported would take its time to end


def keep(connection: socket.socket) -> None:
    """Fork one server and say how it ended; never returns."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with contextlib.suppress(OSError):
        _, fds, _, _ = socket.recv_fds(connection, 1, 2)
        asked = json.loads(connection.makefile("r").readline())
        if (pid := os.fork()) == 0:
            connection.close()
            become_server(asked, *fds)
        for fd in fds:
            os.close(fd)
        connection.sendall(f"{pid}\n".encode())
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        connection.sendall(f"{code}\n".encode())
    os._exit(0)


def become_server(asked: dict[str, Any], fd: int, output: int) -> None:
    """What `python -c` of a fork server does; never returns."""
    code = 1
    try:
        os.setsid()
        os.chdir(asked["folder"])
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number in (1, 2):
            os.dup2(output, number)
        os.close(output)
        os.environ.clear()
        os.environ.update(asked["environ"])
        sys.path[:], sys.argv = asked["path"], ["-c"]
        from pytest_vram.measure.forkserver import serve

        serve(fd, asked["preload"])
        code = 0
    except BaseException:  # as an interpreter says it
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
