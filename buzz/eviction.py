"""Eviction from one layer: how many entries stay, which ones, and moving them.

An *entry's index* counts a row's entries from 0; a *slot* is an index into the store's buffers. A
row's entry 0 is in slot `store.end - held`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from buzz import kernels
from buzz.entries import Rows
from buzz.inputs import on
from buzz.policy import Policy
from buzz.rope import Rope
from buzz.store import Store, with_spare

Lengths = tuple[int, Any]  # cache length, and the policy's state


@dataclass
class Group:
    """Rows of a batch with equally long prompts, which therefore always evict together.

    Attributes:
        rows: their indices in the batch.
        padding: padding tokens before their first token.
        first_position: the position that the model gave to their first token.
        seen: tokens of a row so far, without padding.
        held: cache length of a row.
        state: the policy's state, see :meth:`Policy.next_length`.
        evictions: evictions so far.
        cut: tokens that had been seen at the last eviction.
        source: original keys [rows, kv_heads, pinned, head_dim] of the leading entries, kept where
            the rounding errors of repeated rotations would add up.
        source_positions: int64 [rows, kv_heads, pinned], the positions that `source` is rotated to;
            padding is counted where only differences matter.
        joint: a group of all rows that now have equal lengths, so that one kernel launch serves
            them. It has the `source` of its groups; the padding of each row counts as seen.
        paddings: of a joint group, the padding of each row.
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
    joint: Group | None = None
    paddings: list[int] | None = None

    def apart(self) -> Group:
        """A copy that is independent of a joint group."""
        alone = replace(self, rows=list(self.rows), joint=None)
        joint = self.joint
        if joint is not None and joint.source is not None and joint.source_positions is not None:
            own = on(joint.source.device, [joint.rows.index(row) for row in self.rows])
            alone.source, alone.source_positions = joint.source[own], joint.source_positions[own]
        return alone

    def select_rows(self, origin: Sequence[int], device: torch.device) -> None:
        """Makes row i of the batch what row `origin[i]` was; rows may be dropped or repeated."""
        place = {row: number for number, row in enumerate(self.rows)}
        self.rows = [row for row, old in enumerate(origin) if old in place]
        if self.source is not None and self.source_positions is not None:
            picked = on(device, [place[origin[row]] for row in self.rows])
            self.source = self.source[picked]
            self.source_positions = self.source_positions[picked]

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.source, self.source_positions) if t is not None]


def plan(policy: Policy, groups: Sequence[Group]) -> list[Lengths] | None:
    """The next lengths of each group; None if no length or state changes."""
    now = [(group.held, group.state) for group in groups]
    after = [policy.next_length(*lengths) for lengths in now]
    return None if after == now else after


def evict(
    store: Store,
    idle: Store | None,
    groups: Sequence[Group],
    after: Sequence[Lengths],
    policy: Policy,
    rope: Rope,
    score: Callable[[Group, Rows], Tensor | None],
    later: list[kernels.Move] | None = None,
) -> tuple[Store, Store | None]:
    """Evict entries from every group.

    Args:
        idle: buffers that may be reused.
        after: next lengths of each group, from :func:`plan`.
        rope: the layer's RoPE.
        score: returns the policy's scores of a group, given its rows of the store.
        later: list that takes the moves, so that those of several caches are made in one call;
            None: moves are made at once.

    Returns:
        The store of the entries that stay, and buffers that are still idle.
    """
    longest = max([kept for kept, _ in after])
    target = store
    leaving = any([kept < group.held for group, (kept, _) in zip(groups, after, strict=True)])
    room = max(longest, store.least)
    if leaving and not (store.owned and store.capacity <= 2 * with_spare(room)):
        if idle is not None and idle.fits(store, room):
            target = idle.cleared()
        else:
            target = Store.like(store, with_spare(room))
        target.end, idle = longest, None
    every = list(range(store.keys.shape[0]))
    for members, (kept, state) in _alike(groups, after, policy, rope):
        # If nothing is evicted, the state may still have changed.
        if kept < members[0].held or target is not store:
            group = _joined(members)
            rows: Rows = slice(None) if group.rows == every else on(store.device, group.rows)
            tail = min(policy.num_recent, kept)
            if kept < group.held:
                scores = score(group, rows)
                with _default(store.device):
                    chosen = policy.select(group.held, group.state, scores)
                chosen = chosen.to(store.device, non_blocking=True)
                for member in members:
                    member.evictions += 1
                    member.cut = member.seen
            else:
                chosen = torch.arange(kept - tail, device=store.device)
            chosen = chosen.expand(len(group.rows), store.keys.shape[1], kept - tail)
            _move(store, target, group, rows, chosen, tail, policy.num_pinned, rope, later)
        for member in members:
            member.held, member.state = kept, state
    return target, idle


def _alike(
    groups: Sequence[Group], after: Sequence[Lengths], policy: Policy, rope: Rope
) -> list[tuple[list[Group], Lengths]]:
    """Groups of equal lengths before and after the eviction, together with these lengths.

    Each group is by itself if scores or rotations depend on a row's own positions.
    """
    found: list[tuple[Any, list[Group], Lengths]] = []
    own_positions = policy.needs_rotation or not rope.static
    for group, lengths in zip(groups, after, strict=True):
        source = (group.joint or group).source
        pinned = None if source is None else source.shape[2]
        kind = lengths, group.held, group.state, group.seen - group.cut, pinned
        same = [] if own_positions else [known for known in found if known[0] == kind]
        if same:
            same[0][1].append(group)
        else:
            found.append((kind, [group], lengths))
    return [(members, lengths) for _, members, lengths in found]


def _joined(members: list[Group]) -> Group:
    """One group of all members' rows, in the batch's order."""
    first, *others = members
    if not others and first.joint is None:
        return first
    joint = first.joint
    rows = sorted(row for member in members for row in member.rows)
    if joint is None or joint.rows != rows or any(one.joint is not joint for one in others):
        alone = [member.apart() for member in members]
        paddings = {row: member.padding for member in members for row in member.rows}
        joint = Group(rows, paddings=[paddings[row] for row in rows])
        known = [(x.source, x.source_positions) for x in alone]
        sources, positions = (
            [t for t in each if t is not None] for each in zip(*known, strict=True)
        )
        if sources:
            mixed = [row for member in members for row in member.rows]
            order = on(sources[0].device, [mixed.index(row) for row in rows])
            joint.source = torch.cat(sources)[order]
            joint.source_positions = torch.cat(positions)[order]
        for member in members:
            member.joint, member.source, member.source_positions = joint, None, None
    joint.seen, joint.held, joint.state = first.seen + first.padding, first.held, first.state
    joint.cut = joint.seen - (first.seen - first.cut)
    return joint


def _default(device: torch.device) -> AbstractContextManager[Any]:
    """Makes the device of the entries the default, so that policies' tensors need no transfer."""
    return nullcontext() if device.type == "cpu" else device


def _move(
    store: Store,
    target: Store,
    group: Group,
    rows: Rows,
    chosen: Tensor,
    tail: int,
    pinned: int,
    rope: Rope,
    later: list[kernels.Move] | None,
) -> None:
    """Moves the entries that stay to the end of `target`, with keys rotated to their new positions.

    Args:
        rows: the group's, as an index into the batch.
        chosen: int64 [rows, kv_heads, older], the entries that stay, of those before the tail.
        tail: last entries, which are not moved.
        pinned: leading entries that may stay for long, see :attr:`Policy.num_pinned`.
    """
    kept = chosen.shape[-1] + tail
    if kept == tail and target is store:
        return  # only the tail stays
    first = store.end - group.held  # slot of the group's first entry
    to = target.end - kept
    dropped = group.held - kept
    leading = anew = None
    if rope.module is not None and not rope.static:
        anew = _turned_anew(store, group, rows, chosen, kept, rope)
    elif rope.module is not None and store.keys.dtype in (torch.float16, torch.bfloat16):
        leading = _pinned(store, group, rows, chosen[..., :pinned], kept, rope)
    turns = rope.table(dropped + 1, store.device) if dropped and rope.static else None
    sources = store.tensors()
    targets = sources if target is store else target.tensors()
    move = kernels.Move(
        sources,
        targets,
        first + chosen,
        to,
        first + dropped,
        turns,
        None if isinstance(rows, slice) else rows,
        rope.interleaved,
        leading,
    )
    if later is None or anew is not None:
        kernels.move_all([move])
    else:
        later.append(move)
    if anew is not None:
        target.keys[rows, :, to : to + anew.shape[2]] = anew
    if target is not store:
        for source, destination in zip(sources, targets, strict=True):
            recent = source[rows, :, store.end - tail : store.end]
            destination[rows, :, target.end - tail : target.end] = recent


def _pinned(
    store: Store, group: Group, rows: Rows, chosen: Tensor, kept: int, rope: Rope
) -> kernels.Leading | None:
    """Original keys in half precision, rotated from there, so that rounding errors do not add up.

    Args:
        chosen: int64 [rows, kv_heads, pinned], the leading entries.
        kept: number of entries that stay.
    """
    if not chosen.shape[-1]:
        return None
    _remember(store, group, rows, chosen, group.padding)
    assert group.source is not None and group.source_positions is not None
    position = group.padding + group.seen - kept
    frequencies = rope.frequencies().to(store.device)
    return kernels.Leading(group.source, group.source_positions, position, frequencies)


def _turned_anew(
    store: Store, group: Group, rows: Rows, chosen: Tensor, kept: int, rope: Rope
) -> Tensor | None:
    """All moved keys, rotated from the original ones, for RoPE whose frequencies change.

    Args:
        chosen: int64 [rows, kv_heads, older], entries that stay and are moved.
        kept: number of entries that stay, moved or not.

    Returns:
        [rows, kv_heads, older, head_dim], or None if none is moved.
    """
    older = chosen.shape[-1]
    if not older:
        return None
    batch = on(store.device, group.rows)[:, None, None]
    heads = torch.arange(chosen.shape[1], device=store.device)[:, None]
    arrival = store.positions[batch, heads, store.end - group.held + chosen] + group.padding
    _remember(store, group, rows, chosen, group.first_position)
    assert group.source is not None and group.source_positions is not None
    now = group.first_position + group.seen - kept + torch.arange(older, device=store.device)
    return rope.rotate(group.source, rope.turn(now, group.source_positions, arrival))


def _remember(store: Store, group: Group, rows: Rows, chosen: Tensor, origin: int) -> None:
    """Stores the original keys of `chosen`; `origin` is the position of a row's first token."""
    known = None
    if group.source is not None and group.source_positions is not None:
        known = group.source, group.source_positions
    group.source, group.source_positions = kernels.originals(
        store.keys,
        chosen,
        store.end - group.held,
        origin + group.seen - group.held,
        known,
        rows=None if isinstance(rows, slice) else rows,
    )
