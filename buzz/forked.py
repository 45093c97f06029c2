"""Several methods on the same prompts: a shared prefill, then one row for each method and prompt.

No method evicts before the prompt is complete. So its keys and values are the same for all methods:
they are computed once, and shared until an eviction moves the entries that stay. After the prompt,
every method is a row of one batch. The linear layers run once for all rows, and attention reads
each row's own entries, in one kernel call for all rows where :mod:`buzz.kernels` can. Layers that
do not evict (windows, chunks, recurrent states) are transformers' own: one cache with a row for
each prompt, and later for each method.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from buzz import adapter, kernels, repetition
from buzz.adapter import SelfAttending
from buzz.attention import Shared, sinks_of
from buzz.cache import BROKEN, EvictionCache
from buzz.entries import SeveralLayers
from buzz.errors import ConfigError
from buzz.eviction import Group
from buzz.inputs import check_mask, hides_more, on, padding_of
from buzz.layer import EvictionLayer
from buzz.policy import Policy
from buzz.queries import QueryLog
from buzz.store import Store, with_spare


@dataclass
class Rows:
    """The rows of a step.

    Attributes:
        prompts: of each fork, the index of its prompt.
        padding: of each prompt.
        forked: whether a step has a row for each fork, and not for each prompt.
        in_one_call: whether each layer attends the step's tokens in one kernel call.
        stacks: hold the forks' entries while they decode token by token.
        seats: by index of a layer that evicts: for each fork its stack, and the row in it.
        listening: the forks whose policies read queries.
        reserved: by fork and kind of layer, buffers that the prompt's entries are evicted to.
    """

    prompts: list[int]
    padding: list[int]
    forked: bool = False
    in_one_call: bool = False
    stacks: list[Stack] = field(default_factory=list)
    seats: dict[int, list[tuple[Stack, int]]] = field(default_factory=dict)
    listening: list[int] = field(default_factory=list)
    reserved: dict[Any, list[Store]] = field(default_factory=dict)

    def of_step(self) -> list[int]:
        """The prompt of each row of a step."""
        return self.prompts if self.forked else list(range(len(self.padding)))

    def stack(self, forks: Sequence[EvictionCache]) -> None:
        """Stacks the layers of each fork that have equal lengths, if they are not stacked yet."""
        if self.stacks:
            return
        self.listening = [
            row
            for row, fork in enumerate(forks)
            if fork.policy.queries or fork.policy.moments_from is not None
        ]
        for fork in forks:
            alike: dict[Any, list[int]] = {}
            for index, layer in enumerate(fork.layers):
                if isinstance(layer, EvictionLayer):
                    alike.setdefault(kind_of(layer), []).append(index)
            for indices in alike.values():
                stack = Stack([fork.layers[index] for index in indices])
                self.stacks.append(stack)
                for number, index in enumerate(indices):
                    self.seats.setdefault(index, []).append((stack, number))

    def reserve(self, row: int, fork: EvictionCache, layer: EvictionLayer) -> None:
        """Makes a fork's layer evict its prompt to a row of the stack that it will be in."""
        after, store, policy = layer._plan(), layer.store, layer.policy
        assert store is not None
        if after is None or after[0][0] == layer.longest or layer.idle is not None:
            return
        places = self.reserved.setdefault((row, kind_of(layer)), [])
        if not places:
            alike = [own for own in fork.evicting if kind_of(own)[:3] == kind_of(layer)[:3]]
            sums = policy.needs_scores and policy.score_rule != "step"
            if layer.int8:
                store = store.quantized(store.end)  # of none: to tell types and shapes
            like = replace(store, scores=store.positions.float() if sums else None)
            whole = Store.unwritten(like, with_spare(after[0][0]), len(alike))
            places += [whole.row(number) for number in range(len(alike))]
        layer.idle = places.pop(0)

    def part(self) -> None:
        """Separates the layers of all stacks."""
        for stack in self.stacks:
            stack.part()
        self.stacks, self.seats = [], {}


def kind_of(layer: EvictionLayer) -> Any:
    """A key that is equal for layers that can be in one stack."""
    store = layer.store
    shapes = None if store is None else (store.keys.shape[1::2], store.values.shape[3])
    return layer.policy, id(layer.rope), id(layer.rotation), shapes


class Stack(EvictionLayer):
    """Layers of one fork as rows of one layer, so that one call evicts from all of them.

    Lengths depend on lengths alone, so layers of one policy always have equal lengths. The layers
    stay usable: they have views of the stack's buffers.

    Args:
        layers: of one fork, with equal policies and rotations.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        lead = layers[0]
        super().__init__(lead.policy, lead.rope, lead.index, rotation=lead.rotation)
        self.layers = layers
        self.indices = on(lead.device, [layer.index for layer in layers])[:, None, None]
        self.hold_until = lead.hold_until
        self.awaits_repetition = False
        self.cumulative_length = lead.cumulative_length
        self.lazy_initialization(lead.store.keys, lead.store.values)
        each = [layer.groups[0] for layer in layers]
        group = replace(each[0], rows=list(range(len(layers))))
        if group.source is not None:
            group.source = torch.cat([one.source for one in each])
            group.source_positions = torch.cat([one.source_positions for one in each])
        self.groups = [group]
        self.log = QueryLog.stacked([layer.log for layer in layers])
        self.store = Store.joined([layer.store for layer in layers], group.held)
        self.told = each[0]  # the group of every layer
        self.lent: list[Tensor] = []  # the buffers that the layers have views of
        self.sees_layers = False  # whether the policy reads the index of a single layer
        self.places: list[tuple[int, ...]] = []  # by layer, for `kernels.step_rows`
        self.queries: list[Tensor] = []  # of the current token, from the layers so far
        self.scale = 1.0  # of their logits
        for layer in layers:
            layer.groups, layer.idle = [self.told], None
        self.tell()

    def begin(self) -> None:
        """Makes room for a token, and computes its place in each layer."""
        self.make_room()
        store, group = self.store, self.groups[0]
        assert store is not None
        if store.keys is not self.lent[0]:
            self.tell()  # the layers' views of old buffers need not outlive this
        self.step_scores, self.queries = self.scores_of_step(), []
        bounds = store.end - group.held, store.end + 1, group.seen
        rest = (
            store.capacity,
            *bounds,
            self.step_scores is store.scores,
            store.keys.dtype == torch.int8,
        )
        buffers = store.keys, store.values, store.positions, self.step_scores
        at = [0 if one is None else one.data_ptr() for one in buffers]
        step = [0 if one is None else one.stride(0) * one.element_size() for one in buffers]
        self.places = [
            (*(first + number * size for first, size in zip(at, step, strict=True)), *rest)
            for number in range(len(self.layers))
        ]

    def hear(self, query: Tensor, scale: float) -> None:
        """Takes a layer's query of the token, [1, heads, 1, head_dim]."""
        self.queries.append(query)
        self.scale = scale

    def end(self, moves: list[kernels.Move]) -> None:
        """Counts the token, and evicts; the caller makes the moves of entries."""
        query = torch.cat(self.queries) if self.queries else None
        self.take_in(self.step_scores, query, self.scale, moves)
        self.tell()

    def tell(self) -> None:
        """Updates the layers' lengths and their views of the buffers."""
        store, group, told = self.store, self.groups[0], self.told
        assert store is not None
        told.seen, told.held, told.state = group.seen, group.held, group.state
        told.evictions, told.cut = group.evictions, group.cut
        buffers = store.tensors()
        if len(buffers) != len(self.lent) or any(map(operator.is_not, buffers, self.lent)):
            self.lent = buffers
            for number, layer in enumerate(self.layers):
                layer.store = store.row(number)
        for layer in self.layers:
            layer.store.end = store.end
        if self.log.tensors() or self.layers[-1].log.tensors() or self.scratch is not None:
            for number, layer in enumerate(self.layers):
                own = slice(number, number + 1)
                layer.log = self.log.select_rows(own)
                layer.scratch = None if self.scratch is None else self.scratch[own]
        first = slice(0, 1)  # of the group that all layers have
        if group.source is not None and group.source_positions is not None:
            told.source, told.source_positions = group.source[first], group.source_positions[first]

    def part(self) -> None:
        """Separates the layers."""
        (group,) = self.groups
        for number, layer in enumerate(self.layers):
            own = slice(number, number + 1)
            alone = replace(self.told)
            if group.source is not None and group.source_positions is not None:
                alone.source, alone.source_positions = (
                    group.source[own],
                    group.source_positions[own],
                )
            layer.groups, layer.log, layer.scratch = [alone], self.log.select_rows(own), None

    def _score(
        self, scores: Tensor | None, start: int, group: Group, rows: slice | Tensor
    ) -> Tensor | None:
        found = self._of_layers(scores, start, group, rows)
        if found is None or self.layers[0].council is None:
            return found
        return found.flatten(0, 1)[None]  # all heads choose together

    def _of_layers(
        self, scores: Tensor | None, start: int, group: Group, rows: slice | Tensor
    ) -> Tensor | None:
        """float32 [layers, kv_heads, held]."""
        if not self.sees_layers:
            try:
                return self.policy.score(self._look(scores, start, group, rows, self.indices))
            except SeveralLayers:
                self.sees_layers = True
        found = []
        for row, layer in enumerate(self.layers):
            self.module = layer.module
            entries = self._look(scores, start, group, slice(row, row + 1), layer.index)
            found.append(self.policy.score(entries))
        ranked = [one for one in found if one is not None]
        return torch.cat(ranked) if ranked else None


class ForkedLayer(SelfAttending):
    """One layer of every fork.

    Args:
        forks: their caches.
        index: the layer's.
        rows: of a step; shared by all layers.
        seen: tokens so far, padding included.
    """

    def __init__(
        self, forks: Sequence[EvictionCache], index: int, rows: Rows, seen: int = 0
    ) -> None:
        super().__init__()
        self.forks = forks
        self.index = index
        evicting = forks[0].evicting
        self.is_first = forks[0].layers[index] is evicting[0]
        self.is_last = forks[0].layers[index] is evicting[-1]
        self.layers: list[Any] = [fork.layers[index] for fork in forks]
        self.rows = rows
        self.cumulative_length = seen

    def get_seq_length(self) -> int:
        return self.cumulative_length

    @property
    def batch_size(self) -> int:
        """Rows of the next step."""
        return len(self.rows.of_step())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, self.cumulative_length  # of a mask that is not read

    def attend(
        self,
        attention: Callable[..., tuple[Tensor, Any]],
        query: Tensor,
        *,
        backend: str = "",
        **kwargs: Any,
    ) -> Tensor:
        """Appends a step's entries, attends, and evicts, for every row.

        Args:
            attention: :func:`buzz.attention.attend` of this layer's module.
            query: [rows, heads, new, head_dim].
            backend: the model's.

        Returns:
            [rows, new, heads, head_dim].
        """
        key, value = self.taken()
        self.new = query.shape[2]
        self.cumulative_length += self.new
        if not self.rows.forked:
            return self._prompts(attention, query, key, value, **kwargs)
        if self.is_first:  # it decides for all layers, which evict together
            self.rows.in_one_call = self._in_one_call(query, backend, kwargs)
        if self.rows.in_one_call:
            scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
            return self._token(query, key, value, scale, sinks_of(kwargs))
        self.rows.part()
        outputs = []
        for row, (fork, layer) in enumerate(zip(self.forks, self.layers, strict=True)):
            own = slice(row, row + 1)
            entries = layer.update(key[own], value[own])
            outputs.append(
                attention(query[own], *entries, None, eviction_layers=fork.attended, **kwargs)[0]
            )
        return torch.cat(outputs)

    def _prompts(
        self,
        attention: Callable[..., tuple[Tensor, Any]],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        **kwargs: Any,
    ) -> Tensor:
        """Prompts, or their chunks up to `hold_until`: once for all forks, without padding."""
        batch, heads, new, _ = query.shape
        output = value.new_zeros(batch, new, heads, value.shape[-1])
        first = self.cumulative_length == new
        for prompt, padding in enumerate(self.rows.padding):
            rows = [row for row, own in enumerate(self.rows.prompts) if own == prompt]
            lead, *others = (self.layers[row] for row in rows)
            fresh = slice(padding if first else 0, None)
            own = slice(prompt, prompt + 1)
            entries = lead.update(key[own, :, fresh], value[own, :, fresh])
            for layer in others:
                layer.follow(lead)
            if lead.cumulative_length >= lead.hold_until:  # each evicts to buffers of its own
                lead.store.owned = False
            shared = Shared()
            for row in sorted(rows, key=lambda row: -self.layers[row].observed):
                if kernels.steps_rows(query):  # else nothing is stacked
                    self.rows.reserve(row, self.forks[row], self.layers[row])
                output[own, fresh] = attention(
                    query[own, :, fresh],
                    *entries,
                    None,
                    eviction_layers=self.forks[row].attended,
                    shared=shared,
                    **kwargs,
                )[0]
        return output

    def read(
        self, attention: Callable[..., tuple[Tensor, Any]], query: Tensor, **kwargs: Any
    ) -> Tensor:
        """Attention of a later layer to the entries of this one.

        Args:
            attention: of that layer's module.
            query: [rows, heads, new, head_dim]; of a prompt it may be the last tokens only.
        """
        outputs: list[Tensor] = []
        shared: Shared | None = None
        for row, (fork, layer) in enumerate(zip(self.forks, self.layers, strict=True)):
            prompt = self.rows.prompts[row]
            own = row if self.rows.forked else prompt
            cut = 0  # padding, of the first step
            if self.cumulative_length == self.new:
                cut = max(0, self.rows.padding[prompt] + query.shape[2] - self.new)
            if own == len(outputs):
                shared = None if self.rows.forked else Shared()
            output, _ = attention(
                query[own : own + 1, :, cut:],
                layer.view(layer.store.keys),
                layer.view(layer.store.values),
                None,
                eviction_layers=fork.attended,
                shared=shared,
                **kwargs,
            )
            if own == len(outputs):
                outputs.append(nn.functional.pad(output, (0, 0, 0, 0, cut, 0)))
        return torch.cat(outputs)

    def _in_one_call(self, query: Tensor, backend: str, kwargs: dict[str, Any]) -> bool:
        """Whether each layer can attend the tokens of all rows in one kernel call."""
        layers: list[Any] = [layer for fork in self.forks for layer in fork.evicting]
        return (
            query.shape[2] == 1
            and backend == ("sdpa" if sinks_of(kwargs) is None else "eager")
            and kernels.steps_rows(query)
            and not self.forks[0].shares_entries
            and not any(layer.holds_back for layer in layers)
            and all(layer.store.keys.dtype in (query.dtype, torch.int8) for layer in layers)
            and all(layer.rope.static and layer.logn_base is None for layer in layers)
            and all(
                fork.evicting[0].council is None or len(set(map(kind_of, fork.evicting))) == 1
                for fork in self.forks
            )
            and kwargs.get("softcap") is None
            and not kwargs.get("dropout")
        )

    def _token(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, sinks: Tensor | None
    ) -> Tensor:
        """One token of each row; the last layer evicts from all layers."""
        if self.is_first:
            self.rows.stack(self.forks)
            for stack in self.rows.stacks:
                stack.begin()
        seats = self.rows.seats[self.index]
        places = [stack.places[number] for stack, number in seats]
        output = kernels.step_rows(query, key, value, places, scale, sinks)
        for row in self.rows.listening:
            seats[row][0].hear(query[row : row + 1], scale)
        if self.is_last:
            moves: list[kernels.Move] = []
            for stack in self.rows.stacks:
                stack.end(moves)
            kernels.move_all(moves)
        for layer in self.layers:  # at the end, so that a step that an error ended is noticed
            layer.cumulative_length += 1
        return output.transpose(1, 2)


class ForkedReader(SelfAttending):
    """A layer of every fork that attends another layer's entries."""

    def __init__(self, source: ForkedLayer) -> None:
        super().__init__()
        self.source = source

    def attend(
        self, attention: Callable[..., Any], query: Tensor, *, backend: str = "", **kwargs: Any
    ) -> Tensor:
        return self.source.read(attention, query, **kwargs)


class ForkedCache(EvictionCache):
    """One cache for several methods, on one prompt or on several.

    First `model(prompts)` with a row for each prompt; then steps with a row for each method on each
    prompt: the methods of the first prompt, then those of the second (:attr:`prompts`). `forks[i]`
    is row i's cache, with its lengths, kept positions and bytes. A prompt may come in chunks: up to
    `hold_until` no method evicts, and steps have a row for each prompt. Later steps may be chunks,
    too. A row's output is that of its method alone on its prompt, without padding, up to the
    rounding of batched matrix products. One exception: RoPE frequencies that depend on the text's
    length are those of the whole batch.

    Args:
        model, options: as of :class:`buzz.EvictionCache`; `dtype` may be a list, one
            type for each of a prompt's methods.
        policies: the methods for one prompt, or a list of methods for each of several prompts; a
            method may occur more than once.

    Raises:
        ConfigError: no policy; `compiled`; attributes of one method asked of all (`lengths` is
            `forks[i].lengths`); reordering of rows; as EvictionCache.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policies: Sequence[Policy] | Sequence[Sequence[Policy]],
        **options: Any,
    ) -> None:
        several: Any = policies
        if policies and isinstance(policies[0], Policy):
            several = [policies]
        if not several or not all(several):
            raise ConfigError("policies", policies, "give at least one, for each prompt")
        if options.get("compiled"):
            raise ConfigError("compiled", True, "rows of different lengths are no graph; leave out")
        dtypes: Any = options.pop("dtype", None)
        if not isinstance(dtypes, list):
            dtypes = [dtypes] * max(map(len, several))
        if any(len(own) > len(dtypes) for own in several):
            raise ConfigError("cache.dtype", dtypes, "give one for each method")
        self.forks = [
            EvictionCache(model, policy, dtype=dtype, **options)
            for own in several
            for policy, dtype in zip(own, dtypes, strict=False)
        ]
        self._rows = Rows([i for i, own in enumerate(several) for _ in own], [0] * len(several))
        self._replay = None
        first = self.forks[0]
        self.plain, self._readers, self._restarting = first.plain, first._readers, first._restarting
        self._positions, self._hold_until = first.positions, first.hold_until
        Cache.__init__(self, layers=[])
        self._join()

    def _join(self, seen: int = 0) -> None:
        """Makes the layers of those of all forks, which have seen so many tokens."""
        first = self.forks[0]
        for fork in self.forks:
            fork._put(first.stock)
            fork.joined = self._rows
        self.stock, self._others = first.stock, first._others
        self.layers = [
            ForkedLayer(self.forks, index, self._rows, seen)
            if isinstance(layer, EvictionLayer)
            else layer
            for index, layer in enumerate(first.layers)
        ]
        evicting: list[Any] = [layer for layer in self.layers if isinstance(layer, ForkedLayer)]
        self.evicting = evicting

    @property
    def attended(self) -> list[Any]:
        layers: list[Any] = list(self.layers)
        for index, source in self._readers.items():
            layers[index] = ForkedReader(layers[source])
        return layers

    def __bool__(self) -> bool:
        return bool(self.forks[0])

    @property
    def prompts(self) -> list[int]:
        """The index of each row's prompt."""
        return list(self._rows.prompts)

    @property
    def hold_until(self) -> int:
        return self._hold_until

    @hold_until.setter
    def hold_until(self, tokens: int) -> None:
        read = self._prompts_done
        self.forks[0].hold_until = tokens  # raises
        if read:  # forks have different entries by now
            self._fork()
        self._rows.part()
        self._hold_until = tokens
        for fork, prompt in zip(self.forks, self._rows.prompts, strict=True):
            fork.hold_until = max(0, tokens - self._rows.padding[prompt])
            for layer in () if self._rows.forked else fork.evicting:
                if layer.store is not None:
                    layer.store.owned = False  # shared by forks that may evict now

    @property
    def logn_base(self) -> float | None:
        return self.forks[0].logn_base

    def begin_step(
        self,
        decoder: nn.Module,
        batch: int,
        new: int,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
    ) -> None:
        """Checks a step's inputs for every fork, without padding.

        Raises:
            ConfigError: a padded batch without a mask, in a model with layers that do not evict.
            RuntimeError: another number of rows than prompts, or than forks after the prompt.
        """
        rows, seen = self._rows, self.get_seq_length()
        if any(layer.cumulative_length != seen for layer in self.evicting):
            raise RuntimeError(BROKEN)
        if self._prompts_done:
            self._fork()
        if batch != len(rows.of_step()):
            raise RuntimeError(f"this step has {batch} rows and not {len(rows.of_step())}")
        if attention_mask is not None:
            check_mask(attention_mask, batch, seen + new)
        if not seen:
            rows.padding = [0] * batch if attention_mask is None else padding_of(attention_mask)
            self.hold_until = self.hold_until  # of each fork, without padding
        padding = [rows.padding[prompt] for prompt in rows.of_step()]
        if seen and attention_mask is not None:
            wrong = hides_more(attention_mask, padding)
            for fork in self.forks:
                fork._refuse("attention_mask", wrong, new)
        elif any(padding) and attention_mask is None and not self.plain:
            remedy = "give it with every step: layers that do not evict read it"
            raise ConfigError("attention_mask", None, remedy)
        if position_ids is None and any(padding):  # the model counts padding, too
            position_ids = torch.arange(seen, seen + new, device=self._device(decoder))[None]
        for row, fork in enumerate(self.forks):
            own = slice(self._cut(row, seen), None)
            positions = None if position_ids is None else self._of(row, position_ids)[:, own]
            fork.begin_step(decoder, 1, len(range(new)[own]), None, positions)

    @property
    def _prompts_done(self) -> bool:
        """Whether the prompts are complete, so that steps have a row for each fork."""
        seen = self.get_seq_length()
        return self._rows.forked or 0 < seen >= self.hold_until

    def _fork(self) -> None:
        """Makes steps have a row for each fork."""
        rows = self._rows
        if not rows.forked:
            rows.forked = True
            adapter.select_rows(self.stock, torch.tensor(rows.prompts))

    def end_step(
        self, decoder: nn.Module, tokens: Tensor, known: repetition.Known | None = None
    ) -> None:
        known = {} if known is None else known
        before = self.get_seq_length() - tokens.shape[1]
        for row, fork in enumerate(self.forks):
            fork.end_step(decoder, self._of(row, tokens)[:, self._cut(row, before) :], known)

    def _of(self, row: int, tensor: Tensor) -> Tensor:
        """A fork's row of a step's input [rows or 1, ...]."""
        index = row if self._rows.forked else self._rows.prompts[row]
        return tensor if tensor.shape[0] == 1 else tensor[index : index + 1]

    def _cut(self, row: int, before: int) -> int:
        """Padding tokens of a fork in a step; only the first one has any."""
        return 0 if before else self._rows.padding[self._rows.prompts[row]]

    @staticmethod
    def _device(decoder: nn.Module) -> torch.device:
        return next(decoder.parameters()).device

    def _raise_faults(self) -> None:
        for fork in self.forks:
            fork._raise_faults()

    def keep(self, rows: Sequence[int]) -> None:
        """Keeps these rows only, e.g. without those that have ended: row i is what `rows[i]` was.

        Raises:
            ConfigError: no row is named, or one of them twice.
            RuntimeError: the prompts are not complete.
        """
        if not rows or len(set(rows)) < len(rows):
            raise ConfigError("rows", list(rows), "name at least one, and each once")
        if not self._prompts_done:
            raise RuntimeError("rows can be dropped once their prompts have been read")
        self._fork()
        self._rows.part()
        self.forks = [self.forks[row] for row in rows]
        self._rows.prompts = [self._rows.prompts[row] for row in rows]
        adapter.select_rows(self.stock, torch.tensor(rows))
        self._join(self.get_seq_length())

    def copy(self) -> ForkedCache:
        self._rows.part()
        other = copy.copy(self)
        stock = adapter.copied(self.stock)
        other.forks = [fork._copy(stock) for fork in self.forks]
        other._rows = replace(self._rows, stacks=[], seats={}, reserved={})  # other lists stay
        other._join(self.get_seq_length())
        return other

    def reset(self) -> None:
        faults = []
        for fork in self.forks:
            try:
                fork.reset()
            except ConfigError as error:  # the other forks are reset, too
                faults.append(error)
        self._rows.forked, self._rows.reserved = False, {}
        self._join()
        if faults:
            raise faults[0]


def _refusal(name: str, remedy: str) -> property:
    def refuse(cache: ForkedCache) -> Any:
        raise ConfigError(name, "ForkedCache", remedy)

    return property(refuse)


for _name in (
    *("policy", "lengths", "distinct", "evictions", "entry_nbytes"),
    *("nbytes", "kept_positions", "trace", "take_buffers"),
):
    setattr(ForkedCache, _name, _refusal(_name, f"each method has its own: ask forks[i].{_name}"))
for _name in ("reorder_cache", "batch_select_indices", "batch_repeat_interleave", "crop"):
    setattr(ForkedCache, _name, _refusal(_name, "row i is forks[i]'s, and stays so; see keep"))
