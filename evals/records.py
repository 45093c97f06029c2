"""The folder of a run: what was asked for, under what conditions, and what came out.

config.yaml        the resolved configuration
environment.json   versions, git revision, device
samples.jsonl      one JSON object per sample, appended and flushed as samples finish
fidelity.jsonl     with `kl=true`: per sample, how near its distributions are to the full cache's
summary.json       means over the samples
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from buzz.errors import ConfigError

Record = dict[str, Any]


class InUse(ConfigError):
    """Another process is at work in a run's folder."""


class RunFailed(RuntimeError):
    """A run that cannot go on, or whose measurements cannot be trusted; its text is one line."""


class RunFolder:
    """One run's folder. Records are only ever appended; of several with one id the last counts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.samples = path / "samples.jsonl"

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
                written = path.read_bytes()
                if not written.endswith(b"\n"):
                    os.truncate(path, written.rfind(b"\n") + 1)
            yield

    def read(self, name: str = "samples.jsonl") -> dict[str, Record]:
        """A file's records by sample id, without a last line that is torn, or being written.

        Raises:
            ConfigError: any other line is malformed.
        """
        path = self.path / name
        if not path.exists():
            return {}
        records: dict[str, Record] = {}
        *lines, _ = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                records[record["id"]] = record
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    "output", f"{path}:{number}", "malformed record; remove the folder"
                ) from error
        return records

    def append(self, record: Record, name: str = "samples.jsonl") -> None:
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
        text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
        temporary = self.path / f".{name}"
        with writing(self.path / name):
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(self.path / name)


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


def digest(content: Any) -> str:
    """Eight hexadecimal digits that name a JSON-like value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def environment(device: str, seed: int) -> dict[str, Any]:
    """What a result may depend on besides the configuration."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "seed": seed,
        "git_revision": _git_revision(),
        "versions": {name: _version(name) for name in ("torch", "transformers", "tokenizers")},
    }


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


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor, as the system names it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git_revision() -> str | None:
    """The checkout's commit, with ``-dirty`` if files differ from it; None outside git."""
    root = Path(__file__).parent
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
