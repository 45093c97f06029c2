"""Several methods beside each other on one prompt: one prefill, then a row for each.

No method evicts before a prompt is attended in full, so what a model computes for a prompt is the
same for all of them, and so are its keys and values: they are computed once and shared until an
eviction moves what it keeps. From then on every method is a row of one batch: the linear layers run
once for all rows, attention runs row by row on what that row's method kept.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from buzz.adapter import SelfAttending
from buzz.cache import EvictionCache
from buzz.errors import ConfigError
from buzz.layer import EvictionLayer
from buzz.policy import Policy


class ForkedLayer(SelfAttending):
    """One layer of every fork.

    Args:
        forks: their caches.
        index: the layer's.
    """

    def __init__(self, forks: Sequence[EvictionCache], index: int) -> None:
        super().__init__()
        self.forks = forks
        self.index = index
        self.layers: list[Any] = [fork.layers[index] for fork in forks]
        self.entries: list[tuple[Tensor, Tensor]] = []  # each fork's keys and values, in a step

    def get_seq_length(self) -> int:
        return self.layers[0].get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append a prompt [1, kv_heads, new, head_dim] to all forks, later steps each to its own.

        Returns:
            What it was given: :meth:`attend` has the entries.
        """
        self.entries = [
            layer.update(_row(key_states, row), _row(value_states, row))
            for row, layer in enumerate(self.layers)
        ]
        return key_states, value_states

    def attend(
        self, attention: Callable[..., tuple[Tensor, Any]], query: Tensor, **kwargs: Any
    ) -> Tensor:
        """Every fork's attention, and its eviction.

        Args:
            attention: :func:`buzz.attention.attend` of this layer's module.
            query: [1 or forks, heads, new, head_dim].

        Returns:
            [1 or forks, new, heads, head_dim].
        """
        shared: dict[Any, Any] | None = {} if query.shape[0] == 1 else None
        outputs = [
            attention(
                _row(query, row),
                *self.entries[row],
                None,
                eviction_layers=fork.layers,
                shared=shared,
                **kwargs,
            )[0]
            for row, fork in enumerate(self.forks)
        ]
        self.entries = []
        return outputs[0] if shared is not None else torch.cat(outputs)


class ForkedCache(EvictionCache):
    """One cache for several methods: `model(prompt)` of one row, then steps of a row for each.

    Row i of a step continues under `policies[i]`; `forks[i]` is that method's cache, for lengths,
    kept positions and bytes. Prompts have no padding and come in one piece; later steps may be
    chunks. What a row gives is what it gives alone, up to the rounding of batched matrix products.

    Args:
        model, options: as of :class:`buzz.EvictionCache`.
        policies: the methods; one may be there several times.

    Raises:
        ConfigError: no policy; a model with layers that do not evict; as EvictionCache.
    """

    def __init__(self, model: PreTrainedModel, policies: Sequence[Policy], **options: Any) -> None:
        if not policies:
            raise ConfigError("policies", [], "give at least one")
        self.forks = [EvictionCache(model, policy, **options) for policy in policies]
        first = self.forks[0]
        if not all(isinstance(layer, EvictionLayer) for layer in first.layers):
            name = type(model).__name__
            raise ConfigError("model", name, "has layers that do not evict; run methods one by one")
        layers: list[Any] = [ForkedLayer(self.forks, index) for index in range(len(first.layers))]
        Cache.__init__(self, layers=layers)
        self.evicting = layers
        self._replay = None  # rows of different lengths are no graph

    def begin_step(
        self,
        decoder: nn.Module,
        batch: int,
        new: int,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
    ) -> None:
        """As of every fork.

        Raises:
            ConfigError: a mask.
            RuntimeError: a prompt of several rows; a later step that has not a row for each fork.
        """
        wanted = len(self.forks) if self.get_seq_length() else 1
        if batch != wanted:
            raise RuntimeError(f"this step has {batch} rows and not {wanted}")
        if attention_mask is not None:
            raise ConfigError("attention_mask", "of this step", "leave it out: no row is padded")
        for row, fork in enumerate(self.forks):
            own = None if position_ids is None else _row(position_ids, row)
            fork.begin_step(decoder, 1, new, None, own)

    def end_step(self, decoder: nn.Module, tokens: Tensor) -> None:
        for row, fork in enumerate(self.forks):
            fork.end_step(decoder, _row(tokens, row))

    def copy(self) -> ForkedCache:
        other = copy.copy(self)
        other.forks = [fork.copy() for fork in self.forks]
        layers: list[Any] = [ForkedLayer(other.forks, index) for index in range(len(self.layers))]
        other.layers = other.evicting = layers
        return other

    def reset(self) -> None:
        for fork in self.forks:
            fork.reset()


def _row(tensor: Tensor, row: int) -> Tensor:
    """A fork's row of a step, or the prompt that all share."""
    return tensor if tensor.shape[0] == 1 else tensor[row : row + 1]
