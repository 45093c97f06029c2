"""What a method may look at when it judges: lazy views of what one layer holds."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from buzz.errors import ConfigError

if TYPE_CHECKING:
    from buzz.layer import EvictionLayer, Group

PROJECTIONS = ("o_proj", "out_proj", "dense")  # names of W_o in attention modules


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
        self, layer: EvictionLayer, group: Group, rows: slice | Tensor, received: Tensor | None
    ) -> None:
        self.received = received
        self.held = group.held
        self.seen = group.seen
        self.layer = layer.index
        self._of = layer
        self._rows = rows
        self._uncut = group.seen - group.cut

    @property
    def keys(self) -> Tensor:
        """[rows, kv_heads, held, head_dim], rotated as the step's queries attended them."""
        assert self._of.store is not None
        return self._view(self._of.store.keys)

    @property
    def values(self) -> Tensor:
        """[rows, kv_heads, held, head_dim]."""
        assert self._of.store is not None
        return self._view(self._of.store.values)

    @property
    def positions(self) -> Tensor:
        """True token indices in their own row, int32 [rows, kv_heads, held]."""
        assert self._of.store is not None
        return self._view(self._of.store.positions)

    @property
    def queries(self) -> Tensor:
        """The last queries, times the scale of the logits: logits are `queries @ keys.mT`.

        float32 [rows, heads, w, head_dim], w up to the policy's `queries`; fewer where an earlier
        eviction has moved the entries that the older ones attended.
        """
        assert self._of.queries is not None
        latest = self._of.queries[self._rows]
        return latest[:, :, max(0, latest.shape[2] - self._uncut) :]

    @property
    def output_projection(self) -> Tensor:
        """What the layer's W_o does to each head's output: [heads, head_dim, hidden]."""
        weight = _projection(self._of.module)
        return weight.mT.unflatten(0, (-1, self.values.shape[-1]))

    def _view(self, tensor: Tensor) -> Tensor:
        assert self._of.store is not None
        end = self._of.store.end
        return tensor[self._rows, :, end - self.held : end]


def _projection(module: weakref.ref[nn.Module] | None) -> Tensor:
    """The weight [hidden, heads * head_dim] of an attention module's output projection.

    Raises:
        ConfigError: there is none under a known name, or it is quantised.
    """
    attention = None if module is None else module()
    for name in PROJECTIONS:
        weight = getattr(getattr(attention, name, None), "weight", None)
        if isinstance(weight, Tensor) and weight.is_floating_point() and weight.dim() == 2:
            return weight.detach()
    raise ConfigError(
        "model",
        type(attention).__name__,
        f"has no output projection that can be read (one of {', '.join(PROJECTIONS)}, not"
        " quantised), which this method needs",
    )


def check_projection(module: nn.Module) -> None:
    """Raises ConfigError unless the output projection of an attention module can be read."""
    _projection(weakref.ref(module))


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
