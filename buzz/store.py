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
        keys, values: [batch, kv_heads, capacity, head_dim]; or of int8, with each entry's scale
            behind it (:func:`buzz.kernels.quantized`).
        positions: int32 [batch, kv_heads, capacity], index of each entry's token in its own row.
        scores: float32 [batch, kv_heads, capacity], attention received; None if nobody reads it.
        end: one past the newest entry's slot.
        owned: False while a prompt lies where the model wrote it, or a copy reads it, too.
        least: entries that other buffers in its place have room for, however few there are.
        whole: the store of several rows that this one is a row of, if it is.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    scores: Tensor | None
    end: int = 0
    owned: bool = True
    least: int = 0
    whole: Store | None = None

    @classmethod
    def unwritten(cls, other: Store, capacity: int, rows: int) -> Store:
        """A store of so many rows, for the same heads and types, in memory that is not zeroed yet.

        To be :meth:`cleared`, row by row, before it is used.
        """

        def empty(tensor: Tensor) -> Tensor:
            return tensor.new_empty(rows, tensor.shape[1], capacity, *tensor.shape[3:])

        with writable():
            scores = None if other.scores is None else empty(other.scores)
            tensors = empty(other.keys), empty(other.values), empty(other.positions), scores
            return cls(*tensors, least=other.least)

    @classmethod
    def like(cls, other: Store, capacity: int) -> Store:
        """An empty store for the same batch, heads and types."""
        return cls.unwritten(other, capacity, len(other.keys)).cleared()

    @classmethod
    def joined(cls, stores: Sequence[Store], held: int) -> Store:
        """One store of what several of one row hold, the last `held` slots before each one's end.

        If they are all rows of one, in order, and nobody else reads them, then it is that one.
        """
        whole = stores[0].whole
        if whole is not None and len(stores) == len(whole.keys):
            rows = [whole.row(number) for number in range(len(stores))]
            alike = all(own.owned and own.end == stores[0].end for own in stores)
            if alike and all(map(Store.lies_in, stores, rows)):
                whole.end = stores[0].end
                return whole
        target = cls.unwritten(stores[0], with_spare(held), len(stores)).cleared()
        target.end = held
        for number, own in enumerate(stores):
            for source, buffer in zip(own.tensors(), target.tensors(), strict=True):
                buffer[number, :, :held] = source[0, :, own.end - held : own.end]
        return target

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
        return Store(keys, values, positions, scores[0] if scores else None, self.end, whole=self)

    def lies_in(self, other: Store) -> bool:
        """Whether both have the same buffers."""
        own, others = self.tensors(), other.tensors()
        return [t.data_ptr() for t in own] == [t.data_ptr() for t in others]

    def nbytes(self) -> int:
        """Bytes of all buffers, spare capacity included."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    def cleared(self) -> Store:
        """This store, empty and zeroed: no number of an earlier prompt is left.

        And attention reads (and masks) the slots before a short row's start.
        """
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
        keys, values = self._as_held(keys, values)
        slots = slice(self.end, self.end + keys.shape[2])
        self.keys[:, :, slots] = keys
        self.values[:, :, slots] = values
        self.positions[:, :, slots] = positions
        if self.scores is not None:
            self.scores[:, :, slots] = 0
        self.end = slots.stop

    def _as_held(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.keys.dtype != torch.int8:
            return keys, values
        return kernels.quantized(keys), kernels.quantized(values)

    def quantized(self, start: int) -> Store:
        """What is held from slot `start` on, with keys and values of int8."""
        keys, values, *rest = (t[:, :, start : self.end] for t in self.tensors())
        pair = kernels.quantized(keys), kernels.quantized(values)
        scores = rest[1] if len(rest) > 1 else None
        held = self.end - start
        return Store(*pair, rest[0], scores, held, owned=False, least=self.least)

    def shared(self) -> Store:
        """The same entries once more, in the same buffers: who appends first moves out of them."""
        self.owned = False
        return dataclasses.replace(self)

    def append_token(self, key: Tensor, value: Tensor, token: int, padding: Tensor | None) -> None:
        """Write one entry of each row, see :func:`buzz.kernels.append`."""
        key, value = self._as_held(key, value)
        kernels.append(self.tensors(), key, value, self.end, token, padding)
        self.end += 1

    def select_rows(self, rows: Tensor) -> Store:
        """A store whose row i is row `rows[i]` of this one."""
        with writable():
            picked = [tensor.index_select(0, rows) for tensor in self.tensors()]
        scores = picked[3] if self.scores is not None else None
        return Store(picked[0], picked[1], picked[2], scores, self.end, least=self.least)
