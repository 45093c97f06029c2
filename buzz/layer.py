"""One layer of an evicting cache: takes a step's entries in, and thins them once attended."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from buzz import kernels
from buzz.entries import Entries, Rows
from buzz.eviction import Group, Lengths, evict, plan
from buzz.granularity import added
from buzz.inputs import on
from buzz.policy import Policy
from buzz.queries import BLOCK, QueryLog
from buzz.rope import Rope
from buzz.store import Store, writable


class EvictionLayer(CacheLayerMixin):
    """One layer's cache: appends a step's entries, and evicts once they have been attended.

    Args:
        policy: the eviction method.
        rope: how keys that move are rotated.
        index: the layer's, among those that evict.
        module: its attention module, for methods that read the output projection.
        rotation: how the model rotates the layer's queries, where keys do not move; else `rope`.

    Attributes:
        hold_until, logn_base, logn_clamp: as of the cache.
        int8: whether keys and values are held so once their prompt, as it came, was attended.
        least: entries that every buffer has room for, so that all prompts take the same ones.
        readers: how many layers of the model attend these entries, too. They do so after this one
            in each step, and only then entries leave, by what this layer's own attention gave them.
        faults: the cache's, in its last layer, whose output they spoil.
        council: of layers that choose together; None: this one chooses for itself.
    """

    is_sliding = False

    def __init__(
        self,
        policy: Policy,
        rope: Rope,
        index: int = 0,
        module: nn.Module | None = None,
        rotation: Rope | None = None,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.rope = rope
        self.rotation = rope if rotation is None else rotation
        self.index = index
        self.module = None if module is None else weakref.ref(module)
        self.hold_until = self.least = 0
        self.int8 = False
        self.logn_base: float | None = None
        self.logn_clamp = False
        self.faults: dict[str, Tensor] = {}  # by input, whether a step's was wrong: then NaN
        self.cumulative_length = 0  # tokens seen, padding included
        self.new = 0  # tokens of the current step
        self.cuts_gradient = False  # whether the current step's keys or values had one
        self.groups: list[Group] = []
        self.store: Store | None = None
        self.idle: Store | None = None  # buffers of an earlier prompt, to be used again
        self.log = QueryLog()
        self.scratch: Tensor | None = None  # what entries receive in one step, made by one call
        self.awaits_attention = False
        self.awaits_repetition = policy.needs_repetition
        self.readers = 0
        self.unread = 0  # of those, how many are still to attend in this step
        self.pending: Tensor | None = None  # what entries received in this step, until they have
        self.council: Council | None = None

    # --- what transformers asks ---------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def get_seq_length(self) -> int:
        """Tokens seen, padding included: what generate() numbers positions by."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # Where other layers need masks, one is made for this one too: never read, so a small one.
        return query_length, self.cumulative_length

    def get_max_length(self) -> int:
        return -1

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append a step's keys and values, each [batch, kv_heads, new, head_dim].

        Returns:
            Views of all entries, [batch, kv_heads, held + new, head_dim], the newest last. Rows
            that hold less than the longest begin with slots that are not theirs (:attr:`starts`).

        Raises:
            RuntimeError: the previous step's attention never reached this cache, or the batch
                is not the one that the cache holds.
        """
        if self.awaits_attention:
            raise RuntimeError(
                "keys were appended but attention did not run through the cache, so nothing was"
                " evicted: use the cache with the model that it was made for, pass past_key_values"
                " by keyword, and make a new EvictionCache after model.set_attn_implementation()"
            )
        differentiable = key_states.requires_grad or value_states.requires_grad
        self.cuts_gradient = torch.is_grad_enabled() and differentiable
        keys, values = key_states.detach(), value_states.detach()
        self.lazy_initialization(keys, values)
        batch, _, new, _ = keys.shape
        if not self.groups:
            self.groups = [Group(list(range(batch)))]
        self.check_batch(batch)
        self.rope.observe(self.cumulative_length, new)
        if self.store is None:  # a prompt is attended where it lies and thinned before it is kept
            positions = self._positions(new).expand(batch, keys.shape[1], new)
            self.store = Store(keys, values, positions, None, new, owned=False, least=self.least)
        elif new == 1:
            self._make_room(new)
            self.store.append_token(keys, values, self.cumulative_length, self._padding())
        else:
            self._make_room(new)
            positions = self._positions(new).expand(batch, keys.shape[1], new)
            self.store.append(keys, values, positions)
        self._count(new)
        self.awaits_attention = True
        return self.view(self.store.keys), self.view(self.store.values)

    def follow(self, lead: EvictionLayer) -> None:
        """Take a step's entries in where another layer has put them, which holds the same."""
        store, own = lead.store, self.store
        assert store is not None
        self.groups = self.groups or [Group([0])]
        self.lazy_initialization(store.keys, store.values)
        self.rope.observe(self.cumulative_length, lead.new)
        scores = None if own is None else own.scores
        if scores is not None and scores.shape != store.positions.shape:
            grown = torch.zeros(store.positions.shape, device=self.device)
            grown[:, :, : scores.shape[-1]] = scores
            scores = grown
        self.store = replace(store, scores=scores, owned=False)
        self._count(lead.new)
        self.awaits_attention = True

    def _make_room(self, new: int) -> None:
        assert self.store is not None
        # At once for all of a prompt that is held back.
        new = max(new, self.hold_until - self.cumulative_length)
        before, self.store = self.store, self.store.with_room(self.start, new, self.idle)
        if self.store is self.idle or (self.store is not before and not self.holds_back):
            self.idle = None  # taken, or of a size that this prompt has no use for

    def _count(self, new: int) -> None:
        """Count a step's tokens, which lie in the store."""
        for group in self.groups:
            fresh = new - group.padding if self.cumulative_length == 0 else new
            group.seen += fresh
            group.held += fresh
        self.cumulative_length += new
        self.new = new

    def reset(self) -> None:
        """Forget every entry. Buffers stay allocated, for the next prompt."""
        if self.store is not None and self.store.owned:
            self.idle = self.store
        self.store = None
        self.log = QueryLog()
        self.groups = []
        self.cumulative_length = 0
        self.awaits_attention, self.pending = False, None
        self.awaits_repetition = self.policy.needs_repetition
        self.rope.forget()

    def copy(self, ropes: dict[int, Any]) -> EvictionLayer:
        """A layer that goes on by itself. No entry is copied before either appends another.

        Args:
            ropes: copies that were made for earlier layers, by the id of what they are copies of.
        """
        other = copy.copy(self)
        other.store = None if self.store is None else self.store.shared()
        other.idle = None
        other.groups = [group.apart() for group in self.groups]
        other.faults = dict(self.faults)
        other.log = copy.copy(self.log)
        other.rope = copy.deepcopy(self.rope, ropes)
        other.rotation = copy.deepcopy(self.rotation, ropes)
        return other

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError(
            "an evicting cache cannot be cropped: what was evicted since cannot come back."
            " Assisted decoding and other rollbacks need a DynamicCache"
        )

    def offload(self) -> None:
        raise NotImplementedError("an evicting cache is not offloaded: what it holds is read anew")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Make row i what row `indices[i]` was."""
        if self.store is None:
            return
        self.store = self.store.select_rows(indices.to(self.device))
        self.log = self.log.select_rows(indices.to(self.device))
        origin = indices.tolist()
        self.groups = [group.apart() for group in self.groups]
        for group in self.groups:
            group.select_rows(origin, self.device)
        self.groups = [group for group in self.groups if group.rows]

    # --- lengths ------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        return sum(len(group.rows) for group in self.groups)

    def check_batch(self, rows: int) -> None:
        """Raises RuntimeError if a step has another number of rows than the cache."""
        if rows != self.batch_size:
            raise RuntimeError(
                f"the cache holds {self.batch_size} rows and got {rows}: call cache.reset() first"
            )

    @property
    def lengths(self) -> list[int]:
        """Entries held by each row of the batch."""
        return self.per_row("held")

    @property
    def evictions(self) -> list[int]:
        """Evictions so far of each row of the batch."""
        return self.per_row("evictions")

    def per_row(self, name: str) -> list[int]:
        """An attribute of its group, for each row of the batch."""
        by_row = {row: getattr(group, name) for group in self.groups for row in group.rows}
        return [by_row[row] for row in range(len(by_row))]

    @property
    def longest(self) -> int:
        """Entries that the longest row holds."""
        groups = self.groups
        if len(groups) == 1:
            return groups[0].held
        return max([group.held for group in groups], default=0)

    @property
    def start(self) -> int:
        """First slot of the longest row."""
        assert self.store is not None
        return self.store.end - self.longest

    @property
    def starts(self) -> Tensor | None:
        """First entry of each row in the views of :meth:`update`, int64 [batch]; None if all 0."""
        if len({group.held for group in self.groups}) == 1:
            return None
        return on(self.device, [self.longest - held for held in self.lengths])

    def view(self, tensor: Tensor) -> Tensor:
        """The slots in use of a buffer: [batch, kv_heads, held, ...]."""
        assert self.store is not None
        return tensor[:, :, self.start : self.store.end]

    def holds(self, keys: Tensor) -> bool:
        """Whether they are the keys [batch, kv_heads, held, head_dim] that :meth:`update` gave."""
        assert self.store is not None
        own = self.view(self.store.keys)
        same = torch.compiler.is_compiling() or own.data_ptr() == keys.data_ptr()
        return own.shape == keys.shape and same

    @property
    def entry_nbytes(self) -> int:
        """Bytes of one entry's key and value, over the KV heads."""
        store = self.store or self.idle
        if store is None:
            return 0
        pair = (store.keys[0, :, 0], store.values[0, :, 0])
        return sum(tensor.numel() * tensor.element_size() for tensor in pair)

    def nbytes(self, allocated: bool = False) -> int:
        """Bytes of the keys and values held, or of every buffer with its bookkeeping."""
        if not allocated:
            return self.entry_nbytes * sum(self.lengths)
        each = {id(one): one for group in self.groups for one in (group.joint or group,)}
        sources = [tensor for group in each.values() for tensor in group.tensors()]
        stores = [store for store in (self.store, self.idle) if store is not None]
        sources += [*self.log.tensors(), *([] if self.scratch is None else [self.scratch])]
        return sum(t.numel() * t.element_size() for t in sources) + sum(s.nbytes() for s in stores)

    # --- scores and eviction ------------------------------------------------------------------

    @property
    def holds_back(self) -> bool:
        """Whether the prompt goes on: all that comes before `hold_until` counts as one step.

        And whether it is still to be read a second time.
        """
        return self.awaits_repetition or self.cumulative_length < self.hold_until

    @property
    def observed(self) -> int:
        """How many of this step's last queries count in the scores; 0: nobody reads any."""
        policy = self.policy
        if not policy.needs_scores:
            return 0
        if policy.score_rule == "step" and not self.holds_back and self._plan() is None:
            return 0
        if policy.observe is None:
            return self.new
        to_come = max(0, self.hold_until - self.cumulative_length)
        return min(max(0, policy.observe - to_come), self.new)

    @property
    def wants_scores(self) -> bool:
        """Whether what this step's entries receive is ever read."""
        return self.observed > 0

    def keep_queries(self, query: Tensor, scale: float) -> None:
        """Note the step's queries [batch, heads, new, head_dim], times the logits' scale.

        Of those that the policy asks for; and none after the prompt, if it evicts then alone.
        """
        policy = self.policy
        if not policy.queries and policy.moments_from is None:
            return
        before = self.cumulative_length - self.new
        if policy.evicts == "prompt" and before > 0 and self.hold_until <= before:
            self.log = QueryLog()
            return
        if kept := policy.queries:
            self.log.keep_latest(query, scale, kept)
        if policy.moments_from is not None:
            for low in range(0, self.new, BLOCK):
                part = slice(low, min(low + BLOCK, self.new))
                slots = torch.arange(before, before + self.new, device=self.device)[part]
                padding, first = (
                    on(self.device, self.per_row(name))[:, None, None]
                    for name in ("padding", "first_position")
                )
                index = slots - padding  # of each token in its row: int64 [batch, 1, part]
                back = self.rotation.turn(torch.zeros_like(index), index + first, slots)
                turned = self.rotation.rotate(query[:, :, part].detach().float() * scale, back)
                self.log.keep_moments(turned, (index >= policy.moments_from)[..., None])

    def after_attention(self, received: Tensor | None) -> None:
        """Take in what each entry received, then evict what the policy gives up.

        Args:
            received: float32 [batch, kv_heads, held], the attention probability that each entry
                got in this step, summed over the :attr:`observed` queries and over the query heads
                of its group; None when no scores are wanted.
        """
        self.unread, self.pending = self.readers, received
        if not self.readers:
            self._settle()

    def was_read(self) -> None:
        """Count one of the :attr:`readers`, whose last ends the step."""
        self.unread -= 1
        if self.unread == 0:
            self._settle()

    def _settle(self) -> None:
        store, received = self.store, self.pending
        assert store is not None
        self.awaits_attention, self.pending = False, None
        scores = received
        lasting = self.policy.score_rule != "step" or self.holds_back
        if received is not None and (lasting or store.scores is not None):
            if store.scores is None:
                with writable():
                    store.scores = torch.zeros(store.positions.shape, device=self.device)
            elif self.policy.decay != 1:
                self.view(store.scores).mul_(self.policy.decay**self.new)
            scores = self.view(store.scores).add_(received)
        if not lasting:
            store.scores = None  # of a prompt that was held back, and is judged now
        self._evict(scores)

    def judge(self, scores: Tensor) -> None:
        """Thin a prompt that was read a second time.

        Args:
            scores: float32 [batch, kv_heads, longest row], the highest attention in that.
        """
        self.awaits_repetition = False
        self._evict(scores)

    def _evict(self, scores: Tensor | None, later: list[kernels.Move] | None = None) -> None:
        """Thin what is held, if it is time to.

        Args:
            scores: float32 [batch, kv_heads, held].
            later: see :func:`buzz.eviction.evict`.
        """
        store = self.store
        assert store is not None
        if self.int8 and store.keys.dtype != torch.int8 and not self.holds_back:
            self.store = store.quantized(self.start)
        after = self._plan()
        if after is None:
            return
        if self.council is None:
            self.thin(after, partial(self._score, scores, self.start), later)
        else:
            self.council.hear(self, after, scores)

    def thin(
        self,
        after: Sequence[Lengths],
        score: Callable[[Group, Rows], Tensor | None],
        later: list[kernels.Move] | None = None,
    ) -> None:
        """Thin every group to what `after` says, see :func:`buzz.eviction.evict`."""
        assert self.store is not None
        self.store, self.idle = evict(
            self.store, self.idle, self.groups, after, self.policy, self.rope, score, later
        )

    def scores_of(self, scores: Tensor | None, group: Group) -> Tensor | None:
        """What the policy ranks the entries of a group by: float32 [rows, kv_heads, held].

        Args:
            scores: float32 [batch, kv_heads, longest row], what entries received.
        """
        every = group.rows == list(range(self.batch_size))
        rows: Rows = slice(None) if every else on(self.device, group.rows)
        return self._score(scores, self.start, group, rows)

    # --- a step of one call, see buzz.compiled and buzz.forked --------------------------------

    def make_room(self) -> None:
        """Have buffers that can take a token: the layer's own, and one for scores of one step."""
        self._make_room(1)
        policy, store = self.policy, self.store
        assert store is not None
        shape = store.positions.shape
        alone = policy.needs_scores and policy.score_rule == "step"
        if alone and (self.scratch is None or self.scratch.shape != shape):
            with writable():
                self.scratch = torch.zeros(shape, device=self.device)

    def scores_of_step(self) -> Tensor | None:
        """Where to put what entries receive from the next token; None if nobody reads it.

        float32 [batch, kv_heads, capacity]: sums, which grow, or the layer's `scratch`.
        """
        policy, store = self.policy, self.store
        assert store is not None
        if not policy.needs_scores:
            return None
        if policy.score_rule == "step":
            after = [policy.next_length(group.held + 1, group.state)[0] for group in self.groups]
            return self.scratch if after != [group.held + 1 for group in self.groups] else None
        if store.scores is None:
            store.scores = torch.zeros(store.positions.shape, device=self.device)
        elif policy.decay != 1:
            self.view(store.scores).mul_(policy.decay)
        return store.scores

    def take_in(
        self,
        scores: Tensor | None,
        query: Tensor | None = None,
        scale: float = 1.0,
        later: list[kernels.Move] | None = None,
    ) -> None:
        """Count the token that a step of one call has put in the store, and evict.

        Args:
            scores: float32 [batch, kv_heads, capacity], or None.
            query, scale: as of :meth:`keep_queries`; None: the policy asks for none.
            later: see :func:`buzz.eviction.evict`.
        """
        assert self.store is not None
        self.store.end += 1
        self._count(1)
        if query is not None:
            self.keep_queries(query, scale)
        self._evict(None if scores is None else self.view(scores), later)

    def _plan(self) -> list[Lengths] | None:
        return None if self.holds_back else plan(self.policy, self.groups)

    def _score(self, scores: Tensor | None, start: int, group: Group, rows: Rows) -> Tensor | None:
        """What the policy ranks the entries of a group by: float32 [rows, kv_heads, held].

        Args:
            scores: float32 [batch, kv_heads, longest row], from slot `start` on.
        """
        return self.policy.score(self._look(scores, start, group, rows, self.index))

    def _look(
        self,
        scores: Tensor | None,
        start: int,
        group: Group,
        rows: Rows,
        layer: Any,
    ) -> Entries:
        """What the policy may look at of a group.

        Args:
            scores, start: as of :meth:`_score`.
            layer: index of the rows' layer; int64 [rows, 1, 1] where they are of several.
        """
        store = self.store
        seen: int | Tensor = group.seen
        moved = group.seen - group.held  # by so many positions the first entry, at cache positions
        assert store is not None
        if group.paddings is not None:
            seen = seen - on(self.device, group.paddings)[:, None, None]
        if scores is not None:
            first = store.end - group.held
            scores = scores[rows, :, first - start :]
            if self.policy.score_rule == "mean":
                could_see = seen - store.positions[rows, :, first : store.end]
                scores = scores / could_see
        return Entries(
            store,
            rows,
            group.held,
            seen,
            received=scores,
            log=self.log,
            uncut=group.seen - group.cut,
            rotation=self.rotation if self.policy.needs_rotation else None,
            position=group.first_position + group.seen,
            origin=group.first_position + (moved if self.rope is self.rotation else 0),
            layer=layer,
            module=None if self.module is None else self.module(),
        )

    def _positions(self, new: int) -> Tensor:
        """Token indices of the next slots, int32 [batch or 1, 1, new]; negative in padding."""
        slots = torch.arange(
            self.cumulative_length,
            self.cumulative_length + new,
            dtype=torch.int32,
            device=self.device,
        ).view(1, 1, new)
        padding = self._padding()
        return slots if padding is None else slots - padding.to(torch.int32)[:, None, None]

    def _padding(self) -> Tensor | None:
        """Padding of each row, int64 [batch]; None if there is none."""
        if len(self.groups) == 1 and not self.groups[0].padding:
            return None
        return on(self.device, self.per_row("padding"))


class Council:
    """Layers that choose together: in each step entries leave once the last one has its scores.

    Args:
        layers: how many.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.waiting: list[tuple[EvictionLayer, Sequence[Lengths], Tensor | None]] = []

    def hear(self, layer: EvictionLayer, after: Sequence[Lengths], scores: Tensor | None) -> None:
        """Take a layer's scores, and thin all layers if it is the last.

        Args:
            after: what it is to hold, as all others.
            scores: float32 [batch, kv_heads, held], what its entries received.
        """
        self.waiting.append((layer, after, scores))
        if len(self.waiting) < self.layers:
            return
        found: dict[int, Tensor] = {}  # by row
        for group, (kept, _) in zip(layer.groups, after, strict=True):
            if kept < group.held and (scored := self._scores(group)) is not None:
                found |= dict(zip(group.rows, scored, strict=True))

        def score(group: Group, rows: Rows) -> Tensor | None:
            return torch.stack([found[row] for row in group.rows]) if found else None

        for one, lengths, _ in self.waiting:
            one.thin(lengths, score)
        self.waiting = []

    def _scores(self, group: Group) -> Tensor | None:
        """What the entries of a group are worth to all layers: [rows, 1, held]."""
        found = [layer.scores_of(scores, group) for layer, _, scores in self.waiting]
        ranked = [one for one in found if one is not None]
        return added(torch.cat(ranked, dim=1), 1)[:, None] if ranked else None


class Reader(NamedTuple):
    """What a layer attends that has no entries of its own.

    Attributes:
        source: the layer that holds them.
    """

    source: EvictionLayer
