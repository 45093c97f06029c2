"""A setting's folder on disk: reading, appending and locking of its files.

setting.yaml       what all rows share: the task with its settings, the model, the seed
prompts.json       the samples that count, see :class:`evals.results.record.Asked`
environments.json  the environments of the records: versions, git revision, device
full.jsonl         the full cache's records, one JSON object per sample
h2o@0.25.jsonl     another row: a method, its budget, and parameters that are not its defaults
h2o@0.25.1of2.jsonl  a shard of a row, from a command that had a part of the samples

Records are appended as samples finish. :mod:`evals.results.record` lists their fields.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from buzz.errors import ConfigError
from evals.results.record import Asked, Environment, Record, Setting, problem_of

REFERENCE = "full"  # the full cache: the method that others are compared with, and its row
SHARD = re.compile(r"\.(\d+)of(\d+)$")
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # OmegaConf's takes ten times as long
COMPARED = ("prompt_sha256", "sample_sha256", "prediction", "tokens", "scores")


class InUse(ConfigError):
    """Another process is writing the row."""


class RunFailed(RuntimeError):
    """A run cannot go on, or its measurements cannot be trusted. The message is one line."""


class SettingFolder:
    """A setting's folder. Records are only appended; the last one of an id in a file counts."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def file(self, row: str, shard: str | None = None) -> Path:
        """The file of a row, or of its shard (as in `task.shard`: 0/2)."""
        part = f".{shard.replace('/', 'of')}" if shard else ""
        return self.path / f"{row}{part}.jsonl"

    @property
    def rows(self) -> dict[str, list[Path]]:
        """The files of each row; the full cache comes first."""
        found: dict[str, list[Path]] = {}
        for path in sorted(self.path.glob("*.jsonl")):
            found.setdefault(SHARD.sub("", path.stem), []).append(path)
        return {name: found[name] for name in sorted(found, key=lambda name: name != REFERENCE)}

    @contextmanager
    def lock(self, file: Path) -> Iterator[None]:
        """Locks a row's file for this process, and repairs its last line.

        A killed run may leave a torn last line, which is cut off. Its lock ended with its process.

        Raises:
            InUse: another run has the lock.
            ConfigError: the folder cannot be made.
        """
        try:
            (self.path / ".locks").mkdir(parents=True, exist_ok=True)
            held = FileLock(self.path / ".locks" / file.name, blocking=False)
            held.acquire()
        except Timeout as error:
            remedy = "in use by another run; wait until that is over"
            raise InUse("output", str(file), remedy) from error
        except (OSError, ValueError) as error:
            raise ConfigError("output", str(self.path), f"{error}; give another folder") from error
        try:
            if file.exists():
                whole, last = _lines(file)
                if last and _is_whole(last):  # only the line's end is missing
                    with open(file, "ab") as unfinished:
                        unfinished.write(b"\n")
                elif last:
                    os.truncate(file, file.stat().st_size - len(last))
            yield
        finally:
            held.release()

    def read(self, file: Path) -> dict[str, Record]:
        """A file's records by sample id. A torn last line is left out.

        Raises:
            ConfigError: another line is no record; names file and line.
        """
        records, problems = self.scan(file)
        for line, problem in problems.items():
            remedy = f"{problem}; remove that line, and the same command makes it anew"
            raise ConfigError("output", f"{file}:{line}", remedy)
        return records

    def scan(self, file: Path) -> tuple[dict[str, Record], dict[int, str]]:
        """A file's records by sample id, and the lines that are no record: number, reason."""
        records: dict[str, Record] = {}
        problems: dict[int, str] = {}
        whole, last = _lines(file) if file.exists() else ([], b"")
        for number, line in enumerate([*whole, last if _is_whole(last) else b""], start=1):
            if line.strip():
                record, problem = checked(line, file.name)
                if problem:
                    problems[number] = problem
                else:
                    records[record["id"]] = record
        return records, problems

    def put_together(
        self, files: Iterable[Path], wanted: Mapping[str, str] | None = None
    ) -> tuple[dict[str, Record], list[str]]:
        """Merges the records of a row's files by sample id. Of copies the first ``ok`` one counts.

        Args:
            wanted: the `sample_sha256` of the samples that count; None: all samples do.

        Returns:
            The records, and what does not count, with the reason: lines that are no record, records
            of other data, copies that contradict each other.
        """
        found: dict[str, tuple[Record, Path]] = {}
        left_out, apart = [], set()
        for file in files:
            records, problems = self.scan(file)
            left_out += [f"{file}:{line}: {problem}" for line, problem in problems.items()]
            current = {
                name: record
                for name, record in records.items()
                if wanted is None or wanted.get(name) == record["sample_sha256"]
            }
            if stale := len(records) - len(current):
                left_out.append(f"{file}: {stale} of {len(records)} records are of other data")
            for name, record in current.items():
                known, where = found.setdefault(name, (record, file))
                if differing := _contradiction(known, record):
                    left_out.append(
                        f"{where}: sample {name} contradicts {file.name} in its {differing}; remove"
                        " one of the two"
                    )
                    apart.add(name)
                elif record["status"] == "ok" != known["status"]:
                    found[name] = record, file
        kept = {name: record for name, (record, _) in found.items() if name not in apart}
        return kept, left_out

    def append(self, file: Path, record: Record) -> None:
        """Appends one record to a file by a single write, so that it is there whole or not at all.

        Raises:
            RunFailed: it cannot be written.
        """
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        with writing(file), open(file, "ab", buffering=0) as lines:
            end = lines.tell()
            try:
                if lines.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                with suppress(OSError):  # if this fails, the next start cuts the torn line off
                    os.truncate(file, end)
                raise

    def write(self, name: str, content: Any) -> None:
        """Replaces a file by `content` as YAML or JSON, according to its name, in one step.

        Raises:
            RunFailed: it cannot be written.
        """
        if name.endswith(".yaml"):
            text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        else:
            text = json.dumps(content, indent=2, allow_nan=False) + "\n"
        temporary = self.path / f".{name}.{os.getpid()}"
        with writing(self.path / name):
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(self.path / name)

    def load(self, name: str) -> Any:
        """The content of a YAML or JSON file; None if there is no such file.

        Raises:
            ConfigError: the content is not what the file should have.
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

    @property
    def setting(self) -> Setting:
        """What all rows share.

        Raises:
            ConfigError: setting.yaml is missing or broken.
        """
        found: Setting | None = self.load("setting.yaml")
        if found is None:
            remedy = "no setting.yaml: not a folder of results"
            if (self.path / "samples.jsonl").exists():
                remedy = "a run folder of version 0.2; run its command again, or read it with that"
            raise ConfigError("runs", str(self.path), remedy)
        return found

    @property
    def asked(self) -> Asked | None:
        found: Asked | None = self.load("prompts.json")
        return found

    @property
    def environments(self) -> dict[str, Environment]:
        """The environments of the records by :func:`digest`, oldest first."""
        return self.load("environments.json") or {}

    def ask(self, asked: Asked, order: Sequence[str]) -> None:
        """Writes prompts.json; samples of other shards stay in it if they are of the same data.

        Args:
            order: ids of all samples of the task.
        """
        with FileLock(self.path / ".locks" / "prompts"):
            known = self.asked
            if known and known["data"] == asked["data"]:
                samples = known["samples"] | asked["samples"]
                asked = {
                    **asked,
                    "samples": {name: samples[name] for name in order if name in samples},
                }
            self.write("prompts.json", asked)

    def note(self, environment: Environment) -> str:
        """Adds an environment to environments.json; returns its key there."""
        name = digest(environment)
        with FileLock(self.path / ".locks" / "environments"):
            known = self.environments
            if name not in known:
                self.write("environments.json", known | {name: environment})
        return name


def _contradiction(record: Record, other: Record) -> str | None:
    """The field in which two records of one sample contradict each other; None if they agree."""
    both = record["status"] == other["status"] == "ok"
    for key in COMPARED if both else COMPARED[:2]:
        if key == "scores" and both:
            ours, theirs = record["scores"], other["scores"]
            if ours.keys() == theirs.keys() and all(
                math.isclose(ours[name], theirs[name], rel_tol=1e-6, abs_tol=1e-9) for name in ours
            ):
                continue
        if record.get(key) != other.get(key):
            return {"prompt_sha256": "prompt", "sample_sha256": "reference"}.get(key, key)
    return None


def row_name(label: str, budget: float | int | None, by: str | None, own: Mapping[str, Any]) -> str:
    """A row's name in tables and as a file: h2o@0.25, or buzz@512,stride=3.

    Args:
        own: the parameters that are not the defaults.
    """
    name = label if budget is None else f"{label}@{budget}{' mean' if by == 'mean' else ''}"
    name = ",".join([name, *(f"{key}={_plain(value)}" for key, value in own.items())])
    if len(name) > 120 or not re.fullmatch(r"[\w.+@=,\- ]+", name, re.ASCII):
        safe = re.sub(r"[^\w.+@=,\- ]+", "-", name, flags=re.ASCII)
        name = f"{safe[:100]}-{digest(name)}"
    return name


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "-".join(map(_plain, value))
    return str(value)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failed write into a RunFailed that names `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunFailed(
            f"{path} cannot be written: {reason}; put that right, and the same command goes on"
        ) from error


def checked(text: bytes | str, name: str) -> tuple[Any, str | None]:
    """Parses a record of the file `name`, or the whole file; returns it and its first problem."""
    try:
        content = yaml.load(text, Loader=LOADER) if name.endswith(".yaml") else parse(text)
    except (ValueError, yaml.YAMLError) as error:
        kind = "YAML" if name.endswith(".yaml") else "JSON"
        return None, f"not {kind} ({str(error).splitlines()[0]})"
    return content, problem_of(content, name)


def parse(text: bytes | str) -> Any:
    """Parses strict JSON: NaN, infinities and numbers beyond a float's range are refused.

    A byte-order mark at its start is skipped.

    Raises:
        ValueError: the text is no such JSON.
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
    """A file's lines, and the text behind the last line's end."""
    *whole, last = path.read_bytes().split(b"\n")
    return whole, last


def _is_whole(line: bytes) -> bool:
    """Whether a line without an end is a whole JSON object."""
    with suppress(ValueError):
        return isinstance(parse(line), dict)
    return False


def digest(content: Any) -> str:
    """Eight hexadecimal digits of a JSON-like value's hash; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def sha256(content: Any) -> str:
    """The first 16 hexadecimal digits of a JSON-like value's hash, such as a list of token ids."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def arithmetic_runs(values: list[int]) -> list[tuple[int, int, int]]:
    """Compresses a trace of cache lengths losslessly into runs of (first, count, increment).

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
    """The inverse of :func:`arithmetic_runs`."""
    return [first + i * increment for first, count, increment in runs for i in range(count)]
