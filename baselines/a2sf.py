"""A2SF (arXiv 2407.20485): attention received, forgotten with the age of the query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from baselines.h2o import H2OPolicy
from buzz.policy import register


@register()
@dataclass(frozen=True, kw_only=True)
class A2SFPolicy(H2OPolicy):
    """H2O by attention that counts `decay` to the power of how many tokens ago it was given.

    As Dirac-Notation/A2SF (b2f12442) `utils_real_drop/kv_llama.py`, the last version that follows
    the paper: for a prompt in one piece and tokens after it. There a chunk of many tokens ages what
    came before as one token does; here as many do. It begins to count once the cache is over full.
    The paper searches `decay` for each task; 0.9 is one of its settings, and 1 is H2O.

    Args:
        heavy: entries kept by their score.
        recent: last entries kept.
        decay: what is left of a query's attention one token later.
    """

    scoring: ClassVar[str] = "sum"  # type: ignore[misc]  # H2O's parameter is none here: sums fade

    decay: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        self._within(0, 1, "decay")
