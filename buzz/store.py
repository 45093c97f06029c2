"""Where entries lie: buffers with spare capacity, written in place.

The newest entry of every row is in the same slot, `end - 1`:

    slot   0        start                                end        capacity
           |  free  | sink | history |      window       |   spare   |

Appending writes into spare slots. Eviction moves the kept sink and history up against the window,
which stays where it is: an eviction costs what it moves, not what is held. When the spare slots run
out, the entries slide back to slot 0, once in as many tokens as there were spare slots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from buzz import kernels


def with_spare(entries: int) -> int:
    """Capacity for `entries`: sliding or growing then costs a few copied entries per token.

    Rounded up by less than an eighth, so that prompts of many lengths take buffers of few: what is
    compiled or captured for one of a size serves the next.
    """
    needed = entries + 64 + entries // 8
    step = 1 << max(0, needed.bit_length() - 4)
    return -(-needed // step) * step


def writable() -> AbstractContextManager[Any]:
    """For making what later steps write to: a buffer of inference mode can be written in no other.

    Compiled code has one mode, and cannot leave it.
    """
    return nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False)


@dataclasses.dataclass
class Store:
    """The entries of one layer, slot by slot.

    Attributes:
        keys, values: [batch, kv_heads, capacity, head_dim].
        positions: int32 [batch, kv_heads, capacity], index of each entry's token in its own row.
        scores: float32 [batch, kv_heads, capacity], attention received; None if nobody reads it.
        end: one past the newest entry's slot.
        owned: False while a prompt lies where the model wrote it, or a copy reads it, too.
        least: entries that other buffers in its place have room for, however few there are.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    scores: Tensor | None
    end: int = 0
    owned: bool = True
    least: int = 0

    @classmethod
    def like(cls, other: Store, capacity: int) -> Store:
        """An empty store for the same batch, heads and types.

        Zeroed, because slots before a short row's start are read (and masked) by attention.
        """

        def empty(tensor: Tensor) -> Tensor:
            return tensor.new_zeros(*tensor.shape[:2], capacity, *tensor.shape[3:])

        with writable():
            scores = None if other.scores is None else empty(other.scores)
            tensors = empty(other.keys), empty(other.values), empty(other.positions), scores
            return cls(*tensors, least=other.least)

    @classmethod
    def stacked(cls, held: Sequence[Sequence[Tensor]]) -> Store:
        """One store for what several hold, equally much each, with spare capacity.

        Args:
            held: of each its keys, values, positions and scores, if any, [rows, kv_heads, held,
                ...].
        """

        def joined(parts: tuple[Tensor, ...]) -> Tensor:
            rows, heads, entries, *rest = parts[0].shape
            size = rows * len(parts), heads, with_spare(entries), *rest
            buffer = parts[0].new_zeros(size)
            for own, part in zip(buffer.split(rows), parts, strict=True):
                own[:, :, :entries] = part
            return buffer

        with writable():
            tensors = [joined(parts) for parts in zip(*held, strict=True)]
        scores = tensors[3] if len(tensors) > 3 else None
        return cls(tensors[0], tensors[1], tensors[2], scores, held[0][0].shape[2])

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    @property
    def device(self) -> torch.device:
        return self.keys.device

    def tensors(self) -> list[Tensor]:
        every = (self.keys, self.values, self.positions, self.scores)
        return [tensor for tensor in every if tensor is not None]

    def row(self, number: int) -> Store:
        """One row, in the same buffers."""
        keys, values, positions, *scores = (t[number : number + 1] for t in self.tensors())
        return Store(keys, values, positions, scores[0] if scores else None, self.end)

    def nbytes(self) -> int:
        """Bytes of all buffers, spare capacity included."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    def cleared(self) -> Store:
        """This store, empty and zeroed as a new one is: no number of an earlier prompt is left."""
        for tensor in self.tensors():
            tensor.zero_()
        self.end = 0
        return self

    def fits(self, other: Store, entries: int) -> bool:
        """Whether it can take over `entries` of `other` and is not needlessly large for them.

        With `least` all prompts take buffers of one size: then it must be no larger than a new one.
        """
        rows_and_heads = self.keys.shape[:2] == other.keys.shape[:2]
        same = rows_and_heads and self.keys.dtype == other.keys.dtype
        scores = (self.scores is None) == (other.scores is None)
        most = with_spare(entries) * (1 if self.least else 2)
        return same and scores and entries + entries // 8 < self.capacity <= most

    def with_room(self, start: int, new: int, idle: Store | None) -> Store:
        """This store, or another one, with at least `new` spare slots behind the entries.

        Args:
            start: first slot in use.
            idle: a store to use again if it fits.
        """
        if self.owned and self.end + new <= self.capacity:
            return self
        held = self.end - start
        needed = max(held + new, self.least)
        if self.owned and start > held // 8 and held + new <= self.capacity:
            target = self
        elif idle is not None and idle.fits(self, needed):
            target = idle.cleared()
        else:
            target = Store.like(self, with_spare(needed))
        for source, destination in zip(self.tensors(), target.tensors(), strict=True):
            entries = source[:, :, start : self.end]
            overlaps = target is self and start < held
            destination[:, :, :held] = entries.clone() if overlaps else entries
        target.end = held
        return target

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Write a step's entries, [batch, kv_heads, new, ...], into spare slots."""
        slots = slice(self.end, self.end + keys.shape[2])
        self.keys[:, :, slots] = keys
        self.values[:, :, slots] = values
        self.positions[:, :, slots] = positions
        if self.scores is not None:
            self.scores[:, :, slots] = 0
        self.end = slots.stop

    def shared(self) -> Store:
        """The same entries once more, in the same buffers: who appends first moves out of them."""
        self.owned = False
        return dataclasses.replace(self)

    def append_token(self, key: Tensor, value: Tensor, token: int, padding: Tensor | None) -> None:
        """Write one entry of each row, see :func:`buzz.kernels.append`."""
        kernels.append(self.tensors(), key, value, self.end, token, padding)
        self.end += 1

    def select_rows(self, rows: Tensor) -> Store:
        """A store whose row i is row `rows[i]` of this one."""
        with writable():
            picked = [tensor.index_select(0, rows) for tensor in self.tensors()]
        scores = picked[3] if self.scores is not None else None
        return Store(picked[0], picked[1], picked[2], scores, self.end, least=self.least)
