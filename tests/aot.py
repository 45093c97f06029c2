"""Triton's compiler without a card: what the launch code would launch on a target that is named.

A driver that knows a compute capability and has no device takes the place of Triton's own, and a
launch becomes a compilation: this project's code chooses grids, blocks and arguments, Triton and
ptxas make the machine code, and figures are read off that.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

ROOT = Path(__file__).resolve().parents[1]
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
PRODUCT = r"(HMMA|[HQI]GMMA|UTC\w*MMA)\b.*"  # by tensor cores


class Target:
    """As much of a driver as a compilation needs."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass
class Launch:
    """A kernel by name, its grid, and what was compiled for it."""

    kernel: str
    grid: tuple[int, ...]
    compiled: Any

    @property
    def variant(self) -> str:
        return f"{self.kernel} {self.compiled.hash}"


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="aot-")


@contextlib.contextmanager
def compiling(capability: int) -> Iterator[list[Launch]]:
    """Every launch inside is compiled for a compute capability, 80 for 8.0, and noted."""
    launches: list[Launch] = []
    run = JITFunction.run

    def compiled(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        launches.append(Launch(self.fn.__name__, tuple(grid), kernel))
        return kernel

    before = driver.__dict__.copy()
    driver.set_active(Target(capability))
    try:
        with (
            patch.dict(os.environ, TRITON_CACHE_DIR=_scratch().name),
            patch.object(JITFunction, "run", compiled),
        ):
            yield launches
    finally:
        driver.__dict__.update(before)


def figures(launch: Launch) -> dict[str, Any]:
    """What the machine code of a launch says.

    Registers and stack (bytes) of a thread, shared memory (bytes) and warps of a block; `code`:
    how many instructions by name, such as ``LDGSTS.E.BYPASS.128``; the places of the last product
    and of the first shuffle of a sum, -1 for none.
    """
    file = Path(_scratch().name) / f"{launch.compiled.hash}.cubin"
    file.write_bytes(launch.compiled.asm["cubin"])
    used = dict(re.findall(r"\b(REG|STACK):(\d+)", _tool("cuobjdump", "-res-usage", file)))
    listing = _tool("nvdisasm", "-c", file)
    names = re.findall(r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\w+ +)?([A-Z][\w.]*)", listing)
    products = [at for at, name in enumerate(names) if re.fullmatch(f"{PRODUCT}|FFMA.*", name)]
    sums = [at for at, name in enumerate(names) if name.startswith("SHFL.BFLY")]
    return {
        "kernel": launch.kernel,
        "grid": launch.grid,
        "registers": int(used["REG"]),
        "stack": int(used["STACK"]),
        "shared": launch.compiled.metadata.shared,
        "warps": launch.compiled.metadata.num_warps,
        "code": Counter(names),
        "last_product": max(products, default=-1),
        "first_shuffle": min(sums, default=-1),
    }


def _tool(name: str, *arguments: str | Path) -> str:
    command = [str(TOOLS / name), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def kept(name: str, make: Callable[[], Any], *sources: str | Path) -> Any:
    """What `make` returns, from build/aot where these sources and this Triton made it before."""
    own = [__file__, *sources, *sorted((ROOT / "buzz/kernels").glob("*.py"))]
    digest = hashlib.sha256(b"".join(Path(source).read_bytes() for source in own)).hexdigest()[:16]
    file = ROOT / "build/aot" / f"{digest}-triton-{triton.__version__}" / f"{name}.json"
    if not file.exists():
        made = json.dumps(make())
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        part.write_text(made)
        part.replace(file)
    return json.loads(file.read_text())


def count(code: dict[str, int], pattern: str) -> int:
    """Instructions whose whole name fits a regular expression."""
    return sum(times for name, times in code.items() if re.fullmatch(pattern, name))


# Of a multiprocessor: KiB of shared memory for all blocks, threads, blocks; 65,536 registers.
PROCESSORS = {
    80: (164, 2048, 32),
    86: (100, 1536, 16),
    90: (228, 2048, 32),
    100: (228, 2048, 32),
    120: (100, 1536, 24),
}


def warps_at_a_time(figures: dict[str, Any], capability: int) -> int:
    """Warps that a multiprocessor holds at a time; 0: not even one block fits."""
    shared, threads, most = PROCESSORS[capability]
    warps = figures["warps"]
    registers = -(-figures["registers"] * 32 // 256) * 256 * warps
    by_shared = shared * 1024 // (figures["shared"] + 1024)  # the driver takes 1 KiB a block
    return warps * min(65536 // registers, by_shared, threads // (32 * warps), most)
