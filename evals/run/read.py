"""Texts that are read through an evicting cache, and the log-likelihood of each token."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from buzz import EvictionCache, Policy
from evals.run.faults import NotFinite
from evals.run.generate import Measurements, forward, synchronize
from evals.run.lengths import Lengths
from evals.run.memory import memory_peak, reset_memory_peak
from evals.run.plan import reading_steps


def read(
    model: PreTrainedModel,
    ids: Sequence[int],
    policy: Policy,
    chunk: int,
    cache_options: dict[str, Any],
    starts: Sequence[int] = (0,),
    cache: EvictionCache | None = None,
) -> tuple[Measurements, list[float]]:
    """Reads a text, or several one after another, in steps of `chunk` tokens with one cache.

    A token is scored by the step before the one that feeds it, so it cannot influence which entries
    predict it. Tokens of one step attend each other and what the cache held before.

    Args:
        starts: places in `ids` where a text begins, see :func:`fed_and_scored`.
        cache: an empty one to read with; None: a new one.

    Returns:
        Measurements (`ttft_s` is the time of the first step, a latency that of a step, tokens per
        second are tokens read), and the negative log-likelihood in nats of each token but the first
        of a text.

    Raises:
        LengthMismatch: the cache held another number of entries than the policy's recurrence says.
        NotFinite: a token's loss is NaN or infinite.
    """
    device = model.device
    if cache is None:
        cache = EvictionCache(model, policy, **cache_options)
    fed, scored = (torch.tensor(tokens, device=device) for tokens in fed_and_scored(ids, starts))
    steps = reading_steps(len(fed) + 1, chunk)
    losses: list[Tensor] = []
    lengths = Lengths(cache, policy)
    reset_memory_peak(device)
    synchronize(device)
    times = [time.perf_counter()]
    position = 0
    for new in steps:
        logits = forward(model, cache, fed[None, position : position + new], None, new)[0]
        position += new
        targets = scored[position - new : position]
        losses.append(cross_entropy(logits.float(), targets, reduction="none"))
        lengths.note()
        synchronize(device)
        times.append(time.perf_counter())
    held = lengths.measured(0, steps)
    values = torch.cat(losses).tolist()
    if wrong := [token for token, loss in enumerate(values, start=1) if not math.isfinite(loss)]:
        raise NotFinite("the loss was", wrong[0], model.dtype)
    latencies = np.diff(times)
    p50, p95 = np.percentile(latencies, [50, 95]) * 1e3
    measured = Measurements(
        prompt_tokens=len(ids),
        **held,
        ttft_s=float(latencies[0]),
        decode_tokens_per_s=position / (times[-1] - times[0]),
        itl_p50_ms=p50,
        itl_p95_ms=p95,
        memory_peak_nbytes=memory_peak(device),
    )
    return measured, values


def fed_and_scored(ids: Sequence[int], starts: Sequence[int] = (0,)) -> tuple[list[int], list[int]]:
    """The tokens that are fed, and the token that each of them predicts.

    Of every text, which ends where the next one starts, all but the last are fed and all but the
    first are predicted: nothing of one text predicts the next one's first token.
    """
    ends = [*starts[1:], len(ids)]
    texts = [ids[start:end] for start, end in zip(starts, ends, strict=True)]
    return [i for text in texts for i in text[:-1]], [i for text in texts for i in text[1:]]
