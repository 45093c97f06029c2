"""A second pass over a prompt: how its entries are attended when the model repeats it.

The prompt is read as always, and kept whole. Then the model reads what it might write if it were
asked to repeat a chunk of it; the highest attention that an entry gets from that is its score.
Nothing of this is kept, and only then the prompt is thinned. All of it happens in the forward pass
that ends the prompt, so it counts in the time to the first token. Source: KVzip, arXiv 2505.23416.
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

# What entries are worth to each layer, float32 [kv_heads, held], by the tokens of a row and by what
# is read to judge them.
Known = dict[tuple[Any, ...], list[Tensor]]
BLOCK = 256  # queries whose weights exist at a time
SINK = 4  # first entries, which are attended with every chunk


class _Repeated(SelfAttending):
    """What one layer holds of a row of a group, and behind it what is read; that is never kept."""

    def __init__(self, layer: EvictionLayer, group: Group, row: int) -> None:
        super().__init__()
        store = layer.store
        assert store is not None
        own = slice(row, row + 1), slice(None), slice(store.end - group.held, store.end)
        self.entries = store.keys[own], store.values[own]
        self.scores = torch.zeros(self.entries[0].shape[1:3], device=store.device)
        self.chunk = slice(0, 0)  # the entries that are repeated now

    def attend(self, attention: Callable[..., Any], query: Tensor, **kwargs: Any) -> Tensor:
        """Attention of what is read [1, heads, m, head_dim], and its scores of the chunk."""
        keys, values = self.taken()
        own = self.entries
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        # One layer's entries are copied, a chunk: next to nothing beside its attention.
        both = torch.cat([own[0], keys], 2), torch.cat([own[1], values], 2)
        sinks = sinks_of(kwargs)
        output, _ = kernels.scored_prefill(query, *both, scale, observe=1, sinks=sinks)
        sink = min(SINK, self.chunk.start)
        attended = torch.cat([own[0][:, :, :sink], own[0][:, :, self.chunk], keys], 2)
        highest = highest_attention(query[0] * scale, attended[0], sinks)
        self.scores[:, self.chunk] = highest[:, sink : attended.shape[2] - keys.shape[2]]
        return output.transpose(1, 2)


def highest_attention(query: Tensor, key: Tensor, sinks: Tensor | None = None) -> Tensor:
    """The highest attention that each key gets from any query and head of its group.

    Args:
        query: [heads, m, head_dim], times the scale; the last sees all keys, others end before.
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
    """Raises ConfigError if a prompt cannot be read a second time through these layers.

    Args:
        plain: whether they hold nothing but entries that may be evicted.
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
    """Score what all layers hold of a prompt, and let them evict.

    Args:
        prompt: token ids [batch, n], padding included.
        known: of rows and caches that hold the same; what is found here is added.

    Raises:
        ConfigError: the model was given embeddings.
    """
    first = layers[0]
    if prompt.is_floating_point():
        name = first.policy.name
        raise ConfigError("inputs_embeds", name, "it repeats the prompt's tokens; give input_ids")
    received = []
    for layer in layers:
        assert layer.store is not None
        received.append(torch.zeros_like(layer.view(layer.store.positions), dtype=torch.float32))
    for number, group in enumerate(first.groups):
        if first.policy.next_length(group.held, group.state)[0] == group.held:
            continue
        for row in group.rows:
            tokens = prompt[row, group.padding :].tolist()
            read = [(start, end, *ids) for start, end, ids in first.policy.repetitions(tokens)]
            same = (group.first_position, tuple(tokens), tuple(read))
            if same not in known:
                known[same] = _scores(decoder, layers, number, row, tokens)
            for scores, own in zip(received, known[same], strict=True):
                scores[row, :, scores.shape[-1] - group.held :] = own
    for layer, scores in zip(layers, received, strict=True):
        layer.judge(scores)


def _scores(
    decoder: nn.Module, layers: Sequence[EvictionLayer], group: int, row: int, tokens: list[int]
) -> list[Tensor]:
    """What one row's entries are worth to each layer, float32 [kv_heads, held]."""
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
