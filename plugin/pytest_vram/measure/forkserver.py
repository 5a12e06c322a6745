"""Starts workers: forked from a server that has imported torch once, or spawned where forking cannot work.

The server is a fresh interpreter in a session of its own. It listens on the Unix socket it was born with; one request
(JSON, with the worker's end of a socket pair as a file descriptor) makes one child. When the socket closes, it kills
its children and ends; each worker also watches its own socket.
"""

import contextlib
import errno
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from pytest_vram.errors import StartError
from pytest_vram.measure.channel import Channel, Closed, Message
from pytest_vram.measure.preloading import cuda_untouched

# Without it importing diffusers initialises CUDA, and no forked child can use the GPU any more.
PRELOAD_ENVIRON = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
# What the user has set for PyTorch's allocator would change every case, and no run file would say so.
ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_NO_CUDA_MEMORY_CACHING")
PRELOAD_TIMEOUT_S = 300.0
START_TIMEOUT_S = 60.0
CLOSE_TIMEOUT_S = 5.0
MOST_RESTARTS = 3  # of a server that ends, in a session: what kills it every time is not mended by one more
TAIL_BYTES = 4000
_SERVE = (
    "import json,sys; sys.path[:] = json.loads(sys.argv[1]);"
    "from pytest_vram.measure.forkserver import serve; serve(int(sys.argv[2]), json.loads(sys.argv[3]))"
)
_SPAWN = (
    "import json,sys; sys.path[:] = json.loads(sys.argv[1]);"
    "from pytest_vram.measure.worker import main; main(int(sys.argv[2]), sys.argv[3], sys.argv[4])"
)


class Worker:
    """A worker as the pytest process sees it."""

    def __init__(self, pid: int, channel: Channel, output: Path, starter: "Starter") -> None:
        self.pid, self.channel, self.output = pid, channel, output
        self._starter = starter
        self._returncode: int | None = None

    def kill(self) -> None:
        """End the worker and whatever it started, and wait for it."""
        try:
            for send in (os.killpg, os.kill):
                with contextlib.suppress(OSError):
                    send(self.pid, signal.SIGKILL)
            self.wait(10)
        finally:
            self.close()

    def wait(self, timeout_s: float) -> int | None:
        """The return code (negative for a signal), or None if it has not ended by then, or nobody knows how it has."""
        if self._returncode is None:
            self._returncode = self._starter.wait(self.pid, timeout_s)
        return self._returncode

    def output_tail(self) -> str:
        """The end of what the worker wrote to stdout and stderr."""
        with contextlib.suppress(OSError), self.output.open("rb") as file:
            file.seek(max(0, self.output.stat().st_size - TAIL_BYTES))
            return file.read().decode(errors="replace").strip()
        return ""

    def close(self) -> None:
        self.channel.close()
        self.output.unlink(missing_ok=True)


class Starter(Protocol):
    """What starts workers."""

    name: str

    @property
    def losses(self) -> Sequence[str]:
        """How the servers of this session have ended that ended before their time."""

    def start(self, task: str, environ: Mapping[str, str]) -> Worker: ...

    def wait(self, pid: int, timeout_s: float) -> int | None: ...

    def close(self) -> None: ...


def _output_file() -> tuple[int, Path]:
    try:
        fd, name = tempfile.mkstemp(prefix="pytest-vram-", suffix=".log")
    except OSError as error:  # no room
        raise StartError(f"no worker could be started: {error.strerror}: {tempfile.gettempdir()}") from error
    return fd, Path(name)


class _Lost(StartError):
    """The server is gone, or stuck."""


class ForkServer:
    """Workers in milliseconds: forked from one process that has done the imports.

    A server that ends is started anew when the next worker is asked for, up to `MOST_RESTARTS` times. The workers it
    had go on: each has a channel of its own, and only its return code is not known any more.
    """

    name = "fork"

    def __init__(self, preload: Sequence[str]) -> None:
        """Start the server and wait for its imports; `preload` names modules, or `module:attribute` for lazy ones
        (`module:attribute?` where it may be missing).

        Raises:
            StartError: with the reason, when an import fails.
        """
        self._preload = list(preload)
        self._losses: list[str] = []
        self._exited: dict[int, int] = {}
        self._children: set[int] = set()
        self._orphans: set[int] = set()  # whose server is gone
        self._given_up: str | None = None
        self._begin()

    def _begin(self) -> None:
        ours, theirs = socket.socketpair()
        self._channel = Channel(ours)
        self._socket = ours
        self._lost = False
        try:
            fd, self._output = _output_file()
        except StartError:
            ours.close()
            theirs.close()
            raise
        command = [sys.executable, "-c", _SERVE, json.dumps(sys.path), str(theirs.fileno()), json.dumps(self._preload)]
        with theirs, os.fdopen(fd) as output:
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={**_environ(), **PRELOAD_ENVIRON},
            )
        try:
            ready = self._channel.receive(PRELOAD_TIMEOUT_S)
        except Closed:
            ready = {"error": f"it ended: {_tail(self._output)}"}
        except BaseException:
            self._process.kill()
            self.close()
            raise
        if ready is None or "error" in ready:
            self.close()
            raise StartError(f"the fork server could not import what it needs: {(ready or {}).get('error', 'timeout')}")

    @property
    def losses(self) -> Sequence[str]:
        if not self._lost and self._given_up is None and self._process.poll() is not None:
            self._lose(_how_it_ended(self._process.returncode))
        return self._losses

    def _lose(self, how: str) -> None:
        """The server has ended before its time."""
        self._lost = True
        self._losses.append(f"the fork server {how}")
        self._orphans |= self._children
        self._children.clear()

    def start(self, task: str, environ: Mapping[str, str]) -> Worker:
        """A new worker; its job goes over its channel. Where the server is gone it is started anew first.

        Raises:
            StartError: where it cannot be, or the machine has no room for one more process.
        """
        if self._given_up is not None:
            raise StartError(self._given_up)
        try:
            return self._start(task, environ)
        except _Lost as lost:
            how = _how_it_ended(self._process.poll()) if self._process.poll() is not None else str(lost)
        if not self._lost:
            self._lose(how)
        self.close()
        if len(self._losses) > MOST_RESTARTS:
            self._given_up = f"{self._losses[-1]}; it has ended {len(self._losses)} times and is not started again"
            raise StartError(self._given_up)
        try:
            self._begin()
        except StartError as error:
            self._given_up = f"{self._losses[-1]}, and then {str(error).removeprefix('the fork server ')}"
            raise StartError(self._given_up) from error
        return self._start(task, environ)

    def _start(self, task: str, environ: Mapping[str, str]) -> Worker:
        fd, output = _output_file()
        os.close(fd)
        request = json.dumps({"task": task, "environ": dict(environ), "output": str(output)}).encode() + b"\n"
        ours, theirs = socket.socketpair()
        lost = ""
        message: Message | None = {}
        try:
            with theirs:
                socket.send_fds(self._socket, [request], [theirs.fileno()])
            while (message := self._receive(START_TIMEOUT_S)) is not None and "exited" in message:
                pass
        except (OSError, Closed):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(CLOSE_TIMEOUT_S)  # what it ended with is known in a moment
            lost = f"is gone: {_tail(self._output)}"
        if message is None:
            lost = f"gave no answer within {START_TIMEOUT_S:g} s"
        if lost or message is None or "failed" in message:
            ours.close()
            output.unlink(missing_ok=True)
            if lost or message is None:
                raise _Lost(lost)
            raise StartError(f"the fork server could not start a worker: {message['failed']}")
        pid = int(message["started"])
        self._children.add(pid)
        self._orphans.discard(pid)  # an earlier process of this number
        return Worker(pid, Channel(ours), output, self)

    def _receive(self, timeout_s: float) -> Message | None:
        message = self._channel.receive(timeout_s)
        if message and "exited" in message:
            pid = int(message["exited"])
            self._exited[pid] = int(message["returncode"])
            self._children.discard(pid)
        return message

    def wait(self, pid: int, timeout_s: float) -> int | None:
        deadline = time.monotonic() + timeout_s
        if pid not in self._orphans:
            try:
                while pid not in self._exited and (left := deadline - time.monotonic()) > 0:
                    self._receive(left)
            except (Closed, OSError):
                self._orphans.add(pid)
        if pid in self._orphans:  # nobody says when it ends
            while not _has_ended(pid) and time.monotonic() < deadline:
                time.sleep(0.01)
        return self._exited.pop(pid, None)

    def close(self) -> None:
        if self._process.poll() is None:
            self._lost = True  # from now on its end is none before its time
        self._channel.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_TIMEOUT_S)
        if self._process.poll() is None:
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._output.unlink(missing_ok=True)


def _how_it_ended(returncode: int | None) -> str:
    if returncode is not None and returncode < 0:
        hint = " (the kernel does so when the host runs out of memory)" if returncode == -signal.SIGKILL else ""
        return f"was killed by signal {-returncode}{hint}"
    return f"ended with exit code {returncode}"


def _has_ended(pid: int) -> bool:
    """Whether this process, which is no child of ours, is gone or will be once its parent looks."""
    import psutil  # which the server does without

    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def _environ() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ALLOCATOR_VARIABLES}


class Spawner:
    """Workers that each import everything anew: where a forked process cannot use the GPU."""

    name = "spawn"
    losses: Sequence[str] = ()

    def __init__(self) -> None:
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, task: str, environ: Mapping[str, str]) -> Worker:
        fd, output = _output_file()
        ours, theirs = socket.socketpair()
        command = [
            sys.executable,
            "-c",
            _SPAWN,
            json.dumps(sys.path),
            str(theirs.fileno()),
            task,
            json.dumps(dict(environ)),
        ]
        try:
            with theirs, os.fdopen(fd) as file:
                process = subprocess.Popen(
                    command,
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    start_new_session=True,
                    env=_environ(),
                )
        except OSError as error:
            ours.close()
            output.unlink(missing_ok=True)
            raise StartError(f"no worker could be started: {error}") from error
        self._processes[process.pid] = process
        return Worker(process.pid, Channel(ours), output, self)

    def wait(self, pid: int, timeout_s: float) -> int | None:
        process = self._processes[pid]
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout_s)
        return process.returncode

    def close(self) -> None:
        for process in self._processes.values():
            if process.poll() is None:
                with contextlib.suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _tail(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace").strip()[-TAIL_BYTES:]
    return ""


# The server's side


def serve(fd: int, preload: Sequence[str]) -> None:
    """Import, then fork a worker a request until the socket closes."""
    sock = socket.socket(fileno=fd)
    channel = Channel(sock)
    began = time.monotonic()
    try:
        with cuda_untouched() if preload else contextlib.nullcontext():
            for name in preload:
                _import(name)
    except BaseException as error:  # whatever an import raises is the answer
        traceback.print_exc()
        channel.send({"error": f"{type(error).__name__}: {error}"})
        return
    gc.collect()
    gc.freeze()
    channel.send({"ready": True, "seconds": time.monotonic() - began})
    _Server(sock, channel).run()


def _import(name: str) -> None:
    module, _, attribute = name.partition(":")
    imported = importlib.import_module(module)
    if attribute.endswith("?"):  # whether it is there is somebody else's to say
        getattr(imported, attribute.removesuffix("?"), None)
    elif attribute:
        getattr(imported, attribute)


class _Server:
    def __init__(self, sock: socket.socket, channel: Channel) -> None:
        self.sock, self.channel = sock, channel
        self.children: set[int] = set()
        self.wakeup, wake = socket.socketpair()
        self.wakeup.setblocking(False)
        wake.setblocking(False)
        self.wake = wake
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def run(self) -> None:
        try:
            while True:
                readable, _, _ = select.select([self.sock, self.wakeup], [], [])
                if self.wakeup in readable:
                    self.wakeup.recv(4096)
                    self.reap()
                if self.sock in readable:
                    data, fds, _, _ = socket.recv_fds(self.sock, 1 << 20, 1)
                    if not data:
                        return
                    self.fork(json.loads(data), fds[0])
        except (Closed, ConnectionResetError):
            return
        finally:
            for pid in self.children:
                for send in (os.killpg, os.kill):
                    with contextlib.suppress(OSError):
                        send(pid, signal.SIGKILL)

    def reap(self) -> None:
        while self.children:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except OSError as error:
                if error.errno == errno.ECHILD:
                    return
                raise
            if pid == 0:
                return
            self.children.discard(pid)
            self.channel.send({"exited": pid, "returncode": os.waitstatus_to_exitcode(status)})

    def fork(self, request: dict[str, Any], fd: int) -> None:
        sys.stdout.flush()  # what an import printed is no worker's output
        sys.stderr.flush()
        try:
            pid = os.fork()
        except OSError as error:  # no memory or no process left: this case fails, the next may not
            os.close(fd)
            self.channel.send({"failed": str(error)})
            return
        if pid == 0:
            self.child(request, fd)
        os.close(fd)
        self.children.add(pid)
        self.channel.send({"started": pid})

    def child(self, request: dict[str, Any], fd: int) -> None:
        """Never returns."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for sock in (self.sock, self.wakeup, self.wake):
                sock.close()
            output = os.open(request["output"], os.O_WRONLY | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.close(output)
            from pytest_vram.measure.worker import run

            run(socket.socket(fileno=fd), request["task"], request["environ"])
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
            if isinstance(error.code, str):
                print(error.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
