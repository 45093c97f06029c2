"""How the layers of a model rotate keys, found by running their attention on three tokens.

A list of model names would not do: models of one family differ, and so do layers of one model. So
the decoder runs once with stand-ins for its layers, which record their inputs. Then one layer of
each kind runs up to the end of its attention. The three tokens differ in their positions only: if
:class:`~buzz.rope.Rope` describes a layer, it rotates the key at one position into that at another.

All of this happens in copies that share the model's weights: the model, its hooks and the random
state do not change. In the copies, norms and biases are random, since a norm after the rotation has
no effect if all of its weights are equal.
"""

from __future__ import annotations

import contextlib
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from buzz import adapter
from buzz.errors import ConfigError
from buzz.kernels import reference
from buzz.rope import Rope

NEAR = (2, 7)
FAR = 2**17  # the largest position that is tried
# Options of attention functions that are supported (positions are in the keys already).
SERVED = (
    *("scaling", "dropout", "sliding_window", "is_causal", "s_aux"),
    *("position_ids", "cache_position", "use_cache", "eviction_layers"),
)
# The forms in which layers return hidden states.
RETURNED: tuple[Callable[[Tensor], Any], ...] = (
    lambda hidden: hidden,
    lambda hidden: (hidden,),
    lambda hidden: (hidden, None),
)
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 5e-3}  # as a share of the largest number
SCALED = "makes queries depend on their position by more than a rotation"
LOOSE = 3e-2  # at the far position, whose angle models compute in float32


class Turning(NamedTuple):
    """How a layer rotates its keys: arguments of :class:`~buzz.rope.Rope`."""

    module: nn.Module | None
    layer_type: str = ""
    interleaved: bool = False

    def rope(self) -> Rope:
        return Rope(*self)


class Call(NamedTuple):
    """Arguments of an attention function."""

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    options: dict[str, Any]


class Listener(adapter.SelfAttending):
    """A layer's cache that records its inputs, and whose attention output is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple[Tensor, Tensor]] = []
        self.calls: list[Call] = []
        self.seen = 0  # the length that it reports
        self.was_asked = False

    def get_seq_length(self) -> int:
        self.was_asked = True
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.entries.append((key_states, value_states))
        return key_states, value_states

    def attend(self, attention: Callable[..., Any], query: Tensor, **kwargs: Any) -> Tensor:
        raise NotImplementedError("see hear")

    def hear(self, *call: Any) -> Tensor:
        """Records the fields of a :class:`Call`; returns zeros [batch, new, heads, head_dim]."""
        heard = Call(*call)
        self.calls.append(heard)
        batch, heads, new, _ = heard.query.shape
        return heard.query.new_zeros(batch, new, heads, heard.value.shape[-1])


class _Listening(adapter.StatefulCache):
    def __init__(self, listeners: list[Listener], kinds: Sequence[adapter.Kind]) -> None:
        layers: list[Any] = listeners
        super().__init__(layers=layers)
        self.stock = adapter.copied(Cache(layers=[kind.stock for kind in kinds]))


class _Over(Exception):
    """Ends a layer's forward pass after its attention."""


class _Refused(Exception):
    """The reason why a layer is not supported."""


Finding = Turning | str  # or the reason why keys cannot be rotated to other positions


class Findings(NamedTuple):
    """Properties of a model's layers.

    Attributes:
        turnings: how each layer rotates its keys; None for layers that do not evict.
        restarting: index of the first layer that ignores its earlier states when it reads several
            tokens; None if there is none.
    """

    turnings: list[Finding | None]
    restarting: int | None


_known: weakref.WeakKeyDictionary[nn.Module, dict[str, Findings]] = weakref.WeakKeyDictionary()


def findings(model: PreTrainedModel, decoder: nn.Module, kinds: Sequence[adapter.Kind]) -> Findings:
    """Properties of a model's layers, found once for each model and attention backend.

    Raises:
        ConfigError: a layer uses its cache in a way that is not supported; layers were not found.
    """
    for index, kind in enumerate(kinds):
        if kind.evicts:
            attention = adapter.attention_of(decoder, index)
        elif kind.source is not None:
            own, attention = (adapter.attention_of(decoder, i) for i in (index, kind.source))
            if type(own) is not type(attention):
                reason = f"layer {index} attends unlike layer {kind.source}, whose entries it reads"
                raise ConfigError("model", type(model).__name__, reason)
    known = _known.setdefault(decoder, {})
    backend = str(model.config._attn_implementation)
    if backend not in known:
        try:
            with torch.no_grad():
                known[backend] = _Probe(decoder, kinds, backend).run()
        except _Refused as refused:
            raise ConfigError("model", type(model).__name__, str(refused)) from refused.__cause__
    return known[backend]


class _Probe:
    def __init__(self, decoder: nn.Module, kinds: Sequence[adapter.Kind], backend: str) -> None:
        self.decoder, self.kinds, self.backend = decoder, kinds, backend
        self.layers: Any = decoder.layers
        self.device = _device(decoder)
        self.draw = torch.Generator().manual_seed(0)
        self.rotary = {  # outside the layers, by name
            name: module
            for child, part in decoder.named_children()
            if child != "layers"
            for name, module in part.named_modules(prefix=child)
            if list(_tables(module))
        }

    def run(self) -> Findings:
        found: dict[Any, Any] = {}
        listed: list[Finding | None] = []
        restarting: int | None = None
        given = self._given()
        for index, kind in enumerate(self.kinds):
            key = kind.name, *_structure(self.layers[index]), _identity(given[index])
            if key not in found:
                try:
                    found[key] = (
                        self._finding(index, *given[index]) if kind.evicts else None,
                        kind.name not in adapter.STATEFUL or self._goes_on(index, *given[index]),
                    )
                except _Refused as refused:
                    raise _Refused(f"layer {index} {refused}") from refused.__cause__
                except Exception as error:
                    what = f"layer {index} failed when it was tried ({_line(error)})"
                    raise _Refused(what) from error
            turning, goes_on = found[key]
            listed.append(turning)
            if not goes_on and restarting is None:
                restarting = index
        return Findings(listed, restarting)

    # --- inputs of the layers ---------------------------------------------------------------

    def _given(self) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Arguments of each layer, for the three positions."""
        plain = self._decode(None, [0, 1, 2])
        hidden = _hidden(*plain[0])
        if not self.rotary and not torch.equal(hidden, hidden[:, :1].expand_as(hidden)):
            raise _Refused("marks positions in its embeddings")
        for index, kind in enumerate(self.kinds):
            mask = plain[index][1].get("attention_mask")
            if kind.evicts and isinstance(mask, Tensor) and not _is_causal(mask):
                raise _Refused(f"layer {index} is given a mask that is not the causal one")
        mask = torch.zeros_like(adapter.unread_mask(self.device))
        return self._decode(mask, [*NEAR, self._far()])

    def _decode(self, mask: Tensor | None, positions: list[int]) -> list[Any]:
        problems: list[Exception] = []
        for wrap in RETURNED:
            given: list[Any] = []
            try:
                self._pass(mask, positions, wrap, given)
            except Exception as error:
                problems.append(error)
                continue
            shapes = {_hidden(*inputs).shape for _, *inputs in given}
            if [index for index, *_ in given] == list(range(len(self.kinds))) and len(shapes) == 1:
                return [tuple(inputs) for _, *inputs in given]
        if len(problems) < len(RETURNED):
            raise _Refused("does not run each of its layers once, one after the other")
        raise _Refused(f"failed when it was tried ({_line(problems[0])})") from problems[0]

    def _pass(
        self, mask: Tensor | None, positions: list[int], wrap: Callable[..., Any], given: list[Any]
    ) -> None:
        def stand_in(index: int, layer: nn.Module) -> nn.Module:
            def forward(*args: Any, **kwargs: Any) -> Any:
                given.append((index, args, kwargs))
                return wrap(_hidden(args, kwargs))

            double = _double(layer, deep=False)
            double.__dict__["forward"] = forward
            return double

        decoder = _double(self.decoder, skip="layers")
        doubles = [stand_in(index, layer) for index, layer in enumerate(self.layers)]
        decoder._modules["layers"] = nn.ModuleList(doubles)
        self.doubles = {name: decoder.get_submodule(name) for name in self.rotary}
        self.listeners = [Listener() for _ in self.kinds]
        decoder(
            input_ids=torch.ones(1, len(positions), dtype=torch.long, device=self.device),
            attention_mask=mask,
            position_ids=torch.tensor([positions], device=self.device),
            use_cache=True,
            eviction_layers=self.listeners,
            **{adapter.CACHE_ARGUMENT: _Listening(self.listeners, self.kinds)},
        )

    def _far(self) -> int:
        """A far position with the same frequencies, to find factors that depend on positions."""
        changing = any(not Rope(m, t).static for m in self.rotary.values() for t in _tables(m))
        longest = self._context()
        return 11 if changing or longest <= 12 else min(longest, FAR) - 1

    def _context(self) -> int:
        """The model's context length; 0 if its configuration has none."""
        return getattr(self.decoder.config, "max_position_embeddings", None) or 0

    # --- behaviour of a layer ---------------------------------------------------------------

    def _finding(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Finding:
        layer = self.layers[index]
        attention = adapter.attention_of(self.decoder, index)
        name = next(name for name, module in layer.named_modules() if module is attention)
        double = _double(layer, draw=self.draw)
        device = _device(layer)
        args, kwargs = _moved(args, device), _moved(kwargs, device)
        args, kwargs = self._with_equal_tokens(args, kwargs)
        inner = double.get_submodule(name)
        forward = inner.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            forward(*args, **kwargs)
            raise _Over

        inner.__dict__["forward"] = run
        listener = self.listeners[index]
        listener.was_asked = False
        with contextlib.suppress(_Over):
            double(*args, **kwargs)
        call = self._checked(index)
        if listener.was_asked:  # the layer may derive positions from the cache's length
            listener.seen = self._far()
            with contextlib.suppress(_Over):
                double(*args, **kwargs)
            listener.seen = 0
            if not torch.equal(call.query, self._checked(index).query):
                return SCALED
        return self._turning(index, attention, inner, call)

    def _with_equal_tokens(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        hidden = _hidden(args, kwargs)
        one = torch.randn(*hidden.shape[:-2], 1, hidden.shape[-1], generator=self.draw)
        equal = one.to(hidden).expand(hidden.shape).contiguous()
        if args:
            return (equal, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": equal}

    def _goes_on(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a layer's output for two tokens depends on each of its states after one."""
        layer, listener = self.layers[index], self.listeners[index]
        double, device = _double(layer), _device(layer)
        args, kwargs = _moved(args, device), _moved(kwargs, device)
        cache = _Listening(self.listeners, self.kinds)

        def read(tokens: slice) -> list[Tensor]:
            output = double(*_part(args, tokens, cache), **_part(kwargs, tokens, cache))
            heard = [output if isinstance(output, Tensor) else output[0]]
            heard += [tensor for pair in listener.entries for tensor in pair]
            heard += [call.query for call in listener.calls]
            listener.entries, listener.calls = [], []
            return heard

        read(slice(0, 1))
        before = cache.stock
        made = []
        for name in ("", "conv_states", "recurrent_states"):
            cache.stock = adapter.copied(before)
            states = getattr(cache.stock.layers[index], name, {}).values()
            if any(state is None for state in states):
                continue  # it has no such states
            for state in states:
                state.add_(1)
            made.append(read(slice(1, None)))
        plain, *others = made
        return all(
            any(not torch.equal(*two) for two in zip(plain, other, strict=True)) for other in others
        )

    def _checked(self, index: int) -> Call:
        """The single call of a layer's attention, checked."""
        own = self.listeners[index]
        if any(other.entries or other.calls for other in self.listeners if other is not own):
            raise _Refused("writes to another layer's cache")
        if not own.calls:
            raise _Refused("does not attend through transformers' AttentionInterface")
        for number, what in ((len(own.calls), "attends"), (len(own.entries), "fills its cache")):
            if number != 1:
                raise _Refused(f"{what} {number} times in a step, and eviction takes place at one")
        ((key, value),), (call,) = own.entries, own.calls
        own.entries, own.calls = [], []
        for kept, used in ((key, call.key), (value, call.value)):
            if kept.dim() != 4 or kept.shape != used.shape or not torch.equal(kept, used):
                raise _Refused("attends other keys and values than its cache holds")
        _, heads, _, dim = call.query.shape
        if key.shape[2] != 3 or dim != key.shape[3] or heads % key.shape[1]:
            raise _Refused("holds no key and value for each token and KV head")
        if call.mask is not None and (call.mask.numel() != 1 or call.mask.any()):
            raise _Refused("adds to the attention mask, which an evicting cache does not read")
        for option, setting in call.options.items():
            if option not in SERVED and setting is not None and setting is not False:
                raise _Refused(f"attends with {option}, which no evicting cache serves")
        if self.backend == "sdpa" and call.options.get("s_aux") is not None:
            raise _Refused("attends with s_aux, which sdpa leaves out; load it with eager")
        window = call.options.get("sliding_window")
        if window is not None and window < (self._context() or window):
            raise _Refused(f"attends {window} tokens, and not all as its configuration says")
        causal = call.options.get("is_causal")
        if not (getattr(call.module, "is_causal", True) if causal is None else causal):
            raise _Refused("attends tokens that come later")
        if self.backend == "eager" and not _is_softmax(call, self.draw):
            raise _Refused("attends by more than a softmax over its keys")
        return call

    def _turning(self, index: int, attention: nn.Module, double: nn.Module, call: Call) -> Finding:
        if not call.key.any() or not call.key.isfinite().all():
            raise _Refused("has keys that are all 0 or not finite: are its weights loaded?")
        places = torch.tensor([*NEAR, self._far()], device=call.key.device)
        kind = self.kinds[index].name
        pairs = [(self.rotary[name], module) for name, module in self.doubles.items()]
        pairs += zip(attention.modules(), double.modules(), strict=True)
        tried = [(Turning(None), Rope(None))] + [
            (Turning(real, table, interleaved), Rope(own, table, interleaved))
            for real, own in pairs
            for table in sorted(_tables(own), key=lambda table: table != kind)
            for interleaved in (False, True)
        ]
        for turning, rope in tried:
            if _moves(rope, call.key, places):
                if _moves(rope, call.query, places):
                    return turning
                return SCALED
        return "rotates keys in a way that cannot be undone (or changes them after rotation)"


# --- copies that share weights -------------------------------------------------------------------


def _double(
    module: nn.Module,
    *,
    draw: torch.Generator | None = None,
    deep: bool = True,
    skip: str = "",
) -> nn.Module:
    """A copy that shares weights, without hooks, in evaluation mode.

    Args:
        draw: replaces norm weights and biases by random ones.
        skip: a child that is not copied.
    """
    double = object.__new__(type(module))
    double.__dict__ = state = dict(module.__dict__)
    for name, value in state.items():
        if "hooks" in name and isinstance(value, dict):
            state[name] = OrderedDict()
    state.update(
        training=False,
        _compiled_call_impl=None,
        _parameters=dict(module._parameters),
        _buffers=dict(module._buffers),
        _modules=dict(module._modules),
    )
    if module._modules:
        state.pop("forward", None)
        if (function := _forward(module)) is not type(module).forward:
            state["forward"] = types.MethodType(function, double)  # a replaced forward
    elif draw is not None and "forward" not in state:
        for name, weight in module._parameters.items():
            if weight is None or weight.dim() != 1 or not weight.is_floating_point():
                continue
            if weight.device.type != "meta":
                drawn = torch.rand(weight.shape, generator=draw) + 0.5
                state["_parameters"][name] = nn.Parameter(drawn.to(weight), False)
    if deep:
        for name, child in module._modules.items():
            if child is not None and name != skip:
                state["_modules"][name] = _double(child, draw=draw)
    return double


def _forward(module: nn.Module) -> Any:
    """The function of a module's forward; under accelerate's hooks, the original one."""
    state = module.__dict__
    own = state.get("_old_forward", state.get("forward"))
    return getattr(own, "__func__", type(module).forward)


def _device(part: nn.Module) -> torch.device:
    """The device that a part of a model runs on, also if its weights are loaded for each step."""
    for module in part.modules():
        hook: Any = getattr(module, "_hf_hook", None)
        if (placed := getattr(hook, "execution_device", None)) is not None:
            return torch.device(placed)
        for weight in module._parameters.values():
            if weight is not None and weight.device.type != "meta":
                return weight.device
    raise _Refused("has no weights that could be run: load them first")


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (list, tuple):
        return type(value)(_moved(part, device) for part in value)
    if type(value) is dict:
        return {name: _moved(part, device) for name, part in value.items()}
    return value


def _part(value: Any, tokens: slice, cache: Cache) -> Any:
    """A layer's inputs for some of the three tokens, with another cache."""
    if isinstance(value, Tensor):
        return value[:, tokens] if value.dim() > 1 and value.shape[1] == 3 else value
    if isinstance(value, Cache):
        return cache
    if type(value) in (list, tuple):
        return type(value)(_part(part, tokens, cache) for part in value)
    if type(value) is dict:
        return {name: _part(part, tokens, cache) for name, part in value.items()}
    return value


# --- equal layers --------------------------------------------------------------------------------


def _hidden(args: Any, kwargs: Any) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _structure(layer: nn.Module) -> Iterator[Any]:
    """A key that is equal for layers that differ in their index and weights only."""
    for name, module in layer.named_modules():
        plain = (int, float, str, type(None))
        settings = [
            (key, value)
            for key, value in module.__dict__.items()
            if isinstance(value, plain) and key not in ("layer_idx", "layer_id", "layer_index")
        ]
        yield name, type(module), _forward(module), *settings


def _identity(value: Any) -> Any:
    """A key of a layer's inputs: tensors by identity."""
    if isinstance(value, tuple | list):
        return tuple(_identity(part) for part in value)
    if isinstance(value, dict):
        return tuple((name, _identity(part)) for name, part in value.items())
    return value if isinstance(value, int | float | str | None) else id(value)


def _tables(module: nn.Module) -> Iterator[str]:
    """Prefixes of a rotary module's frequencies: one for each layer type, or an empty one."""
    for name in module._buffers:
        if name == "inv_freq":
            yield ""
        elif name.endswith("_inv_freq") and "original" not in name:
            yield name.removesuffix("_inv_freq")


# --- checks of an attention call -----------------------------------------------------------------


def _moves(rope: Rope, states: Tensor, places: Tensor) -> bool:
    """Whether a RoPE rotates the first token's states into those of the others.

    Args:
        states: [1, heads, 3, head_dim].
        places: their positions, int64 [3].
    """
    if rope.module is not None and 2 * rope.frequencies().shape[-1] > states.shape[-1]:
        return False
    first = states[:, :, :1].expand_as(states)
    rotation = rope.turn(places, places[:1].expand_as(places), places)
    off = (rope.rotate(first, rotation).float() - states.float()).abs().amax((0, 1, 3))
    size = states.float().abs().max()
    near = TOLERANCE.get(states.dtype, 1e-4)
    return bool(off[1] <= near * size and off[2] <= max(near, LOOSE) * size)


def _is_causal(mask: Tensor) -> bool:
    """Whether a mask, additive or bool, is the causal one."""
    if mask.dim() == 2:
        return bool(mask.all())
    shown = mask if mask.dtype == torch.bool else mask == 0
    rows, columns = mask.shape[-2:]
    return bool((shown == shown.new_ones(rows, columns).tril(columns - rows)).all())


def _is_softmax(call: Call, draw: torch.Generator) -> bool:
    """Whether the model's own attention is softmax(q k) v, also for large logits.

    Attention sinks, if there are any, are part of the softmax.
    """
    query = call.query * 8
    query[:, :, 0] = 0  # beside logits of 0, sinks have a visible effect
    # The call's own values are equal, so that all weights would give the same output.
    value = torch.randn(call.value.shape, generator=draw).to(call.value)
    new = query.shape[2]
    least = torch.finfo(query.dtype).min
    mask = torch.full((1, 1, new, new), least, dtype=query.dtype, device=query.device).triu(1)
    own = adapter.model_eager(call.module, query, call.key, value, mask, **call.options)[0]
    scale = call.options.get("scaling") or query.shape[-1] ** -0.5
    sinks = call.options.get("s_aux")
    plain = reference.scored_prefill(query, call.key, value, scale, sinks=sinks)[0]
    off = (own.transpose(1, 2).float() - plain.float()).abs().max()
    return bool(off <= max(TOLERANCE.get(query.dtype, 0), 1e-3) * value.abs().max())


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
