"""Entries that a cache holds after each step, compared with its methods' length recurrences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from buzz import EvictionCache, Policy
from evals.run.faults import LengthMismatch


class Lengths:
    """Notes after each step what the layers that evict hold, and what is allocated for all.

    Layers under the same policy hold the same, so only one of each is looked at in every step, and
    all of them at the end.

    Args:
        policy: what the cache was told to follow; None: what its layers follow.
    """

    def __init__(self, cache: EvictionCache, policy: Policy | None = None) -> None:
        self._cache = cache
        self._policy = policy
        self._layers = cache.distinct
        self._count = Counter(layer.policy for layer in cache.evicting)
        self._allocated: list[int] = []  # by step, without idle buffers of an earlier prompt
        self._steps: list[list[list[int]]] = []  # by step and layer: entries of each row
        self._evictions: list[list[int]] = []  # by step: evictions so far of each row

    def of_copy(self, cache: EvictionCache) -> Lengths:
        """Those of a copy of the cache, which goes on by itself."""
        other = Lengths(cache, self._policy)
        other._steps, other._evictions = list(self._steps), list(self._evictions)
        other._allocated = list(self._allocated)
        return other

    def note(self) -> None:
        self._steps.append([list(layer.lengths) for layer in self._layers])
        counts = zip(*(layer.evictions for layer in self._layers), strict=True)
        self._evictions.append([max(row) for row in counts])
        now = self._cache.window_allocated_nbytes
        for layer in self._layers:
            waiting = 0 if layer.idle is None else layer.idle.nbytes()
            now += (layer.nbytes(allocated=True) - waiting) * self._count[layer.policy]
        self._allocated.append(now)

    def measured(self, row: int, steps: Sequence[int], skip: int = 0) -> dict[str, Any]:
        """What :class:`evals.run.generate.Measurements` says of a row's cache.

        Args:
            steps: tokens fed by each of the row's steps.
            skip: first steps whose lengths are left out.

        Raises:
            LengthMismatch: as :meth:`verified`.
        """
        cache, count = self._cache, len(steps)
        seen = list(accumulate(steps))[skip:]
        return {
            "lengths": self.verified(row, steps)[skip:],
            "evictions": self._evictions[count - 1][row],
            "entry_nbytes": cache.entry_nbytes,
            "window_nbytes": [cache.window_nbytes(tokens) for tokens in seen],
            "allocated_nbytes": max(self._allocated[:count]) // len(self._evictions[0]),
        }

    def verified(self, row: int, steps: Sequence[int]) -> list[float]:
        """Entries per layer and KV head after each of a row's steps, on average over the layers.

        Args:
            steps: tokens fed by each step.

        Raises:
            LengthMismatch: a layer held another number than its policy's recurrence says, or than
                another layer under the same policy.
        """
        totals = [0] * len(steps)
        for number, layer in enumerate(self._layers):
            measured = [step[number][row] for step in self._steps[: len(steps)]]
            told = self._policy and self._policy.for_layer(layer.index, len(self._cache.evicting))
            policy = told or layer.policy
            for step, due in enumerate(policy.lengths(steps)):
                if measured[step] != due:
                    raise LengthMismatch(
                        f"{policy.name}: after step {step}, with {sum(steps[: step + 1])} tokens"
                        f" read, the cache holds {measured[step]} entries, the method's own"
                        f" recurrence says {due}"
                    )
                totals[step] += due * self._count[layer.policy]
        by_policy = {layer.policy: layer.lengths for layer in self._layers}
        for layer in self._cache.evicting:
            if layer.lengths != by_policy[layer.policy]:
                raise LengthMismatch(
                    f"layers hold different numbers of entries: layer {layer.index}"
                    f" {layer.lengths}, another {by_policy[layer.policy]}"
                )
        layers = len(self._cache.evicting)
        return [total / layers if total % layers else total // layers for total in totals]
