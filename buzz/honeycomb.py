"""Honeycomb: history ranked by several signals, each with its share of the memory.

    | sink | history: the best by each signal | window |

Accumulated attention (H2O) does not predict what a later question needs. Keys unlike the others
(KeyDiff) include those of a passkey, but the text that they leave is hard to continue. Honeycomb
gives each of several signals a share of the budget, and evicts once in dozens of tokens. With one
signal it is H2O, KeyDiff, or SnapKV at every eviction; with cells, BUZZ's local maxima.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, pad

from buzz.entries import Entries, key_difference, observed_attention
from buzz.errors import ConfigError
from buzz.policy import BudgetBy, Policy, State, highest, register

SIGNALS = ("attention", "value", "observed", "keydiff")
OBSERVED, POOLED = 16, 5  # of `observed`: last queries, and entries of a max-pooling window
EARLY, LESS = 4 / 15, 0.3  # of ``late``: part of the layers that are early; their part of the mean
RARELY = 10  # under a fitted budget an eviction frees at most 1 / RARELY of it


@register()
@dataclass(frozen=True, kw_only=True)
class HoneycombPolicy(Policy):
    """Once in `every` tokens, keeps the `keep` history entries that rank best by any signal.

    An entry's rank is the minimum, over signals with a share above 0, of (its rank by that signal)
    / (the signal's share). The entries of the lowest ranks stay, so each signal chooses about its
    share of them. A single signal ranks by its scores.

    Args:
        sink: leading entries that always stay.
        window: last entries that always stay.
        keep: history entries that an eviction leaves.
        every: tokens between two evictions; a fitted budget lowers it to a tenth of itself.
        attention: share of the attention sums (H2O's score).
        value: share of the attention sums times the L1 norm of the value (VATP's).
        observed: share of the attention of the last 16 queries, max-pooled over 5 entries
            (SnapKV's); of fewer if the window or the text since the last eviction is shorter.
        keydiff: share of the keys least similar to the mean key (KeyDiff's).
        neighbours: entries over which `keydiff` is averaged, so that the digits of a number stay
            together; 1: none, as KeyDiff.
        cells: equal parts of the history, each of which keeps `keep` / `cells` entries; 0: `keep`
            cells of one entry each.
        fading: factor on earlier attention sums at every new token.
        layers: budgets by layer. ``flat``: equal; ``rising``: from 0.5 to 1.5 times the mean with
            depth; ``late``: 0.3 times the mean in the first 4 of 15 layers, the others equal.
        early_window: share of the window in the early layers of ``late``; null: as in the others.
    """

    needs_scores: ClassVar[bool] = True

    sink: int = 0
    window: int = 84
    keep: int = 413
    every: int = 64
    attention: float = 0.0
    value: float = 0.6
    observed: float = 0.0
    keydiff: float = 0.4
    neighbours: int = 7
    cells: int = 1
    fading: float = 1.0
    layers: str = "late"
    early_window: float | None = None

    def __post_init__(self) -> None:
        self._at_least(0, "sink", "window", "cells")
        self._at_least(1, "keep", "every", "neighbours")
        self._one_of("layers", "flat", "rising", "late")
        self._within(0, 1, "fading", *SIGNALS)
        if self.early_window is not None:
            self._within(0, 1, "early_window")
        if not self._shares:
            raise ConfigError("method.value", 0, f"give one of {', '.join(SIGNALS)} a share")
        if self.cells and self.keep % self.cells:
            raise ConfigError("method.cells", self.cells, f"must divide keep={self.keep}")

    @property
    def _shares(self) -> dict[str, float]:
        return {name: share for name in SIGNALS if (share := getattr(self, name))}

    @property
    def num_recent(self) -> int:
        return self.window

    @property
    def queries(self) -> int:
        """No more than the window has, so that they score every entry before it."""
        return max(1, min(OBSERVED, self.window)) if self.observed else 0

    @property
    def decay(self) -> float:
        return self.fading

    @property
    def num_pinned(self) -> int:
        return self.sink + self.keep

    def next_length(self, cache_length: int, state: State) -> tuple[int, State]:
        kept = self.sink + self.keep + self.window
        return (cache_length if cache_length < kept + self.every else kept), 0

    def for_layer(self, index: int, layers: int) -> Policy:
        if self.layers == "flat" or layers == 1:
            return self
        early = max(1, round(EARLY * layers))
        if self.layers == "rising":
            share = 0.5 + index / max(1, layers - 1)
        else:
            share = LESS if index < early else (layers - LESS * early) / max(1, layers - early)
        sized = self.sized(max(1 + self.sink, round(share * self.peak)))
        if self.early_window is None or self.layers != "late" or index >= early:
            return sized
        return sized.sized(sized.peak, self.early_window)

    @property
    def peak(self) -> int:
        """Maximum cache length after any step."""
        return self.sink + self.window + self.keep + self.every - 1

    def sized(self, peak: int, window_share: float | None = None) -> HoneycombPolicy:
        """A copy with another peak, in the proportions of this one or with another window's share.

        `every` stays, or is lowered to half of a small history; `keep` is rounded down to whole
        cells.

        Raises:
            ConfigError: the peak leaves nothing to `keep`.
        """
        room = peak - self.sink
        if window_share is None:
            window_share = self.window / (self.peak - self.sink)
        window = round(window_share * room)
        if self.window:
            window = min(max(1, window), room - 1)
        every = max(1, min(self.every, (room - window) // 2))
        keep = room - window - (every - 1)
        keep -= keep % self.cells if self.cells else 0
        self._require(peak, 1, keep=keep)
        return dataclasses.replace(self, window=window, keep=keep, every=every)

    def score(self, entries: Entries) -> Tensor:
        scores = {name: self._signal(name, entries) for name in self._shares}
        if len(scores) == 1:
            return next(iter(scores.values()))
        places = []
        for name, share in self._shares.items():
            history = scores[name][..., self.sink : entries.cache_length - self.window]
            order = history.argsort(dim=-1, descending=True, stable=True)
            place = torch.arange(1, order.shape[-1] + 1, device=order.device) / share
            places.append(torch.empty_like(history).scatter_(-1, order, place.expand(order.shape)))
        return -pad(torch.stack(places).amin(0), (self.sink, self.window))

    def _signal(self, name: str, entries: Entries) -> Tensor:
        """float32 [rows, kv_heads, held]"""
        if name == "observed":
            return observed_attention(entries, self.queries, POOLED)
        if name == "keydiff":
            unlike, width = key_difference(entries), self.neighbours
            if width == 1:
                return unlike
            pooled = avg_pool1d(unlike, width, 1, width // 2, count_include_pad=False)
            return pooled[..., : entries.cache_length]
        received = entries.attention_sums
        return received if name == "attention" else received * entries.values.float().abs().sum(-1)

    def select(self, cache_length: int, state: State, scores: Tensor | None) -> Tensor:
        assert scores is not None
        first, last = self.sink, cache_length - self.window
        history = scores[..., first:last]
        best = highest(history, self.keep) if self.cells == 1 else self._best_of_cells(history)
        sink = torch.arange(first, device=scores.device).expand(*best.shape[:-1], first)
        return torch.cat([sink, first + best], dim=-1)

    def _best_of_cells(self, scores: Tensor) -> Tensor:
        """The best entries of each cell; cell sizes differ by at most one entry."""
        entries, device = scores.shape[-1], scores.device
        cells = self.cells or self.keep
        bounds = torch.arange(cells + 1, device=device) * entries // cells
        widest = -(-entries // cells)
        place = bounds[:-1, None] + torch.arange(widest, device=device)  # [cells, widest]
        inside = place < bounds[1:, None]
        place = place.clamp(max=entries - 1)
        own = scores[..., place].masked_fill(~inside, -torch.inf)
        best = own.topk(self.keep // cells, dim=-1).indices
        return (bounds[:-1, None] + best).flatten(-2).sort(dim=-1).values

    def fit(
        self, budget: int, fixed: frozenset[str] = frozenset(), by: BudgetBy = "peak"
    ) -> Policy:
        """Window and keep that fill the budget in the proportions that they have here.

        ``peak``: sink + window + keep + every - 1 = budget; ``mean``: half of the tokens between
        two evictions count.
        """
        if {"window", "keep"} & fixed:
            return self
        every = self.every if "every" in fixed else max(1, min(self.every, budget // RARELY))
        share = self.window / (self.peak - self.sink)
        own = dataclasses.replace(self, every=every)
        sized = own.sized(budget + (every // 2 if by == "mean" else 0), share)
        if "every" in fixed and sized.every != every:
            self._require(budget, 1, keep=1 - every)
        return sized
