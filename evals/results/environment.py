"""Under what conditions a sample is measured: versions, machine, threads, other processes."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections import deque
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from uuid import uuid4

import psutil
import torch

from evals.results.record import Environment

PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "rouge", "rouge-score", "lm-eval")
WINDOW = 1.0  # seconds that other processes are watched at least: /proc/stat counts in 10 ms
DISTURBING = 0.2  # cores

_processes: dict[int, str] = {}


def environment(device: str, seed: int, parameters: int) -> Environment:
    """What a result may depend on besides the configuration.

    Args:
        parameters: of the model, in all.
    """
    found: Environment = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "seed": seed,
        "model_parameters": parameters,
        "git_revision": _git_revision(),
        "versions": {name: package_version(name) for name in PACKAGES},
    }
    if device.startswith("cuda"):  # timings depend on it
        deprioritized = os.environ.get("TORCH_CUDNN_SDPA_DEPRIORITIZED", "0")
        found["cudnn_attention_deprioritized"] = deprioritized
    return found


def machine(environment: Environment) -> str:
    """What timings depend on, in words: runs with the same may be compared in speed."""
    device = environment.get("device")
    if device != "cpu":
        return str(device or "unknown")
    threads = environment.get("threads")
    return f"{environment.get('cpu')}, {threads} thread{'s' if threads != 1 else ''}"


def process() -> str:
    """Eight random digits that name this process in its records."""
    return _processes.setdefault(os.getpid(), uuid4().hex[:8])


def busy(load: float | None, threads: int, cores: int) -> bool:
    """Whether other processes that keep `load` cores busy disturb timings on `threads` threads.

    They do if they take more than a tenth of the machine, or more than the threads leave free, and
    in any case more than DISTURBING: threads that compute one product wait for the slowest, so a
    single core that is shared slows down all of them.
    """
    return load is not None and load > max(DISTURBING, min(cores / 10, cores - threads))


class Neighbours:
    """Watches how busy the other processes of this machine are.

    Time that a hypervisor gives to other machines counts too; what this process itself uses, in all
    its threads, does not, nor does waiting for disks.
    """

    def __init__(self) -> None:
        self._marks = deque([_mark()])

    def load(self) -> float | None:
        """Cores that they kept busy, on average, since the call before; None if nobody knows.

        Short of WINDOW seconds, since an earlier call.
        """
        now = _mark()
        while len(self._marks) > 1 and now[0] - self._marks[1][0] >= WINDOW:
            self._marks.popleft()
        before = self._marks[0]
        self._marks.append(now)
        wall, used, counted = (b - a for a, b in zip(before, now, strict=True))
        cores = psutil.cpu_count() or 1
        if wall < WINDOW / 2 or counted < 0.5 * wall * cores:
            return None  # too short for the system's ticks; a sandbox, whose counters stand still
        return round(min(max(0.0, used / wall), cores), 3)


def _mark() -> tuple[float, float, float]:
    """Seconds: on the clock; of all cores, busy with other processes; of all cores, counted."""
    times = psutil.cpu_times()._asdict()
    counted = sum(times.values()) - times.get("guest", 0.0) - times.get("guest_nice", 0.0)
    idle = times["idle"] + times.get("iowait", 0.0)
    return time.perf_counter(), counted - idle - time.process_time(), counted


def package_version(package: str) -> str | None:
    """A package's version; None where it is not installed."""
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
    """The checkout's commit, with ``-dirty`` if files differ from it; None outside git.

    An installed package may lie within a repository that is not its own.
    """
    own = ["git", "ls-files", "--error-unmatch", Path(__file__).name]
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        for command in (own, describe):
            where = {"cwd": Path(__file__).parent, "capture_output": True, "text": True}
            result = subprocess.run(command, check=True, **where)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
