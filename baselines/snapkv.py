"""SnapKV (arXiv 2404.14469): keeps the prompt's entries that its last queries attend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d, pad

from baselines.ranking import PromptPolicy
from buzz.entries import Entries
from buzz.policy import BudgetBy, Policy, ScoreRule, register


@register()
@dataclass(frozen=True, kw_only=True)
class SnapKVPolicy(PromptPolicy):
    """Keeps the prompt's last `window` entries, and those that the window's queries attend most.

    As FasterDecoding/SnapKV (e216ddc8) `snapkv/monkeypatch/snapkv_utils.py`, except that the query
    heads of a group choose together (in the original each chooses alone).

    Args:
        capacity: prompt entries kept, including the window.
        window: last entries, which stay and whose queries score the others.
        kernel: entries whose attention is pooled.
        pooling: ``avg`` or ``max``.
    """

    needs_scores: ClassVar[bool] = True
    score_rule: ClassVar[ScoreRule] = "step"

    window: int = 32
    kernel: int = 7
    pooling: str = "max"

    def __post_init__(self) -> None:
        self._at_least(1, "window", "kernel")
        self._one_of("pooling", "avg", "max")
        super().__post_init__()

    @property
    def num_recent(self) -> int:
        return self.window

    observe = num_recent

    def score(self, entries: Entries) -> Tensor:
        """Attention of the window's queries, pooled; infinite for its own entries."""
        pooled = self._pool(entries.attention_sums[..., : entries.cache_length - self.window])
        return pad(pooled, (0, self.window), value=torch.inf)

    def _pool(self, scores: Tensor) -> Tensor:
        """Scores pooled along the last of three dimensions."""
        pool = avg_pool1d if self.pooling == "avg" else max_pool1d
        return pool(scores, self.kernel, 1, self.kernel // 2)[..., : scores.shape[-1]]

    def fit(
        self, budget: int, fixed: frozenset[str] = frozenset(), by: BudgetBy = "peak"
    ) -> Policy:
        """The budget is the cache length after the prompt; the answer's tokens add to it."""
        if "capacity" in fixed:
            return self
        window = self.window if "window" in fixed else min(self.window, budget // 2)
        if budget <= window:
            self._replace(budget, capacity=budget - window)
        return self._replace(budget, window=window, capacity=budget)
