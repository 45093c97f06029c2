"""All knowledge of transformers: names, hooks and shapes of its models.

:func:`install` connects a model with evicting caches:

1. it registers an attention function with transformers' `AttentionInterface` in place of the
   model's backend (sdpa, eager, flash_attention_2 ...), whose own function it can call;
2. it adds a forward pre-hook to the decoder, which sees the inputs of each step first.

Keyword arguments that the hook adds reach the attention function unchanged. Neither model code nor
configuration is changed.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import sys
import types
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    LinearAttentionLayer,
    get_layer_types_and_kwargs,
)
from transformers.generation import GenerationMixin
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from buzz.errors import ConfigError
from buzz.store import writable

# The name under which this transformers takes a cache: `cache` from 5.24 on, which still knows the
# older name and warns.
CACHE_ARGUMENT = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)
BACKENDS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")
PROJECTIONS = ("o_proj", "out_proj", "dense")  # names of W_o in attention modules

TEXT = (
    *("input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position"),
    *("labels", "logits_to_keep"),
)

Attention = Callable[..., tuple[Tensor, Any]]
Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Inputs | None]

# Models whose attention is more than softmax(q k) v over per-head keys.
UNSUPPORTED = {
    "kv_lora_rank": "caches a latent and not keys (MLA)",
    "cross_attention_layers": "attends images in layers of their own",
    "alibi": "marks positions by ALiBi and not by RoPE",
    "attn_logit_softcapping": "caps its attention logits, which the scored attention does not",
}

# Layers that do not evict: they have states of a fixed size, entries within a window or a chunk, or
# nothing at all.
KEPT = (
    *("linear_attention", "conv", "hybrid_sliding", "sliding_attention", "chunked_attention"),
    *("dummy", "moe", "mlp"),
)
# Those with states, which depend on the order of tokens without RoPE, too.
STATEFUL = ("linear_attention", "conv", "hybrid", "hybrid_sliding")

_installed: dict[str, Attention] = {}  # by backend, the function in place of its own


# --- a model that serves evicting caches ---------------------------------------------------------


def install(
    model: PreTrainedModel,
    attend: Callable[..., tuple[Tensor, Any]],
    announce: Hook,
    overhear: Hook,
) -> nn.Module:
    """Installs an attention function and a pre-hook of the decoder (once).

    Args:
        attend: takes the stock function, the backend's name, and the stock function's arguments.
        announce: the hook.
        overhear: a pre-hook of a model around the decoder, e.g. one that reads images.

    Returns:
        The decoder.

    Raises:
        ConfigError: an attention backend that is not supported.
    """
    backend = model.config._attn_implementation
    if backend not in BACKENDS:
        raise ConfigError(
            "model.attn_implementation", backend, f"choose one of {', '.join(BACKENDS)}"
        )
    stock = ALL_ATTENTION_FUNCTIONS.get(backend, model_eager)
    if stock is not _installed.get(backend):
        _installed[backend] = functools.partial(attend, stock, backend)
        AttentionInterface.register(backend, _installed[backend])
    decoder = decoder_of(model)
    for module, hook in ((decoder, announce), (model.base_model, overhear)):
        present = module._forward_pre_hooks.values()
        if not any(known in (announce, overhear) for known in present):
            module.register_forward_pre_hook(hook, with_kwargs=True)
    return decoder


def before_generate(model: PreTrainedModel, check: Callable[..., None]) -> None:
    """Installs a check that `model.generate` calls first, with its own arguments (once).

    No other place sees the whole prompt: `generate` passes on the tokens that are new to the cache.
    """
    own: Any = getattr(model, "generate", None)
    if own is None or getattr(own, "check", None) is check:
        return

    function = getattr(own, "__func__", None)

    @functools.wraps(own)
    def generate(model: PreTrainedModel, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        check(inputs, **kwargs)
        call = own if function is None else functools.partial(function, model)
        return call(inputs, *args, **kwargs)

    generate.__dict__["check"] = check
    # A method, so that a copy of the model has its own.
    model.__dict__["generate"] = types.MethodType(generate, model)


def after_forward(decoder: nn.Module, hook: Callable[..., None]) -> None:
    """Installs a hook that is called after a forward pass, if it is not installed yet."""
    if not any(known is hook for known in decoder._forward_hooks.values()):
        decoder.register_forward_hook(hook, with_kwargs=True)


def intercept(decoder: nn.Module, run: Callable[[nn.Module, dict[str, Any]], Any | None]) -> None:
    """Makes a decoder call `run` in place of its own forward, unless `run` returns None (once).

    Args:
        run: takes the decoder and its inputs by name.

    Raises:
        ConfigError: the decoder's own forward has been replaced before.
    """
    present = decoder.__dict__.get("forward")
    if present is not None and not isinstance(getattr(present, "__func__", None), _Intercepted):
        raise ConfigError(
            "model.compile", True, "the decoder's forward has been replaced; leave it out"
        )
    decoder.__dict__["forward"] = types.MethodType(_Intercepted(run), decoder)


class _Intercepted:
    """A decoder's forward that calls another function first."""

    def __init__(self, run: Callable[[nn.Module, dict[str, Any]], Any | None]) -> None:
        self.run = run

    def __call__(self, decoder: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = None if args else self.run(decoder, kwargs)
        return type(decoder).forward(decoder, *args, **kwargs) if output is None else output


def named_inputs(
    decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """A decoder's inputs by name.

    Raises:
        ConfigError: attention weights are asked for.
    """
    if args:
        names = inspect.signature(decoder.forward).parameters
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    if kwargs.get("output_attentions", getattr(decoder.config, "output_attentions", False)):
        raise ConfigError(
            "output_attentions", True, "an evicting cache keeps no weights; leave it out"
        )
    return kwargs


def step_tokens(inputs: dict[str, Any]) -> Tensor:
    """Ids [batch, new] or embeddings [batch, new, hidden]."""
    ids = inputs.get("input_ids")
    return inputs["inputs_embeds"] if ids is None else ids


def require_text(inputs: dict[str, Any]) -> None:
    """Refuses a prompt with images or sounds, whose attention may not be causal.

    Args:
        inputs: of a model around a decoder, by name.

    Raises:
        ConfigError: there are other inputs than text.
    """
    for name, value in inputs.items():
        if name not in TEXT and isinstance(value, Tensor) and value.any():
            raise ConfigError(name, tuple(value.shape), "an evicting cache serves text alone")


def unread_mask(device: torch.device) -> Tensor:
    """A 4-D mask that is never read: transformers passes it on instead of making one."""
    return torch.empty(1, 1, 1, 1, device=device)


def model_eager(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
    """The eager attention of the module's own model file, which transformers does not register."""
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **kwargs)


class SelfAttending(CacheLayerMixin):
    """A cache layer that attends itself, called by :func:`buzz.attention.attend`.

    It is used with positions and a mask, so that models do not ask for its length.

    Attributes:
        entry: the step's keys and values, between :meth:`update` and :meth:`attend`.
    """

    is_sliding = False
    entry: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def get_seq_length(self) -> int:
        raise NotImplementedError("positions are given")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        raise NotImplementedError("a mask is given")

    def get_max_length(self) -> int:
        return -1

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores and returns a step's keys and values, each [batch, kv_heads, new, head_dim]."""
        self.entry = key_states, value_states
        return key_states, value_states

    def taken(self) -> tuple[Tensor, Tensor]:
        """The step's keys and values, which are then forgotten."""
        assert self.entry is not None
        entry, self.entry = self.entry, None
        return entry

    @abstractmethod
    def attend(self, attention: Callable[..., Any], query: Tensor, **kwargs: Any) -> Tensor:
        """The step's attention output; the layer may evict, too.

        Args:
            attention: :func:`buzz.attention.attend` of the layer's module.
            query: [batch, heads, new, head_dim].
            kwargs: of transformers' attention functions.

        Returns:
            [batch, new, heads, head_dim].
        """


class StatefulCache(Cache):
    """A cache that keeps states of a fixed size in another one, :attr:`stock`.

    So a layer may have both: entries in this cache, and states in the other.

    Attributes:
        stock: has one of transformers' layers for each layer; empty if there is nothing to keep.
    """

    stock: Cache

    def get_conv_state(self, *args: Any, **kwargs: Any) -> Any:
        return self.stock.get_conv_state(*args, **kwargs)

    def update_conv_state(self, *args: Any, **kwargs: Any) -> Any:
        return self.stock.update_conv_state(*args, **kwargs)

    def get_recurrent_state(self, *args: Any, **kwargs: Any) -> Any:
        return self.stock.get_recurrent_state(*args, **kwargs)

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> Any:
        return self.stock.update_recurrent_state(*args, **kwargs)

    def has_previous_state(self, *args: Any, **kwargs: Any) -> bool:
        return self.stock.has_previous_state(*args, **kwargs)


def copied(stock: Cache) -> Cache:
    """An independent copy: states are cloned as they change in place; keys and values are not."""
    layers: list[Any] = []
    for layer in stock.layers:
        layers.append(copy.copy(layer))
        for name, value in vars(layer).items():
            if isinstance(value, dict):  # by number of the state
                with writable():
                    own = {n: x.clone() if isinstance(x, Tensor) else x for n, x in value.items()}
                setattr(layers[-1], name, own)
    return Cache(layers=layers)


def select_rows(stock: Cache, indices: Tensor) -> None:
    """Makes row i what row `indices[i]` was, in place: recurrent layers offer this method only."""
    for layer in stock.layers:
        own: Any = layer
        own.reorder_cache(indices)


def entries_of(layer: Any) -> list[Tensor]:
    """Keys and values of a layer of transformers' own, [batch, kv_heads, held, ...], if any."""
    pair = getattr(layer, "keys", None), getattr(layer, "values", None)
    return [tensor for tensor in pair if tensor is not None]


def states_of(layer: Any) -> list[Tensor]:
    """States of fixed size of a layer of transformers' own, each [batch, ...]."""
    held = [getattr(layer, name, {}) for name in ("conv_states", "recurrent_states")]
    return [state for states in held for state in states.values() if state is not None]


# --- structure of a model ------------------------------------------------------------------------


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The module that runs the layers."""
    decoder: Any = model.get_decoder()
    while not hasattr(decoder, "layers") and isinstance(getattr(decoder, "model", None), nn.Module):
        decoder = decoder.model  # Llama 4's decoder is inside another model
    return decoder


def why_unsupported(config: PretrainedConfig) -> str | None:
    """The reason why models of this configuration are not supported; None if they are."""
    text = config.get_text_config(decoder=True)
    layers = [text]
    if hasattr(text, "num_hidden_layers"):  # layers may have configurations of their own
        layers = list(getattr(text, "per_layer_config", layers))
    for field, reason in UNSUPPORTED.items():
        if any(getattr(layer, field, None) for layer in layers):
            return f"{reason} (config.{field})"
    orders = any(kind in STATEFUL for kind in getattr(text, "layer_types", None) or ())
    if not getattr(text, "rope_parameters", None) and not orders:
        return "has no rotary position embedding (RoPE), so no kept key can be moved"
    return None


class Kind(NamedTuple):
    """The kind of a decoder layer.

    Attributes:
        name: its type in transformers.
        evicts: whether its cache grows with every token.
        stock: transformers' own cache layer for entries and states that are not evicted.
        source: the layer whose entries it attends instead of its own.
    """

    name: str
    evicts: bool
    stock: Any
    source: int | None = None


def layers_of(model: PreTrainedModel) -> list[Kind]:
    """The kind of each decoder layer.

    Raises:
        ConfigError: the model is not supported; no layer could evict; a layer is of an unknown
            kind.
    """
    name = type(model).__name__
    if reason := why_unsupported(model.config):
        raise ConfigError("model", name, reason)
    config = model.config.get_text_config(decoder=True)
    try:
        stated = list(zip(*get_layer_types_and_kwargs(config), strict=True))
    except AttributeError as error:
        reason = "its configuration does not name the kinds of its layers"
        raise ConfigError("model", name, reason) from error
    kinds = []
    for index, (kind, kwargs) in enumerate(stated):
        window: Any = kwargs.get("sliding_window") or math.inf
        wide = window >= (getattr(config, "max_position_embeddings", None) or math.inf)
        if kind == "full_attention" or (
            kind in ("sliding_attention", "chunked_attention") and wide
        ):
            kinds.append(Kind(kind, True, DynamicLayer()))  # which stays empty
        elif kind == "hybrid":
            kinds.append(Kind(kind, True, LinearAttentionLayer(**kwargs)))
        elif kind in KEPT:
            stock: Any = DYNAMIC_LAYER_TYPE_MAPPING[kind]
            kinds.append(Kind(kind, False, stock(**kwargs), _source(model, config, index)))
        else:
            remedy = f"layer {index} is {kind}, which no evicting cache serves"
            raise ConfigError("model", name, remedy)
    if not any(kind.evicts for kind in kinds):
        names = {kind.name for kind in kinds}
        reason = (
            f"no layer attends all tokens, so nothing can be evicted ({', '.join(sorted(names))})"
        )
        if names == {"sliding_attention"}:
            reason += "; load it with sliding_window=None"
        raise ConfigError("model", name, reason)
    return kinds


def _source(model: PreTrainedModel, config: PretrainedConfig, index: int) -> int | None:
    """The layer whose entries layer `index` attends; None if it has its own, or needs none.

    Raises:
        ConfigError: it is a layer of another model.
    """
    modes = getattr(config, "kv_sharing_modes", None)
    if modes is None or modes[index] != "reuse":
        return None
    kinds = config.layer_types
    stored = [i for i in range(index) if modes[i] == "store" and kinds[i] == kinds[index]]
    if not stored:
        remedy = f"layer {index} attends entries of another model"
        raise ConfigError("model", type(model).__name__, remedy)
    return stored[-1]


def attention_of(decoder: nn.Module, index: int) -> nn.Module:
    """The attention module of one decoder layer.

    Raises:
        ConfigError: the model keeps it under an unknown name.
    """
    layers: Any = getattr(decoder, "layers", None)
    layer = layers[index] if layers is not None else None
    for name in ("self_attn", "attention", "attn", "mixer"):
        if hasattr(layer, name):
            return getattr(layer, name)
    raise ConfigError("model", type(decoder).__name__, "its attention layers could not be found")


def output_projection(attention: nn.Module | None) -> Tensor:
    """The weight [hidden, heads * head_dim] of an attention module's output projection.

    Raises:
        ConfigError: it has no known name, or is quantised.
    """
    for name in PROJECTIONS:
        weight = getattr(getattr(attention, name, None), "weight", None)
        if isinstance(weight, Tensor) and weight.is_floating_point() and weight.dim() == 2:
            return weight.detach()
    raise ConfigError(
        "model",
        type(attention).__name__,
        f"has no output projection that can be read (one of {', '.join(PROJECTIONS)}, not"
        " quantised), which this method needs",
    )


def short_context(model: PreTrainedModel, decoder: nn.Module) -> int:
    """Tokens after which LongRoPE's frequencies change; 0 for other models."""
    longrope = getattr(getattr(decoder, "rotary_emb", None), "rope_type", None) == "longrope"
    return model.config.original_max_position_embeddings if longrope and drops(model) else 0


def drops(model: PreTrainedModel) -> bool:
    """Whether the model's `generate` may drop a cache to compute the whole text again.

    Phi-3 drops a truthy one when a text grows past its short context.
    """
    return hasattr(model.config, "original_max_position_embeddings")
