"""How busy other processes are, and whether that counts."""

from __future__ import annotations

import os
import sys
import time
from types import SimpleNamespace

import psutil
import pytest

import evals.launch
from evals.results import environment
from evals.results.environment import Neighbours, busy, machine, process


class System:
    """A machine of some cores whose counters are set by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cores: int = 4) -> None:
        self.cores, self.clock, self.own, self.others = cores, 100.0, 0.0, 0.0
        monkeypatch.setattr(environment.psutil, "cpu_count", lambda: cores)
        monkeypatch.setattr(environment.psutil, "cpu_times", self.times)
        monkeypatch.setattr(environment.time, "perf_counter", lambda: self.clock)
        monkeypatch.setattr(environment.time, "process_time", lambda: self.own)

    def times(self) -> SimpleNamespace:
        used = self.own + self.others
        known = {"user": 0.7 * used, "steal": 0.3 * used, "guest": 0.5 * used, "iowait": 1.0}
        idle = self.cores * self.clock - used - 1.0
        return SimpleNamespace(_asdict=lambda: known | {"idle": idle})

    def go_on(self, seconds: float, own: float, others: float) -> None:
        self.clock += seconds
        self.own += own * seconds
        self.others += others * seconds


def test_load_is_what_others_use_since_the_sample_before(monkeypatch) -> None:
    system = System(monkeypatch)
    neighbours = Neighbours()
    system.go_on(5, own=2, others=0)
    assert neighbours.load() == pytest.approx(0)
    system.go_on(3, own=1, others=1.5)
    assert neighbours.load() == pytest.approx(1.5)
    system.go_on(2, own=4, others=0)
    assert neighbours.load() == pytest.approx(0)


def test_on_a_card_attention_is_that_of_the_benchmark(monkeypatch) -> None:
    """Set by the command for all that it starts, and recorded where it counts."""
    assert evals.launch and os.environ["TORCH_CUDNN_SDPA_DEPRIORITIZED"] == "1"
    monkeypatch.setattr(environment.torch.cuda, "get_device_name", lambda device: "A card")
    told = environment.environment("cuda:0", 0, 1)
    assert told["cudnn_attention_deprioritized"] == "1" and machine(told) == "A card"
    assert "cudnn_attention_deprioritized" not in environment.environment("cpu", 0, 1)


def test_short_samples_are_watched_for_a_second(monkeypatch) -> None:
    system = System(monkeypatch)
    neighbours = Neighbours()
    system.go_on(0.1, own=1, others=3)
    assert neighbours.load() is None  # ten ticks of the system's clock tell nothing
    for _ in range(10):
        system.go_on(0.3, own=1, others=0.5)
        load = neighbours.load()
    assert load == pytest.approx(0.5)
    system.go_on(0.1, own=1, others=2.5)
    assert 0.5 < neighbours.load() < 1  # over that second


def test_counters_that_stand_still_say_nothing(monkeypatch) -> None:
    system = System(monkeypatch)
    neighbours = Neighbours()
    fixed = system.times()
    monkeypatch.setattr(environment.psutil, "cpu_times", lambda: fixed)
    system.clock += 5
    assert neighbours.load() is None and not busy(None, 4, 4)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the real /proc/stat")
def test_real_neighbours_are_seen_and_the_process_itself_is_not() -> None:
    """Whatever else runs: cores are kept busy here, up to eight, one by the process itself."""
    cores = psutil.cpu_count()
    spin = [sys.executable, "-c", "while True: pass"]
    beside = [psutil.Popen(spin) for _ in range(min(cores, 8) - 1)]
    try:
        time.sleep(0.2)  # until they have started

        def used() -> tuple[float, float]:
            """Seconds of a core that this process has had, and that those beside it have."""
            return time.process_time(), sum(sum(p.cpu_times()[:2]) for p in beside)

        neighbours, start, before = Neighbours(), time.perf_counter(), used()
        while time.perf_counter() < start + 1.2:
            pass
        load, wall, after = neighbours.load(), time.perf_counter() - start, used()
    finally:
        for process in beside:
            process.kill()
            process.wait()
    if load is None:
        pytest.skip("the counters of this system stand still")
    own, theirs = ((b - a) / wall for a, b in zip(before, after, strict=True))
    assert load > theirs - 0.2
    assert load < cores - own + 0.2


@pytest.mark.parametrize(
    ("load", "threads", "cores", "disturbs"),
    [
        (0.15, 2, 2, False),
        (0.25, 2, 2, True),
        (0.25, 1, 2, True),  # caches and clock are shared
        (0.25, 32, 32, True),  # threads wait for the slowest
        (1.0, 16, 32, False),
        (4.0, 16, 32, True),
        (1.0, 31, 32, False),
        (1.1, 31, 32, True),
    ],
)
def test_what_disturbs(load: float, threads: int, cores: int, disturbs: bool) -> None:
    assert busy(load, threads, cores) is disturbs


def test_machines_are_told_apart_by_device_or_processor_and_threads() -> None:
    cpu = {"device": "cpu", "cpu": "a CPU", "threads": 1}
    assert machine(cpu) == "a CPU, 1 thread" and machine(cpu | {"threads": 2}) != machine(cpu)
    assert machine(cpu | {"device": "NVIDIA H100"}) == "NVIDIA H100"
    assert machine({}) == "unknown"


def test_a_process_has_one_name_and_a_fork_another() -> None:
    assert process() == process() and len(process()) == 8
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.write(write, process().encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 8).decode() != process()
