"""Decoding never waits for a device: no number of it is read, no copy to it is waited for.

A `meta` device stands for a GPU: its tensors have no numbers, so that whoever reads one fails.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from methods import METHODS
from tiny import tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from buzz import EvictionCache

# KVzip reads its prompt a second time, and looks at its mask before.
STEPS = 16
NAMES = [name for name in METHODS if name != "kvzip"]


class Transfers(TorchDispatchMode):
    """Notes copies from one device to another that the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.awaited: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        result = func(*args, **kwargs)
        if name in ("_to_copy", "copy_"):
            source, target = (args[0], result) if name == "_to_copy" else (args[1], args[0])
            waits = not kwargs.get("non_blocking", len(args) > 2 and args[2])
            if isinstance(source, Tensor) and source.device != target.device and waits:
                self.awaited.append(f"{name} of {list(source.shape)}")
        return result


def decode(name: str, steps: int) -> tuple[EvictionCache, list[str]]:
    """A prompt and tokens on the device; what was waited for after the prompt."""
    model = tiny()
    cache = EvictionCache(model, METHODS[name])
    model.to("meta")
    ids = torch.zeros(1, 60, dtype=torch.int64, device="meta")
    with torch.no_grad():
        model(ids, past_key_values=cache)
        with Transfers() as transfers:
            for _ in range(steps):
                model(ids[:, :1], past_key_values=cache)
    return cache, transfers.awaited


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_decoding_does_not_wait_for_the_device(name: str) -> None:
    cache, awaited = decode(name, STEPS)
    assert awaited == []
    policy = METHODS[name].for_layer(0, 3)
    assert cache.lengths[0] == policy.lengths([60] + [1] * STEPS)[-1]
    assert policy.evicts != "always" or cache.evictions[0] > 1  # one more than the prompt's


def test_waiting_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    select = type(METHODS["h2o"]).select
    monkeypatch.setattr(type(METHODS["h2o"]), "select", lambda *a: print(select(*a).tolist()))
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        decode("h2o", 1)
    monkeypatch.undo()
    on_host = torch.arange(2).expand(1, 1, -1)
    streaming = type(METHODS["streaming_llm"])
    monkeypatch.setattr(streaming, "select", lambda *a: on_host.to("meta"))
    assert decode("streaming_llm", 1)[1] == ["_to_copy of [1, 1, 2]"] * 3
