"""Compiled decoding: a token's way through the decoder as one graph, whatever the cache holds.

The graph sees none of what changes from step to step but in tensors: it writes and reads the
buffers of each layer where `bounds` says, which lies on the device
(:func:`buzz.kernels.step`). Lengths, room and eviction stay with the cache, between two runs of
the graph. So one graph serves every step, eviction, prompt and sample; on CUDA it is captured
(`mode="reduce-overhead"`) and replayed.

A capture holds addresses and sizes. Evictions run between two replays, on the same stream, and move
entries within the buffers that were captured: what they change is numbers, bounds among them. It is
recorded anew when a layer takes other buffers: with a cache that grows, with a new cache, and with
the first eviction of a prompt, unless :meth:`EvictionCache.reset` left buffers that fit, whose
capacities are few (:func:`buzz.store.with_spare`). A method that comes to hold as much of every
long prompt takes buffers for that at once. So one cache that is reset between samples of one budget
records with the first of them alone; runs do so. Layers that do not evict keep what they hold
outside of any graph: models that have them are refused.
"""

from __future__ import annotations

import inspect
import itertools
import math
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from transformers import Cache

from buzz import adapter, kernels
from buzz.errors import ConfigError
from buzz.policy import Policy
from buzz.store import writable

if TYPE_CHECKING:
    from buzz.layer import EvictionLayer

BACKEND = "inductor"
MANY = (
    "decoding goes on without a graph: torch.compile made {} for this model, and makes no more for"
    " other batch sizes, modes and options of the cache; raise torch._dynamo.config.recompile_limit"
)
TORCH = "2.13"  # 2.6 cannot capture the model's forward pass; those between were not tried

_replays: weakref.WeakKeyDictionary[nn.Module, Replay] = weakref.WeakKeyDictionary()


def check_policy(policy: Policy) -> None:
    """Refuses a method that no graph can serve.

    Raises:
        ConfigError: it reads queries, lets scores decay, or differs from layer to layer; or torch
            is older than what this was tested with.
    """
    if not tested():
        raise _refusal(f"torch {torch.__version__} is older than {TORCH}, the oldest it ran with")
    if policy.queries or policy.decay != 1 or policy.moments_from is not None:
        raise _refusal(f"{policy.name} needs more of a step than what its entries receive")
    if type(policy).for_layer is not Policy.for_layer and policy.for_layer(0, 2) != policy:
        raise _refusal(f"{policy.name} has a budget for each layer")


def tested() -> bool:
    """Whether torch is new enough."""
    return Version(torch.__version__) >= Version(TORCH)


def check_model(model: nn.Module, layers: Sequence[Any], plain: bool) -> None:
    """Refuses a model that no graph can serve.

    Args:
        plain: whether its layers hold nothing but entries that may be evicted.

    Raises:
        ConfigError: layers that do not evict; frequencies that change; several devices.
    """
    if not plain:
        what = "layers with a window of their own, recurrent ones, or ones that share entries"
        raise _refusal(f"{type(model).__name__} has {what}")
    for layer in layers:
        if not layer.rope.static:
            raise _refusal(f"{type(model).__name__} rotates by frequencies that change")
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise _refusal("the model lies on several devices")


def _refusal(what: str) -> ConfigError:
    return ConfigError("model.compile", True, f"{what}; leave it out")


class ReplayLayer(adapter.SelfAttending):
    """One layer's buffers, as the graph sees them.

    Attributes:
        keys, values, positions: of the layer's store.
        scores: where what entries receive goes; None if nobody reads it.
        bounds: int64 [3, batch], see :func:`buzz.kernels.step`; the same for all layers.
        adds: whether scores grow or are of this step alone.
        logn_base, logn_clamp: as of the cache.
    """

    keys: Tensor | None
    values: Tensor | None
    positions: Tensor | None = None
    scores: Tensor | None = None
    bounds: Tensor
    adds: bool
    logn_base: float | None
    logn_clamp: bool

    def attend(
        self,
        attention: Callable[..., Any],
        query: Tensor,
        *,
        scaling: float | None = None,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """A token's output, its entry appended on the way.

        Args:
            attention: what would attend otherwise.
            query: [batch, heads, 1, head_dim].
            s_aux: sinks of each head, see :func:`buzz.kernels.scored_prefill`.

        Returns:
            [batch, 1, heads, head_dim].
        """
        key, value = self.taken()
        scale = scaling or query.shape[-1] ** -0.5
        if self.logn_base is not None:
            attended = (self.bounds[1] - self.bounds[0]).float()
            factor = attended.log() / math.log(self.logn_base)
            if self.logn_clamp:
                factor = factor.clamp(min=1)
            query = query * factor.to(query.dtype)[:, None, None, None]
        assert self.keys is not None and self.values is not None and self.positions is not None
        return kernels.step(
            query,
            key,
            value,
            self.keys,
            self.values,
            self.positions,
            self.scores,
            self.bounds,
            scale,
            self.adds,
            s_aux,
        ).transpose(1, 2)

    def follow(self, layer: EvictionLayer, bounds: Tensor) -> None:
        """Point to the buffers of a layer of the cache whose turn it is."""
        store = layer.store
        assert store is not None
        policy = layer.policy
        scores = store.scores
        if policy.needs_scores and policy.score_rule == "step":
            scores = layer.scratch
        self.adds = scores is store.scores
        self.logn_base, self.logn_clamp = layer.logn_base, layer.logn_clamp
        self.bounds = bounds
        for name, tensor in zip(
            ("keys", "values", "positions", "scores"),
            (store.keys, store.values, store.positions, scores),
            strict=True,
        ):
            if getattr(self, name) is not tensor:
                setattr(self, name, tensor)
                if tensor is not None:
                    _mark(tensor)


class Replay:
    """A decoder's graph, and what it reads; shared by all caches of the model.

    Args:
        decoder: the model's.
        layers: how many it has.
    """

    def __init__(self, decoder: nn.Module, layers: int) -> None:
        self.layers = [ReplayLayer() for _ in range(layers)]
        self.cache = Cache(layers=list(self.layers))
        self._bounds: Tensor | None = None
        self._has_warned = False
        self._known: list[list[int]] = []
        options: dict[str, Any] = {"fullgraph": True, "backend": BACKEND}
        if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
            options["isolate_recompiles"] = True  # other models' graphs do not count here
        if next(decoder.parameters()).is_cuda:
            options["mode"] = "reduce-overhead"
        self._graph: Callable[..., Any] = torch.compile(type(decoder).forward, **options)

    def __call__(
        self, decoder: nn.Module, layers: Sequence[EvictionLayer], inputs: dict[str, Any]
    ) -> Any | None:
        """The decoder's output for one token of each row; None if it takes one graph too many.

        Args:
            layers: those of the cache whose turn it is.
            inputs: what the decoder was given.
        """
        first = layers[0]
        for layer in layers:
            layer.make_room()
        assert first.store is not None
        rows = len(first.lengths)
        bounds = self._point(
            [
                [first.store.end - held for held in first.lengths],
                [first.store.end + 1] * rows,
                first.per_row("seen"),
            ],
            first.device,
        )
        for own, layer in zip(self.layers, layers, strict=True):
            own.follow(layer, bounds)
        cache = inputs[adapter.CACHE_ARGUMENT]
        given = {**inputs, adapter.CACHE_ARGUMENT: self.cache, "eviction_layers": self.layers}
        if given.get("position_ids") is None:
            seen = first.cumulative_length
            given["position_ids"] = torch.full((1, 1), seen, device=first.device)
        try:
            output = self._graph(decoder, **given)
        except FailOnRecompileLimitHit:
            if not self._has_warned:
                warnings.warn(MANY.format(torch._dynamo.config.recompile_limit), stacklevel=2)
            self._has_warned = True
            return None
        for own, layer in zip(self.layers, layers, strict=True):
            layer.take_in(own.scores)
        if adapter.CACHE_ARGUMENT in output:
            output[adapter.CACHE_ARGUMENT] = cache
        hidden = output[0]
        if hidden.is_cuda:  # the next replay writes where this one did
            hidden = hidden.clone()
        for wrong in layers[-1].faults.values():
            hidden = hidden.masked_fill(wrong.to(hidden.device), math.nan)
        output.last_hidden_state = hidden
        return output

    def _point(self, now: list[list[int]], device: torch.device) -> Tensor:
        """Bounds on the device: steps count them up where they lie, and send nothing."""
        bounds, known = self._bounds, self._known
        self._known = now
        if bounds is None or bounds.device != device or len(known[0]) != len(now[0]):
            with writable():  # all caches of the model share them, in whatever mode they run
                self._bounds = torch.tensor(now, device=device)
            _mark(self._bounds)
            return self._bounds
        moves = [
            {new - old for new, old in zip(*pair, strict=True)}
            for pair in zip(now, known, strict=True)
        ]
        if any(len(move) > 1 for move in moves):
            bounds.copy_(torch.tensor(now), non_blocking=True)
            return bounds
        at = 0
        for (move,), alike in itertools.groupby(moves):
            count = len(list(alike))
            if move:
                (bounds if count == len(moves) else bounds[at : at + count]).add_(move)
            at += count
        return bounds


def replay_of(decoder: nn.Module, layers: int) -> Replay:
    """The one of this decoder."""
    if decoder not in _replays:
        _replays[decoder] = Replay(decoder, layers)
    return _replays[decoder]


def _mark(tensor: Tensor) -> None:
    """A buffer that stays where it is, of a capacity that no graph is made for."""
    if tensor.ndim > 2:
        torch._dynamo.maybe_mark_dynamic(tensor, 2)
    torch._dynamo.mark_static_address(tensor)
