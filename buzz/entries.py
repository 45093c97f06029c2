"""What a method may look at when it judges: lazy views of what one layer holds."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
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
    """A method asks which layer this is, and it is several: it must look at each by itself."""


class Entries:
    """The entries of rows that hold equally many in one layer, just before an eviction.

    Nothing is gathered or computed before it is asked for. What a policy has to declare, because it
    costs something, raises a ConfigError if it did not.

    Attributes:
        held: entries of a row.
        seen: tokens of a row so far; int64 [rows, 1, 1] where rows differ in it.
    """

    def __init__(
        self,
        store: Store,
        rows: Rows,
        held: int,
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
        """Of `rows` of the layer's `store`.

        Args:
            log: the layer's queries.
            uncut: tokens that came since the last eviction.
            rotation: what the model rotates queries by; None: the policy does not ask.
            position: of the next token.
            origin: of the first entry at cache positions, else of the row's first token.
            layer: its index; int64 [rows, 1, 1] if the rows are of several.
            module: the layer's; None if they are of several.
        """
        self._received = received
        self.held = held
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
        """The index of each row's layer: an int, or int64 [rows, 1, 1] of rows of several layers.

        Where it is numbers to compute with, this spares a look at each layer by itself.
        """
        return self._layer

    @property
    def received(self) -> Tensor:
        """Attention received, by the policy's `score_rule`; of those that declare `needs_scores`.

        float32 [rows, kv_heads, held].
        """
        if self._received is None:
            raise _undeclared("received", "needs_scores = True")
        return self._received

    @cached_property
    def keys(self) -> Tensor:
        """[rows, kv_heads, held, head_dim], rotated as the step's queries attended them.

        Those of int8 widened to float32, as :attr:`values`.
        """
        return kernels.widened(self._view(self._store.keys))

    @cached_property
    def values(self) -> Tensor:
        """[rows, kv_heads, held, head_dim]."""
        return kernels.widened(self._view(self._store.values))

    @property
    def positions(self) -> Tensor:
        """True token indices in their own row, int32 [rows, kv_heads, held]."""
        return self._view(self._store.positions)

    @property
    def queries(self) -> Tensor:
        """The last queries, times the scale of the logits: logits are `queries @ keys.mT`.

        float32 [rows, heads, w, head_dim], w up to the policy's `queries`; fewer where an earlier
        eviction has moved the entries that the older ones attended.
        """
        if self._log is None or self._log.latest is None:
            raise _undeclared("queries", "a property `queries` of how many to keep")
        latest = self._log.latest[self._rows]
        return latest[:, :, max(0, latest.shape[2] - self._uncut) :]

    @property
    def moments(self) -> Moments:
        """Mean and covariance of the queries from the policy's `moments_from` on.

        Times the scale of the logits, and before any rotation: see :meth:`ahead`.
        """
        if self._log is None or self._log.moments is None:
            raise _undeclared("moments", "a property `moments_from` of the first that counts")
        return self._log.moments.select_rows(self._rows)

    def ahead(self, vectors: Tensor, steps: Sequence[int]) -> Tensor:
        """Vectors [..., head_dim] on average over the positions of tokens to come; 0: the next one.

        The rotation is linear, so its mean over positions is one too.
        """
        rotation = self._declared_rotation
        to = on(vectors.device, steps) + self._position
        turn = rotation.turn(to, torch.zeros_like(to), torch.full_like(to, self.seen - 1))
        mean = None if turn is None else (turn[0].mean(0), turn[1].mean(0))
        return rotation.rotate(vectors, mean)

    @property
    def keys_from_zero(self) -> Tensor:
        """As :attr:`keys`, but float32, and turned back together by the first one's position.

        At cache positions that is the thinned cache's beginning, else the text's: for methods that
        look at more of keys than how they lie to each other.
        """
        keys, rotation = self.keys.float(), self._declared_rotation
        if not self._origin:
            return keys
        by = torch.full((1,), -self._origin, device=keys.device)
        now = torch.full_like(by, self._position - 1)
        return rotation.rotate(keys, rotation.turn(by, torch.zeros_like(by), now))

    @property
    def unrotated(self) -> Tensor:
        """As :attr:`keys`, but float32 and before any rotation; only while nothing has left yet."""
        keys, rotation = self.keys.float(), self._declared_rotation
        index = torch.arange(self.held, device=keys.device)
        at = index + self._origin
        return rotation.rotate(keys, rotation.turn(torch.zeros_like(at), at, index))

    def sizes(self, vectors: Tensor) -> Tensor:
        """L2 norm of each pair of numbers that the model rotates together: [..., R / 2]."""
        return self._declared_rotation.sizes(vectors)

    @property
    def _declared_rotation(self) -> Rope:
        if self._rotation is None:
            raise _undeclared("rotation", "a property `needs_rotation` that is True")
        return self._rotation

    @property
    def output_projection(self) -> Tensor:
        """What the layer's W_o does to each head's output: [heads, head_dim, hidden]."""
        if not isinstance(self._layer, int):
            raise SeveralLayers
        weight = adapter.output_projection(self._module)
        return weight.mT.unflatten(0, (-1, self.values.shape[-1]))

    def _view(self, tensor: Tensor) -> Tensor:
        end = self._store.end
        return tensor[self._rows, :, end - self.held : end]


def _undeclared(name: str, declaration: str) -> ConfigError:
    remedy = f"the method reads it and does not declare it; give its class {declaration}"
    return ConfigError(f"entries.{name}", None, remedy)


def projected_norms(entries: Entries) -> Tensor:
    """L1 norm of each value behind its query heads' part of W_o, the mean of the group.

    Formula: CriticalKV, arXiv 2502.03805. One query head at a time: the largest intermediate is
    [rows, held, hidden].

    Returns:
        float32 [rows, kv_heads, held].
    """
    projection, values = entries.output_projection.float(), entries.values.float()
    group = projection.shape[0] // values.shape[1]
    norms = torch.zeros(values.shape[:3], device=values.device)
    for head, weight in enumerate(projection):
        norms[:, head // group] += (values[:, head // group] @ weight).abs().sum(-1)
    return norms / group


def observed_attention(entries: Entries, window: int, kernel: int) -> Tensor:
    """Attention that the last `window` queries give to all older entries, pooled over neighbours.

    As SnapKV observes, in the form of R-KV's authors (`rkv/compression/snapkv.py`): the query heads
    of a group judge by the highest of their logits, and the window's entries take no share.

    Returns:
        float32 [rows, kv_heads, held]; infinite for the last `window` entries.
    """
    keys = entries.keys[:, :, :-window].float()
    grouped = entries.queries.unflatten(1, (keys.shape[1], -1))
    attention = (grouped @ keys[:, :, None].mT).amax(2).softmax(-1).mean(2)
    pooled = max_pool1d(attention, kernel, 1, kernel // 2)[..., : keys.shape[2]]
    return pad(pooled, (0, window), value=torch.inf)


def key_difference(entries: Entries) -> Tensor:
    """Minus the cosine of each key to the mean direction of all. Formula: KeyDiff, 2504.15364.

    Returns:
        float32 [rows, kv_heads, held].
    """
    keys = entries.keys.float()
    return -cosine_similarity(keys, normalize(keys, dim=-1).mean(2, keepdim=True), dim=-1)
