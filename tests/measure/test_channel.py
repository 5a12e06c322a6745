"""Messages over a socket: whole, in order, in time, or Closed."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from pytest_vram.measure.channel import Channel, Closed, Message


@pytest.fixture
def pair() -> Iterator[tuple[Channel, socket.socket]]:
    """A channel and the raw other end."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Channel(ours), theirs


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"text": "two\nlines, ümlaut \u2028 \x00"},
        {"nested": [1, 2.5, None, True, {"a": []}]},
        {"big": "x" * 3_000_000},
    ],
    ids=["empty", "text", "nested", "big"],
)
def test_a_message_arrives_as_it_was_sent(pair: tuple[Channel, socket.socket], message: Message) -> None:
    ours, theirs = pair[0], Channel(pair[1])
    sender = threading.Thread(target=ours.send, args=(message,))
    sender.start()
    assert theirs.receive(10) == message
    sender.join()


def test_messages_keep_their_order_however_they_are_cut(pair: tuple[Channel, socket.socket]) -> None:
    channel, raw = pair
    raw.sendall(b'{"n": 1}\n{"n": 2}\n{"n"')
    assert [channel.receive(1), channel.receive(1), channel.receive(0)] == [{"n": 1}, {"n": 2}, None]
    raw.sendall(b": 3}\n")
    assert channel.receive(1) == {"n": 3}


def test_a_channel_that_was_closed_at_this_end_is_closed(pair: tuple[Channel, socket.socket]) -> None:
    """By another thread, while this one waits for a message."""
    channel, _ = pair
    channel.close()
    for timeout_s in (None, 1.0):
        with pytest.raises(Closed):
            channel.receive(timeout_s)


def test_a_slow_sender_does_not_stretch_the_timeout(pair: tuple[Channel, socket.socket]) -> None:
    channel, raw = pair
    over = threading.Event()

    def trickle() -> None:
        while not over.wait(0.01):
            raw.sendall(b" ")

    sender = threading.Thread(target=trickle)
    sender.start()
    began = time.monotonic()
    message = channel.receive(0.1)
    took = time.monotonic() - began
    over.set()
    sender.join()
    assert message is None
    assert 0.09 < took < 1


def test_what_was_sent_before_the_end_is_still_read(pair: tuple[Channel, socket.socket]) -> None:
    channel, raw = pair
    raw.sendall(b'{"last": true}\n{"half')
    raw.close()
    assert channel.receive() == {"last": True}
    with pytest.raises(Closed):
        channel.receive(1)


def test_an_end_with_unread_messages_is_an_end(pair: tuple[Channel, socket.socket]) -> None:
    channel, raw = pair
    channel.send({"never": "read"})
    raw.close()  # the kernel answers the next read with a reset
    with pytest.raises(Closed):
        channel.receive()


def test_nobody_to_send_to(pair: tuple[Channel, socket.socket]) -> None:
    channel, raw = pair
    raw.close()
    with pytest.raises(Closed):
        channel.send({})
