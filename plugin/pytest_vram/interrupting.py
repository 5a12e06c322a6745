"""SIGTERM, which CI sends before it kills, ends a sweep as Ctrl-C does: its record and its file are written."""

import signal
from collections.abc import Callable
from types import FrameType


def terminate_as_ctrl_c() -> Callable[[], None]:
    """From now on SIGTERM raises KeyboardInterrupt, until the result is called.

    Nothing changes where somebody else handles or ignores it, or outside the main thread, where Python allows none.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return lambda: None
    try:
        signal.signal(signal.SIGTERM, interrupt)
    except ValueError:
        return lambda: None

    def restore() -> None:
        if signal.getsignal(signal.SIGTERM) is interrupt:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    return restore
