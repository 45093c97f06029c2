"""Whether a prompt is compressed with its question in sight, or before anybody has asked.

prompt    the prompt is attended in full, then evicted from: what a method keeps may depend on the
          question, as it does in most papers.
context   all before the question is read and evicted from; then the question is read, by queries
          that see what was kept and nothing else.
stream    as context, read in chunks with an eviction after each: no step holds the whole context.

A prompt is read in steps. All but the first have the same size in every row of a batch (`later`);
padding, if there is any, is in the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from buzz import CACHE_ARGUMENT, EvictionCache
from buzz.errors import ConfigError
from evals.tasks.base import Sample
from evals.tasks.encoding import Encoded

Compress = Literal["prompt", "context", "stream"]


def steps_before(
    compress: Compress,
    chunk: int,
    sample: Sample,
    encoded: Encoded | None,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[int, ...]:
    """Tokens of the steps that read a prompt up to its question; () if all is read at once.

    Args:
        chunk: tokens of a step, of a stream.
        encoded: the sample's prompt; None where the task tokenized it.

    Raises:
        ConfigError: the prompt has no question that is apart from a context.
    """
    if compress == "prompt":
        return ()
    if encoded is None or not sample.question.strip():
        raise ConfigError(
            "compress",
            compress,
            f"sample {sample.id} has no question that follows a context; write compress=prompt",
        )
    context = encoded.tokens_before(sample.question, tokenizer)
    if not 0 < context < len(encoded.ids):
        reason = "its question was cut" if encoded.truncated else "there is no context"
        remedy = f"sample {sample.id} cannot be split: {reason}; write compress=prompt"
        raise ConfigError("compress", compress, remedy)
    return in_steps(context, compress, chunk)


def in_steps(context: int, compress: Compress, chunk: int) -> tuple[int, ...]:
    """Tokens of the steps that read a context of so many."""
    if compress == "context":
        return (context,)
    whole, rest = divmod(context, chunk)
    return (chunk,) * whole + (rest,) * bool(rest)


def read_context(
    model: PreTrainedModel,
    cache: EvictionCache,
    ids: Tensor,
    mask: Tensor,
    later: Sequence[int],
    note: Callable[[], None] = lambda: None,
    chunk: int | None = None,
) -> None:
    """Feeds a prompt up to its last step, which asks; in chunks, up to the last chunk of that.

    Args:
        ids, mask: int64 [rows, longest], with padding on the left.
        later: tokens of the steps behind the first; if there are none, that is the last.
        note: called after each step.
        chunk: tokens of the chunks in which the first step is read, as if they were one; None: it
            is read as one, as it is if a whole chunk would be padding.
    """
    first = ids.shape[1] - sum(later)
    chunked = chunk and chunk < first and mask[:, chunk - 1].all()
    chunks = range(chunk, first, chunk) if chunked else ()
    if chunks:
        cache.hold_until = first
    start = 0
    for end in [*chunks, *(accumulate(later[:-1], initial=first) if later else ())]:
        forward(model, cache, ids[:, start:end], mask[:, :end], 1)
        if end >= first:
            note()
        start = end


def forward(
    model: PreTrainedModel, cache: EvictionCache, ids: Tensor, mask: Tensor | None, keep: int
) -> Tensor:
    """Logits [rows, keep, vocab] of a step's last tokens.

    Args:
        ids: int64 [rows, new].
        mask: int64 [rows, seen + new], 0 in padding; None if there is none.
    """
    given: dict[str, Any] = {CACHE_ARGUMENT: cache}
    if mask is not None:
        given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    with torch.inference_mode():
        return model(ids, attention_mask=mask, **given, logits_to_keep=keep).logits
