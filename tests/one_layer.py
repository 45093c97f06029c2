"""An eviction layer without a model: numbers are fed, and attention is said."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from buzz.layer import EvictionLayer


def feed(layer: EvictionLayer, keys: Tensor, values: Tensor, queries: Tensor) -> None:
    """What a step brings, each [batch, heads, new, D]."""
    layer.update(keys, values)
    layer.keep_queries(queries, 0.5)


def finish(layer: EvictionLayer, received: Tensor | None) -> None:
    """The end of a step; where a prompt is read a second time, that of the pass."""
    layer.after_attention(received)
    if layer.awaits_repetition:
        layer.judge(torch.rand(held(layer).shape, generator=torch.Generator().manual_seed(0)))


@functools.cache  # the layer refers to it weakly
def projecting(heads: int) -> torch.nn.Module:
    """What stands for an attention module with an output projection."""
    module = torch.nn.Module()
    module.o_proj = torch.nn.Linear(4 * heads, 8, bias=False)
    return module


def held(layer: EvictionLayer) -> Tensor:
    """The tokens whose entries it holds, [batch, heads, held]."""
    assert layer.store is not None
    return layer.view(layer.store.positions)
