"""Sampled answers that depend on their own seed alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    The likeliest token after Gumbel noise is a draw from the softmax (Gumbel, 1954; the Gumbel-max
    trick), so that greedy decoding with noise samples. Each row has a random generator of its own,
    so that an answer is the same in any batch, and in a run that is resumed.

    Attributes:
        temperature: above 0.
        top_p: the likeliest tokens of this probability together are drawn from.
        seeds: of each row.
    """

    temperature: float
    top_p: float
    seeds: Sequence[int]

    def processors(self, device: torch.device) -> list[LogitsProcessor]:
        found: list[LogitsProcessor] = [TemperatureLogitsWarper(float(self.temperature))]
        if self.top_p < 1:
            found.append(TopPLogitsWarper(self.top_p))
        return [*found, _Gumbel(self.seeds, device)]


class _Gumbel(LogitsProcessor):
    """Adds Gumbel noise to the logits [rows, vocab]."""

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = torch.empty(scores.shape, device=scores.device)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores.float() - noise.log()
