"""A second pass over a prompt, which scores its entries by how the model attends to repeat it.

The prompt is read as always, without eviction. Then the model reads a request to repeat a chunk of
it, and the chunk itself; the maximum attention that an entry gets from these tokens is its score.
Their entries are not kept. Then the prompt is evicted from. All of this happens in the forward pass
that ends the prompt, so it is part of the time to first token. Source: KVzip, arXiv 2505.23416.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from buzz import kernels
from buzz.adapter import CACHE_ARGUMENT, SelfAttending, unread_mask
from buzz.attention import sinks_of
from buzz.errors import ConfigError
from buzz.eviction import Group
from buzz.kernels.reference import softmax
from buzz.layer import EvictionLayer
from buzz.policy import Policy

# Scores of a row's entries in each layer, float32 [kv_heads, cache_length], by the row's tokens and
# the token ids of its second pass.
Known = dict[tuple[Any, ...], list[Tensor]]
BLOCK = 256  # queries whose weights exist at a time
SINK = 4  # first entries, attended with every chunk


class _Repeated(SelfAttending):
    """One layer's entries of one row, followed by those of the second pass, which are not kept."""

    def __init__(self, layer: EvictionLayer, group: Group, row: int) -> None:
        super().__init__()
        store = layer.store
        assert store is not None
        own = slice(row, row + 1), slice(None), slice(store.end - group.held, store.end)
        self.entries = store.keys[own], store.values[own]
        self.scores = torch.zeros(self.entries[0].shape[1:3], device=store.device)
        self.chunk = slice(0, 0)  # the entries of the current chunk

    def attend(self, attention: Callable[..., Any], query: Tensor, **kwargs: Any) -> Tensor:
        """Attention of the second pass's queries [1, heads, m, head_dim]; scores the chunk."""
        keys, values = self.taken()
        own = self.entries
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        # This copies one layer's entries once a chunk: little, compared with its attention.
        both = torch.cat([own[0], keys], 2), torch.cat([own[1], values], 2)
        sinks = sinks_of(kwargs)
        output, _ = kernels.scored_prefill(query, *both, scale, observe=1, sinks=sinks)
        sink = min(SINK, self.chunk.start)
        attended = torch.cat([own[0][:, :, :sink], own[0][:, :, self.chunk], keys], 2)
        highest = highest_attention(query[0] * scale, attended[0], sinks)
        self.scores[:, self.chunk] = highest[:, sink : attended.shape[2] - keys.shape[2]]
        return output.transpose(1, 2)


def highest_attention(query: Tensor, key: Tensor, sinks: Tensor | None = None) -> Tensor:
    """Maximum attention to each key, over all queries and the query heads of its group.

    Args:
        query: [heads, m, head_dim], times the scale; causal, the last one attends all keys.
        key: [kv_heads, n, head_dim], n >= m.
        sinks: [heads], see :func:`buzz.kernels.scored_prefill`.

    Returns:
        float32 [kv_heads, n].
    """
    count, held = query.shape[1], key.shape[1]
    grouped = query.float().unflatten(0, (key.shape[0], -1))
    highest = torch.zeros(key.shape[:2], device=key.device)
    slots = torch.arange(held, device=key.device)
    for head, own in enumerate(key.float()):
        terms = None if sinks is None else sinks.unflatten(0, (len(key), -1))[head]
        for low in range(0, count, BLOCK):
            block = grouped[head, :, low : low + BLOCK]
            last = torch.arange(low, low + block.shape[1], device=key.device) + held - count
            logits = (block @ own.mT).masked_fill(slots > last[:, None], -torch.inf)
            weights = softmax(logits[None, None], terms)[0, 0]
            highest[head] = highest[head].maximum(weights.amax((0, 1)))
    return highest


def check(policy: Policy, layers: Sequence[Any], plain: bool, logn_base: float | None) -> None:
    """Raises ConfigError if these layers cannot read a prompt a second time.

    Args:
        plain: whether all of them evict and have no other states.
    """
    if not policy.needs_repetition:
        return
    if logn_base is not None:
        raise ConfigError(
            "cache.logn_base", logn_base, f"{policy.name}'s second pass does not scale; write null"
        )
    reason = ""
    if not plain:
        reason = "layers that do not evict would keep what the second pass reads"
    elif not all(layer.rotation.static for layer in layers):
        reason = "RoPE's frequencies would change with what the second pass reads"
    if reason:
        raise ConfigError("method.name", policy.name, f"{reason}; take another method or model")


@torch.no_grad()
def repeat(
    decoder: nn.Module, layers: Sequence[EvictionLayer], prompt: Tensor, known: Known
) -> None:
    """Reads a prompt a second time to score its entries, and lets all layers evict.

    Args:
        prompt: token ids [batch, n], padding included.
        known: scores of other rows and caches; those found here are added.

    Raises:
        ConfigError: the model was given embeddings.
    """
    first = layers[0]
    if prompt.is_floating_point():
        name = first.policy.name
        raise ConfigError("inputs_embeds", name, "it repeats the prompt's tokens; give input_ids")
    scored = []
    for layer in layers:
        assert layer.store is not None
        scored.append(torch.zeros_like(layer.view(layer.store.positions), dtype=torch.float32))
    for number, group in enumerate(first.groups):
        if first.policy.next_length(group.held, group.state)[0] == group.held:
            continue
        for row in group.rows:
            tokens = prompt[row, group.padding :].tolist()
            read = [(start, end, *ids) for start, end, ids in first.policy.repetitions(tokens)]
            same = (group.first_position, tuple(tokens), tuple(read))
            if same not in known:
                known[same] = _scores(decoder, layers, number, row, tokens)
            for scores, own in zip(scored, known[same], strict=True):
                scores[row, :, scores.shape[-1] - group.held :] = own
    for layer, scores in zip(layers, scored, strict=True):
        layer.judge(scores)


def _scores(
    decoder: nn.Module, layers: Sequence[EvictionLayer], group: int, row: int, tokens: list[int]
) -> list[Tensor]:
    """Scores of one row's entries in each layer, float32 [kv_heads, cache_length]."""
    repeated = [_Repeated(layer, layer.groups[group], row) for layer in layers]
    device, of = layers[0].device, layers[0].groups[group]
    position = of.first_position + of.seen
    for start, end, ids in layers[0].policy.repetitions(tokens):
        for one in repeated:
            one.chunk = slice(start, end)
        given: dict[str, Any] = {CACHE_ARGUMENT: Cache(layers=list(repeated))}
        decoder(
            input_ids=torch.tensor([ids], device=device),
            position_ids=torch.arange(position, position + len(ids), device=device)[None],
            attention_mask=unread_mask(device),
            eviction_layers=repeated,
            **given,
        )
    return [one.scores for one in repeated]
