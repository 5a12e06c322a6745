"""The process that owns the GPU for one case: what every worker does before and after its task."""

import contextlib
import ctypes
import importlib
import json
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

from pytest_vram.measure.channel import Channel, Closed, Message


class Reporter:
    """The worker's end of its channel. The worker ends when the other end does, whatever it is doing."""

    def __init__(self, sock: socket.socket) -> None:
        self._channel = Channel(sock)
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True, name="vram-channel").start()

    def _listen(self) -> None:
        with contextlib.suppress(Closed):
            while True:
                message = self._channel.receive()
                if message is not None:
                    self._inbox.put(message)
        for end in (os.killpg, os.kill):  # nobody waits for the result: free the GPU now
            with contextlib.suppress(OSError):
                end(os.getpid(), signal.SIGKILL)

    def send(self, event: str, **fields: Any) -> None:
        """Tell the pytest process."""
        with contextlib.suppress(Closed):  # the listening thread ends the process
            self._channel.send({"event": event, **fields})

    def ask(self, event: str, **fields: Any) -> Message:
        """Tell the pytest process and wait for its answer."""
        self.send(event, **fields)
        return self._inbox.get()

    def job(self) -> Message:
        """The first message: what to do."""
        return self._inbox.get()


Task = Callable[[Message, Reporter], None]


def run(sock: socket.socket, task: str, environ: Mapping[str, str]) -> None:
    """Be a worker: a session of its own, deaf to Ctrl-C, first in line for the kernel's memory killer.

    `task` is `module:function`; the function gets the job and the reporter.
    """
    with contextlib.suppress(PermissionError):  # a spawned worker leads its session already
        os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("1000")
    os.environ.update(environ)
    reporter = Reporter(sock)
    job = reporter.job()
    module, function = task.split(":")
    target: Task = getattr(importlib.import_module(module), function)
    target(job, reporter)


def die_with_parent() -> None:
    """Ask Linux to kill this process when the one that started it ends, even while it is stopped or stuck."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, prctl(2)


def main(fd: int, task: str, environ_json: str) -> None:
    """The entry of a spawned worker."""
    die_with_parent()
    run(socket.socket(fileno=fd), task, json.loads(environ_json))
