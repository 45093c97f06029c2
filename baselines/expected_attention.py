"""Expected Attention (arXiv 2510.00636): of the prompt, what queries to come would attend stays."""

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
    """Keeps what queries like those of the prompt would attend, weighed by the values' L2 norm.

    Queries are taken as normal, with the prompt's mean and covariance before rotation, at the mean
    rotation of the positions to come. As NVIDIA/kvpress (8bb29b9c) `expected_attention_press`, by
    the paper's authors, after the prompt alone. No window is protected.

    Args:
        capacity: prompt entries kept, the first `sink` among them.
        sink: first entries, which stay, and whose queries do not count.
        future: positions to come that are averaged over.
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
        for head in range(mean.shape[1]):  # [rows, held, head_dim] of one at a time
            own = keys[:, head // group]
            spread = ((own @ covariance[:, head]) * own).sum(-1)
            logits = (own @ mean[:, head, :, None])[..., 0] + spread / 2
            attention[:, head // group] += logits.softmax(-1) / group
        norms = entries.values.float().norm(dim=-1)
        scores = torch.full_like(norms, torch.inf)
        scores[..., self.sink :] = attention * norms[..., self.sink :]
        return scores
