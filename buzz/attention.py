"""The attention backend: stock attention that also yields what each cache entry received.

How the pieces find each other, in one place. Making an :class:`~buzz.EvictionCache`

1. registers :func:`attend` with transformers' `AttentionInterface` in place of the model's backend
   (sdpa, eager, flash_attention_2 ...), which it keeps and calls;
2. adds a forward pre-hook to the decoder. When `past_key_values` is an EvictionCache, the hook has
   the cache check the step's inputs and read the padding off the 2-D mask, puts an inert mask in
   its place, and passes the cache on as the keyword `eviction_cache`, which transformers hands down
   to the attention function unchanged.

Without that keyword :func:`attend` only calls the stock function: with any other cache, and in any
other model, the stock path runs. Neither model code nor configuration is touched.

Where outputs and scores come from:

- methods (and steps) that read no scores: the stock backend, at its own speed;
- with scores, under sdpa and flash attention: :mod:`buzz.kernels`, which choose by device;
- with scores, under eager: the plain torch version of the same kernels.

No gradient flows through kept entries, so none flows at all: a backward pass is refused.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from buzz import kernels
from buzz.errors import ConfigError
from buzz.layer import EvictionLayer

if TYPE_CHECKING:
    from buzz.cache import EvictionCache

BACKENDS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")
Attention = Callable[..., tuple[Tensor, Any]]
Scored = tuple[Tensor, Tensor | None]  # output, and what each entry received


def install(model: PreTrainedModel) -> nn.Module:
    """Make `model` serve evicting caches (once); its decoder is returned.

    Raises:
        ConfigError: an attention backend that is not supported.
    """
    backend = model.config._attn_implementation
    if backend not in BACKENDS:
        raise ConfigError(
            "model.attn_implementation", backend, f"choose one of {', '.join(BACKENDS)}"
        )
    stock = ALL_ATTENTION_FUNCTIONS.get(backend, _model_eager)
    if not isinstance(stock, functools.partial):
        AttentionInterface.register(backend, functools.partial(attend, stock, backend))
    decoder: nn.Module = model.get_decoder()
    if not any(hook is _announce_cache for hook in decoder._forward_pre_hooks.values()):
        decoder.register_forward_pre_hook(_announce_cache, with_kwargs=True)
    return decoder


def of_layer(decoder: nn.Module, index: int) -> nn.Module:
    """The attention module of one decoder layer.

    Raises:
        ConfigError: the model keeps it under an unknown name.
    """
    layers: Any = getattr(decoder, "layers", None)
    layer = layers[index] if layers is not None else None
    for name in ("self_attn", "attention", "attn"):
        if hasattr(layer, name):
            return getattr(layer, name)
    raise ConfigError("model", type(decoder).__name__, "its attention layers could not be found")


def attend(
    stock: Attention,
    backend: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    eviction_cache: EvictionCache | None = None,
    shared: dict[Any, Scored] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """An attention function of transformers that evicts once the step's output is computed.

    Args:
        stock: the backend's own attention function.
        backend: its name.
        query: [batch, heads, new, head_dim].
        key, value: [batch, kv_heads, held, head_dim], the new entries last.
        eviction_cache: the cache that holds `key` and `value`; None to run the stock function.
        shared: results of other caches that hold and are asked the same, by how they score.

    Returns:
        Output [batch, new, heads, head_dim]; no weights.
    """
    index: Any = module.layer_idx
    layer = eviction_cache.layers[index] if eviction_cache is not None else None
    if (attend_forks := getattr(layer, "attend", None)) is not None:
        return attend_forks(
            functools.partial(attend, stock, backend, module), query, **kwargs
        ), None
    if eviction_cache is None or not isinstance(layer, EvictionLayer):
        return stock(module, query, key, value, attention_mask, **kwargs)
    for option in ("dropout", "softcap", "s_aux"):
        if kwargs.get(option):
            raise ConfigError(f"model.{option}", kwargs[option], "no evicting cache serves it")
    kwargs.pop("sliding_window", None)  # wider than the model's context, or the layer is not ours

    observed = layer.observed
    scorer = kernels.reference if backend == "eager" else kernels
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5

    def attention(
        query: Tensor, key: Tensor, value: Tensor, starts: Tensor | None = None
    ) -> Scored:
        if observed and query.shape[2] == 1:
            return scorer.scored_decode(query, key, value, scale, starts)
        if observed:
            observe = min(observed, query.shape[2])
            if (decay := layer.policy.decay) != 1:  # only the plain version weighs queries
                return kernels.reference.scored_prefill(
                    query, key, value, scale, observe=observe, decay=decay
                )
            return scorer.scored_prefill(query, key, value, scale, observe=observe)
        mask = _mask(backend, query, key, starts)
        return stock(module, query, key, value, mask, **kwargs)[0].transpose(1, 2), None

    differentiable = torch.is_grad_enabled() and (query.requires_grad or layer.cuts_gradient)
    if differentiable:
        query = query.detach()
    query = _scaled_by_log_n(eviction_cache, layer, query)
    if layer.policy.queries:
        layer.keep_queries(query, scale)
    rule = observed, layer.policy.decay
    if shared is not None and rule in shared:
        output, received = shared[rule]
    elif query.shape[2] == 1:
        output, received = attention(query, key, value, layer.starts)
    else:
        output, received = _by_group(attention, layer, query, key, value)
    if shared is not None:
        shared[rule] = output, received
    layer.after_attention(received)
    if layer is eviction_cache.evicting[-1]:
        output = eviction_cache.spoil(output)
    if differentiable:
        output = _NoBackward.apply(output, torch.empty(0, requires_grad=True))
    return output.transpose(1, 2), None


def _by_group(
    attention: Callable[[Tensor, Tensor, Tensor], Scored],
    layer: EvictionLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
) -> Scored:
    """Attention of a prompt or a chunk of it, for rows of equal length at a time.

    Padding is cut off and not masked: a padded row costs, and gives, what it does alone. The output
    of padding tokens is 0.
    """
    if len(layer.groups) == 1 and not layer.groups[0].padding:
        return attention(query, key, value)
    batch, heads, new, _ = query.shape
    output = value.new_zeros(batch, heads, new, value.shape[-1])
    received = torch.zeros(key.shape[:3], device=key.device) if layer.wants_scores else None
    for group in layer.groups:
        fresh = slice(new - min(new, group.seen), new)
        entries = slice(key.shape[2] - group.held, key.shape[2])
        rows = group.rows
        part, scores = attention(
            query[rows, :, fresh], key[rows, :, entries], value[rows, :, entries]
        )
        output[rows, :, fresh] = part
        if received is not None and scores is not None:
            received[rows, :, entries] = scores
    return output, received


def _mask(backend: str, query: Tensor, key: Tensor, starts: Tensor | None) -> Tensor | None:
    """The mask with which a stock backend attends causally, the last query to the last entry.

    Args:
        query: [batch, heads, new, head_dim].
        key: [batch, kv_heads, held, head_dim].
        starts: int64 [batch], first entry of each row; None if all 0.

    Returns:
        None wherever the backend needs none; flash attention: bool [batch, held]; sdpa: bool
        [batch or 1, 1, new, held]; eager: the same as a float bias.
    """
    new, held = query.shape[2], key.shape[2]
    slots = torch.arange(held, device=key.device)
    if backend.startswith("flash"):
        return None if starts is None else slots >= starts[:, None]
    if starts is None and (new == 1 or (new == held and backend == "sdpa")):
        return None
    last = torch.arange(held - new, held, device=key.device)
    mask = (slots <= last[:, None])[None, None]
    if starts is not None:
        mask = mask & (slots >= starts[:, None])[:, None, None]
    if backend == "eager":
        return torch.zeros(mask.shape, dtype=query.dtype, device=key.device).masked_fill(
            ~mask, torch.finfo(query.dtype).min
        )
    return mask


def _scaled_by_log_n(cache: EvictionCache, layer: EvictionLayer, query: Tensor) -> Tensor:
    """Queries times log n of what each attends, if the cache is set to do so."""
    if cache.logn_base is None:
        return query
    new = query.shape[2]
    held = torch.tensor(layer.lengths, device=query.device)
    attended = held[:, None] - torch.arange(new - 1, -1, -1, device=query.device)
    scale = attended.clamp(min=1).float().log() / math.log(cache.logn_base)
    if cache.logn_clamp:
        scale = scale.clamp(min=1)
    return query * scale.to(query.dtype)[:, None, :, None]


class _NoBackward(torch.autograd.Function):
    """Hands on what it is given; whoever asks for its gradient is told that there is none."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor) -> Tensor:
        """`anchor` requires a gradient, so that the result does and :meth:`backward` is reached."""
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise ConfigError(
            "past_key_values",
            "EvictionCache",
            "no gradient flows through kept entries; run under torch.no_grad() or"
            " torch.inference_mode(), or compute what you differentiate without a cache",
        )


def _announce_cache(
    decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook: hand the cache on to :func:`attend`, and a step's inputs to the cache."""
    from buzz.cache import EvictionCache

    # By type and not by name: `past_key_values` became `cache` in transformers 5.24.
    passed = (value for value in (*kwargs.values(), *args) if isinstance(value, EvictionCache))
    cache = next(passed, None)
    if cache is None:
        return None
    if args:
        names = inspect.signature(decoder.forward).parameters
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    if kwargs.get("output_attentions", getattr(decoder.config, "output_attentions", False)):
        raise ConfigError(
            "output_attentions", True, "an evicting cache has no weights to give; leave it out"
        )
    tokens = kwargs.get("input_ids")
    if tokens is None:
        tokens = kwargs["inputs_embeds"]
    batch, new = tokens.shape[:2]
    inputs = kwargs.get("attention_mask"), kwargs.get("position_ids")
    cache.begin_step(decoder, batch, new, *inputs)
    kwargs = {**kwargs, "eviction_cache": cache}
    if len(cache.evicting) == len(cache.layers):
        # A 4-D mask is passed on as it is and spares making one. This one is never read.
        kwargs["attention_mask"] = torch.empty(1, 1, 1, 1, device=tokens.device)
    return (), kwargs


def _model_eager(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
    """The eager attention of the module's own model file, which transformers does not register."""
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **kwargs)
