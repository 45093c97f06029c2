"""PyramidKV (arXiv 2406.02069): SnapKV whose lower layers keep more than the upper ones."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from baselines.snapkv import SnapKVPolicy
from buzz.policy import BudgetBy, Policy, register


@register()
@dataclass(frozen=True, kw_only=True)
class PyramidKVPolicy(SnapKVPolicy):
    """SnapKV with capacities that fall from layer to layer, by the same number each time.

    As Zefan-Cai/KVCache-Factory (c97f9d70) `pyramidkv/pyramidkv_utils.py`, by its authors.
    A prompt of less than twice what is kept beside the window gets the same in every layer.

    Args:
        capacity: prompt entries kept by a layer on average, window included.
        beta: the last layer keeps, beside the window, this part of the mean: 1 / beta.
        step: ``floor`` rounds the difference between two layers down, as the original does: all
            layers then hold up to (layers - 1) / 2 more than the capacity, on average. ``exact``,
            which a budget sets, spreads the rounding over the layers, and holds no more.
    """

    window: int = 8
    beta: int = 20
    step: str = "floor"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(1, "beta")
        self._one_of("step", "floor", "exact")

    def for_layer(self, index: int, layers: int) -> Policy:
        return _Layer(**vars(self), index=index, layers=layers)

    def fit(
        self, budget: int, fixed: frozenset[str] = frozenset(), by: BudgetBy = "peak"
    ) -> Policy:
        """The budget is the mean over the layers of what the prompt's end leaves."""
        fitted = super().fit(budget, fixed, by)
        if fitted is self or "step" in fixed:
            return fitted
        assert isinstance(fitted, PyramidKVPolicy)
        return dataclasses.replace(fitted, step="exact")


@dataclass(frozen=True, kw_only=True)
class _Layer(PyramidKVPolicy):
    """One of the `layers`, from 0 at the input."""

    index: int
    layers: int

    def left(self, prompt: int) -> int:
        mean, history = self.capacity - self.window, prompt - self.window
        if prompt <= self.capacity or prompt < 2 * mean or self.layers == 1:
            return min(prompt, self.capacity)
        first = min(2 * mean - mean // self.beta, history)
        fall, steps = 2 * (first - mean), self.layers - 1  # from the first layer to the last
        if self.step == "floor":
            return self.window + first - self.index * (fall // steps)
        return self.window + first - -(-self.index * fall // steps)
