"""A2SF (arXiv 2407.20485): attention sums in which older queries count less."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from baselines.h2o import H2OPolicy
from buzz.policy import register


@register()
@dataclass(frozen=True, kw_only=True)
class A2SFPolicy(H2OPolicy):
    """H2O by attention sums that fade: a query of n tokens ago counts `decay` to the power of n.

    As Dirac-Notation/A2SF (b2f12442) `utils_real_drop/kv_llama.py`, the last version that follows
    the paper, for a prompt in one piece and the tokens after it. There, a chunk of many tokens
    fades earlier attention as much as one token; here as much as its tokens. There, sums begin once
    the cache exceeds its size. The paper searches `decay` for each task; 0.9 is one of its
    settings, and 1 is H2O.

    Args:
        heavy: entries kept by their score.
        recent: last entries kept.
        decay: factor on earlier attention sums at every new token.
    """

    scoring: ClassVar[str] = "sum"  # type: ignore[misc]  # H2O's parameter is none here: sums fade

    decay: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        self._within(0, 1, "decay")
