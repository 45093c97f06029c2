"""Expected Attention (arXiv 2510.00636): keeps what future queries are expected to attend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from baselines.ranking import PromptPolicy
from buzz.entries import Entries
from buzz.policy import register


@register()
@dataclass(frozen=True, kw_only=True)
class ExpectedAttentionPolicy(PromptPolicy):
    """Ranks the prompt's entries by the expected attention of future queries to them.

    Queries are assumed to be normal, with the mean and covariance of the prompt's before RoPE, at
    the mean rotation of future positions; attention is weighted by the values' L2 norm. As
    NVIDIA/kvpress (8bb29b9c) `expected_attention_press`, by the paper's authors, after the prompt
    alone. No window is protected.

    Args:
        capacity: prompt entries kept, including the first `sink`.
        sink: first entries, which always stay, and whose queries do not count.
        future: future positions that are averaged over.
    """

    sink: int = 4
    future: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(0, "sink")
        self._at_least(1, "future")

    @property
    def moments_from(self) -> int:
        return self.sink

    def score(self, entries: Entries) -> Tensor:
        moments, steps = entries.moments, range(self.future)
        mean = entries.ahead(moments.mean, steps)
        # Rotated from both sides: R C R^T.
        half = entries.ahead(moments.covariance, steps)
        covariance = entries.ahead(half.mT, steps).mT
        keys = entries.keys[:, :, self.sink :].float()
        group = mean.shape[1] // keys.shape[1]
        attention = torch.zeros(keys.shape[:3], device=keys.device)
        for head in range(mean.shape[1]):  # one at a time: [rows, n, head_dim]
            own = keys[:, head // group]
            spread = ((own @ covariance[:, head]) * own).sum(-1)
            logits = (own @ mean[:, head, :, None])[..., 0] + spread / 2
            attention[:, head // group] += logits.softmax(-1) / group
        norms = entries.values.float().norm(dim=-1)
        scores = torch.full_like(norms, torch.inf)
        scores[..., self.sink :] = attention * norms[..., self.sink :]
        return scores
