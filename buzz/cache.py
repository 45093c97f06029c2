"""The evicting cache: a stock transformers cache whose layers evict entries themselves."""

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
DType = Literal["int8"]

LONGROPE = (
    "the text grows past the {} tokens of the model's short context: cached keys keep the"
    " frequencies that they were rotated with, while the model's own generate() would compute the"
    " whole text again"
)


ANOTHER = (
    "this prompt does not continue the conversation of {} tokens that the cache holds, {}: call"
    " cache.reset() or make a new cache; to continue, give the whole conversation with the new"
    " tokens at its end, or the new tokens alone with the attention_mask of all"
)

RESTARTS = (
    "layer {} of this model reads several tokens as if the {} before them did not exist: give the"
    " prompt in one piece, and later tokens one at a time"
)

BROKEN = (
    "an error ended the last step between two layers, so they no longer hold the same tokens: call"
    " cache.reset()"
)


class EvictionCache(adapter.StatefulCache):
    """A KV cache for `model.generate(**inputs, past_key_values=cache)` that evicts by `policy`.

    Creating the cache also installs the attention backend. With any other cache the model runs its
    stock path.

    A step with an unsupported mask or positions raises a ConfigError. A decoding step that cannot
    wait for this check (on a GPU, in compiled code) gives NaN logits instead, and the error is
    raised when the cache is read next.

    Layers that attend all tokens evict. Other layers (sliding windows, chunks, recurrent states)
    use transformers' own cache layers.

    Args:
        model: a causal language model with RoPE, loaded with sdpa, eager or flash attention.
        policy: the eviction method.
        positions: of entries. ``cache``: their index in the cache; ``true``: their token's position
            in the text, so that no key is rotated.
        logn_base: scales attention logits by log(n) / log(logn_base), n = entries that a query
            attends (512 in a commented line of the original BUZZ code; the journal version's
            formula was not available). None: no scaling.
        logn_clamp: never scales by less than 1.
        hold_until: tokens, padding included, before the first eviction, which then scores all of
            them as one step. With the prompt's length, a prompt in chunks gives the result of one
            in one piece.
        dtype: ``int8``: keys and values are held in int8, with a scale per entry and head, once the
            prompt (all up to `hold_until`) was attended as computed; only at true positions. None:
            as the model computes them.
        compiled: decodes with one graph of torch.compile, made at the first token (on CUDA, a
            captured graph that is replayed). Prompts and chunks run without it.

    Raises:
        ConfigError: the model has no RoPE, or no layer that could evict; an impossible value; a
            method or a model that cannot be compiled; a card too old for the kernels.
    """

    joined: Any = None  # of a fork: what holds the entries of all forks while they decode
    _is_amid = False  # whether a step is under way, for models with layers that do not evict
    _told: Told | None = None  # the token ids so far; None for ForkedCache
    around: dict[str, Any] = {}  # the step's inputs to a model around the decoder

    def __init__(
        self,
        model: PreTrainedModel,
        policy: Policy,
        *,
        positions: Positions = "cache",
        logn_base: float | None = None,
        logn_clamp: bool = False,
        hold_until: int = 0,
        dtype: DType | None = None,
        compiled: bool = False,
    ) -> None:
        if not isinstance(policy, Policy):
            raise ConfigError("policy", policy, "give a Policy, e.g. BuzzPolicy()")
        if logn_base is not None and not 1 < _number(logn_base) < math.inf:
            raise ConfigError("cache.logn_base", logn_base, "give a number above 1, or null")
        check_clamp(logn_base, logn_clamp)
        self.policy = policy = policy.for_model(model)
        self._positions = positions_of(positions)
        check_dtype(dtype, self._positions)
        self._trace = Trace()
        for device in {weights.device for weights in model.parameters() if weights.is_cuda}:
            kernels.implementation(torch.empty(0, dtype=model.dtype, device=device))
            if dtype == "int8":
                kernels.implementation(torch.empty(0, dtype=torch.int8, device=device))
        decoder = adapter.install(model, attend, _announce, _overhear)
        kinds = adapter.layers_of(model)
        found = probe.findings(model, decoder, kinds)
        layers = _make_layers(decoder, model, kinds, found.turnings, policy, self.positions)
        super().__init__(layers=layers)
        self._empty = Cache(layers=[kind.stock for kind in kinds])
        self._put(adapter.copied(self._empty))
        # Layers that attend another layer's entries, if that one evicts: its index, by theirs.
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
        self._prompt: list[Tensor] = []  # the prompt's tokens, until its second pass
        self._decoder = weakref.ref(decoder)
        self._is_dropped = adapter.drops(model)
        self._short_context = adapter.short_context(model, decoder)
        # The layers that evict.
        self.evicting = [layer for layer in layers if isinstance(layer, EvictionLayer)]
        self._convene()
        self.hold_until = hold_until
        for layer in self.evicting:
            layer.logn_base, layer.logn_clamp = logn_base, logn_clamp
            layer.int8 = dtype == "int8"
        self._replay = _replay(decoder, model, layers, self.plain, policy) if compiled else None
        if compiled:
            for layer in self.evicting:
                layer.least = _least(policy)

    def __bool__(self) -> bool:
        # Phi-3 drops a truthy cache when a text grows past its short context, to compute the whole
        # text again. It keeps a falsy one.
        return not self._is_dropped

    @property
    def positions(self) -> Positions:
        """``cache`` or ``true``."""
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
        """The compiled decoder's output for one token of each row; None if it cannot run compiled.

        Args:
            inputs: the decoder's, by name.
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
        """Cache length of each layer of the model, of its longest row."""
        self._raise_faults()
        return [
            layer.longest
            if isinstance(layer, EvictionLayer)
            else max((tensor.shape[2] for tensor in adapter.entries_of(layer)), default=0)
            for layer in self.layers
        ]

    @property
    def reads_chunks(self) -> bool:
        """Whether a prompt can be read in chunks."""
        return self._restarting is None

    @property
    def shares_entries(self) -> bool:
        """Whether layers attend other layers' entries, whose eviction waits for them."""
        return bool(self._readers)

    @property
    def attended(self) -> list[Any]:
        """The cache layer that each layer of the model attends: its own, or another layer's."""
        if not self._readers:
            return self.layers
        layers: list[Any] = list(self.layers)
        for index, source in self._readers.items():
            layers[index] = Reader(layers[source])
        return layers

    @property
    def distinct(self) -> list[EvictionLayer]:
        """One evicting layer for each policy: layers of equal policies have equal lengths."""
        return list({layer.policy: layer for layer in reversed(self.evicting)}.values())[::-1]

    @property
    def evictions(self) -> list[int]:
        """Evictions of each row of the batch, in the layer that had the most."""
        self._raise_faults()
        return [max(row) for row in zip(*(layer.evictions for layer in self.distinct), strict=True)]

    @property
    def entry_nbytes(self) -> int:
        """Bytes of one token's keys and values over all evicting layers."""
        return sum(layer.entry_nbytes for layer in self.evicting)

    def window_nbytes(self, seen: int) -> int:
        """Bytes of layers that do not evict, for a row that has seen so many tokens.

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
        """Allocated bytes of layers that do not evict; of a fork, its share of the forks' bytes."""
        rows = self.evicting[0].batch_size
        return sum(
            tensor.untyped_storage().nbytes() * rows // tensor.shape[0]
            for layer in self._others
            for tensor in (*adapter.entries_of(layer), *adapter.states_of(layer))
        )

    def nbytes(self, allocated: bool = False, *, evicting: bool = False) -> int:
        """Bytes of keys, values and recurrent states, without padding and spare capacity.

        Args:
            allocated: count all buffers as allocated, with positions, scores, original keys and
                spare capacity.
            evicting: count the layers that evict only, which budgets are about.
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
            int64 [batch, kv_heads, cache_length], in temporal order; rows shorter than the longest
            begin with -1.
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
        """(tokens seen, cache length, evictions) after each step.

        Of the first row, in the first layer that evicts. Consecutive steps under torch.compile
        appear as one.
        """
        self._raise_faults()
        self._trace.note(self.evicting[0].groups)
        return self._trace.steps()

    def reset(self) -> None:
        """Removes all entries. Buffers stay allocated for the next prompt.

        Raises:
            ConfigError: an earlier step had a wrong mask or wrong positions, which was not reported
                yet; the cache is empty nevertheless.
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
        """An independent copy, e.g. for another question on one context.

        The copy and the original share buffers until they append a token. The first token of either
        one costs a copy of the entries.
        """
        return self._copy(adapter.copied(self.stock))

    def _copy(self, stock: Cache) -> EvictionCache:
        """A copy whose layers that do not evict are those of `stock`."""
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
        """Takes over the buffers of another cache of this model and policy, which is reset."""
        spent.reset()
        for layer, other in zip(self.evicting, spent.evicting, strict=True):
            layer.idle, layer.scratch = other.idle, other.scratch
            other.idle = other.scratch = None

    def _part(self) -> None:
        """Separates a fork's entries from those of the others."""
        if self.joined is not None:
            self.joined.part()

    def _convene(self) -> None:
        """With ``heads=all``, makes the layers choose together in each step."""
        if isinstance(self.policy, Constrained) and self.policy.heads == "all":
            council = Council(len(self.evicting))
            for layer in self.evicting:
                layer.council = council

    @property
    def _waits(self) -> bool:
        """Whether an error ended a step before layers that choose together have chosen."""
        council = self.evicting[0].council
        return council is not None and bool(council.waiting)

    def _put(self, stock: Cache) -> None:
        """Sets the layers that do not evict."""
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
        """Makes row i what row `indices[i]` was; or, for bools, keeps the rows that are True.

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
        """Records a step's inputs after `seen` tokens: ids [batch, new], or embeddings."""
        if self._told is not None:
            self._told.note(tokens, seen)

    def check_prompt(self, ids: Tensor) -> None:
        """Checks that a whole prompt [batch, tokens] continues what the cache was fed.

        Raises:
            ConfigError: it begins with other tokens, or has no new ones.
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
            how = "as it has no new tokens"
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
        """Checks a step's inputs, and reads the padding of rows from a prompt's mask.

        Args:
            decoder: the one that is called.
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
        """Ends a step; after the prompt, reads it a second time if the policy declares it.

        Args:
            tokens: ids of the step, [batch, new].
            known: scores that other caches found in the second pass.

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
        """Groups rows of equally long prompts."""
        kinds = list(zip(padding, starts, strict=True))
        for layer in self.evicting:
            layer.groups = [
                Group([row for row, own in enumerate(kinds) if own == kind], *kind)
                for kind in sorted(set(kinds))
            ]

    def _check_hold(self, seen: int, new: int) -> None:
        """If only the prompt's last queries count, `hold_until` must be the end of a chunk."""
        if 0 < seen < self.hold_until < seen + new and self.policy.observe is not None:
            raise ConfigError(
                "hold_until",
                self.hold_until,
                f"{self.policy.name} scores by the last tokens before it, and a chunk of tokens"
                f" {seen} to {seen + new} goes past it; set it to the end of a chunk",
            )

    def _foreign(self, decoder: nn.Module) -> ConfigError:
        own = self._decoder()
        names = ["one that is gone" if own is None else _name(own), _name(decoder)]
        other = f"another {names[1]}" if names[0] == names[1] else names[1]
        return ConfigError(
            "past_key_values",
            "EvictionCache",
            f"was made for {names[0]} and not for {other}; make a cache for each model",
        )

    # --- checks whose result is on the device of the input ------------------------------------

    def _refuse(self, field: str, wrong: Tensor, new: int) -> None:
        """Refuses a step if `wrong` is true, at once if reading it does not slow the step down.

        Otherwise (a decoding step on a GPU, compiled code) the result stays on the device. If it is
        true, the outputs of this step and all later ones are NaN, and the error is raised when the
        cache is read, or fed a prompt, the next time.
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
        """Raises errors of earlier steps; waits for the device if there is a check to read."""
        faults = self._faults
        if not faults:
            return
        self.evicting[-1].faults = {}
        for field, wrong in faults.items():
            if wrong:
                raise ConfigError(field, "of an earlier step", REMEDIES[field])


def positions_of(value: Any) -> Positions:
    """The kind of positions that a setting names; ``true`` may come as a bool, as in YAML.

    Raises:
        ConfigError: it names none.
    """
    if value is True or value == "true":
        return "true"
    if value == "cache":
        return "cache"
    raise ConfigError("cache.positions", value, "choose cache or true")


def check_clamp(logn_base: float | None, logn_clamp: bool) -> None:
    """Raises ConfigError for `logn_clamp` without `logn_base`."""
    if logn_clamp and logn_base is None:
        remedy = "bounds the scale by log n, which is off: set cache.logn_base too, e.g. 512"
        raise ConfigError("cache.logn_clamp", logn_clamp, remedy)


def check_dtype(dtype: Any, positions: Positions) -> None:
    """Raises ConfigError if entries cannot be held in this type."""
    if dtype not in (None, "int8"):
        raise ConfigError("cache.dtype", dtype, "choose int8, or null for the model's own")
    if dtype == "int8" and positions == "cache":
        remedy = "keys that are turned would be rounded again each time: set cache.positions=true"
        raise ConfigError("cache.dtype", dtype, remedy)


def _may_wait(device: torch.device, new: int) -> bool:
    """Whether a step of so many tokens can wait for a device without being slower for it."""
    return not torch.compiler.is_compiling() and (device.type == "cpu" or new > 1)


def _number(value: Any) -> float:
    """The number, or NaN for anything else."""
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
    """Cache length after every long prompt; 0 if it depends on the prompt's length."""
    if (peak := policy.footprint().peak) < math.inf:
        return int(peak)
    stays = {policy.next_length(tokens, 0)[0] for tokens in (2**20, 2**21)}
    return stays.pop() if len(stays) == 1 else 0


def _among(inputs: Iterable[Any]) -> EvictionCache | None:
    """The evicting cache among a decoder's inputs, by type: it has different names."""
    return next((value for value in inputs if isinstance(value, EvictionCache)), None)


def _run_compiled(decoder: nn.Module, inputs: dict[str, Any]) -> Any | None:
    """Runs before a decoder's own forward, once one of its caches is compiled."""
    cache = _among(inputs.values())
    return None if cache is None else cache.replay(decoder, inputs)


def _check_prompt(inputs: Any, **kwargs: Any) -> None:
    """Runs before `generate`; ids that are as long as their mask are the whole text."""
    cache, mask = _among(kwargs.values()), kwargs.get("attention_mask")
    ids = kwargs.get("input_ids") if inputs is None else inputs
    if cache is None or not isinstance(ids, Tensor) or kwargs.get("inputs_embeds") is not None:
        return
    if mask is None or mask.shape[-1] == ids.shape[1]:
        cache.check_prompt(ids)


def _announce(
    decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> adapter.Inputs | None:
    """Forward pre-hook: gives the cache a step's inputs, and :func:`attend` the layers."""
    cache = _among((*kwargs.values(), *args))
    if cache is None:
        return None
    inputs = adapter.named_inputs(decoder, args, kwargs)
    tokens = adapter.step_tokens(inputs)
    around, cache.around = cache.around, {}  # its mask is 2-D; the decoder's may not be
    mask, position_ids = {**inputs, **around}.get("attention_mask"), inputs.get("position_ids")
    batch, new = tokens.shape[:2]
    seen = cache.get_seq_length()
    cache.begin_step(decoder, batch, new, mask, position_ids)
    if not torch.compiler.is_compiling():
        cache.note(tokens, seen)
    inputs = {**inputs, "eviction_layers": cache.attended}
    if cache.plain:
        inputs["attention_mask"] = adapter.unread_mask(tokens.device)
    elif position_ids is None:  # else Bamba begins every step at 0
        inputs["position_ids"] = torch.arange(seen, seen + new, device=tokens.device)[None]
    return (), inputs


def _overhear(around: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a model around the decoder, to read its mask before it is expanded."""
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
    """Forward hook for policies with a second pass, and models with layers that do not evict."""
    cache = _among(kwargs.values())
    if cache is not None:
        cache.end_step(decoder, adapter.step_tokens(kwargs))
