"""The evicting cache: a stock transformers cache whose layers thin themselves."""

from __future__ import annotations

import copy
import math
import warnings
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from buzz import adapter, compiled, kernels, probe, repetition
from buzz.attention import attend
from buzz.errors import ConfigError
from buzz.eviction import Group
from buzz.granularity import Constrained
from buzz.inputs import (
    REMEDIES,
    Told,
    check_mask,
    first_positions,
    hides_more,
    jumps,
    padding_of,
)
from buzz.layer import Council, EvictionLayer, Reader
from buzz.policy import Policy
from buzz.rope import Rope
from buzz.trace import Trace

Positions = Literal["cache", "true"]

LONGROPE = (
    "the text grows past the {} tokens of its short context: keys that are in the cache keep the"
    " frequencies that they were rotated with, while the model's own generate() would compute all"
    " of the text again"
)


ANOTHER = (
    "this is another prompt than the conversation of {} tokens that the cache holds, {}: call"
    " cache.reset() or make a new cache; to go on, give all that was said, and behind it what is"
    " new, or the new tokens alone with the attention_mask of all"
)

RESTARTS = (
    "layer {} of this model reads several tokens as if the {} before them had not been: give a"
    " prompt in one piece, and what comes later a token at a time"
)

BROKEN = (
    "an error ended the last step between two layers, and they no longer hold the same tokens: call"
    " cache.reset()"
)


class EvictionCache(adapter.StatefulCache):
    """A KV cache for `model.generate(**inputs, past_key_values=cache)` that evicts by `policy`.

    Making one is all that is needed: it also puts the attention backend in place. The model then
    still runs its stock path with any other cache.

    A step whose mask or positions cannot be served is refused by a ConfigError. Where a decoding
    step cannot wait for that verdict (on a GPU, in compiled code) its logits are NaN, and the error
    comes from whatever reads the cache next.

    Layers that attend all tokens evict. What others hold (a window or a chunk of their own, states
    of recurrent layers) stays in layers of transformers' own.

    Args:
        model: a causal language model with RoPE, loaded with sdpa, eager or flash attention.
        policy: the eviction method.
        positions: ``cache``: an entry is attended as if it stood at its index in the thinned cache;
            ``true``: at the position that its token has in the text (no key is ever rotated).
        logn_base: scale attention logits by log(n) / log(logn_base), n = entries that a query
            attends (512 in a line that is commented out in the original BUZZ code; the journal
            version's formula has not been seen). None: no scaling.
        logn_clamp: never scale by less than 1.
        hold_until: evict nothing before this many tokens, padding included, have been seen, and
            judge them as one step then: set it to the prompt's length, and a prompt in chunks gives
            what it gives in one piece.
        compiled: decode by one graph of torch.compile, made at the first token (and on CUDA
            replayed): the same tokens, sooner. Prompts and chunks run as ever.

    Raises:
        ConfigError: the model has no RoPE, or no layer that could evict; an impossible value; a
            method or a model that no graph can serve; a card too old for the kernels.
    """

    joined: Any = None  # of a fork, what holds the entries of all of them while they decode
    _is_amid = False  # whether a step of a model with other layers has begun and not ended
    _told: Told | None = None  # of a cache that `generate` may be given with a conversation in it
    around: dict[str, Any] = {}  # what a model around the decoder was given in this step

    def __init__(
        self,
        model: PreTrainedModel,
        policy: Policy,
        *,
        positions: Positions = "cache",
        logn_base: float | None = None,
        logn_clamp: bool = False,
        hold_until: int = 0,
        compiled: bool = False,
    ) -> None:
        if not isinstance(policy, Policy):
            raise ConfigError("policy", policy, "give a Policy, e.g. BuzzPolicy()")
        if logn_base is not None and not 1 < _number(logn_base) < math.inf:
            raise ConfigError("cache.logn_base", logn_base, "give a number above 1, or null")
        check_clamp(logn_base, logn_clamp)
        self.policy = policy = policy.for_model(model)
        self._positions = positions_of(positions)
        self._trace = Trace()
        for device in {weights.device for weights in model.parameters() if weights.is_cuda}:
            kernels.implementation(torch.empty(0, dtype=model.dtype, device=device))
        decoder = adapter.install(model, attend, _announce, _overhear)
        kinds = adapter.layers_of(model)
        found = probe.findings(model, decoder, kinds)
        layers = _make_layers(decoder, model, kinds, found.turnings, policy, self.positions)
        super().__init__(layers=layers)
        self._empty = Cache(layers=[kind.stock for kind in kinds])
        self._put(adapter.copied(self._empty))
        # Layers that attend what another one holds, by index, if that one evicts.
        self._readers = {
            index: kind.source
            for index, kind in enumerate(kinds)
            if kind.source is not None and kinds[kind.source].evicts
        }
        for source in self._readers.values():
            layers[source].readers += 1
        self.plain = all(kind.evicts and kind.name != "hybrid" for kind in kinds)
        self._restarting = found.restarting
        repetition.check(policy, layers, self.plain, logn_base)
        if policy.needs_repetition or not self.plain:
            adapter.after_forward(decoder, _conclude)
        adapter.before_generate(model, _check_prompt)
        self._told = Told()
        self._prompt: list[Tensor] = []  # its tokens, while it is to be read a second time
        self._decoder = weakref.ref(decoder)
        self._is_dropped = adapter.drops(model)
        self._short_context = adapter.short_context(model, decoder)
        # The layers that evict: all, unless the model mixes in others.
        self.evicting = [layer for layer in layers if isinstance(layer, EvictionLayer)]
        self._convene()
        self.hold_until = hold_until
        for layer in self.evicting:
            layer.logn_base, layer.logn_clamp = logn_base, logn_clamp
        self._replay = _replay(decoder, model, layers, self.plain, policy) if compiled else None
        if compiled:
            for layer in self.evicting:
                layer.least = _least(policy)

    def __bool__(self) -> bool:
        # Phi-3 drops a truthy cache when a text grows past its short context, to compute all of it
        # again; a falsy one goes on, with keys rotated as they came.
        return not self._is_dropped

    @property
    def positions(self) -> Positions:
        """``cache`` or ``true``, for as long as the cache lives."""
        return self._positions

    @property
    def hold_until(self) -> int:
        return self.evicting[0].hold_until

    @hold_until.setter
    def hold_until(self, tokens: int) -> None:
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0:
            raise ConfigError("hold_until", tokens, "give a number of tokens, 0 for none")
        for layer in self.evicting:
            layer.hold_until = tokens

    @property
    def logn_base(self) -> float | None:
        return self.evicting[0].logn_base

    @property
    def compiled(self) -> bool:
        """Whether decoding runs as one graph."""
        return self._replay is not None

    def replay(self, decoder: nn.Module, inputs: dict[str, Any]) -> Any | None:
        """The decoder's output for one token of each row, by the graph; None: it must run itself.

        Args:
            inputs: what the decoder is given, by name.
        """
        tokens = adapter.step_tokens(inputs)
        first = self.evicting[0]
        if (
            self._replay is None
            or tokens.shape[1] != 1
            or first.store is None
            or first.holds_back
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or inputs.get("output_hidden_states")
        ):
            return None
        return self._replay(decoder, self.evicting, inputs)

    @property
    def lengths(self) -> list[int]:
        """Entries held by each layer of the model (by its longest row)."""
        self._raise_faults()
        return [
            layer.longest
            if isinstance(layer, EvictionLayer)
            else max((tensor.shape[2] for tensor in adapter.entries_of(layer)), default=0)
            for layer in self.layers
        ]

    @property
    def reads_chunks(self) -> bool:
        """Whether a prompt can come in several steps; otherwise all but its tokens alone."""
        return self._restarting is None

    @property
    def shares_entries(self) -> bool:
        """Whether layers attend what others hold, so that an eviction waits for them."""
        return bool(self._readers)

    @property
    def attended(self) -> list[Any]:
        """What each layer of the model attends: its own entries, or those of another."""
        if not self._readers:
            return self.layers
        layers: list[Any] = list(self.layers)
        for index, source in self._readers.items():
            layers[index] = Reader(layers[source])
        return layers

    @property
    def distinct(self) -> list[EvictionLayer]:
        """The first evicting layer of each policy: those under the same one hold the same."""
        return list({layer.policy: layer for layer in reversed(self.evicting)}.values())[::-1]

    @property
    def evictions(self) -> list[int]:
        """Evictions so far of each row of the batch, in the layer that had the most."""
        self._raise_faults()
        return [max(row) for row in zip(*(layer.evictions for layer in self.distinct), strict=True)]

    @property
    def entry_nbytes(self) -> int:
        """Bytes of one entry's keys and values over all evicting layers."""
        return sum(layer.entry_nbytes for layer in self.evicting)

    def window_nbytes(self, seen: int) -> int:
        """Bytes that do not leave by eviction, of a row that has seen so many of its tokens.

        Entries within a layer's own window or chunk, and states of recurrent layers.
        """
        total = 0
        for layer in self._others:
            for tensor in adapter.entries_of(layer):
                total += min(seen, tensor.shape[2]) * tensor[0, :, :1].nbytes
            total += sum(state[0].nbytes for state in adapter.states_of(layer))
        return total

    @property
    def window_allocated_nbytes(self) -> int:
        """Bytes of these as they lie in memory; of a fork, its share of what all of them have."""
        rows = self.evicting[0].batch_size
        return sum(
            tensor.untyped_storage().nbytes() * rows // tensor.shape[0]
            for layer in self._others
            for tensor in (*adapter.entries_of(layer), *adapter.states_of(layer))
        )

    def nbytes(self, allocated: bool = False, *, evicting: bool = False) -> int:
        """Bytes of keys, values and recurrent states held, without padding and spare capacity.

        Args:
            allocated: count instead every buffer as it lies in memory, with positions, scores,
                kept original keys and spare capacity.
            evicting: leave out all that no eviction thins (windows, chunks, recurrent states): what
                a budget is of.
        """
        self._raise_faults()
        own = sum(layer.nbytes(allocated) for layer in self.evicting)
        if evicting:
            return own
        if allocated:
            return own + self.window_allocated_nbytes
        return own + sum(map(self.window_nbytes, self.evicting[0].per_row("seen")))

    def kept_positions(self, layer: int) -> Tensor:
        """True token indices of the entries of layer `layer`.

        Returns:
            int64 [batch, kv_heads, held], in temporal order; rows shorter than the longest begin
            with -1.
        """
        self._raise_faults()
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

        In the first layer that evicts.

        Steps that ran under torch.compile appear as one.
        """
        self._raise_faults()
        self._trace.note(self.evicting[0].groups)
        return self._trace.steps()

    def reset(self) -> None:
        """Forget every entry. Buffers stay allocated, for the next prompt.

        Raises:
            ConfigError: a step had a wrong mask or wrong positions, and nobody was told yet; the
                cache is empty then too.
        """
        self._part()
        for layer in self.evicting:
            layer.reset()
        self._put(adapter.copied(self._empty))
        self._convene()
        self._trace, self._told = Trace(), Told()
        self._prompt, self._is_amid = [], False
        self._raise_faults()

    def copy(self) -> EvictionCache:
        """A cache that goes on from here by itself, e.g. with another question on one context.

        Both read the same entries until they append their own: a copy costs memory and time with
        the first token that is fed to it, and so does the original with its next one.
        """
        return self._copy(adapter.copied(self.stock))

    def _copy(self, stock: Cache) -> EvictionCache:
        """A copy whose other layers are those of `stock`."""
        self._part()
        other = copy.copy(self)
        other.joined = None
        ropes: dict[int, Any] = {}
        other.layers = [
            layer.copy(ropes) if isinstance(layer, EvictionLayer) else layer
            for layer in self.layers
        ]
        other._put(stock)
        other.evicting = [layer for layer in other.layers if isinstance(layer, EvictionLayer)]
        other._convene()
        other._trace = self._trace.copy()
        other._prompt = list(self._prompt)
        other._told = None if self._told is None else self._told.select_rows()
        return other

    def take_buffers(self, spent: EvictionCache) -> None:
        """Go on in the buffers of another cache of this model and policy, which is empty then."""
        spent.reset()
        for layer, other in zip(self.evicting, spent.evicting, strict=True):
            layer.idle, layer.scratch = other.idle, other.scratch
            other.idle = other.scratch = None

    def _part(self) -> None:
        """Hold what a fork holds apart from the others, before it goes another way."""
        if self.joined is not None:
            self.joined.part()

    def _convene(self) -> None:
        """Have layers that choose together wait for each other in each step."""
        if isinstance(self.policy, Constrained) and self.policy.heads == "all":
            council = Council(len(self.evicting))
            for layer in self.evicting:
                layer.council = council

    @property
    def _waits(self) -> bool:
        """Whether an error ended a step before layers that choose together had done so."""
        council = self.evicting[0].council
        return council is not None and bool(council.waiting)

    def _put(self, stock: Cache) -> None:
        """Have other layers of transformers' own."""
        self.stock = stock
        self._others = [own for own in stock.layers if type(own) is not DynamicLayer]  # not empty
        self.layers = [
            layer if isinstance(layer, EvictionLayer) else other
            for layer, other in zip(self.layers, stock.layers, strict=True)
        ]

    def crop(self, tokens_to_remove: int) -> None:
        """Refused, also by layers that do not evict."""
        self.evicting[0].crop(tokens_to_remove)

    def __deepcopy__(self, memo: dict[int, Any]) -> EvictionCache:
        return self.copy()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = self.evicting[0].batch_size
        self.batch_select_indices(torch.arange(rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor | Sequence[int]) -> None:
        """Make row i what row `indices[i]` was; or leave the rows for which it is True.

        Raises:
            IndexError: there is no such row.
        """
        rows = self.evicting[0].batch_size
        if not rows:
            return
        self._part()
        indices = torch.arange(rows)[indices.cpu() if isinstance(indices, Tensor) else indices]
        for layer in self.evicting:
            layer.batch_select_indices(indices)
        adapter.select_rows(self.stock, indices)
        self._prompt = [tokens[indices.to(tokens.device)] for tokens in self._prompt]
        self._told = None if self._told is None else self._told.select_rows(indices)

    def note(self, tokens: Tensor, seen: int) -> None:
        """Note what a step is fed behind `seen` tokens: ids [batch, new], or embeddings."""
        if self._told is not None:
            self._told.note(tokens, seen)

    def check_prompt(self, ids: Tensor) -> None:
        """Refuse a whole prompt [batch, tokens] that does not go on with what the cache was fed.

        Raises:
            ConfigError: it is no longer than that, or begins otherwise.
        """
        if self._told is None:
            return
        seen, batch = self.evicting[0].cumulative_length, self.evicting[0].batch_size
        if not seen or batch % len(ids):
            return
        rows = ids.repeat_interleave(batch // len(ids), 0)  # of beams, and of several answers
        where = self._told.differs(rows, seen, self.evicting[0].per_row("padding"))
        if where is not None:
            how = f"and differs from token {where} on"
        elif ids.shape[1] <= seen:
            how = "or the same, with nothing new behind it"
        else:
            return
        raise ConfigError("input_ids", f"{ids.shape[1]} tokens", ANOTHER.format(seen, how))

    def begin_step(
        self,
        decoder: nn.Module,
        batch: int,
        new: int,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
    ) -> None:
        """Check what a step is given, and learn from a prompt's mask how rows are padded.

        Args:
            decoder: the one that runs.
            batch, new: the step's rows, and tokens of each.
            attention_mask: [batch, seen + new], 0 in padding; None if there is none.
            position_ids: int64 [batch or 1, new]; None if the model numbers its tokens.

        Raises:
            ConfigError: another model than the cache was made for; a mask that hides anything but
                padding before a row's first token; positions that do not count up by one; a chunk
                that a recurrent layer of the model cannot read.
            RuntimeError: an error in the middle of a step left the layers apart; another batch
                than the cache holds.
        """
        first, last = self.evicting[0], self.evicting[-1]
        seen = first.cumulative_length
        if decoder is not self._decoder():
            raise self._foreign(decoder)
        if last.cumulative_length != seen or self._is_amid or self._waits:
            raise RuntimeError(BROKEN)
        if not torch.compiler.is_compiling():
            self._trace.note(first.groups)
            if new > 1:  # a prompt or a chunk, which may wait
                self._raise_faults()
            if 0 < seen <= self._short_context < seen + new:
                warnings.warn(LONGROPE.format(self._short_context), stacklevel=2)
        self._check_hold(seen, new)
        if seen and new > 1 and self._restarting is not None:
            raise ConfigError("input_ids", f"{new} tokens", RESTARTS.format(self._restarting, seen))
        if attention_mask is not None:
            check_mask(attention_mask, batch, seen + new)
        if seen == 0:
            padding = [0] * batch if attention_mask is None else padding_of(attention_mask)
            starts = first_positions(position_ids, padding)
            self._group(padding, starts)
            for layer in self.evicting:
                layer.rotation.forget()
        else:
            first.check_batch(batch)
            padding, starts = first.per_row("padding"), first.per_row("first_position")
            if attention_mask is not None:
                self._refuse("attention_mask", hides_more(attention_mask, padding), new)
        if self.positions == "true":
            pass
        elif position_ids is not None:
            self._refuse("position_ids", jumps(position_ids, seen, padding, starts), new)
        elif starts != padding:  # the model counts padding, now
            raise ConfigError("position_ids", None, REMEDIES["position_ids"])
        self._is_amid = not self.plain

    def end_step(
        self, decoder: nn.Module, tokens: Tensor, known: repetition.Known | None = None
    ) -> None:
        """End a step, and read a prompt that is complete a second time, if the policy asks for it.

        Args:
            tokens: ids of the step, [batch, new].
            known: what caches that hold the same have found in it.

        Raises:
            ConfigError: the step had embeddings and no ids.
        """
        self._is_amid = False
        first = self.evicting[0]
        if first.awaits_repetition:
            self._prompt.append(tokens)
            if self.hold_until <= first.cumulative_length:
                known = {} if known is None else known
                repetition.repeat(decoder, self.evicting, torch.cat(self._prompt, 1), known)
                self._prompt = []

    def _group(self, padding: list[int], starts: list[int]) -> None:
        """Put rows of a prompt together that are as long as each other."""
        kinds = list(zip(padding, starts, strict=True))
        for layer in self.evicting:
            layer.groups = [
                Group([row for row, own in enumerate(kinds) if own == kind], *kind)
                for kind in sorted(set(kinds))
            ]

    def _check_hold(self, seen: int, new: int) -> None:
        """Only with its end known can a chunk tell which of its queries judge the whole."""
        if 0 < seen < self.hold_until < seen + new and self.policy.observe is not None:
            raise ConfigError(
                "hold_until",
                self.hold_until,
                f"{self.policy.name} judges by the last tokens before it, and a chunk of tokens"
                f" {seen} to {seen + new} goes past it; set it to where a chunk ends",
            )

    def _foreign(self, decoder: nn.Module) -> ConfigError:
        own = self._decoder()
        names = ["one that is gone" if own is None else _name(own), _name(decoder)]
        other = f"another {names[1]}" if names[0] == names[1] else names[1]
        return ConfigError(
            "past_key_values",
            "EvictionCache",
            f"was made for {names[0]} and not for {other}; make one for each model",
        )

    # --- what is wrong with a step is found out where its mask lies ---------------------------

    def _refuse(self, field: str, wrong: Tensor, new: int) -> None:
        """Refuse a step if `wrong`, at once where that can be read without slowing it down.

        Otherwise (a token on another device than the CPU, compiled code) the answer stays there:
        the outputs of this step, and of all later ones, are NaN if it is yes, and whoever next
        reads the cache or feeds it a prompt gets the error.
        """
        if not _may_wait(wrong.device, new):
            before = self._faults.get(field)
            self._faults[field] = wrong if before is None else wrong | before
        elif wrong:
            raise ConfigError(field, "of this step", REMEDIES[field])

    @property
    def _faults(self) -> dict[str, Tensor]:
        return self.evicting[-1].faults

    def _raise_faults(self) -> None:
        """Waits for the device if there is an answer to wait for."""
        faults = self._faults
        if not faults:
            return
        self.evicting[-1].faults = {}
        for field, wrong in faults.items():
            if wrong:
                raise ConfigError(field, "of an earlier step", REMEDIES[field])


def positions_of(value: Any) -> Positions:
    """The kind of positions that a setting names; YAML and command lines turn `true` into True.

    Raises:
        ConfigError: it names none.
    """
    if value is True or value == "true":
        return "true"
    if value == "cache":
        return "cache"
    raise ConfigError("cache.positions", value, "choose cache or true")


def check_clamp(logn_base: float | None, logn_clamp: bool) -> None:
    """Raises ConfigError if a bound is given for a scale that is not there."""
    if logn_clamp and logn_base is None:
        remedy = "bounds the scale by log n, and there is none: set cache.logn_base too, e.g. 512"
        raise ConfigError("cache.logn_clamp", logn_clamp, remedy)


def _may_wait(device: torch.device, new: int) -> bool:
    """Whether a step of so many tokens can read a number off a device and not be slower for it."""
    return not torch.compiler.is_compiling() and (device.type == "cpu" or new > 1)


def _number(value: Any) -> float:
    """A number as it is, anything else as one that no range holds."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _name(decoder: nn.Module) -> str:
    path = getattr(decoder.config, "name_or_path", "")
    return f"{type(decoder).__name__} {path}".strip()


def _make_layers(
    decoder: nn.Module,
    model: PreTrainedModel,
    kinds: list[adapter.Kind],
    found: list[probe.Finding | None],
    policy: Policy,
    positions: Positions,
) -> list[Any]:
    name = type(model).__name__
    ropes: dict[probe.Finding, Rope] = {}
    still = Rope(None)  # one for all, so that forks can join layers
    layers: list[Any] = []
    for index, (finding, kind) in enumerate(zip(found, kinds, strict=True)):
        if not kind.evicts:
            layers.append(kind.stock)
            continue
        assert finding is not None
        if isinstance(finding, str) and (positions == "cache" or policy.needs_rotation):
            remedy = "set cache.positions=true, which moves none"
            if positions != "cache":
                remedy = f"{policy.name} turns vectors as the model does, so take another method"
            raise ConfigError("model", name, f"layer {index} {finding}; {remedy}")
        if finding not in ropes:
            ropes[finding] = Rope(None) if isinstance(finding, str) else finding.rope()
        # At true positions no key moves, as in a layer without RoPE.
        rope = ropes[finding] if positions == "cache" else still
        module = adapter.attention_of(decoder, index)
        if policy.needs_projection:
            adapter.output_projection(module)  # raises if it cannot be read
        layers.append(EvictionLayer(policy, rope, module=module, rotation=ropes[finding]))
    evicting = [layer for layer in layers if isinstance(layer, EvictionLayer)]
    for number, layer in enumerate(evicting):
        layer.index, layer.policy = number, policy.for_layer(number, len(evicting))
    return layers


def _replay(
    decoder: nn.Module, model: PreTrainedModel, layers: list[Any], plain: bool, policy: Policy
) -> compiled.Replay:
    compiled.check_policy(policy)
    compiled.check_model(model, layers, plain)
    adapter.intercept(decoder, _run_compiled)
    return compiled.replay_of(decoder, len(layers))


def _least(policy: Policy) -> int:
    """Entries that a method comes to hold of every long prompt; 0 where they depend on it."""
    if (peak := policy.footprint().peak) < math.inf:
        return int(peak)
    stays = {policy.next_length(tokens, 0)[0] for tokens in (2**20, 2**21)}
    return stays.pop() if len(stays) == 1 else 0


def _among(inputs: Iterable[Any]) -> EvictionCache | None:
    """The cache of ours that a decoder is given, by type: its name may be the older one."""
    return next((value for value in inputs if isinstance(value, EvictionCache)), None)


def _run_compiled(decoder: nn.Module, inputs: dict[str, Any]) -> Any | None:
    """What stands before a decoder's own forward once one of its caches is compiled."""
    cache = _among(inputs.values())
    return None if cache is None else cache.replay(decoder, inputs)


def _check_prompt(inputs: Any, **kwargs: Any) -> None:
    """What stands before `generate`, for which ids as long as their mask are all of the text."""
    cache, mask = _among(kwargs.values()), kwargs.get("attention_mask")
    ids = kwargs.get("input_ids") if inputs is None else inputs
    if cache is None or not isinstance(ids, Tensor) or kwargs.get("inputs_embeds") is not None:
        return
    if mask is None or mask.shape[-1] == ids.shape[1]:
        cache.check_prompt(ids)


def _announce(
    decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> adapter.Inputs | None:
    """Forward pre-hook: tell the cache what a step is given, and :func:`attend` the layers."""
    cache = _among((*kwargs.values(), *args))
    if cache is None:
        return None
    inputs = adapter.named_inputs(decoder, args, kwargs)
    tokens = adapter.step_tokens(inputs)
    around, cache.around = cache.around, {}  # its mask is 2-D; that of the decoder may be made
    mask, position_ids = {**inputs, **around}.get("attention_mask"), inputs.get("position_ids")
    batch, new = tokens.shape[:2]
    seen = cache.get_seq_length()
    cache.begin_step(decoder, batch, new, mask, position_ids)
    if not torch.compiler.is_compiling():
        cache.note(tokens, seen)
    inputs = {**inputs, "eviction_layers": cache.attended}
    if cache.plain:
        inputs["attention_mask"] = adapter.unread_mask(tokens.device)
    elif position_ids is None:  # Bamba begins every step at 0 if it is not told
        inputs["position_ids"] = torch.arange(seen, seen + new, device=tokens.device)[None]
    return (), inputs


def _overhear(around: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a model around the decoder, which makes the decoder's mask itself."""
    cache = _among((*kwargs.values(), *args))
    if cache is None:
        return
    inputs = adapter.named_inputs(around, args, kwargs)
    ids = inputs.get("input_ids")
    if ids is None or ids.shape[1] > 1:  # a token alone is text
        adapter.require_text(inputs)
    cache.around = {"attention_mask": inputs.get("attention_mask")}


def _conclude(
    decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    """Forward hook, for policies that read a prompt twice, and models with other layers."""
    cache = _among(kwargs.values())
    if cache is not None:
        cache.end_step(decoder, adapter.step_tokens(kwargs))
