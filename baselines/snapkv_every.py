"""SnapKV while decoding too, once in so many tokens, as R-KV (arXiv 2505.24133) ran it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from baselines.ranking import RankingPolicy
from buzz.entries import Entries, observed_attention
from buzz.policy import register


@register()
@dataclass(frozen=True, kw_only=True)
class SnapKVEveryPolicy(RankingPolicy):
    """Keeps the last `window` entries, and those that their queries attend the most.

    As Zefan-Cai/R-KV (d15c9767) `rkv/compression/snapkv.py`: the query heads of a group judge by
    the highest of their logits, and the window's entries take no share of the attention. There
    the cache is stored in order of falling scores, so that pooling joins what is not adjacent;
    here in order of time. The phase of its first period depends on the prompt's length.

    Args:
        size: entries kept by an eviction, window included.
        window: last queries that judge; as many as an eviction left to come, if they are fewer.
        kernel: neighbours whose highest attention counts.
        every: tokens that come between two evictions.
    """

    every: int = 128
    window: int = 8
    kernel: int = 7

    def __post_init__(self) -> None:
        self._at_least(1, "window", "kernel")
        super().__post_init__()

    @property
    def num_recent(self) -> int:
        return self.window

    queries = num_recent

    def score(self, entries: Entries) -> Tensor:
        return observed_attention(entries, self.window, self.kernel)
