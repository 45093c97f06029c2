"""BUZZ: sink, window, and between them a beehive that keeps one entry a cell.

Source: arXiv 2410.23079; where the paper is silent, the recorded behaviour of its original
implementation.

    | sink | history: old (sampled before) | new (evicted now) | window |
             one of ceil(stride / 2)         one of stride

Old history is thinned by plain striding; in the new part the entry of each cell that received the
most attention survives (the local maximum).
"""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from buzz.errors import ConfigError
from buzz.policy import BudgetBy, Policy, ScoreRule, register


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
        history: how old history is thinned. ``strided``: the first entry of each cell, as in the
            paper; ``local_max``: the entry of the highest score (an option of this project).
        compact: what happens to new history that, one entry a cell, would still exceed `threshold`,
            as after a long prompt. ``once``, as in the original: it is thinned as old history in
            the following steps, and the cache is larger until then. ``widen`` (of this project;
            budgets set it): wider cells, so that it fits at once. ``until_fits`` (of this project):
            it is thinned as old history in the same step.
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
        self._one_of("compact", "once", "until_fits", "widen")
        if self.history == "local_max" and not self.local_max:
            raise ConfigError("method.history", self.history, f"{self.name} keeps no local maxima")
        if self.compact == "widen":
            self._at_least(2, "threshold")
        if self.stride <= 2:
            if self.compact != "once":
                raise ConfigError("method.compact", self.compact, "needs a stride of at least 3")
            warnings.warn(
                f"method.stride={self.stride} never thins old history: the cache is unbounded",
                stacklevel=2,
            )

    @property
    def num_recent(self) -> int:
        return self.window

    @property
    def num_pinned(self) -> int:
        # Of history, only the first entry is the first of its cell in every eviction.
        return self.sink + 1

    @property
    def old_stride(self) -> int:
        """Cell size of history that was sampled before: ceil(stride / 2)."""
        return (self.stride + 1) // 2

    def _new_stride(self, old: int, new: int) -> int:
        """Cell size for `new` entries of history that join `old` ones."""
        if self.compact != "widen":
            return self.stride
        # At least 1: old history is at most `threshold`, and is at least halved.
        room = self.threshold - _cells(old, self.old_stride)
        return max(self.stride, _cells(new, room))

    def next_length(self, cache_length: int, state: int) -> tuple[int, int]:
        """The state is the number of old history entries, which an earlier eviction sampled."""
        others = cache_length - self.sink - self.window
        if others <= self.threshold:
            return cache_length, state
        width = self._new_stride(state, others - state)
        history = _cells(state, self.old_stride) + _cells(others - state, width)
        while self.compact == "until_fits" and history > max(self.threshold, 1):
            history = _cells(history, self.old_stride)
        return self.sink + history + self.window, history

    def select(self, cache_length: int, state: int, scores: Tensor | None) -> Tensor:
        old_end, new_end = self.sink + state, cache_length - self.window
        device = scores.device if scores is not None else None
        index = torch.arange(new_end, device=device).expand(1, 1, -1)
        if scores is not None:
            index = index.expand(*scores.shape[:2], -1)

        old = self._sample_old(index[..., self.sink : old_end], scores)
        new, width = index[..., old_end:], self._new_stride(state, new_end - old_end)
        new = _best_of_cells(new, scores, width) if self.local_max else new[..., ::width]
        history = torch.cat([old, new], dim=-1)
        while self.compact == "until_fits" and history.shape[-1] > max(self.threshold, 1):
            history = self._sample_old(history, scores)
        return torch.cat([index[..., : self.sink], history], dim=-1)

    def _sample_old(self, index: Tensor, scores: Tensor | None) -> Tensor:
        if self.history == "local_max":
            return _best_of_cells(index, scores, self.old_stride)
        return index[..., :: self.old_stride]

    def fit(
        self, budget: int, fixed: frozenset[str] = frozenset(), by: BudgetBy = "peak"
    ) -> Policy:
        """Window and threshold that fill the budget in the proportion that they have here.

        ``peak``: sink + window + threshold = budget; ``mean``: sink + window + the mean of the
        history, (kept + threshold) / 2, = budget. If one of the two is fixed, the other fills the
        budget. `compact` becomes ``widen`` if it is ``once`` and not fixed: the history that a long
        prompt leaves would exceed any threshold.
        """
        if self.stride <= 2:
            raise ConfigError(
                "method.stride", self.stride, "the cache is unbounded; a budget needs at least 3"
            )
        compact = self.compact
        if compact == "once" and "compact" not in fixed:
            compact = "widen"
        least = 2 if compact == "widen" else 0
        room = budget - self.sink  # for window and history

        def made(window: int, threshold: int) -> BuzzPolicy:
            if "window" not in fixed:
                self._require(budget, 1, window=window)
            if "threshold" not in fixed:
                self._require(budget, least, threshold=threshold)
            return dataclasses.replace(self, window=window, threshold=threshold, compact=compact)

        def history(threshold: int) -> int:
            """Entries of the budget that the history takes."""
            if by == "peak" or threshold < 2:
                return threshold
            alone = dataclasses.replace(self, sink=0, window=1, threshold=threshold)
            return round(alone.footprint().mean - 1)

        if {"window", "threshold"} <= fixed:
            return made(self.window, self.threshold)
        if "threshold" in fixed:
            return made(room - history(self.threshold), self.threshold)
        # Over a cycle the history takes threshold * part. In closed form, up to rounding:
        # kept = (threshold + 1) / (1 + stride (1 - 1/s')), s' = ceil(stride / 2).
        kept = 1 / (1 + self.stride * (1 - 1 / self.old_stride))
        part = 1.0 if by == "peak" else (1 + kept) / 2
        if "window" in fixed:
            near = round((room - self.window) / part)
            near = min(
                range(near - 3, near + 4), key=lambda t: abs(self.window + history(t) - room)
            )
            return made(self.window, near)
        share = self.window / max(self.threshold, 1)
        threshold = max(round(room / (share + part)), least)
        while threshold > least and room - history(threshold) < int(share * threshold):
            threshold -= 1
        return made(room - history(threshold), threshold)


@register("buzz_strided")
@dataclass(frozen=True, kw_only=True)
class BuzzStridedPolicy(BuzzPolicy):
    """BUZZ without local maxima: each new cell keeps its first entry. No score is computed.

    Args:
        history: ``strided`` alone.
    """

    needs_scores: ClassVar[bool] = False
    local_max: ClassVar[bool] = False


@register("buzz_fast")
@dataclass(frozen=True, kw_only=True)
class BuzzFastPolicy(BuzzPolicy):
    """BUZZ whose local maxima are of the attention in the evicting step alone, not of sums."""

    @property
    def score_rule(self) -> ScoreRule:
        return "step"


def _cells(entries: int, size: int) -> int:
    return -(-entries // size)


def _best_of_cells(index: Tensor, scores: Tensor | None, size: int) -> Tensor:
    """The highest-scored entry of each `size` consecutive ones of `index`; of ties, the first.

    Args:
        index: [rows, kv_heads, n] entries, ascending.
        scores: [rows, kv_heads, cache_length].

    Returns:
        [rows, kv_heads, ceil(n / size)].
    """
    assert scores is not None
    n = index.shape[-1]
    filler = -n % size
    own = torch.nn.functional.pad(scores.gather(-1, index), (0, filler), value=-torch.inf)
    best = own.unflatten(-1, (-1, size)).argmax(-1)
    first = torch.arange(0, n, size, device=index.device)
    return index.gather(-1, first + best)
