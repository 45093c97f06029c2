"""Where progress and remarks go: not into what a program reads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(stderr=True)
MINUTE = 60.0  # seconds between lines where there is no terminal


@contextmanager
def progress(name: str, total: int, status: Callable[[], str]) -> Iterator[Callable[[int], None]]:
    """A bar, or without a terminal a line a minute: what is done, what is left, how long it takes.

    Args:
        name: of what is counted.
        status: what else is to be said.

    Yields:
        A function that takes how many more are done.
    """
    if not total:
        yield lambda count: None
        return
    if console.is_terminal:
        columns = (
            TextColumn("{task.description:>14}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}", markup=False),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bars:
            bar = bars.add_task(name, total=total, status="")
            yield lambda count: bars.update(bar, advance=count, status=status())
        return
    done, start, over = 0, time.monotonic(), Event()

    def advance(count: int) -> None:
        nonlocal done
        done += count

    def report() -> None:
        while not over.wait(MINUTE):
            seconds = time.monotonic() - start
            left = f"{total - done} left"
            if done:
                left += f", about {_duration(seconds / done * (total - done))}"
            line = f"{name}: {done} of {total} done in {_duration(seconds)}, {left}"
            say("; ".join(filter(None, [line, status()])))

    thread = Thread(target=report, daemon=True)
    thread.start()
    try:
        yield advance
    finally:
        over.set()
        thread.join()


def say(line: str) -> None:
    """A line as it is."""
    console.print(line, soft_wrap=True, highlight=False, markup=False)


def _duration(seconds: float) -> str:
    """In minutes, or in hours and minutes."""
    minutes = max(1, round(seconds / 60))
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
