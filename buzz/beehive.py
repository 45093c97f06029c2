"""BUZZ: sink, window, and between them a beehive that keeps one entry a cell.

Source: arXiv 2410.23079; where the paper is silent, the recorded behaviour of its original
implementation.

    | sink | history: old (sampled before) | new (evicted now) | window |
             one of ceil(stride / 2)         one of stride

Old history is thinned by plain striding; in the new part the entry of each cell that received the
most attention survives (the local maximum).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from buzz.errors import ConfigError
from buzz.policy import Policy, ScoreRule, register


@register("buzz")
@dataclass(frozen=True, kw_only=True)
class BuzzPolicy(Policy):
    """BUZZ with accumulated scores.

    An eviction happens when the entries between sink and window outnumber `threshold`. Stride 1
    drops nothing and stride 2 never thins old history: both are legal, but unbounded.

    Args:
        sink: leading entries that always stay.
        window: last entries that always stay.
        stride: cell size for newly evicted entries; old history is thinned by ceil(stride / 2).
        threshold: history entries that trigger an eviction when exceeded.
        history: ``strided``, the paper's, or ``local_max``: old history too keeps the highest
            score of each of its cells (scores then follow it; an option of this project).
        compact: ``once`` a step as in the original, or ``until_fits``: thin old history again in
            the same step until it is within `threshold`, so that memory is bounded right after
            the prompt (an option of this project).
    """

    needs_scores: ClassVar[bool] = True
    local_max: ClassVar[bool] = True

    sink: int = 4
    window: int = 160
    stride: int = 5
    threshold: int = 400
    history: str = "strided"
    compact: str = "once"

    def __post_init__(self) -> None:
        self._at_least(0, "sink", "threshold")
        self._at_least(1, "window", "stride")
        self._one_of("history", "strided", "local_max")
        self._one_of("compact", "once", "until_fits")
        if self.history == "local_max" and not self.local_max:
            raise ConfigError("method.history", self.history, f"{self.name} keeps no local maxima")
        if self.stride <= 2:
            if self.compact == "until_fits":
                raise ConfigError("method.compact", self.compact, "needs a stride of at least 3")
            warnings.warn(
                f"method.stride={self.stride} never thins old history: the cache is unbounded",
                stacklevel=2,
            )

    @property
    def protected(self) -> int:
        return self.window

    @property
    def resident(self) -> int:
        # The first history entry heads its cell in every eviction; all others move a few times.
        return self.sink + 1

    @property
    def old_stride(self) -> int:
        """Cell size of history that was sampled before: ceil(stride / 2)."""
        return (self.stride + 1) // 2

    def survivors(self, held: int, sampled: int) -> tuple[int, int]:
        others = held - self.sink - self.window
        if others <= self.threshold:
            return held, sampled
        history = _cells(sampled, self.old_stride) + _cells(others - sampled, self.stride)
        while self.compact == "until_fits" and history > max(self.threshold, 1):
            history = _cells(history, self.old_stride)
        return self.sink + history + self.window, history

    def select(self, held: int, sampled: int, scores: Tensor | None) -> Tensor:
        old_end, new_end = self.sink + sampled, held - self.window
        device = scores.device if scores is not None else None
        index = torch.arange(new_end, device=device).expand(1, 1, -1)
        if scores is not None:
            index = index.expand(*scores.shape[:2], -1)

        old = self._sample_old(index[..., self.sink : old_end], scores)
        new = index[..., old_end:]
        new = (
            _best_of_cells(new, scores, self.stride) if self.local_max else new[..., :: self.stride]
        )
        history = torch.cat([old, new], dim=-1)
        while self.compact == "until_fits" and history.shape[-1] > max(self.threshold, 1):
            history = self._sample_old(history, scores)
        return torch.cat([index[..., : self.sink], history], dim=-1)

    def _sample_old(self, index: Tensor, scores: Tensor | None) -> Tensor:
        if self.history == "local_max":
            return _best_of_cells(index, scores, self.old_stride)
        return index[..., :: self.old_stride]

    def fit(self, budget: int, fixed: frozenset[str] = frozenset()) -> Policy:
        """Window and threshold such that the decode-phase cache holds `budget` entries on average.

        The proportion of window to threshold stays as near to this policy's as rounding allows,
        unless one of the two is fixed.
        """
        if {"window", "threshold"} <= fixed:
            return self
        if self.stride <= 2:
            raise ConfigError(
                "method.stride", self.stride, "the cache is unbounded; a budget needs at least 3"
            )
        room = budget - self.sink  # for window and history together
        if "threshold" in fixed:
            return self._replace(budget, window=room - round(self._mean_history(self.threshold)))

        def misfit(threshold: int) -> float:
            window = self.window if "window" in fixed else room - self._mean_history(threshold)
            if "window" in fixed:
                return abs(window + self._mean_history(threshold) - room)
            return abs(window - threshold * self.window / max(self.threshold, 1))

        if room < 2:
            self._replace(budget, window=room - 1)
        threshold = min(range(max(2 * room, 1)), key=misfit)
        if "window" in fixed:
            if room - self.window < 1:
                self._replace(budget, threshold=room - self.window)
            return self._replace(budget, minimum=0, threshold=threshold)
        window = room - round(self._mean_history(threshold))
        return self._replace(budget, minimum=0, threshold=threshold, window=window)

    def _mean_history(self, threshold: int, evictions: int = 32) -> float:
        """History entries, averaged over the steps of decoding, from the length recurrence.

        Between two evictions the history grows by one a step from `kept` to `threshold`; what is
        kept settles on a fixed point or a short cycle, over which the average is taken.
        """
        kept, steps, total = 0, 0, 0
        for eviction in range(2 * evictions):
            grown = threshold + 1
            kept = _cells(kept, self.old_stride) + _cells(grown - kept, self.stride)
            if eviction >= evictions:
                length = max(threshold - kept + 1, 1)
                steps, total = steps + length, total + length * (kept + threshold)
        return total / (2 * steps)


@register("buzz_strided")
@dataclass(frozen=True, kw_only=True)
class BuzzStridedPolicy(BuzzPolicy):
    """BUZZ without local maxima: each new cell keeps its first entry, so no score is computed."""

    needs_scores: ClassVar[bool] = False
    local_max: ClassVar[bool] = False


@register("buzz_fast")
@dataclass(frozen=True, kw_only=True)
class BuzzFastPolicy(BuzzPolicy):
    """BUZZ that judges cells by the attention of the evicting step alone: nothing accumulates."""

    @property
    def score_rule(self) -> ScoreRule:
        return "step"


def _cells(entries: int, size: int) -> int:
    return -(-entries // size)


def _best_of_cells(index: Tensor, scores: Tensor | None, size: int) -> Tensor:
    """The highest-scored entry of each `size` consecutive ones of `index`, the first of equals.

    Args:
        index: [rows, kv_heads, n] entries, ascending.
        scores: [rows, kv_heads, held].

    Returns:
        [rows, kv_heads, ceil(n / size)].
    """
    assert scores is not None
    n = index.shape[-1]
    filler = -n % size
    received = torch.nn.functional.pad(scores.gather(-1, index), (0, filler), value=-torch.inf)
    best = received.unflatten(-1, (-1, size)).argmax(-1)
    first = torch.arange(0, n, size, device=index.device)
    return index.gather(-1, first + best)
