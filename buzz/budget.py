"""From a budget to a policy. All methods are fitted here, and checked to meet the budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from buzz.errors import ConfigError
from buzz.policy import BudgetBy, Policy

LAYERS = 30  # of a model that a budget is tried on
SLACK = 0.01  # of a budget; and at least one entry, as sizes are whole numbers


@dataclass(frozen=True)
class Budget:
    """KV memory of a method, per layer and KV head.

    Methods that evict whole pages (:class:`buzz.Constrained`) leave less than two pages of it
    unused.

    Args:
        size: entries, or a fraction of the prompt.
        by: ``peak``: the maximum cache length after any step, which a machine must have memory for;
            ``mean``: the average cache length over an endless answer.

    Raises:
        ConfigError: no such size or measure.
    """

    size: float | int
    by: BudgetBy = "peak"

    def __post_init__(self) -> None:
        whole = isinstance(self.size, int) and not isinstance(self.size, bool) and self.size >= 1
        if not whole and not (isinstance(self.size, float) and 0 < self.size < 1):
            remedy = "give a fraction of the prompt between 0 and 1, or entries >= 1"
            raise ConfigError("budget", self.size, remedy)
        if self.by not in get_args(BudgetBy):
            raise ConfigError("budget_by", self.by, "choose one of peak, mean")

    def entries(self, prompt: int) -> int:
        """The budget in entries, for a prompt of so many tokens."""
        return self.size if isinstance(self.size, int) else max(1, round(self.size * prompt))

    def policy(
        self, method: Policy, prompt: int, fixed: frozenset[str] = frozenset()
    ) -> tuple[Policy, int | None]:
        """The method that meets the budget, and the budget in entries (None if it never evicts).

        Args:
            prompt: its tokens.
            fixed: parameters of `method` that the user set and that must stay.

        Raises:
            ConfigError: the method does not meet the budget, because of `fixed` or because its
                class has no `fit`. Both numbers are named.
        """
        if method.evicts == "never":
            return method, None
        budget = self.entries(prompt)
        fitted = method.fit(budget, fixed, self.by)
        after_prompt, peak = fitted.footprint(prompt).after_prompt, float(budget)
        if fitted.evicts == "prompt":  # the answer comes on top of the budget
            reached = float(fitted.footprint(max(prompt, 2 * budget)).after_prompt)
        else:
            _, peak, mean = fitted.footprint()
            reached = mean if self.by == "mean" else peak
        for index in (0, LAYERS - 1):  # refused now, and not when a cache is made
            try:
                fitted.for_layer(index, LAYERS)
            except ConfigError as error:
                remedy = f"leaves a layer of {fitted.name} too little ({error}); give more"
                raise ConfigError("budget", self.size, remedy) from error
        slack = max(1.0, SLACK * budget)
        unfilled = slack if fitted.page == 1 else max(slack, 2 * fitted.page)
        if not budget - unfilled <= reached <= budget + slack * (self.by == "mean"):
            raise self._refusal(fitted, budget, f"holds {reached:,.0f}", fixed)
        if after_prompt > max(budget, peak):
            found = f"holds {after_prompt:,} after a prompt of {prompt:,} tokens"
            raise self._refusal(fitted, budget, found, fixed)
        return fitted, budget

    def _refusal(
        self, fitted: Policy, budget: int, found: str, fixed: frozenset[str]
    ) -> ConfigError:
        method = getattr(fitted, "method", fitted)
        own = vars(method)
        given = ", ".join(f"method.{name}={own[name]}" for name in sorted(fixed & own.keys()))
        remedy = (
            f"leave out {given}" if given else f"its class {type(method).__name__} needs a `fit`"
        )
        return ConfigError(
            "budget",
            self.size,
            f"{fitted.name} {found} and not {budget:,} entries ({self.by}); {remedy}",
        )
