"""Progress and remarks, on stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event, Thread

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(stderr=True)
MINUTE = 60.0  # seconds between lines where there is no terminal


@dataclass
class Command:
    """How far a command is whose settings this process runs one after another.

    Attributes:
        job, jobs: the number of the sweep's job, from 0, and how many this process runs.
        number, of: the setting under way, and how many there are.
        start: when the command began, by :func:`time.monotonic`.
        worked: numbers of the settings that had something to do.
    """

    job: int = 0
    jobs: int = 1
    number: int = 1
    of: int = 1
    start: float = field(default_factory=lambda: time.monotonic())
    worked: set[int] = field(default_factory=set)

    def left(self, here: float) -> float:
        """Seconds to the end of all settings.

        Those to come are taken to need what the others have needed on average.

        Args:
            here: seconds that the one under way needs yet.
        """
        each = (time.monotonic() - self.start + here) / len(self.worked)
        return here + each * (self.of - self.number)


command = Command()


def begin_command() -> None:
    vars(command).update(vars(Command()))


@contextmanager
def progress(name: str, total: int, status: Callable[[], str]) -> Iterator[Callable[[int], None]]:
    """A bar, or a line a minute without a terminal: what is done, what is left, how long it takes.

    Of a command with several settings also which this is, and how long all of them take.

    Args:
        name: of what is counted.
        status: gives what else the line says.

    Yields:
        A function that takes how many more are done.
    """
    if not total:
        yield lambda count: None
        return
    done, start, over = 0, time.monotonic(), Event()
    command.worked.add(command.number)
    if command.of > 1:
        name = f"setting {command.number} of {command.of}, {name}"

    def here() -> float:
        return (time.monotonic() - start) / done * (total - done)

    def said() -> str:
        whole = ""
        if done and command.of > 1:
            whole = f"all settings done in about {_duration(command.left(here()))}"
        return "; ".join(filter(None, [whole, status()]))

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

            def update(count: int) -> None:
                nonlocal done
                done += count
                bars.update(bar, advance=count, status=said())

            yield update
        return

    def advance(count: int) -> None:
        nonlocal done
        done += count

    def report() -> None:
        while not over.wait(MINUTE):
            left = f"{total - done} left"
            if done:
                left += f", about {_duration(here())}"
            spent = _duration(time.monotonic() - start)
            line = f"{name}: {done} of {total} samples done in {spent}, {left}"
            say("; ".join(filter(None, [line, said()])))

    thread = Thread(target=report, daemon=True)
    thread.start()
    try:
        yield advance
    finally:
        over.set()
        thread.join()


def say(line: str) -> None:
    """Prints a line as it is."""
    console.print(line, soft_wrap=True, highlight=False, markup=False)


def _duration(seconds: float) -> str:
    """In minutes, or in hours and minutes."""
    minutes = max(1, round(seconds / 60))
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
