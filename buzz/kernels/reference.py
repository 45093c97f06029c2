"""Scored attention in plain PyTorch: what every other implementation must equal.

Any device and dtype. Half precision is computed in float32, so that what an entry received does not
depend on how its logits were rounded. Blocks of query rows keep the extra memory at O(block * n).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Leading(NamedTuple):
    """Keys that a move turns at once from how they came, and not step by step.

    Attributes:
        source: [rows, H, R, D], as they came.
        positions: int64 [rows, H, R], those that `source` is rotated to.
        position: the one that the first of them moves to.
        frequencies: float32 [R / 2].
    """

    source: Tensor
    positions: Tensor
    position: int
    frequencies: Tensor


@dataclasses.dataclass
class Move:
    """The arguments of one :func:`buzz.kernels.move`."""

    source: Sequence[Tensor]
    target: Sequence[Tensor]
    index: Tensor
    to: int
    shift: int
    turns: tuple[Tensor, Tensor] | None = None
    rows: Tensor | None = None
    interleaved: bool = False
    leading: Leading | None = None


BLOCK = 64  # queries whose scores exist at one time
BEHIND = 4  # bytes of an entry's scale, behind its numbers


def quantized(x: Tensor) -> Tensor:
    """See :func:`buzz.kernels.quantized`."""
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True) / 127
    numbers = (x / scale).nan_to_num(0, 0, 0).round().to(torch.int8)  # 0 / 0, where all are 0
    own = scale.clone(memory_format=torch.contiguous_format)
    return torch.cat([numbers, own.view(torch.int8)], -1)


def widened(x: Tensor) -> Tensor:
    """See :func:`buzz.kernels.widened`."""
    if x.dtype != torch.int8:
        return x
    scale = x[..., -BEHIND:].clone(memory_format=torch.contiguous_format).view(torch.float32)
    return x[..., :-BEHIND] * scale


def width(x: Tensor) -> int:
    """See :func:`buzz.kernels.width`."""
    return x.shape[-1] - (BEHIND if x.dtype == torch.int8 else 0)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else widened(x)


def softmax(logits: Tensor, sinks: Tensor | None) -> Tensor:
    """Over the last dimension; of those that have a sink it takes its share, and is left out.

    Args:
        logits: [B, Hkv, Hq // Hkv, ..., n].
        sinks: [Hq].
    """
    if sinks is None:
        return logits.softmax(-1)
    each = sinks.to(logits.dtype).view(*logits.shape[1:3], *[1] * (logits.dim() - 3))
    return torch.cat([logits, each.expand(*logits.shape[:-1], 1)], -1).softmax(-1)[..., :-1]


def scored_prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    *,
    observe: int | None = None,
    decay: float = 1.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`buzz.kernels.scored_prefill`."""
    batch, heads, queries, _ = query.shape
    kv_heads, keys = key.shape[1:3]
    group = heads // kv_heads
    first_observed = 0 if observe is None else queries - observe

    # Laid out as models want it: [B, q, Hq, Dv] in memory.
    output = query.new_empty(batch, queries, heads, width(value)).transpose(1, 2)
    received = torch.zeros(batch, kv_heads, keys, device=query.device)
    # One key head at a time, so that its block of scores stays in the processor's cache.
    for head in range(kv_heads):
        own = slice(head, head + 1)
        members = slice(head * group, (head + 1) * group)
        q = _wide(query[:, members])[:, None]
        k, v = _wide(key[:, own]).mT, _wide(value[:, own])
        for low in range(0, queries, BLOCK):
            high = min(low + BLOCK, queries)
            seen = keys - queries + high  # nothing right of it is visible to this block
            block = q[:, :, :, low:high] * scale
            scores = (block.flatten(2, 3) @ k[..., :seen]).view(*block.shape[:4], seen)
            future = torch.ones(high - low, high - low, dtype=torch.bool, device=q.device).triu(1)
            scores[..., low - high :].masked_fill_(future, -torch.inf)
            weights = softmax(scores, None if sinks is None else sinks[members])
            counted = weights[:, :, :, max(0, first_observed - low) :]
            if decay != 1:
                age = torch.arange(queries - 1 - low, queries - 1 - high, -1, device=q.device)
                counted = counted * (decay**age)[high - low - counted.shape[3] :, None]
            received[:, own, :seen] += counted.sum((2, 3))
            mixed = weights.flatten(2, 3) @ v[:, :, :seen]
            output[:, members, low:high] = mixed.view(batch, group, high - low, -1)
    return output, received


def scored_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    starts: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`buzz.kernels.scored_decode`."""
    batch, heads, _, _ = query.shape
    kv_heads, keys = key.shape[1:3]
    scores = _wide(query).view(batch, kv_heads, heads // kv_heads, -1) * scale @ _wide(key).mT
    if starts is not None:
        absent = torch.arange(keys, device=query.device) < starts[:, None]
        scores = scores.masked_fill(absent[:, None, None], -torch.inf)
    weights = softmax(scores, sinks)
    output = (weights @ _wide(value)).view(batch, heads, 1, -1)
    return output.to(query.dtype), weights.sum(2).float()


def append(
    buffers: Sequence[Tensor],
    key: Tensor,
    value: Tensor,
    slot: int,
    token: int,
    padding: Tensor | None = None,
) -> None:
    """See :func:`buzz.kernels.append`."""
    keys, values, positions, *scores = buffers
    own = slice(slot, slot + 1)  # torch.compile makes a graph for every index, and one for slices
    keys[:, :, own] = key
    values[:, :, own] = value
    positions[:, :, own] = token if padding is None else (token - padding)[:, None, None]
    for tensor in scores:
        tensor[:, :, own] = 0


def step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    scores: Tensor | None,
    bounds: Tensor,
    scale: float,
    adds: bool,
    sinks: Tensor | None = None,
) -> Tensor:
    """See :func:`buzz.kernels.step`; over the whole capacity: nothing waits for `bounds`."""
    if keys.dtype == torch.int8:
        key, value = quantized(key), quantized(value)
    start, end, token = bounds[:, :, None, None]
    slots = torch.arange(keys.shape[2], device=keys.device)
    new = slots == end - 1
    keys.copy_(torch.where(new[..., None], key, keys))
    values.copy_(torch.where(new[..., None], value, values))
    positions.copy_(torch.where(new, token.to(positions.dtype), positions))
    absent = (slots < start) | (slots >= end)
    batch, heads, _, _ = query.shape
    logits = _wide(query).view(batch, keys.shape[1], -1, query.shape[-1]) * scale @ _wide(keys).mT
    weights = softmax(logits.masked_fill(absent[:, :, None], -torch.inf), sinks)
    if scores is not None:
        received = weights.sum(2).float()
        scores.copy_(scores.masked_fill(new, 0) + received if adds else received)
    output = (weights @ _wide(values)).view(batch, 1, heads, -1).transpose(1, 2)
    return output.to(query.dtype)


def move(
    source: Sequence[Tensor],
    target: Sequence[Tensor],
    index: Tensor,
    to: int,
    shift: int,
    turns: tuple[Tensor, Tensor] | None = None,
    *,
    rows: Tensor | None = None,
    interleaved: bool = False,
    leading: Leading | None = None,
) -> None:
    """See :func:`buzz.kernels.move`."""
    size, heads, count = index.shape
    batch = torch.arange(size, device=index.device) if rows is None else rows
    where = batch[:, None, None], torch.arange(heads, device=index.device)[:, None], index
    picked = [tensor[where] for tensor in source]
    if turns is not None:
        turn = shift + torch.arange(count, device=index.device) - index
        picked[0] = rotate(picked[0], turns[0][turn], turns[1][turn], interleaved)
    if leading is not None:
        residents = leading.source.shape[2]
        now = leading.position + torch.arange(residents, device=index.device)
        angle = (now - leading.positions)[..., None] * leading.frequencies.double()
        angle = angle.remainder(2 * torch.pi).float()
        turned = rotate(leading.source, angle.cos(), angle.sin(), interleaved)
        picked[0][:, :, :residents] = turned
    for tensor, entries in zip(target, picked, strict=True):
        if rows is None:
            tensor[:, :, to : to + count] = entries
        else:
            tensor[rows, :, to : to + count] = entries


def originals(
    keys: Tensor,
    index: Tensor,
    first: int,
    position: int,
    known: tuple[Tensor, Tensor] | None = None,
    *,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`buzz.kernels.originals`."""
    size, heads, _ = index.shape
    batch = torch.arange(size, device=index.device) if rows is None else rows
    head = torch.arange(heads, device=index.device)[:, None]
    found = keys[batch[:, None, None], head, first + index]
    positions = position + index
    if known is not None:
        place = index.clamp(max=known[0].shape[2] - 1)
        is_known = index < known[0].shape[2]
        earlier = known[0].gather(2, place[..., None].expand_as(found))
        found = torch.where(is_known[..., None], earlier, found)
        positions = torch.where(is_known, known[1].gather(2, place), positions)
    return found, positions


def rotate(keys: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Keys [..., D] turned in their first R dimensions, in the precision of `cos` and `sin`.

    Formula: RoFormer, arXiv 2104.09864. Dimensions beyond R (partial rotary) are left alone.

    Args:
        cos, sin: [..., R / 2].
        interleaved: pairs are (0, 1), (2, 3), ... and not (0, R/2), (1, R/2 + 1), ...
    """
    half = cos.shape[-1]
    turned = keys[..., : 2 * half].to(cos.dtype)
    if interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return torch.cat([turned.to(keys.dtype), keys[..., 2 * half :]], dim=-1)
