"""CUDA devices that are not there: tensors with a device, a type and a shape, and no numbers.

The real Python code runs on PyTorch's fake tensors. Whoever reads a number, mixes devices or
launches a kernel on another device than its tensors' fails; what the host would wait for, and each
operation that a card would run, is noted.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
import subprocess
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from buzz import inputs, kernels
from buzz.kernels import triton_scores

ROOT = Path(__file__).resolve().parents[1]
GRID = (2**31, 2**16, 2**16)
# A build of PyTorch without CUDA cannot make such a device the current one, not even of fakes.
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
}
"""
# Answers depend on numbers: the host waits for them.
WAITS = {
    "_local_scalar_dense", "bincount", "equal", "is_nonzero", "masked_select", "nonzero",
    "unique_dim", "unique_consecutive", "_unique2",
}  # fmt: skip
# Another look at the same memory, or memory alone: nothing runs.
VIEWS = {
    "alias", "as_strided", "chunk", "detach", "diagonal", "empty", "empty_like", "empty_strided",
    "expand", "lift_fresh", "new_empty", "new_empty_strided", "permute", "reshape",
    "_reshape_alias", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose",
    "unbind", "unfold", "unsqueeze", "_unsafe_view", "view",
}  # fmt: skip


@functools.cache
def available() -> bool:
    """Whether fakes of CUDA tensors work here."""
    if torch.version.cuda is not None:
        return True
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        return False
    torch_folder = Path(torch.__file__).parent
    library = ROOT / "build" / f"guard-{torch.__version__}.so"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        part = library.with_suffix(f".{os.getpid()}")
        command = [compiler, "-std=c++20", "-shared", "-fPIC", f"-I{torch_folder}/include"]
        command += ["-x", "c++", "-", "-o", str(part), f"-L{torch_folder}/lib", "-lc10"]
        done = subprocess.run(command, input=GUARD, text=True, capture_output=True)
        if done.returncode:
            return False
        part.replace(library)
    ctypes.CDLL(str(library))
    return True


def _place() -> str:
    """The line of this project that is running."""
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.startswith(str(ROOT)) and "/tests/" not in frame.filename:
            name = frame.filename.removeprefix(f"{ROOT}/")
            if not name.startswith("."):
                return f"{name}:{frame.lineno}"
    return "the model"


class Noted(TorchDispatchMode):
    """What a card would have been asked.

    Attributes:
        waits: for what the host would have waited, and where.
        operations: how often each ran.
        launches: of Triton kernels, with their grids.
    """

    def __init__(self, answers: bool) -> None:
        super().__init__()
        self.answers = answers
        self.waits: Counter[str] = Counter()
        self.operations: Counter[str] = Counter()
        self.launches: list[tuple[str, tuple[int, ...]]] = []

    def clear(self) -> None:
        for each in (self.waits, self.operations, self.launches):
            each.clear()

    def wait(self, what: str) -> None:
        self.waits[f"{what} at {_place()}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if name in WAITS or name == "repeat_interleave" and func._overloadname == "Tensor":
            self.wait(name)
        if name in ("index", "index_put_", "index_put"):
            chosen = [index for index in args[1] if index is not None]
            if any(index.dtype == torch.bool for index in chosen):
                self.wait("an index by truth")
            if any(index.device.type == "cpu" != args[0].device.type for index in chosen):
                self.wait("an index that is sent")
        if self.answers and name in ("_local_scalar_dense", "equal", "allclose", "is_nonzero"):
            if name != "_local_scalar_dense":
                return True
            kind = args[0].dtype
            return False if kind == torch.bool else 1.0 if kind.is_floating_point else 0
        result = func(*args, **kwargs)
        if name in ("to", "_to_copy", "copy_"):  # the first in inference mode
            source, target = (args[1], args[0]) if name == "copy_" else (args[0], result)
            names = [argument.name for argument in func._schema.arguments]
            non_blocking = {**dict(zip(names, args, strict=False)), **kwargs}.get("non_blocking")
            kinds = source.device.type, target.device.type
            if kinds == ("cuda", "cpu") or (kinds == ("cpu", "cuda") and not non_blocking):
                self.wait(f"a copy {kinds[0]} to {kinds[1]}, {list(source.shape)},")
        if name not in VIEWS:
            self.operations[name] += 1
        return result


@contextlib.contextmanager
def card(capability: int = 90, answers: bool = False) -> Iterator[Noted]:
    """Inside, devices ``cuda:0`` and on take fake tensors.

    Args:
        answers: whoever reads a number gets 1.0, 0 or False, and whoever compares tensors True.
    """
    noted, current, made = Noted(answers), [0], torch.tensor

    @contextlib.contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        current.append(tensor.device.index if tensor.is_cuda else current[-1])
        try:
            yield
        finally:
            current.pop()

    def launch(self: Any, *given: Any, grid: Any, warmup: bool, **options: Any) -> None:
        name = self.fn.__name__
        for tensor in given:
            if isinstance(tensor, Tensor):
                assert tensor.is_cuda, f"{name} is given a tensor on {tensor.device}"
                assert tensor.device.index == current[-1], (
                    f"{name} is launched on cuda:{current[-1]}, a tensor is on {tensor.device}"
                )
        assert all(0 < size < most for size, most in zip(grid, GRID)), f"{name}: grid {grid}"  # noqa: B905
        noted.launches.append((name, tuple(grid)))
        noted.operations[name] += 1

    def tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        host = made(data, *args, device="cpu", **kwargs)
        host.constant = None  # else PyTorch computes with its numbers by itself
        return host.to(device or torch.empty(0).device)

    for known in (kernels.capability, inputs._sent):
        known.cache_clear()
    with (
        patch.object(JITFunction, "run", launch),
        patch.object(torch, "tensor", tensor),
        patch.object(torch.cuda, "device_of", device_of),
        patch.object(torch.cuda, "get_device_capability", lambda *_: divmod(capability, 10)),
        patch.object(torch.cuda, "get_device_name", lambda *_: f"A card of sm_{capability}"),
        patch.object(triton_scores, "can_use_flash_attention", lambda _: True),
        FakeTensorMode(allow_non_fake_inputs=True),
        noted,
    ):
        try:
            yield noted
        finally:
            for known in (kernels.capability, inputs._sent):
                known.cache_clear()


def send(model: Any, place: Callable[[str], str]) -> None:
    """Make a model's parameters and buffers fakes; `place` names the device of each."""
    for path, module in model.named_modules():
        for tensors in (module._parameters, module._buffers):
            for name, value in tensors.items():
                if value is None:
                    continue
                device = place(f"{path}.{name}")
                fake = torch.empty_strided(
                    value.shape, value.stride(), dtype=value.dtype, device=device
                )
                is_parameter = tensors is module._parameters
                tensors[name] = torch.nn.Parameter(fake, False) if is_parameter else fake
