"""Checks of a step's inputs: the mask may hide padding only, and positions count up by one.

An evicting cache cuts padding off instead of masking it, and rotates keys by how far they move. So
any other mask, or positions with a jump, would silently give wrong results. The checks return
tensors on the device of their input; reading one waits for that device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from buzz.errors import ConfigError
from buzz.store import with_spare, writable

REMEDIES = {
    "attention_mask": "it must hide the padding before each row's first token, as it did with the"
    " prompt, and nothing else: an evicting cache serves no other mask",
    "position_ids": "a row's positions must count up by one, also from step to step; give them with"
    " every step or with none, or set cache.positions=true, which moves no key",
}


def check_mask(mask: Any, batch: int, tokens: int) -> None:
    """Checks that a mask is 2-D and covers all tokens.

    Args:
        batch: rows.
        tokens: those seen before and those of the step.

    Raises:
        ConfigError: it is not.
    """
    shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    if shape != (batch, tokens):
        raise ConfigError(
            "attention_mask",
            shape,
            f"give the 2-D mask of all tokens so far, with their padding: {(batch, tokens)}",
        )


def padding_of(mask: Tensor) -> list[int]:
    """Padding tokens before each row's first token, from a prompt's mask [batch, tokens].

    Raises:
        ConfigError: the mask hides other tokens, or all of a row.
    """
    padding = mask.bool().long().argmax(-1).tolist()
    if hides_more(mask, padding):
        hidden = (mask == 0).sum(-1).tolist()
        raise ConfigError(
            "attention_mask",
            hidden,
            "padding must come before a row's first token, and no row (nor its first chunk) may be"
            " all padding: set tokenizer.padding_side='left'",
        )
    return padding


def hides_more(mask: Tensor, padding: Sequence[int]) -> Tensor:
    """Whether a mask [batch, tokens] hides anything but `padding`: a bool on its device."""
    if not any(padding):
        return ~mask.all()
    slots = torch.arange(mask.shape[1], device=mask.device)
    return (mask.bool() != (slots >= on(mask.device, padding)[:, None])).any()


def first_positions(position_ids: Tensor | None, padding: Sequence[int]) -> list[int]:
    """The position of each row's first token after its padding.

    Args:
        position_ids: int64 [..., batch or 1, new]; None: the model counts padding, too.
    """
    if position_ids is None:
        return list(padding)
    rows = position_ids.flatten(0, -3)[0] if position_ids.ndim > 2 else position_ids
    rows = rows.expand(len(padding), -1)
    return rows.gather(-1, on(rows.device, padding)[:, None])[:, 0].tolist()


def jumps(position_ids: Tensor, seen: int, padding: Sequence[int], first: Sequence[int]) -> Tensor:
    """Whether positions [..., batch or 1, new] do not count up by one: a bool on their device.

    Args:
        seen: tokens before this step, padding included.
        padding, first: of each row, its padding and the position of its first token.
    """
    new = position_ids.shape[-1]
    shifts = [position - slot for position, slot in zip(first, padding, strict=True)]
    if new == 1 and len(set(shifts)) == 1:  # a single token is never padding
        return (position_ids != seen + shifts[0]).any()
    slots = torch.arange(seen, seen + new, device=position_ids.device)
    wrong = position_ids != slots + on(slots.device, shifts)[:, None]
    return (wrong & (slots >= on(slots.device, padding)[:, None])).any()


class Told:
    """The token ids that a cache was fed, to tell whether a prompt continues its conversation.

    They are copied, as callers may reuse the buffer that they feed tokens from.
    """

    def __init__(self) -> None:
        self._ids: Tensor | None = None  # int64 [batch, capacity], -1 where they are unknown

    def note(self, tokens: Tensor, seen: int) -> None:
        """Records a step after `seen` tokens: ids [batch, new], or embeddings [batch, new, hidden].

        The ids of embeddings are unknown, as are those of a step that was not recorded.
        """
        batch, new = tokens.shape[:2]
        end = seen + new
        if self._ids is None or self._ids.shape[1] < end:
            with writable():
                larger = torch.full((batch, with_spare(end)), -1, device=tokens.device)
            if self._ids is not None:
                larger[:, : self._ids.shape[1]] = self._ids
            self._ids = larger
        self._ids[:, seen:end] = tokens if tokens.ndim == 2 else -1

    def differs(self, ids: Tensor, seen: int, padding: Sequence[int]) -> int | None:
        """Index of the first of `seen` tokens that differs from ids [batch, tokens] in any row.

        Waits for the device.

        Args:
            padding: of each row; padding is not compared.

        Returns:
            None if no token differs.
        """
        if self._ids is None:
            return None
        told = self._ids[:, : min(seen, ids.shape[1])]
        slots = torch.arange(told.shape[1], device=told.device)
        others = (told != ids[:, : told.shape[1]].to(told.device)) & (told >= 0)
        others = (others & (slots >= on(told.device, padding)[:, None])).any(0)
        return int(others.int().argmax()) if others.any() else None

    def select_rows(self, rows: Tensor | None = None) -> Told:
        """A copy, whose row i is row `rows[i]` if `rows` are given."""
        other = Told()
        if self._ids is not None:
            with writable():
                ids = self._ids
                other._ids = ids.clone() if rows is None else ids[rows.to(ids.device)]
        return other


def on(device: torch.device, numbers: Sequence[int]) -> Tensor:
    """Whole numbers as int64 on a device. Not to be changed: equal calls share a tensor."""
    if torch.compiler.is_compiling():
        return torch.tensor(numbers, device=device)
    return _sent(device, tuple(numbers))


@lru_cache(maxsize=256)
def _sent(device: torch.device, numbers: tuple[int, ...]) -> Tensor:
    with writable():
        return torch.tensor(numbers, dtype=torch.int64).to(device, non_blocking=True)
