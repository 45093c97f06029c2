"""What a method reads to score entries: lazy views of one layer's cache."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, max_pool1d, normalize, pad

from buzz import adapter, kernels
from buzz.errors import ConfigError
from buzz.inputs import on
from buzz.queries import Moments, QueryLog
from buzz.rope import Rope
from buzz.store import Store

Rows = slice | Tensor  # an index into the batch


class SeveralLayers(Exception):
    """The method asks for the layer, and the rows are of several: score each layer by itself."""


class Entries:
    """The entries of one layer, for rows of equal cache length, just before an eviction.

    Nothing is computed before it is read. Properties that cost memory or time must be declared by
    the policy; reading one that is not declared raises a ConfigError.

    Attributes:
        cache_length: entries of a row.
        seen: tokens of a row so far; int64 [rows, 1, 1] where rows differ.
    """

    def __init__(
        self,
        store: Store,
        rows: Rows,
        cache_length: int,
        seen: Any,
        *,
        received: Tensor | None = None,
        log: QueryLog | None = None,
        uncut: int = 0,
        rotation: Rope | None = None,
        position: int = 0,
        origin: int = 0,
        layer: Any = 0,
        module: nn.Module | None = None,
    ) -> None:
        """
        Args:
            store: the layer's.
            rows: which of the batch.
            received: attention sums.
            log: the layer's queries.
            uncut: tokens since the last eviction.
            rotation: the model's RoPE; None if the policy does not declare that it reads it.
            position: of the next token.
            origin: position of the first entry at cache positions, else of the row's first token.
            layer: its index; int64 [rows, 1, 1] if the rows are of several layers.
            module: its attention module; None if the rows are of several layers.
        """
        self._received = received
        self.cache_length = cache_length
        self.seen = seen
        self._layer = layer
        self._store = store
        self._rows = rows
        self._log = log
        self._uncut = uncut
        self._rotation = rotation
        self._position = position
        self._origin = origin
        self._module = module

    @property
    def layer(self) -> int:
        """Index of the layer among those that evict."""
        if not isinstance(self._layer, int):
            raise SeveralLayers
        return self._layer

    @property
    def layers(self) -> Any:
        """The index of each row's layer: an int, or int64 [rows, 1, 1] for rows of several layers.

        A method that computes with it scores several layers in one call, unlike with :attr:`layer`.
        """
        return self._layer

    @property
    def attention_sums(self) -> Tensor:
        """Attention that each entry has received, summed by the policy's `score_rule`.

        float32 [rows, kv_heads, cache_length]; to be declared by `needs_scores`.
        """
        if self._received is None:
            raise _undeclared("attention_sums", "needs_scores = True")
        return self._received

    # Names of version 0.2.
    received = attention_sums
    held = property(attrgetter("cache_length"))

    @cached_property
    def keys(self) -> Tensor:
        """[rows, kv_heads, cache_length, head_dim], rotated as the step's queries attended them.

        Those of int8 widened to float32, as :attr:`values`.
        """
        return kernels.widened(self._view(self._store.keys))

    @cached_property
    def values(self) -> Tensor:
        """[rows, kv_heads, cache_length, head_dim]."""
        return kernels.widened(self._view(self._store.values))

    @property
    def positions(self) -> Tensor:
        """True token indices in their own row, int32 [rows, kv_heads, cache_length]."""
        return self._view(self._store.positions)

    @property
    def queries(self) -> Tensor:
        """The last queries, times the scale of the logits: logits are `queries @ keys.mT`.

        float32 [rows, heads, w, head_dim]. w is the policy's `queries`, or the number of tokens
        since the last eviction if that is smaller: eviction moves the keys of earlier queries.
        """
        if self._log is None or self._log.latest is None:
            raise _undeclared("queries", "a property `queries` of how many to keep")
        latest = self._log.latest[self._rows]
        return latest[:, :, max(0, latest.shape[2] - self._uncut) :].float() * self._log.scale

    @property
    def moments(self) -> Moments:
        """Mean and covariance of the queries from the policy's `moments_from` on.

        Of queries before RoPE, times the scale of the logits: see :meth:`ahead`.
        """
        if self._log is None or self._log.moments is None:
            raise _undeclared("moments", "a property `moments_from` of the first that counts")
        return self._log.moments.select_rows(self._rows)

    def ahead(self, vectors: Tensor, steps: Sequence[int]) -> Tensor:
        """Mean of vectors [..., head_dim] after RoPE at future positions; step 0 is the next token.

        RoPE is linear, so it is the mean rotation that is applied.
        """
        rotation = self._declared_rotation
        to = on(vectors.device, steps) + self._position
        turn = rotation.turn(to, torch.zeros_like(to), torch.full_like(to, self.seen - 1))
        mean = None if turn is None else (turn[0].mean(0), turn[1].mean(0))
        return rotation.rotate(vectors, mean)

    @property
    def keys_from_zero(self) -> Tensor:
        """:attr:`keys` in float32, rotated together so that the first position is 0.

        That is the first entry's position at cache positions, and else the text's beginning. For
        methods whose scores depend on absolute positions.
        """
        keys, rotation = self.keys.float(), self._declared_rotation
        if not self._origin:
            return keys
        by = torch.full((1,), -self._origin, device=keys.device)
        now = torch.full_like(by, self._position - 1)
        return rotation.rotate(keys, rotation.turn(by, torch.zeros_like(by), now))

    @property
    def unrotated(self) -> Tensor:
        """:attr:`keys` in float32, before RoPE; valid at the first eviction only."""
        keys, rotation = self.keys.float(), self._declared_rotation
        index = torch.arange(self.cache_length, device=keys.device)
        at = index + self._origin
        return rotation.rotate(keys, rotation.turn(torch.zeros_like(at), at, index))

    def sizes(self, vectors: Tensor) -> Tensor:
        """L2 norm of each pair of dimensions that RoPE rotates together: [..., R / 2]."""
        return self._declared_rotation.sizes(vectors)

    @property
    def _declared_rotation(self) -> Rope:
        if self._rotation is None:
            raise _undeclared("rotation", "a property `needs_rotation` that is True")
        return self._rotation

    @property
    def output_projection(self) -> Tensor:
        """The layer's output projection W_o, by query head: [heads, head_dim, hidden]."""
        if not isinstance(self._layer, int):
            raise SeveralLayers
        weight = adapter.output_projection(self._module)
        return weight.mT.unflatten(0, (-1, self.values.shape[-1]))

    def _view(self, tensor: Tensor) -> Tensor:
        end = self._store.end
        return tensor[self._rows, :, end - self.cache_length : end]


def _undeclared(name: str, declaration: str) -> ConfigError:
    remedy = f"the method reads it and does not declare it; give its class {declaration}"
    return ConfigError(f"entries.{name}", None, remedy)


def projected_norms(entries: Entries) -> Tensor:
    """L1 norm of each value after W_o, averaged over the query heads of its group.

    Formula: CriticalKV, arXiv 2502.03805. One query head at a time: the largest intermediate is
    [rows, cache_length, hidden].

    Returns:
        float32 [rows, kv_heads, cache_length].
    """
    projection, values = entries.output_projection.float(), entries.values.float()
    group = projection.shape[0] // values.shape[1]
    norms = torch.zeros(values.shape[:3], device=values.device)
    for head, weight in enumerate(projection):
        norms[:, head // group] += (values[:, head // group] @ weight).abs().sum(-1)
    return norms / group


def observed_attention(entries: Entries, window: int, kernel: int) -> Tensor:
    """Attention of the last `window` queries to all older entries, max-pooled over neighbours.

    SnapKV's observation window in the form of R-KV's authors (`rkv/compression/snapkv.py`): the
    logits of a group are the maximum over its query heads, and the softmax leaves out the window's
    own entries.

    Returns:
        float32 [rows, kv_heads, cache_length]; infinite for the last `window` entries.
    """
    keys = entries.keys[:, :, :-window].float()
    grouped = entries.queries.unflatten(1, (keys.shape[1], -1))
    attention = (grouped @ keys[:, :, None].mT).amax(2).softmax(-1).mean(2)
    pooled = max_pool1d(attention, kernel, 1, kernel // 2)[..., : keys.shape[2]]
    return pad(pooled, (0, window), value=torch.inf)


def key_difference(entries: Entries) -> Tensor:
    """Minus the cosine of each key to the mean of all normalised keys (KeyDiff, arXiv 2504.15364).

    Returns:
        float32 [rows, kv_heads, cache_length].
    """
    keys = entries.keys.float()
    return -cosine_similarity(keys, normalize(keys, dim=-1).mean(2, keepdim=True), dim=-1)
