"""The conditions of a measurement: versions, machine, threads, load by other processes."""

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
WINDOW = 1.0  # least seconds over which load is measured: /proc/stat counts in steps of 10 ms
DISTURBING = 0.2  # cores; a smaller load disturbs no timings

_processes: dict[int, str] = {}


def environment(device: str, seed: int, parameters: int) -> Environment:
    """Everything besides the configuration that a result may depend on.

    Args:
        parameters: number of the model's parameters.
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
    """The machine in words. Timings are compared only within one machine."""
    device = environment.get("device")
    if device != "cpu":
        return str(device or "unknown")
    threads = environment.get("threads")
    return f"{environment.get('cpu')}, {threads} thread{'s' if threads != 1 else ''}"


def process() -> str:
    """Eight random hexadecimal digits that name this process in its records."""
    return _processes.setdefault(os.getpid(), uuid4().hex[:8])


def busy(load: float | None, threads: int, cores: int) -> bool:
    """Whether other processes that keep `load` cores busy disturb timings on `threads` threads.

    They do if they take more than a tenth of the machine, or more cores than the threads leave
    free. A load up to DISTURBING never counts. One shared core is enough to slow down all threads,
    because the threads of one matrix product wait for the slowest.
    """
    return load is not None and load > max(DISTURBING, min(cores / 10, cores - threads))


class Neighbours:
    """Measures the load by other processes of this machine.

    Time that a hypervisor gives to other machines counts as load. Time of this process, in all its
    threads, and waiting for disks do not.
    """

    def __init__(self) -> None:
        self._times = deque([_times()])

    def load(self) -> float | None:
        """Mean number of cores that others kept busy since the previous call; None if unknown.

        If that call is less than WINDOW seconds ago, since an earlier one.
        """
        now = _times()
        while len(self._times) > 1 and now[0] - self._times[1][0] >= WINDOW:
            self._times.popleft()
        before = self._times[0]
        self._times.append(now)
        wall, used, counted = (b - a for a, b in zip(before, now, strict=True))
        cores = psutil.cpu_count() or 1
        if wall < WINDOW / 2 or counted < 0.5 * wall * cores:
            return None  # too short for the system's ticks, or a sandbox without such counters
        return round(min(max(0.0, used / wall), cores), 3)


def _times() -> tuple[float, float, float]:
    """Seconds: on the clock; of all cores, busy with other processes; of all cores, in all."""
    times = psutil.cpu_times()._asdict()
    counted = sum(times.values()) - times.get("guest", 0.0) - times.get("guest_nice", 0.0)
    idle = times["idle"] + times.get("iowait", 0.0)
    return time.perf_counter(), counted - idle - time.process_time(), counted


def package_version(package: str) -> str | None:
    """A package's version; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The system's name of the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git_revision() -> str | None:
    """The checkout's commit, with ``-dirty`` if files differ from it; None outside a checkout.

    An installed package may lie within another project's repository, which does not count.
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
