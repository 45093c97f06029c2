"""What a method may look at when it judges: lazy views of what one layer holds."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from buzz import adapter
from buzz.store import Store

Rows = slice | Tensor  # an index into the batch


class Entries:
    """The entries of rows of equal length in one layer, just before an eviction.

    Nothing is gathered or computed before it is asked for.

    Attributes:
        received: float32 [rows, kv_heads, held], attention received by the policy's `score_rule`;
            None unless it `needs_scores`.
        held: entries of a row.
        seen: tokens of a row so far.
        layer: index of the layer among those that evict.
    """

    def __init__(
        self,
        store: Store,
        rows: Rows,
        held: int,
        seen: int,
        *,
        received: Tensor | None = None,
        queries: Tensor | None = None,
        uncut: int = 0,
        layer: int = 0,
        module: nn.Module | None = None,
    ) -> None:
        """Of `rows` of the layer's `store`; `uncut` tokens came since their last eviction."""
        self.received = received
        self.held = held
        self.seen = seen
        self.layer = layer
        self._store = store
        self._rows = rows
        self._queries = queries
        self._uncut = uncut
        self._module = module

    @property
    def keys(self) -> Tensor:
        """[rows, kv_heads, held, head_dim], rotated as the step's queries attended them."""
        return self._view(self._store.keys)

    @property
    def values(self) -> Tensor:
        """[rows, kv_heads, held, head_dim]."""
        return self._view(self._store.values)

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
        assert self._queries is not None
        latest = self._queries[self._rows]
        return latest[:, :, max(0, latest.shape[2] - self._uncut) :]

    @property
    def output_projection(self) -> Tensor:
        """What the layer's W_o does to each head's output: [heads, head_dim, hidden]."""
        weight = adapter.output_projection(self._module)
        return weight.mT.unflatten(0, (-1, self.values.shape[-1]))

    def _view(self, tensor: Tensor) -> Tensor:
        end = self._store.end
        return tensor[self._rows, :, end - self.held : end]


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
