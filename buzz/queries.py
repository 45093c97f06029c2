"""The queries that a layer keeps for methods that declare it: the last ones, and moments of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 2048  # queries that are rotated back and multiplied at a time


@dataclass
class Moments:
    """Mean and covariance of queries so far, by row and head.

    Attributes:
        count: float32 [batch, 1, 1].
        mean: float32 [batch, heads, head_dim].
        spread: float32 [batch, heads, head_dim, head_dim], sum of outer products of deviations.
    """

    count: Tensor
    mean: Tensor
    spread: Tensor

    @classmethod
    def of(cls, queries: Tensor, counted: Tensor) -> Moments:
        """Of queries [batch, heads, n, head_dim] where `counted` [batch or 1, 1, n, 1] is True."""
        count = counted.sum(2).float().expand(queries.shape[0], 1, 1)
        mean = queries.masked_fill(~counted, 0).sum(2) / count.clamp(min=1)
        centred = (queries - mean[:, :, None]).masked_fill(~counted, 0)
        return cls(count, mean, centred.mT @ centred)

    def plus(self, later: Moments) -> Moments:
        """Moments of both sets of queries together (Chan, Golub and LeVeque, 1979)."""
        count = self.count + later.count
        share = later.count / count.clamp(min=1)
        step = later.mean - self.mean
        between = step[..., None] * step[..., None, :] * (self.count * share)[..., None]
        return Moments(count, self.mean + step * share, self.spread + later.spread + between)

    @property
    def covariance(self) -> Tensor:
        return self.spread / self.count.clamp(min=1)[..., None]

    def tensors(self) -> list[Tensor]:
        return [self.count, self.mean, self.spread]

    def select_rows(self, rows: Tensor | slice) -> Moments:
        return Moments(*(tensor[rows] for tensor in self.tensors()))


@dataclass
class QueryLog:
    """The queries of one layer.

    Attributes:
        latest: the last ones, after RoPE: [batch, heads, w, head_dim], in the model's dtype; None
            if not read.
        scale: of the layer's logits.
        moments: of the queries before RoPE, times the scale; None if not read.
    """

    latest: Tensor | None = None
    scale: float = 1.0
    moments: Moments | None = None

    @classmethod
    def stacked(cls, logs: Sequence[QueryLog]) -> QueryLog:
        """One log with the rows of all."""
        latest = [log.latest for log in logs if log.latest is not None]
        moments = [log.moments.tensors() for log in logs if log.moments is not None]
        return cls(
            torch.cat(latest) if latest else None,
            logs[0].scale,
            Moments(*map(torch.cat, zip(*moments, strict=True))) if moments else None,
        )

    def keep_latest(self, queries: Tensor, scale: float, kept: int) -> None:
        """Appends a step's queries [batch, heads, new, head_dim], and keeps the last `kept`."""
        latest = queries[:, :, -kept:].detach().clone()  # not a view of a whole prompt's
        if self.latest is not None and latest.shape[2] < kept:
            latest = torch.cat([self.latest, latest], dim=2)[:, :, -kept:]
        self.latest, self.scale = latest, scale

    def keep_moments(self, queries: Tensor, counted: Tensor) -> None:
        """Adds a step's queries, before RoPE, to the moments: see :meth:`Moments.of`."""
        own = Moments.of(queries, counted)
        self.moments = own if self.moments is None else self.moments.plus(own)

    def tensors(self) -> list[Tensor]:
        latest = [] if self.latest is None else [self.latest]
        return latest + ([] if self.moments is None else self.moments.tensors())

    def select_rows(self, rows: Tensor | slice) -> QueryLog:
        return QueryLog(
            None if self.latest is None else self.latest[rows],
            self.scale,
            None if self.moments is None else self.moments.select_rows(rows),
        )
