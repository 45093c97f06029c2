"""What leaves a layer: how many entries stay, which ones, and their move to where they go on.

Two ways to count: an *entry's* number is its place among those that its row holds, from 0; a *slot*
is a place in the store's buffers. A row's first entry lies in slot `store.end - held`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from buzz import kernels
from buzz.entries import Entries, Rows
from buzz.inputs import on
from buzz.policy import Policy
from buzz.rope import Rope
from buzz.store import Store, with_spare

Lengths = tuple[int, Any]  # entries held, and the policy's state


@dataclass
class Group:
    """Rows of a batch that evict in step for ever, because their prompts are equally long.

    Attributes:
        rows: their indices in the batch.
        padding: padding tokens before their first token.
        first_position: the position that the model gave to their first token.
        seen: tokens of a row so far, without padding.
        held: entries that a row holds.
        state: what the policy remembers of earlier steps, see :meth:`Policy.survivors`.
        evictions: evictions so far.
        cut: tokens that had been seen at the last of them.
        source: keys [rows, kv_heads, residents, head_dim] of the leading entries as they were
            before they first moved, where turning them again and again would add up errors.
        source_positions: int64 [rows, kv_heads, residents], the positions `source` is rotated to.
    """

    rows: list[int]
    padding: int = 0
    first_position: int = 0
    seen: int = 0
    held: int = 0
    state: Any = 0
    evictions: int = 0
    cut: int = 0
    source: Tensor | None = None
    source_positions: Tensor | None = None

    def select_rows(self, origin: Sequence[int], device: torch.device) -> None:
        """Row i of the batch is now what row `origin[i]` was; of its rows some may be left."""
        place = {row: number for number, row in enumerate(self.rows)}
        self.rows = [row for row, old in enumerate(origin) if old in place]
        if self.source is not None and self.source_positions is not None:
            picked = torch.tensor([place[origin[row]] for row in self.rows], dtype=torch.int64)
            self.source = self.source[picked.to(device)]
            self.source_positions = self.source_positions[picked.to(device)]

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.source, self.source_positions) if t is not None]


def plan(policy: Policy, groups: Sequence[Group]) -> list[Lengths] | None:
    """What the length recurrence says of each group; None when nothing happens to any."""
    now = [(group.held, group.state) for group in groups]
    after = [policy.survivors(*lengths) for lengths in now]
    return None if after == now else after


def evict(
    store: Store,
    idle: Store | None,
    groups: Sequence[Group],
    after: Sequence[Lengths],
    policy: Policy,
    rope: Rope,
    look: Callable[[Group, Rows], Entries],
) -> tuple[Store, Store | None]:
    """Thin every group to what `after` says.

    Args:
        idle: buffers that may be used again.
        after: what :func:`plan` returned.
        rope: how the layer rotates its keys.
        look: what the policy may look at, of a group and its rows.

    Returns:
        The store that holds what stays, and the buffers that are idle still.
    """
    longest = max([kept for kept, _ in after])
    target = store
    leaving = any([kept < group.held for group, (kept, _) in zip(groups, after, strict=True)])
    if leaving and not (store.owned and store.capacity <= 2 * with_spare(longest)):
        if idle is not None and idle.fits(store, longest):
            target, idle = idle.cleared(), None
        else:
            target = Store.like(store, with_spare(longest))
        target.end = longest
    for group, (kept, state) in zip(groups, after, strict=True):
        # Of what is whole, the policy may still have re-labelled its history.
        if kept < group.held or target is not store:
            rows: Rows = slice(None) if len(groups) == 1 else on(store.device, group.rows)
            tail = min(policy.protected, kept)
            if kept < group.held:
                scores = policy.score(look(group, rows))
                with _default(store.device):
                    chosen = policy.select(group.held, group.state, scores)
                chosen = chosen.to(store.device, non_blocking=True)
                group.evictions += 1
                group.cut = group.seen
            else:
                chosen = torch.arange(kept - tail, device=store.device)
            chosen = chosen.expand(len(group.rows), store.keys.shape[1], kept - tail)
            _move(store, target, group, rows, chosen, tail, policy.resident, rope)
        group.held, group.state = kept, state
    return target, idle


def _default(device: torch.device) -> AbstractContextManager[Any]:
    """Tensors of a policy are made where the entries are, and not sent there step by step."""
    return nullcontext() if device.type == "cpu" else device


def _move(
    store: Store,
    target: Store,
    group: Group,
    rows: Rows,
    chosen: Tensor,
    tail: int,
    residents: int,
    rope: Rope,
) -> None:
    """Move what a group keeps to the end of `target`, its keys rotated to their new positions.

    Args:
        rows: the group's, as an index into the batch.
        chosen: int64 [rows, kv_heads, older], entries that stay of those before the tail.
        tail: last entries, which stay where they are.
        residents: how many leading entries the policy keeps for long.
    """
    kept = chosen.shape[-1] + tail
    if kept == tail and target is store:
        return  # what is left stays where it is
    first = store.end - group.held  # slot of the group's first entry
    to = target.end - kept
    dropped = group.held - kept
    leading = anew = None
    if rope.module is not None and not rope.static:
        anew = _turned_anew(store, group, rows, chosen, kept, rope)
    elif rope.module is not None and store.keys.dtype in (torch.float16, torch.bfloat16):
        leading = _residents(store, group, rows, chosen[..., :residents], kept, rope)
    turns = rope.table(dropped + 1, store.device) if dropped and rope.static else None
    tensors = store.tensors(), target.tensors()
    kernels.move(
        *tensors,
        first + chosen,
        to,
        first + dropped,
        turns,
        rows=None if isinstance(rows, slice) else rows,
        interleaved=rope.interleaved,
        leading=leading,
    )
    if anew is not None:
        target.keys[rows, :, to : to + anew.shape[2]] = anew
    if target is not store:
        for source, destination in zip(*tensors, strict=True):
            recent = source[rows, :, store.end - tail : store.end]
            destination[rows, :, target.end - tail : target.end] = recent


def _residents(
    store: Store, group: Group, rows: Rows, chosen: Tensor, kept: int, rope: Rope
) -> kernels.Leading | None:
    """Keys of half precision that must not be turned step by step: rounding errors would add up.

    Args:
        chosen: int64 [rows, kv_heads, residents], the leading entries that stay for long.
        kept: all that stay.
    """
    if not chosen.shape[-1]:
        return None
    _remember(store, group, rows, chosen)
    assert group.source is not None and group.source_positions is not None
    position = group.first_position + group.seen - kept
    frequencies = rope.frequencies().to(store.device)
    return kernels.Leading(group.source, group.source_positions, position, frequencies)


def _turned_anew(
    store: Store, group: Group, rows: Rows, chosen: Tensor, kept: int, rope: Rope
) -> Tensor | None:
    """All keys where frequencies change, because turns do not add up then.

    Args:
        chosen: int64 [rows, kv_heads, older], entries that stay.
        kept: with those that do not move.

    Returns:
        [rows, kv_heads, older, head_dim], or None if there are none.
    """
    older = chosen.shape[-1]
    if not older:
        return None
    batch = on(store.device, group.rows)[:, None, None]
    heads = torch.arange(chosen.shape[1], device=store.device)[:, None]
    arrival = store.positions[batch, heads, store.end - group.held + chosen] + group.padding
    _remember(store, group, rows, chosen)
    assert group.source is not None and group.source_positions is not None
    now = group.first_position + group.seen - kept + torch.arange(older, device=store.device)
    return rope.rotate(group.source, rope.turn(now, group.source_positions, arrival))


def _remember(store: Store, group: Group, rows: Rows, chosen: Tensor) -> None:
    """Keep the keys of `chosen` as they came."""
    known = None
    if group.source is not None and group.source_positions is not None:
        known = group.source, group.source_positions
    group.source, group.source_positions = kernels.originals(
        store.keys,
        chosen,
        store.end - group.held,
        group.first_position + group.seen - group.held,
        known,
        rows=None if isinstance(rows, slice) else rows,
    )
