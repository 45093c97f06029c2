"""ChunkKV (arXiv 2502.00299): keeps whole chunks of the prompt that its last queries attend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from baselines.snapkv import SnapKVPolicy
from buzz.entries import Entries
from buzz.policy import register


@register()
@dataclass(frozen=True, kw_only=True)
class ChunkKVPolicy(SnapKVPolicy):
    """SnapKV by chunks of the prompt, the same in every KV head.

    A chunk's score is the mean of its entries' scores. As NVIDIA/kvpress (8bb29b9c) `chunkkv_press`
    on `snapkv_press`, where entries of the window have the highest score of those before it, and
    the last chunk may be shorter. There, a share of the chunks is kept. Here, the best chunks fill
    the capacity; of the last one of these, the best entries stay. The paper's reuse of indices
    across layers is in neither.

    Args:
        chunk: tokens of a chunk.
    """

    num_recent: ClassVar[int] = 0

    kernel: int = 5
    pooling: str = "avg"
    chunk: int = 20

    def __post_init__(self) -> None:
        self._at_least(1, "window", "kernel", "capacity", "chunk")
        self._one_of("pooling", "avg", "max")

    @property
    def observe(self) -> int:
        return self.window

    def score(self, entries: Entries) -> Tensor:
        """Minus the rank of an entry's chunk, plus a fraction below 1 that ranks it in its chunk.

        Chunks that reach into the window come first, the last one before the others: in the
        original no chunk can have a higher score, as the attention of a query sums to 1.
        """
        length, sums = entries.cache_length, entries.attention_sums
        history, device = max(1, length - self.window), sums.device
        attention = self._pool(sums[..., :history]).sum(1, keepdim=True).double()
        chunks, judged = -(-length // self.chunk), history // self.chunk
        means = attention[..., : judged * self.chunk].unflatten(-1, (judged, self.chunk)).mean(-1)
        order = means.sort(dim=-1, descending=True, stable=True).indices
        # Ranks: chunks of the window 0, 1, ... from the end, then the others by their means.
        ranks = torch.arange(chunks - 1, -1, -1, device=device).repeat(*order.shape[:2], 1)
        by_mean = torch.arange(chunks - judged, chunks, device=device).expand_as(order)
        ranks[..., :judged].scatter_(-1, order, by_mean)
        recent = torch.arange(length - history, device=device) / self.window
        inside = [
            attention / (2.1 * attention.sum(-1, keepdim=True).clamp(min=1e-30)),
            (0.5 + recent / 2.1).expand(*order.shape[:2], -1),
        ]
        of_chunk = ranks.repeat_interleave(self.chunk, dim=-1)[..., :length]
        return torch.cat(inside, dim=-1) - of_chunk
