"""What leaves a layer: how many entries stay, which ones, and their move to where they go on.

Two ways to count: an *entry's* number is its place among those that its row holds, from 0; a *slot*
is a place in the store's buffers. A row's first entry lies in slot `store.end - held`.
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
        state: what the policy remembers of earlier steps, see :meth:`Policy.next_length`.
        evictions: evictions so far.
        cut: tokens that had been seen at the last of them.
        source: keys [rows, kv_heads, residents, head_dim] of the leading entries as they were
            before they first moved, where turning them again and again would add up errors.
        source_positions: int64 [rows, kv_heads, residents], the positions `source` is rotated to;
            counted with padding, where only differences matter.
        joint: all rows that by now hold and keep equally much: one launch serves them. It has the
            `source` of its groups and the padding of each of its rows, and counts it as seen.
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
        """A copy that shares nothing with a joint group."""
        alone = replace(self, rows=list(self.rows), joint=None)
        joint = self.joint
        if joint is not None and joint.source is not None and joint.source_positions is not None:
            own = on(joint.source.device, [joint.rows.index(row) for row in self.rows])
            alone.source, alone.source_positions = joint.source[own], joint.source_positions[own]
        return alone

    def select_rows(self, origin: Sequence[int], device: torch.device) -> None:
        """Row i of the batch is now what row `origin[i]` was; of its rows some may be left."""
        place = {row: number for number, row in enumerate(self.rows)}
        self.rows = [row for row, old in enumerate(origin) if old in place]
        if self.source is not None and self.source_positions is not None:
            picked = on(device, [place[origin[row]] for row in self.rows])
            self.source = self.source[picked]
            self.source_positions = self.source_positions[picked]

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.source, self.source_positions) if t is not None]


def plan(policy: Policy, groups: Sequence[Group]) -> list[Lengths] | None:
    """What the length recurrence says of each group; None when nothing happens to any."""
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
    """Thin every group to what `after` says.

    Args:
        idle: buffers that may be used again.
        after: what :func:`plan` returned.
        rope: how the layer rotates its keys.
        score: what the policy ranks the entries of a group by, in these rows of the store.
        later: takes moves that may wait, so that those of several caches are one call.

    Returns:
        The store that holds what stays, and the buffers that are idle still.
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
        # Of what is whole, the policy may still have re-labelled its history.
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
    """Groups that are thinned alike, together: held and kept, and what is remembered of them.

    Each by itself where a row's own positions count.
    """
    found: list[tuple[Any, list[Group], Lengths]] = []
    own_positions = policy.needs_rotation or not rope.static
    for group, lengths in zip(groups, after, strict=True):
        source = (group.joint or group).source
        residents = None if source is None else source.shape[2]
        kind = lengths, group.held, group.state, group.seen - group.cut, residents
        same = [] if own_positions else [known for known in found if known[0] == kind]
        if same:
            same[0][1].append(group)
        else:
            found.append((kind, [group], lengths))
    return [(members, lengths) for _, members, lengths in found]


def _joined(members: list[Group]) -> Group:
    """One group of all their rows, in the batch's order."""
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
    later: list[kernels.Move] | None,
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
    _remember(store, group, rows, chosen, group.padding)
    assert group.source is not None and group.source_positions is not None
    position = group.padding + group.seen - kept
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
    _remember(store, group, rows, chosen, group.first_position)
    assert group.source is not None and group.source_positions is not None
    now = group.first_position + group.seen - kept + torch.arange(older, device=store.device)
    return rope.rotate(group.source, rope.turn(now, group.source_positions, arrival))


def _remember(store: Store, group: Group, rows: Rows, chosen: Tensor, origin: int) -> None:
    """Keep the keys of `chosen` as they came; `origin` is the position of a row's first token."""
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
