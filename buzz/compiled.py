"""Compiled decoding: the decoder's forward pass of one token as one graph, for any cache content.

All that changes from step to step is in tensors: the graph reads and writes each layer's buffers
between the slots of `bounds`, a tensor on the device (:func:`buzz.kernels.step`). The cache evicts
between two runs of the graph. So one graph serves all steps, prompts and samples; on CUDA it is
captured (`mode="reduce-overhead"`) and replayed.

A capture contains addresses and sizes of buffers. Evictions run between two replays, on the same
stream, and move entries within these buffers. The graph is captured again when a layer takes other
buffers: when a cache grows, with a new cache, and at the first eviction of a prompt unless
:meth:`EvictionCache.reset` left buffers that fit. Buffers come in few capacities
(:func:`buzz.store.with_spare`), and a method of constant length takes one of that size at once. So
a cache that is reset between samples of one budget captures during the first sample only; runs do
so. Models with layers that do not evict are refused, as their caches would be outside of the graph.
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
    "decoding goes on without a graph: torch.compile made {} graphs for this model, its limit, and"
    " each batch size, mode and cache option takes one; raise torch._dynamo.config.recompile_limit"
)
TORCH = "2.13"  # 2.6 cannot capture the model's forward pass; versions between were not tried

_replays: weakref.WeakKeyDictionary[nn.Module, Replay] = weakref.WeakKeyDictionary()


def check_policy(policy: Policy) -> None:
    """Refuses a method that cannot be compiled.

    Raises:
        ConfigError: it reads queries, lets scores decay, or differs from layer to layer; or torch
            is older than the oldest tested version.
    """
    if not tested():
        raise _refusal(f"torch {torch.__version__} is older than {TORCH}, the oldest it ran with")
    if policy.queries or policy.decay != 1 or policy.moments_from is not None:
        raise _refusal(f"{policy.name} reads more of a step than attention sums")
    if type(policy).for_layer is not Policy.for_layer and policy.for_layer(0, 2) != policy:
        raise _refusal(f"{policy.name} has a budget for each layer")


def tested() -> bool:
    """Whether torch is new enough."""
    return Version(torch.__version__) >= Version(TORCH)


def check_model(model: nn.Module, layers: Sequence[Any], plain: bool) -> None:
    """Refuses a model that cannot be compiled.

    Args:
        plain: whether all of its layers evict and have no other states.

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
    """One layer's buffers, as inputs of the graph.

    Attributes:
        keys, values, positions: of the layer's store.
        scores: buffer for the attention to each entry; None if it is not read.
        bounds: int64 [3, batch], see :func:`buzz.kernels.step`; the same for all layers.
        adds: whether `scores` are sums over steps, and not of this step alone.
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
        """Appends a token's entry, and attends.

        Args:
            attention: not used.
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
        """Takes the buffers of a layer of the cache that is decoded now."""
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
    """A decoder's graph and its inputs; shared by all caches of the model.

    Args:
        decoder: the model's.
        layers: their number.
    """

    def __init__(self, decoder: nn.Module, layers: int) -> None:
        self.layers = [ReplayLayer() for _ in range(layers)]
        self.cache = Cache(layers=list(self.layers))
        self._bounds: Tensor | None = None
        self._has_warned = False
        self._known: list[list[int]] = []
        options: dict[str, Any] = {"fullgraph": True, "backend": BACKEND}
        if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
            options["isolate_recompiles"] = True  # so that other models' graphs do not count
        if next(decoder.parameters()).is_cuda:
            options["mode"] = "reduce-overhead"
        self._graph: Callable[..., Any] = torch.compile(type(decoder).forward, **options)

    def __call__(
        self, decoder: nn.Module, layers: Sequence[EvictionLayer], inputs: dict[str, Any]
    ) -> Any | None:
        """The decoder's output for one token of each row; None if there are too many graphs.

        Args:
            layers: of the cache that is decoded now.
            inputs: the decoder's.
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
        if hidden.is_cuda:  # the next replay overwrites it
            hidden = hidden.clone()
        for wrong in layers[-1].faults.values():
            hidden = hidden.masked_fill(wrong.to(hidden.device), math.nan)
        output.last_hidden_state = hidden
        return output

    def _point(self, now: list[list[int]], device: torch.device) -> Tensor:
        """Bounds on the device, where they are incremented, so that steps transfer nothing."""
        bounds, known = self._bounds, self._known
        self._known = now
        if bounds is None or bounds.device != device or len(known[0]) != len(now[0]):
            with writable():  # shared by all caches of the model, with inference mode or without
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
    """The decoder's graph."""
    if decoder not in _replays:
        _replays[decoder] = Replay(decoder, layers)
    return _replays[decoder]


def _mark(tensor: Tensor) -> None:
    """Marks a buffer: its address is static, its capacity is dynamic."""
    if tensor.ndim > 2:
        torch._dynamo.maybe_mark_dynamic(tensor, 2)
    torch._dynamo.mark_static_address(tensor)
