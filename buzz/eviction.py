"""What leaves a layer: how many entries stay, which ones, and their move to where they go on.

Two ways to count: an *entry's* number is its place among those that its row holds, from 0; a *slot*
is a place in the store's buffers. A row's first entry lies in slot `store.end - held`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    leading = _resident_keys(store, group, rows, chosen, kept, residents, rope)
    to = target.end - kept
    dropped = group.held - kept
    turns = rope.table(dropped + 1) if dropped and rope.static else None
    tensors = store.tensors(), target.tensors()
    kernels.move(
        *tensors,
        first + chosen,
        to,
        first + dropped,
        turns,
        rows=None if isinstance(rows, slice) else rows,
        interleaved=rope.interleaved,
    )
    if leading is not None:
        target.keys[rows, :, to : to + leading.shape[2]] = leading
    if target is not store:
        for source, destination in zip(*tensors, strict=True):
            recent = source[rows, :, store.end - tail : store.end]
            destination[rows, :, target.end - tail : target.end] = recent


def _resident_keys(
    store: Store,
    group: Group,
    rows: Rows,
    chosen: Tensor,
    kept: int,
    residents: int,
    rope: Rope,
) -> Tensor | None:
    """The keys that must not be turned step by step, turned at once from how they came.

    These are, in half precision, the residents of the policy, whose rounding errors would add up;
    and all keys where frequencies change, because turns do not add up then.

    Args:
        chosen: int64 [rows, kv_heads, older], entries that stay.
        kept: with those that do not move.

    Returns:
        [rows, kv_heads, residents, head_dim], or None if there are none.
    """
    older = chosen.shape[-1]
    if not rope.static:
        residents = older
    elif store.keys.dtype in (torch.float16, torch.bfloat16):
        residents = min(residents, older)
    else:
        residents = 0
    if not residents or rope.module is None:
        return None
    chosen, device = chosen[..., :residents], store.device
    batch = on(device, group.rows) if isinstance(rows, slice) else rows
    heads = torch.arange(chosen.shape[1], device=device)[:, None]
    where = batch[:, None, None], heads, store.end - group.held + chosen
    keys, arrival = store.keys[where], store.positions[where] + group.padding
    newest = group.first_position + group.seen
    old = newest - group.held + chosen
    if group.source is not None and group.source_positions is not None:
        known = group.source.shape[2]
        place = chosen.clamp(max=known - 1)
        has_source = chosen < known
        source = group.source.gather(2, place[..., None].expand_as(keys))
        keys = torch.where(has_source[..., None], source, keys)
        old = torch.where(has_source, group.source_positions.gather(2, place), old)
    group.source, group.source_positions = keys, old
    new = newest - kept + torch.arange(residents, device=device)
    return rope.rotate(keys, rope.turn(new, old, arrival))
