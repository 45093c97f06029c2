"""Honeycomb: one family that holds H2O, BUZZ's cells, and what lies between and beyond.

    | sink | history: the best of each of its cells | window |

H2O evicts at every token the entry of the lowest score; BUZZ evicts once in hundreds, one of each
cell. Here the number of cells, how far the cache grows before it evicts, what a score is, and how a
budget is spread over the layers are parameters of their own, so that each can be judged alone.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from buzz.entries import Entries
from buzz.errors import ConfigError
from buzz.policy import BudgetBy, Policy, State, register

EARLY, LESS = 4 / 15, 0.3  # of ``late``: the first layers, and their share of an even budget


@register()
@dataclass(frozen=True, kw_only=True)
class HoneycombPolicy(Policy):
    """Thins history to its `keep` best entries, of each cell as many, when it exceeds `threshold`.

    With one cell, no sink and `threshold` = `keep` it is H2O; with as many cells as entries kept,
    each cell keeps its local maximum, as new history of BUZZ's does.

    Args:
        sink: leading entries that always stay.
        window: last entries that always stay.
        keep: history entries that an eviction leaves.
        threshold: history entries that trigger one when exceeded.
        cells: equal parts of history, each of which keeps `keep` / `cells` entries; 0: as many as
            entries are kept, one of each.
        score_by: ``sum`` of the attention received; ``value``: times the L1 norm of the value.
        fading: what of a query's attention still counts one token later.
        layers: ``flat``; ``rising``: budgets from half to one and a half times the even one with
            depth; ``late``: 0.3 times in the first 4 of 15 layers, the others share the rest.
        early_window: of ``late``, the window's share of those layers; null: as in the others.
    """

    needs_scores: ClassVar[bool] = True

    sink: int = 0
    window: int = 252
    keep: int = 252
    threshold: int = 308
    cells: int = 1
    score_by: str = "sum"
    fading: float = 1.0
    layers: str = "flat"
    early_window: float | None = None

    def __post_init__(self) -> None:
        self._at_least(0, "sink")
        self._at_least(1, "window", "keep")
        self._at_least(0, "cells")
        self._at_least(self.keep, "threshold")
        self._one_of("score_by", "sum", "value")
        self._one_of("layers", "flat", "rising", "late")
        self._within(0, 1, "fading")
        if self.early_window is not None:
            self._within(0, 1, "early_window")
        if self.cells and self.keep % self.cells:
            raise ConfigError("method.cells", self.cells, f"must divide keep={self.keep}")

    @property
    def protected(self) -> int:
        return self.window

    @property
    def decay(self) -> float:
        return self.fading

    @property
    def resident(self) -> int:
        return self.sink + self.keep

    def survivors(self, held: int, state: State) -> tuple[int, State]:
        if held - self.sink - self.window <= self.threshold:
            return held, 0
        return self.sink + self.keep + self.window, 0

    def for_layer(self, index: int, layers: int) -> Policy:
        if self.layers == "flat":
            return self
        early = max(1, round(EARLY * layers))
        if self.layers == "rising":
            share = 0.5 + index / max(1, layers - 1)
        else:
            share = LESS if index < early else (layers - LESS * early) / max(1, layers - early)
        sized = self.sized(round(share * self.peak))
        if self.early_window is None or self.layers != "late" or index >= early:
            return sized
        return sized.sized(sized.peak, self.early_window)

    @property
    def peak(self) -> int:
        """The most entries that any step leaves."""
        return self.sink + self.window + self.threshold

    def sized(self, peak: int, window_share: float | None = None) -> HoneycombPolicy:
        """A copy of another peak, in the proportions of this one, or with another window in it.

        `threshold` / `keep` stays as it is; `keep` is rounded down to whole cells.

        Raises:
            ConfigError: there is no room for all of it.
        """
        room = peak - self.sink
        if window_share is None:
            window_share = self.window / (self.window + self.threshold)
        window = max(1, round(window_share * room))
        threshold = room - window
        keep = round(threshold * self.keep / self.threshold)
        keep -= keep % self.cells if self.cells else 0
        self._require(peak, 1, keep=keep)
        return dataclasses.replace(self, window=window, threshold=threshold, keep=keep)

    def score(self, entries: Entries) -> Tensor:
        assert entries.received is not None
        if self.score_by == "sum":
            return entries.received
        return entries.received * entries.values.float().abs().sum(-1)

    def select(self, held: int, state: State, scores: Tensor | None) -> Tensor:
        assert scores is not None
        first, last = self.sink, held - self.window
        history = scores[..., first:last]
        if self.cells == 1 and history.shape[-1] == self.keep + 1:  # one leaves, no sort is needed
            stay = torch.arange(self.keep, device=scores.device)
            best = stay + (stay >= history.argmin(-1, keepdim=True))
        elif self.cells == 1:
            best = history.topk(self.keep, dim=-1).indices.sort(dim=-1).values
        else:
            best = self._best_of_cells(history)
        sink = torch.arange(first, device=scores.device).expand(*best.shape[:-1], first)
        return torch.cat([sink, first + best], dim=-1)

    def _best_of_cells(self, scores: Tensor) -> Tensor:
        """Of every cell its best entries; cells differ in size by one entry at most."""
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
        """Window, keep and threshold that fill the budget in the proportions that they have here.

        ``peak``: sink + window + threshold = budget; ``mean``: sink + window + (keep + threshold)
        / 2 = budget, as the history's length runs through all from `keep` to `threshold`.
        """
        if {"window", "keep", "threshold"} & fixed:
            return self
        if by == "mean":
            most = self.window + self.threshold
            mean = self.window + (self.keep + self.threshold) / 2
            return self.sized(self.sink + round((budget - self.sink) * most / mean))
        return self.sized(budget)
