"""Scored attention in plain PyTorch: what every other implementation must equal.

Any device and dtype. Half precision is computed in float32, so that what an entry received does not
depend on how its logits were rounded. Blocks of query rows keep the extra memory at O(block * n).
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64  # queries whose scores exist at one time


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def scored_prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    *,
    observe: int | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`buzz.kernels.scored_prefill`."""
    batch, heads, queries, _ = query.shape
    kv_heads, keys = key.shape[1:3]
    group = heads // kv_heads
    first_observed = 0 if observe is None else queries - observe
    slot = torch.arange(keys, device=query.device)

    # Laid out as models want it: [B, q, Hq, Dv] in memory.
    output = query.new_empty(batch, queries, heads, value.shape[-1]).transpose(1, 2)
    received = torch.zeros(batch, kv_heads, keys, device=query.device)
    # One key head at a time, so that its block of scores stays in the processor's cache; a single
    # query has no such block.
    step = kv_heads if queries == 1 else 1
    for head in range(0, kv_heads, step):
        own = slice(head, head + step)
        members = slice(head * group, (head + step) * group)
        q = _wide(query[:, members]).unflatten(1, (step, group))
        k, v = _wide(key[:, own]).mT, _wide(value[:, own])
        for low in range(0, queries, BLOCK):
            high = min(low + BLOCK, queries)
            seen = keys - queries + high  # nothing right of it is visible to this block
            block = q[:, :, :, low:high] * scale
            scores = (block.flatten(2, 3) @ k[..., :seen]).view(*block.shape[:4], seen)
            future = torch.ones(high - low, high - low, dtype=torch.bool, device=q.device).triu(1)
            scores[..., low - high :].masked_fill_(future, -torch.inf)
            if starts is None:
                weights = scores.softmax(-1)
            else:  # a query that is itself padding sees nothing: 0 / 0
                padding = (slot[:seen] < starts[:, None])[:, None, None, None]
                weights = scores.masked_fill(padding, -torch.inf).softmax(-1).nan_to_num(0.0)
            counted = weights[:, :, :, max(0, first_observed - low) :]
            received[:, own, :seen] += counted.sum((2, 3))
            mixed = weights.flatten(2, 3) @ v[:, :, :seen]
            output[:, members, low:high] = mixed.view(batch, step * group, high - low, -1)
    return output, received


def scored_decode(
    query: Tensor, key: Tensor, value: Tensor, scale: float, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`buzz.kernels.scored_decode`."""
    return scored_prefill(query, key, value, scale, starts=starts)


def move(
    keys: Tensor, values: Tensor, index: Tensor, target: int, cos: Tensor, sin: Tensor
) -> None:
    """See :func:`buzz.kernels.move`."""
    half, count = cos.shape[-1], index.shape[-1]
    slots = index.unsqueeze(-1)
    kept = keys.gather(2, slots.expand(-1, -1, -1, keys.shape[-1]))
    first, second, rest = kept.split([half, half, keys.shape[-1] - 2 * half], -1)
    new = slice(target, target + count)
    keys[:, :, new] = torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)
    values[:, :, new] = values.gather(2, slots.expand(-1, -1, -1, values.shape[-1]))
