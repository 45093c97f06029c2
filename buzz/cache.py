"""The evicting cache: a stock transformers cache whose layers thin themselves."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer, get_layer_types_and_kwargs
from transformers.generation import GenerationMixin

from buzz import attention
from buzz.errors import ConfigError
from buzz.layer import EvictionLayer, Group
from buzz.policy import Policy
from buzz.rope import Rope, find_rope

# The name under which this transformers takes a cache: `cache` from 5.24 on, which still knows the
# older name and warns.
CACHE_ARGUMENT = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)

# Models whose attention is more than softmax(q k) v over per-head keys.
UNSUPPORTED = {
    "kv_lora_rank": "caches a latent and not keys (MLA)",
    "alibi": "marks positions by ALiBi and not by RoPE",
    "attn_logit_softcapping": "caps its attention logits, which the scored attention does not",
}


class EvictionCache(Cache):
    """A KV cache for `model.generate(**inputs, past_key_values=cache)` that evicts by `policy`.

    Making one is all that is needed: it also puts the attention backend in place. The model then
    still runs its stock path with any other cache.

    Args:
        model: a causal language model with RoPE, loaded with sdpa, eager or flash attention.
        policy: the eviction method.
        logn_base: scale attention logits by log(n) / log(logn_base), n = entries that a query
            attends (512 in a line that is commented out in the original BUZZ code; the journal
            version's formula has not been seen). None: no scaling.
        logn_clamp: never scale by less than 1.
        hold_until: evict nothing before this many tokens, padding included, have been seen: set it
            to the prompt's length to attend a chunked prompt in full.

    Raises:
        ConfigError: the model has no RoPE, or no layer that could evict.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: Policy,
        *,
        logn_base: float | None = None,
        logn_clamp: bool = False,
        hold_until: int = 0,
    ) -> None:
        if logn_base is not None and not logn_base > 1:
            raise ConfigError("cache.logn_base", logn_base, "give a number above 1, or null")
        self.policy = policy
        self.logn_base = logn_base
        self.logn_clamp = logn_clamp
        self._runs: list[list[int]] = []  # [steps, new tokens, change in length, evictions] alike
        self._last = (0, 0, 0)
        self._is_dropped = hasattr(model.config, "original_max_position_embeddings")
        super().__init__(layers=_make_layers(attention.install(model), model, policy))
        self.hold_until = hold_until

    def __bool__(self) -> bool:
        # Phi-3 with longrope drops a truthy cache when a text grows past its short context, to
        # compute all of it again; a falsy one goes on, with keys rotated as they came.
        return not self._is_dropped

    @property
    def evicting(self) -> list[EvictionLayer]:
        """The layers that evict: all, unless the model mixes in layers with a window of its own."""
        return [layer for layer in self.layers if isinstance(layer, EvictionLayer)]

    @property
    def hold_until(self) -> int:
        return self.evicting[0].hold_until

    @hold_until.setter
    def hold_until(self, tokens: int) -> None:
        for layer in self.evicting:
            layer.hold_until = tokens

    @property
    def lengths(self) -> list[int]:
        """Entries held by each evicting layer (by its longest row)."""
        return [layer.longest for layer in self.evicting]

    @property
    def evictions(self) -> list[int]:
        """Evictions so far of each row of the batch."""
        return self.evicting[0].evictions

    @property
    def entry_nbytes(self) -> int:
        """Bytes of one entry's keys and values over all evicting layers."""
        return sum(layer.entry_nbytes for layer in self.evicting)

    def nbytes(self, allocated: bool = False) -> int:
        """Bytes of keys and values held, padding and spare capacity not counted.

        Args:
            allocated: count instead every buffer as it lies in memory, with positions, scores,
                kept original keys and spare capacity.
        """
        return sum(layer.nbytes(allocated) for layer in self.evicting)

    def kept_positions(self, layer: int) -> Tensor:
        """True token indices of the entries of layer `layer`.

        Returns:
            int64 [batch, kv_heads, held], in temporal order; rows shorter than the longest begin
            with -1.
        """
        cache = self.layers[layer]
        if not isinstance(cache, EvictionLayer) or cache.store is None:
            raise ConfigError("layer", layer, "holds no entries (yet) that an eviction could keep")
        positions = cache.view(cache.store.positions).to(torch.int64)
        if (starts := cache.starts) is not None:
            slots = torch.arange(positions.shape[-1], device=positions.device)
            positions = positions.where(slots >= starts[:, None, None], -1)
        return positions

    def trace(self) -> list[tuple[int, int, int]]:
        """Length over time, of the first row: (tokens seen, entries held, evictions) by step.

        Steps that ran under torch.compile appear as one.
        """
        self._note_step()
        seen = held = evictions = 0
        trace = []
        for steps, new, change, evicted in self._runs:
            for _ in range(steps):
                seen, held, evictions = seen + new, held + change, evictions + evicted
                trace.append((seen, held, evictions))
        return trace

    def _note_step(self) -> None:
        """Note what the last step changed; equal steps share a note, so that it stays small."""
        group = next((g for g in self.evicting[0].groups if 0 in g.rows), None)
        if group is None or group.seen == self._last[0]:
            return
        now = (group.seen, group.held, group.evictions)
        change = [after - before for after, before in zip(now, self._last, strict=True)]
        if self._runs and self._runs[-1][1:] == change:
            self._runs[-1][0] += 1
        else:
            self._runs.append([1, *change])
        self._last = now

    def reset(self) -> None:
        """Forget every entry. Buffers stay allocated, for the next prompt."""
        super().reset()
        self._runs, self._last = [], (0, 0, 0)

    def begin_step(self, attention_mask: Tensor | None, batch: int, new: int) -> None:
        """Learn from a step's 2-D mask which rows are padded, and by how much.

        Args:
            attention_mask: [batch, seen + new], 0 in padding; None if there is none.

        Raises:
            ConfigError: padding anywhere but before a row's first token.
        """
        if not torch.compiler.is_compiling():
            self._note_step()
        first = self.evicting[0].cumulative_length == 0
        if attention_mask is None or not (first or new > 1):
            return
        if attention_mask.ndim != 2:
            raise ConfigError(
                "attention_mask", tuple(attention_mask.shape), "give the 2-D padding mask"
            )
        mask = attention_mask[:, -new:].bool()
        padding = (new - mask.sum(-1)).tolist()
        inside = torch.arange(new, device=mask.device) >= (new - mask.sum(-1, keepdim=True))
        if not torch.equal(mask, inside) or max(padding) == new or (not first and any(padding)):
            raise ConfigError(
                "attention_mask",
                padding,
                "padding must come before a row's first token, and no row may be all padding:"
                " set tokenizer.padding_side='left'",
            )
        if first:
            for layer in self.evicting:
                layer.groups = [
                    Group([row for row in range(batch) if padding[row] == size], padding=size)
                    for size in sorted(set(padding))
                ]


def _make_layers(decoder: nn.Module, model: PreTrainedModel, policy: Policy) -> list[Any]:
    config = model.config.get_text_config(decoder=True)
    name = type(model).__name__
    for field, reason in UNSUPPORTED.items():
        if getattr(config, field, None):
            raise ConfigError("model", name, f"{reason} (config.{field})")
    if getattr(decoder, "rotary_emb", None) is None:
        raise ConfigError(
            "model", name, "has no rotary position embedding (RoPE), so no kept key can be moved"
        )
    ropes: dict[tuple[str, bool], Rope] = {}
    layers: list[Any] = []
    types, arguments = get_layer_types_and_kwargs(config)
    for index, (kind, kwargs) in enumerate(zip(types, arguments, strict=True)):
        window: Any = kwargs.get("sliding_window")
        if kind == "sliding_attention" and window < config.max_position_embeddings:
            layers.append(DynamicSlidingWindowLayer(sliding_window=window))
            continue
        if kind not in ("full_attention", "sliding_attention"):
            raise ConfigError("model", name, f"layer {index} is {kind}; it has no KV cache to thin")
        module = attention.of_layer(decoder, index)
        key = (kind, bool(getattr(module, "use_rope", True)))
        if key not in ropes:
            ropes[key] = find_rope(decoder, module, kind)
        layers.append(EvictionLayer(policy, ropes[key]))
    if not any(isinstance(layer, EvictionLayer) for layer in layers):
        raise ConfigError(
            "model",
            name,
            f"all layers have a sliding window of {config.sliding_window} of their own and nothing"
            " is left to evict; load it with sliding_window=None",
        )
    return layers
