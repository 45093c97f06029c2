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

    def fit(
        self,
        budget: int,
        fixed: frozenset[str] = frozenset(),
        horizon: tuple[int, int] | None = None,
    ) -> Policy:
        """Window and threshold such that the decode-phase cache holds `budget` entries on average.

        The threshold is that of the steady state in which window and threshold have the proportion
        of this policy; the window then takes what `horizon` leaves. Of the two, one that is fixed
        stays as it is, and the other makes up for it.
        """
        if {"window", "threshold"} <= fixed:
            return self
        if self.stride <= 2:
            raise ConfigError(
                "method.stride", self.stride, "the cache is unbounded; a budget needs at least 3"
            )
        prompt, new = horizon or (budget, 64 * budget)
        room = budget - self.sink  # for window and history together
        if "window" in fixed:
            if room <= self.window:
                self._replace(budget, threshold=room - self.window)
            candidates = [self._replace(budget, 0, threshold=t) for t in range(2 * room)]
        else:
            # Steady state: kept = (threshold + 1) / (1 + stride (1 - 1/s')),
            # average = sink + window + (kept + threshold) / 2.
            kept = 1 / (1 + self.stride * (1 - 1 / self.old_stride))
            share = self.window / max(self.threshold, 1)
            threshold = round(room / (share + (1 + kept) / 2))
            if "threshold" in fixed:
                threshold = self.threshold
            if room < 2:
                self._replace(budget, window=room - 1)
            candidates = [
                self._replace(budget, 0, threshold=threshold, window=w) for w in range(1, room + 1)
            ]
        return min(candidates, key=lambda policy: abs(policy._mean_held(prompt, new) - budget))

    def _mean_held(self, prompt: int, new: int) -> float:
        """Entries held, averaged over the `new` steps from the prompt's on (exact, data-free)."""
        held, sampled = self.survivors(prompt, 0)
        total, left = held, new - 1
        limit = self.sink + self.window + self.threshold
        while left > 0:
            grow = min(max(limit - held, 0), left)  # steps that evict nothing
            total += grow * held + grow * (grow + 1) // 2
            held, left = held + grow, left - grow
            if left:
                held, sampled = self.survivors(held + 1, sampled)
                total, left = total + held, left - 1
        return total / new


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
