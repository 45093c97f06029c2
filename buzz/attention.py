"""The attention backend: stock attention that also yields what each cache entry received.

:func:`attend` stands in for the model's own attention function (:mod:`buzz.adapter` puts it there).
With any cache but an :class:`~buzz.EvictionCache` it only calls that one: the stock path runs.

Where outputs and scores come from:

- methods (and steps) that read no scores: the stock backend; where :mod:`buzz.kernels` outruns
  PyTorch's sdpa (on the CPU), the same kernels that others run;
- with scores, under sdpa and flash attention: :mod:`buzz.kernels`, which choose by device;
- with scores, under eager: the plain torch version of the same kernels;
- entries of int8: :mod:`buzz.kernels` or its plain version, with scores and without;
- models with attention sinks, which sdpa does not know and which are loaded with eager for that:
  :mod:`buzz.kernels`, with scores and without.

No gradient flows through kept entries, so none flows at all: a backward pass is refused.
"""

from __future__ import annotations

import dataclasses
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
from buzz.layer import EvictionLayer, Reader
from buzz.probe import Listener

Scored = tuple[Tensor, Tensor | None]  # output, and what each entry received


@dataclasses.dataclass
class Shared:
    """What one attention gives to several caches that hold and are asked the same.

    Attributes:
        output: None until the first of them attends.
        received: by how many queries count and how they fade.
    """

    output: Tensor | None = None
    received: dict[tuple[int, float], Tensor | None] = dataclasses.field(default_factory=dict)


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
    shared: Shared | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """An attention function of transformers that evicts once the step's output is computed.

    Args:
        stock: the backend's own attention function.
        backend: its name.
        query: [batch, heads, new, head_dim].
        key, value: [batch, kv_heads, held, head_dim], the new entries last.
        eviction_layers: what each layer attends of an evicting cache; None to run the stock
            function. That of the module holds `key` and `value`.
        shared: of caches that hold and are asked the same, those first that observe the most
            queries; no row may be padded.

    Returns:
        Output [batch, new, heads, head_dim]; no weights.
    """
    index: Any = getattr(module, "layer_idx", None)  # that of an image encoder has none
    layer = None if eviction_layers is None else eviction_layers[index]
    if isinstance(layer, Listener):
        return layer.hear(module, query, key, value, attention_mask, kwargs), None
    if isinstance(layer, SelfAttending):
        own = functools.partial(attend, stock, backend, module)
        return layer.attend(own, query, backend=backend, **kwargs), None
    reads = isinstance(layer, Reader)
    layer = layer.source if isinstance(layer, Reader) else layer
    if not isinstance(layer, EvictionLayer):
        window = None if layer is None else kwargs.get("sliding_window")
        if window is None or query.shape[2] <= window or getattr(attention_mask, "ndim", 0) != 4:
            return stock(module, query, key, value, attention_mask, **kwargs)
        assert attention_mask is not None
        own = functools.partial(stock, module, **kwargs)
        return _by_window(own, window, query, key, value, attention_mask), None
    if kwargs.get("dropout"):
        raise ConfigError("model.dropout", kwargs["dropout"], "no evicting cache serves it")
    kwargs.pop("sliding_window", None)  # wider than the model's context, or the layer is not ours

    if reads and not layer.holds(key):
        raise ConfigError("model", type(module).__name__, f"layer {index} attends other entries")
    observed = 0 if reads else layer.observed
    sinks = sinks_of(kwargs)
    scorer = kernels.reference if backend == "eager" and sinks is None else kernels
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    int8 = key.dtype == torch.int8  # which no stock backend reads

    def attention(
        query: Tensor, key: Tensor, value: Tensor, starts: Tensor | None = None
    ) -> Scored:
        if not observed and not _outruns_stock(backend, sinks, query) and not int8:
            mask = _mask(backend, query, key, starts)
            return stock(module, query, key, value, mask, **kwargs)[0].transpose(1, 2), None
        if query.shape[2] == 1:
            output, received = scorer.scored_decode(query, key, value, scale, starts, sinks)
        else:
            last, decay = min(observed, query.shape[2]), layer.policy.decay
            output, received = scorer.scored_prefill(
                query, key, value, scale, observe=last, decay=decay, sinks=sinks
            )
        return output, received if observed else None

    differentiable = torch.is_grad_enabled() and (query.requires_grad or layer.cuts_gradient)
    if differentiable:
        query = query.detach()
    query = _scaled_by_log_n(layer, query)
    if not reads:
        layer.keep_queries(query, scale)
    rule = observed, layer.policy.decay
    if shared is not None and shared.output is not None:
        output = shared.output
        if observed and rule not in shared.received:  # of the queries that count, and no others
            last = query[:, :, -observed:]
            shared.received[rule] = scorer.scored_prefill(
                last, key, value, scale, decay=rule[1], sinks=sinks
            )[1]
        received = shared.received.get(rule)
    elif query.shape[2] == 1:
        output, received = attention(query, key, value, layer.starts)
    else:
        output, received = _by_group(attention, layer, query, key, value)
    if shared is not None and shared.output is None:
        shared.output, shared.received[rule] = output, received
    if reads:
        layer.was_read()
    else:
        layer.after_attention(received)
    for wrong in layer.faults.values():  # a step was wrong and nobody could be told yet
        output = output.masked_fill(wrong.to(output.device), math.nan)
    if differentiable:
        output = _NoBackward.apply(output, torch.empty(0, requires_grad=True))
    return output.transpose(1, 2), None


def sinks_of(options: dict[str, Any]) -> Tensor | None:
    """A layer's attention sinks [heads], of what transformers tells an attention function."""
    sinks: Tensor | None = options.get("s_aux")
    return None if sinks is None else sinks.detach()


def _outruns_stock(backend: str, sinks: Tensor | None, query: Tensor) -> bool:
    """Whether kernels of this project attend also where nobody asks for scores."""
    if backend == "eager":
        return sinks is not None
    return backend == "sdpa" and kernels.outruns_stock(query)


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
    output = query.new_zeros(batch, heads, new, kernels.width(value))
    received = torch.zeros(key.shape[:3], device=key.device) if layer.wants_scores else None
    for group in layer.groups:
        fresh = slice(new - min(new, group.seen), new)
        entries = slice(key.shape[2] - group.held, key.shape[2])
        rows = on(key.device, group.rows)
        part, scores = attention(
            query[rows, :, fresh], key[rows, :, entries], value[rows, :, entries]
        )
        output[rows, :, fresh] = part
        if received is not None and scores is not None:
            received[rows, :, entries] = scores
    return output, received


def _by_window(
    stock: Callable[..., tuple[Tensor, Any]],
    window: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
) -> Tensor:
    """Attention of a layer with a window of its own, `window` queries at a time.

    So a chunk costs its length times the window, and not its square.

    Args:
        stock: the backend's function of the layer's module.
        mask: [batch or 1, 1, new, held].

    Returns:
        [batch, new, heads, head_dim].
    """
    new, held = query.shape[2], key.shape[2]
    outputs = []
    for low in range(0, new, window):
        high = min(low + window, new)
        seen = slice(max(0, held - new + low - window + 1), held - new + high)
        part = query[:, :, low:high], key[:, :, seen], value[:, :, seen], mask[:, :, low:high, seen]
        outputs.append(stock(*part)[0])
    return torch.cat(outputs, dim=1)


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
    longest, starts = layer.longest, layer.starts
    attended = torch.arange(longest - new + 1, longest + 1, device=query.device)[None]
    if starts is not None:
        attended = attended - starts[:, None]
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
