"""JSON messages, one a line, over a Unix socket."""

import json
import select
import socket
import time
from typing import Any

Message = dict[str, Any]


class Closed(Exception):
    """The other end is gone."""


class Channel:
    """One end of a connection; not for more than one reader at a time."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._buffer = b""

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        """Raises Closed when nobody listens any more."""
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise Closed from error

    def receive(self, timeout_s: float | None = None) -> Message | None:
        """The next message, or None after `timeout_s` without a whole one; raises Closed at the end."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                if not select.select([self._socket], [], [], left)[0]:
                    return None
                data = self._socket.recv(1 << 16)
            except (OSError, ValueError):  # reset by the other end, or this one closed by another thread
                data = b""
            if not data:
                raise Closed
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        message: Message = json.loads(line)
        return message

    def close(self) -> None:
        self._socket.close()
