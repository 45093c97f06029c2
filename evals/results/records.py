"""The folder of a run: what was asked for, under what conditions, and what came out.

config.yaml        the resolved configuration
environment.json   every environment that samples were run in: versions, git revision, device
prompts.json       which samples the run is of, see :class:`evals.results.schema.Asked`
samples.jsonl      one JSON object per sample, appended and flushed as samples finish
fidelity.jsonl     with `kl=true`: per sample, how near its distributions are to the full cache's
summary.json       means over the samples

Fields and their types are in :mod:`evals.results.schema`.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from buzz.errors import ConfigError
from evals.results.schema import Environment, Record, problem_of

SAMPLES, FIDELITY = "samples.jsonl", "fidelity.jsonl"


class InUse(ConfigError):
    """Another process is at work in a run's folder."""


class RunFailed(RuntimeError):
    """A run that cannot go on, or whose measurements cannot be trusted; its text is one line."""


class RunFolder:
    """One run's folder. Records are only ever appended; of several with one id the last counts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.samples = path / SAMPLES

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder for this process; the lock of a process that died is void by itself.

        Torn last lines, left by a killed run, are cut off: nobody else can be writing them.

        Raises:
            InUse: another run holds it.
            ConfigError: there can be no such folder.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = open(self.path / "lock", "a+")  # noqa: SIM115 (closed below)
        except (OSError, ValueError) as error:
            raise ConfigError("output", str(self.path), f"{error}; give another folder") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.seek(0)
                raise InUse(
                    "output", str(self.path), f"in use by the run of process {file.read()}; wait"
                ) from error
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            for path in self.path.glob("*.jsonl"):
                whole, last = _lines(path)
                if last and _is_whole(last):  # an editor, or a kill between two bytes
                    with open(path, "ab") as unfinished:
                        unfinished.write(b"\n")
                elif last:
                    os.truncate(path, path.stat().st_size - len(last))
            yield

    def read(self, name: str = SAMPLES) -> dict[str, Record]:
        """A file's records by sample id, without a last line that is torn, or being written.

        Raises:
            ConfigError: naming file and line: any other line is no record.
        """
        path = self.path / name
        records: dict[str, Record] = {}
        whole, last = _lines(path) if path.exists() else ([], b"")
        for number, line in enumerate([*whole, last if _is_whole(last) else b""], start=1):
            if not line.strip():
                continue
            record, problem = checked(line, name)
            if problem:
                remedy = f"{problem}; remove that line, and the same command makes it anew"
                raise ConfigError("output", f"{path}:{number}", remedy)
            records[record["id"]] = record
        return records

    def append(self, record: Record, name: str = SAMPLES) -> None:
        """Adds one record to a file, by a single write: all of it or nothing.

        Raises:
            RunFailed: it cannot be written.
        """
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        path = self.path / name
        with writing(path), open(path, "ab", buffering=0) as file:
            end = file.tell()
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                with suppress(OSError):  # else the next start cuts the torn line off
                    os.truncate(path, end)
                raise

    def write(self, name: str, content: Any) -> None:
        """Writes `content` (text, or anything that JSON knows), all of it or nothing.

        Raises:
            RunFailed: it cannot be written.
        """
        text = content
        if not isinstance(content, str):
            text = json.dumps(content, indent=2, allow_nan=False) + "\n"
        temporary = self.path / f".{name}"
        with writing(self.path / name):
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(self.path / name)

    def load(self, name: str) -> Any:
        """What a JSON file holds; None if there is no such file.

        Raises:
            ConfigError: it holds something else.
        """
        path = self.path / name
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        loaded, problem = checked(content, name)
        if problem:
            raise ConfigError("output", str(path), f"{problem}; remove that file and run again")
        return loaded

    def environments(self) -> dict[str, Environment]:
        """The environments that samples were run in, in their order, by :func:`digest`.

        Raises:
            ConfigError: environment.json is broken.
        """
        found = self.load("environment.json") or []
        return {digest(one): one for one in (found if isinstance(found, list) else [found])}

    def note(self, environment: Environment) -> str:
        """Adds an environment to those of the folder; the digest that names it in records."""
        known = self.environments() | {digest(environment): environment}
        self.write("environment.json", list(known.values()))
        return digest(environment)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises RunFailed, in a line that names `path`, where something cannot be written."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunFailed(
            f"{path} cannot be written: {reason}; put that right, and the same command goes on"
        ) from error


def checked(text: bytes | str, name: str) -> tuple[Any, str | None]:
    """A record of the file `name`, or all it holds, and what is wrong with that, if anything."""
    try:
        content = parse(text)
    except ValueError as error:
        return None, f"not JSON ({error})"
    return content, problem_of(content, name)


def parse(text: bytes | str) -> Any:
    """JSON, of which NaN, infinities and numbers beyond a float's range are no part.

    A byte-order mark before it is passed over.

    Raises:
        ValueError: it is something else.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number")

    def finite(number: str) -> float:
        value = float(number)
        if not math.isfinite(value):
            refuse(number)
        return value

    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")
    try:
        return json.loads(text, parse_constant=refuse, parse_float=finite)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _lines(path: Path) -> tuple[list[bytes], bytes]:
    """A file's lines, and what follows the last line's end."""
    *whole, last = path.read_bytes().split(b"\n")
    return whole, last


def _is_whole(line: bytes) -> bool:
    """Whether a line without an end is an object all the same, so lacks nothing but its end."""
    with suppress(ValueError):
        return isinstance(parse(line), dict)
    return False


def digest(content: Any) -> str:
    """Eight hexadecimal digits that name a JSON-like value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def sha256(content: Any) -> str:
    """First 16 digits of the hash of a JSON-like value, such as a list of token ids."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def arithmetic_runs(values: list[int]) -> list[tuple[int, int, int]]:
    """A trace of lengths as runs of (first, count, increment): exact, and short for every method.

    >>> arithmetic_runs([10, 11, 12, 5, 5])
    [(10, 3, 1), (5, 2, 0)]
    """
    runs: list[tuple[int, int, int]] = []
    for value in values:
        if runs:
            first, count, increment = runs[-1]
            if count == 1 or value == first + count * increment:
                runs[-1] = (first, count + 1, value - first if count == 1 else increment)
                continue
        runs.append((value, 1, 0))
    return runs


def unrolled(runs: Iterable[Sequence[int]]) -> list[int]:
    """What :func:`arithmetic_runs` made runs of."""
    return [first + i * increment for first, count, increment in runs for i in range(count)]
