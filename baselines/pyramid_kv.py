"""PyramidKV (arXiv 2406.02069): SnapKV with larger capacities in lower layers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from baselines.snapkv import SnapKVPolicy
from buzz.policy import BudgetBy, Policy, register


@register()
@dataclass(frozen=True, kw_only=True)
class PyramidKVPolicy(SnapKVPolicy):
    """SnapKV with capacities that decrease linearly with depth.

    As Zefan-Cai/KVCache-Factory (c97f9d70) `pyramidkv/pyramidkv_utils.py`, by its authors. Layers
    have equal capacities for prompts shorter than twice the mean capacity without window.

    Args:
        capacity: mean capacity of the layers, in prompt entries, including the window.
        beta: without the window, the last layer keeps 1 / beta of the mean.
        step: ``floor`` rounds the difference between two layers down, as the original does: the
            mean is then up to (layers - 1) / 2 above the capacity. ``exact``, which a budget sets,
            distributes the rounding over the layers: the mean is the capacity at most.
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
        """The budget is the mean cache length of the layers after the prompt."""
        fitted = super().fit(budget, fixed, by)
        if fitted is self or "step" in fixed:
            return fitted
        assert isinstance(fitted, PyramidKVPolicy)
        return dataclasses.replace(fitted, step="exact")


@dataclass(frozen=True, kw_only=True)
class _Layer(PyramidKVPolicy):
    """The policy of layer `index`; 0 is the first."""

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
