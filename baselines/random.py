"""Random: a uniform sample of entries, as a lower bound."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from baselines.ranking import RankingPolicy
from buzz.entries import Entries
from buzz.policy import BudgetBy, Policy, register

# Of splitmix64 (Steele, Lea, Flood 2014), as signed numbers.
STEP = 0x9E3779B97F4A7C15 - 2**64
MIXES = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1))


@register()
@dataclass(frozen=True, kw_only=True)
class RandomPolicy(RankingPolicy):
    """Keeps the first `sink` and the last `window` entries, and a uniform sample of the others.

    A hash gives each token a priority, another one in every layer and KV head. So the cache is a
    uniform sample of all tokens so far, whatever the batch, chunks or device. Protected ends of a
    tenth each follow arXiv 2605.18053, whose code was not found. NVIDIA/kvpress (8bb29b9c)
    `random_press` protects nothing, and draws again in every call, the same numbers for every
    layer.

    Args:
        size: entries kept, including both ends.
        sink: first entries kept; a budget makes them a tenth of it.
        window: last entries kept; a budget makes them a tenth of it.
        seed: of the sample.
    """

    sink: int = 51
    window: int = 51
    seed: int = 0

    def __post_init__(self) -> None:
        self._at_least(0, "sink", "window", "seed")
        super().__post_init__()
        self._at_least(self.sink + self.window, "size")

    @property
    def num_recent(self) -> int:
        return self.window

    def score(self, entries: Entries) -> Tensor:
        positions = entries.positions.long()
        heads = torch.arange(positions.shape[1], device=positions.device)[:, None]
        seed = self.seed * 1_000_003 % 2**31
        stream = _mixed(heads + (seed + entries.layers) % 2**31 * 2**20)
        priority = _mixed(positions * STEP + stream).double()
        return priority.masked_fill(positions < self.sink, torch.inf)

    def fit(
        self, budget: int, fixed: frozenset[str] = frozenset(), by: BudgetBy = "peak"
    ) -> Policy:
        if "size" in fixed:
            return self
        ends = {end: round(budget / 10) for end in ("sink", "window") if end not in fixed}
        ends |= {end: getattr(self, end) for end in ("sink", "window") if end in fixed}
        every = self.every if "every" in fixed else min(self.every, max(1, budget // 2))
        size = budget - (every - 1) // (1 if by == "peak" else 2)
        self._require(budget, max(sum(ends.values()), ends["window"] + 1), size=size)
        return self._replace(budget, minimum=0, **ends, every=every, size=size)


def _mixed(numbers: Tensor) -> Tensor:
    """A hash of int64 numbers, uniform over all of them."""
    for shift, factor in MIXES:
        high = (numbers >> shift) & (2 ** (64 - shift) - 1)
        numbers = (numbers ^ high) * factor
    return numbers
