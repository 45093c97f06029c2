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
    """Keeps the last `window` entries, and those that the window's queries attend most.

    As Zefan-Cai/R-KV (d15c9767) `rkv/compression/snapkv.py`: the logits of a group are the maximum
    over its query heads, and the softmax leaves out the window's own entries. There, the cache is
    in order of falling scores, so that pooling joins entries that are not adjacent; here it is in
    order of time. There, the prompt's length decides when the first eviction of the answer is.

    Args:
        size: entries kept by an eviction, including the window.
        window: last entries, which stay; their queries since the last eviction score the others.
        kernel: entries whose attention is max-pooled.
        every: tokens between two evictions.
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
