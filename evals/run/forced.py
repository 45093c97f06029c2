"""Teacher-forced passes through an evicting cache: reading texts, and comparing with full cache."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax
from transformers import PreTrainedModel

from baselines import FullPolicy
from buzz import EvictionCache, Policy
from evals.run.compress import forward, read_context
from evals.run.faults import NotFinite
from evals.run.generate import Measurements, left_padded, synchronize
from evals.run.lengths import Lengths
from evals.run.memory import memory_peak, reset_memory_peak

# Steps of the full cache that are computed at once: nothing is evicted between them.
CHUNK = 32


@dataclass(frozen=True)
class Fidelity:
    """How near a method's next-token distributions are to those of a full cache, for one row.

    Means over the continuation's tokens but the first, which is predicted before any eviction;
    None if there is no other. Where the context is compressed before the question is read, over
    all.

    Attributes:
        kl_to_full: KL(full || method) in nats.
        top1_to_full: share of positions where both have the same likeliest token.
    """

    kl_to_full: float | None
    top1_to_full: float | None


def read(
    model: PreTrainedModel,
    ids: Sequence[int],
    policy: Policy,
    chunk: int,
    cache_options: dict[str, Any],
    starts: Sequence[int] = (0,),
) -> tuple[Measurements, list[float]]:
    """Reads a text, or several one after another, in steps of `chunk` tokens with one cache.

    A token is scored by the step before the one that feeds it, so before it can influence which
    entries predict it; tokens of one step attend each other and whatever the cache held before.

    Args:
        starts: places in `ids` where a text begins, see :func:`fed_and_scored`.

    Returns:
        Measurements (`ttft_s` is the first step's time, a latency is a step's, tokens per second
        are those read), and the negative log-likelihood in nats of each token but a text's first.

    Raises:
        LengthMismatch: the cache held another number of entries than the policy's recurrence says.
        NotFinite: a token's loss is NaN or infinite.
    """
    device = model.device
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
    held = lengths.verified(0, steps)
    values = torch.cat(losses).tolist()
    if wrong := [token for token, loss in enumerate(values, start=1) if not math.isfinite(loss)]:
        raise NotFinite("the loss was", wrong[0], model.dtype)
    latencies = np.diff(times)
    p50, p95 = np.percentile(latencies, [50, 95]) * 1e3
    measured = Measurements(
        prompt_tokens=len(ids),
        lengths=held,
        evictions=cache.evictions[0],
        entry_nbytes=cache.entry_nbytes,
        allocated_nbytes=cache.nbytes(allocated=True),
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


def reading_steps(tokens: int, chunk: int) -> list[int]:
    """Tokens fed by each step: the last has no successor to predict and is not fed."""
    whole, rest = divmod(tokens - 1, chunk)
    return [chunk] * whole + [rest] * bool(rest)


def compare_with_full(
    model: PreTrainedModel,
    prompts: list[list[int]],
    continuations: list[list[int]],
    policy: Policy,
    pad: int,
    cache_options: dict[str, Any],
    later: Sequence[int] = (),
) -> list[Fidelity]:
    """Feeds both caches the same continuations, a token at a time as in decoding.

    Args:
        prompts, continuations: token ids of each row of the batch.
        pad: the padding token's id.
        cache_options: the method's; the full cache has none.
        later: tokens of the steps behind the first in which every prompt is read, see
            :mod:`evals.run.compress`.

    Raises:
        NotFinite: a divergence is NaN or infinite.
    """
    longest = max(map(len, continuations))
    rows = [tokens + [pad] * (longest - len(tokens)) for tokens in continuations]
    forced = torch.tensor(rows, device=model.device)[:, :-1]
    options = [{}, cache_options]
    caches = [
        EvictionCache(model, method, **option)
        for method, option in zip((FullPolicy(), policy), options, strict=True)
    ]
    ids, mask = left_padded(prompts, pad).to(model.device)
    asks = sum(later[-1:])
    for cache in caches:
        read_context(model, cache, ids, mask, later)
    first = [forward(model, cache, ids[:, -asks:], mask, 1) for cache in caches]
    pairs = _distributions(model, caches, forced, mask)
    if later:  # the first token, too, is predicted from what was kept
        pairs = chain([tuple(_log_probabilities(logits[:, 0]) for logits in first)], pairs)
    steps = [
        torch.stack([(full.exp() * (full - own)).sum(-1), full.argmax(-1) == own.argmax(-1)])
        for full, own in pairs
    ]
    if not steps:
        return [Fidelity(None, None)] * len(prompts)
    kls, agreements = torch.stack(steps, dim=-1).tolist()  # the only wait for the device
    unpredicted = 0 if later else 1
    counts = [len(tokens) - unpredicted for tokens in continuations]
    return [
        fidelity_of(kl[:count], same[:count], model.dtype)
        for kl, same, count in zip(kls, agreements, counts, strict=True)
    ]


def fidelity_of(kl: list[float], same: list[float], dtype: torch.dtype) -> Fidelity:
    """Means over the positions of one answer.

    Raises:
        NotFinite: a divergence is NaN or infinite.
    """
    if not kl:
        return Fidelity(None, None)
    if wrong := [position for position, nats in enumerate(kl, start=1) if not math.isfinite(nats)]:
        raise NotFinite("the KL divergence was", wrong[0], dtype)
    return Fidelity(statistics.fmean(kl), statistics.fmean(same))


def _distributions(
    model: PreTrainedModel, caches: list[EvictionCache], forced: Tensor, mask: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Log-probabilities [rows, vocab] of the full cache and the other one, after each token."""
    full, own = caches
    for start in range(0, forced.shape[1], CHUNK):
        tokens = forced[:, start : start + CHUNK]
        seen = torch.cat([mask, torch.ones_like(forced[:, : start + tokens.shape[1]])], dim=1)
        expected = forward(model, full, tokens, seen, tokens.shape[1])
        for step in range(tokens.shape[1]):
            now = seen[:, : mask.shape[1] + start + step + 1]
            found = forward(model, own, tokens[:, step : step + 1], now, 1)
            yield _log_probabilities(expected[:, step]), _log_probabilities(found[:, 0])


def _log_probabilities(logits: Tensor) -> Tensor:
    return log_softmax(logits, dim=-1, dtype=torch.float32)
