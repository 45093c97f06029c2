"""Ctrl-C and SIGTERM let the sample in flight finish."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

NOTICE = b"\nstopping after the sample in flight; once more stops at once\n"


class Interrupted(KeyboardInterrupt):
    """A signal asked to stop. As with Ctrl-C, only the outermost caller should handle it.

    Attributes:
        exit_status: 128 plus the signal's number, as shells have it.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_status = 128 + number


@contextmanager
def deferred_signals() -> Iterator[Callable[[], None]]:
    """Holds the first SIGINT or SIGTERM back; a second one acts at once.

    Yields:
        A function to call where it is safe to stop: it raises a signal that was held back.

    Raises:
        Interrupted: a signal came. It is raised at the end of the block at the latest.
    """
    caught: list[int] = []
    before = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def hold(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        restore()
        os.write(2, NOTICE)  # print is not reentrant, and a signal may come within one

    def stop_here() -> None:
        if caught:
            raise Interrupted(caught[0])

    if threading.current_thread() is threading.main_thread():  # others never get signals
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # which jobs in the background have
                before[number] = signal.signal(number, hold)
    try:
        yield stop_here
    finally:
        restore()
    stop_here()
