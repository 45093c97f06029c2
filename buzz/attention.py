"""The attention backend: stock attention that also yields what each cache entry received.

:func:`attend` stands in for the model's own attention function (:mod:`buzz.adapter` puts it there).
With any cache but an :class:`~buzz.EvictionCache` it only calls that one: the stock path runs.

Where outputs and scores come from:

- methods (and steps) that read no scores: the stock backend; where :mod:`buzz.kernels` outruns
  PyTorch's sdpa (on the CPU), the same kernels that others run;
- with scores, under sdpa and flash attention: :mod:`buzz.kernels`, which choose by device;
- with scores, under eager: the plain torch version of the same kernels.

No gradient flows through kept entries, so none flows at all: a backward pass is refused.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from buzz import kernels
from buzz.adapter import Attention, SelfAttending
from buzz.errors import ConfigError
from buzz.inputs import on
from buzz.layer import EvictionLayer

Scored = tuple[Tensor, Tensor | None]  # output, and what each entry received


def attend(
    stock: Attention,
    backend: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    eviction_layers: Sequence[Any] | None = None,
    shared: dict[Any, Scored] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """An attention function of transformers that evicts once the step's output is computed.

    Args:
        stock: the backend's own attention function.
        backend: its name.
        query: [batch, heads, new, head_dim].
        key, value: [batch, kv_heads, held, head_dim], the new entries last.
        eviction_layers: the layers of an evicting cache; None to run the stock function. That of
            the module holds `key` and `value`.
        shared: results of other caches that hold and are asked the same, by how they score.

    Returns:
        Output [batch, new, heads, head_dim]; no weights.
    """
    index: Any = module.layer_idx
    layer = None if eviction_layers is None else eviction_layers[index]
    if isinstance(layer, SelfAttending):
        own = functools.partial(attend, stock, backend, module)
        return layer.attend(own, query, **kwargs), None
    if not isinstance(layer, EvictionLayer):
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
        if not observed and (backend != "sdpa" or not kernels.outruns_stock(query)):
            mask = _mask(backend, query, key, starts)
            return stock(module, query, key, value, mask, **kwargs)[0].transpose(1, 2), None
        if query.shape[2] == 1:
            output, received = scorer.scored_decode(query, key, value, scale, starts)
        else:
            last, decay = min(observed, query.shape[2]), layer.policy.decay
            output, received = scorer.scored_prefill(
                query, key, value, scale, observe=last, decay=decay
            )
        return output, received if observed else None

    differentiable = torch.is_grad_enabled() and (query.requires_grad or layer.cuts_gradient)
    if differentiable:
        query = query.detach()
    query = _scaled_by_log_n(layer, query)
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
    for wrong in layer.faults.values():  # a step was wrong and nobody could be told yet
        output = output.masked_fill(wrong.to(output.device), math.nan)
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
    if starts is None and (
        new == 1 or (new == held and backend == "sdpa") or backend.startswith("flash")
    ):
        return None
    if starts is None and backend == "sdpa" and not torch.compiler.is_compiling():
        return causal_lower_right(new, held)  # flash attention, where a device has it; no matrix
    slots = torch.arange(held, device=key.device)
    if backend.startswith("flash"):
        assert starts is not None
        return slots >= starts[:, None]
    last = torch.arange(held - new, held, device=key.device)
    mask = (slots <= last[:, None])[None, None]
    if starts is not None:
        mask = mask & (slots >= starts[:, None])[:, None, None]
    if backend == "eager":
        return torch.zeros(mask.shape, dtype=query.dtype, device=key.device).masked_fill(
            ~mask, torch.finfo(query.dtype).min
        )
    return mask


def _scaled_by_log_n(layer: EvictionLayer, query: Tensor) -> Tensor:
    """Queries times log n of what each attends, if the cache is set to do so."""
    if layer.logn_base is None:
        return query
    new = query.shape[2]
    held = on(query.device, layer.lengths)
    attended = held[:, None] - torch.arange(new - 1, -1, -1, device=query.device)
    scale = attended.clamp(min=1).float().log() / math.log(layer.logn_base)
    if layer.logn_clamp:
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
