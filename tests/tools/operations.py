"""Counts what a decoding step asks of a device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import baselines  # noqa: F401  (registers its methods)
from buzz import CACHE_ARGUMENT, kernels

# Launches that a kernel of this project takes on CUDA; on the CPU they are calls that PyTorch does
# not see.
LAUNCHES = {
    "scored_decode": 2,
    "scored_prefill": 2,
    "move": 1,
    "step": 3,
    "append": 1,
    "originals": 1,
}
# What only describes memory, or makes a place for results.
FREE = (
    "view", "reshape", "expand", "slice", "select", "transpose", "t", "permute", "unsqueeze",
    "squeeze", "alias", "detach", "split", "unbind", "as_strided", "empty", "new_empty",
    "empty_strided", "empty_like", "_unsafe_view", "unfold", "movedim", "new_empty_strided",
)  # fmt: skip
READS = ("_local_scalar_dense", "item", "is_nonzero", "equal")


class Operations(TorchDispatchMode):
    """Counts what a step asks a device to do.

    Attributes:
        launches: by operation, views and empty tensors left out.
        waits: reads of a number from a tensor, and tensors made of the host's data.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self._made = torch.tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        result = func(*args, **(kwargs or {}))
        if name in READS:
            self.waits[name] += 1
        elif name not in FREE and name != "lift_fresh":
            self.launches[name] += 1
        return result

    def __enter__(self) -> Operations:
        def tensor(*args: Any, **kwargs: Any) -> Tensor:
            self.waits["torch.tensor"] += 1
            return self._made(*args, **kwargs)

        self._kernels = {
            name: getattr(kernels, name) for name in LAUNCHES if hasattr(kernels, name)
        }
        for name, kernel in self._kernels.items():
            setattr(kernels, name, self._counted(name, kernel))
        torch.tensor = tensor
        self._outruns = kernels.outruns_stock
        kernels.outruns_stock = lambda query: False  # as on CUDA
        super().__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        torch.tensor = self._made
        kernels.outruns_stock = self._outruns
        for name, kernel in self._kernels.items():
            setattr(kernels, name, kernel)

    def _counted(self, name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.launches[f"buzz.{name}"] += LAUNCHES[name]
            with torch.utils._python_dispatch._disable_current_modes():
                return kernel(*args, **kwargs)

        return counted


def operations(model: nn.Module, cache: Any, token: Tensor, **inputs: Any) -> Operations:
    """What the next step does."""
    with torch.no_grad(), Operations() as counted:
        model(token, **{CACHE_ARGUMENT: cache}, **inputs)
    return counted
