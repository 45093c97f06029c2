"""TriAttention (arXiv 2604.04921): keeps what the model's average queries would attend."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from baselines.calibration import TEXT, stored
from baselines.full import FullPolicy
from baselines.ranking import RankingPolicy
from buzz import CACHE_ARGUMENT, EvictionCache
from buzz.entries import Entries
from buzz.policy import FOREVER, register
from buzz.store import writable

MOST = 1024  # tokens of a text that queries are measured on
UNTOLD = 256  # random tokens that stand for the text, without a tokenizer


@register()
@dataclass(frozen=True, kw_only=True)
class TriAttentionPolicy(RankingPolicy):
    """Ranks by the logits of each head's mean query, at distances of 1, 2, 4, ... from now on.

    Mean queries before RoPE are measured once for a model, on a text of this project. For each pair
    of dimensions, the product of two numbers is added: the mean norm of queries less the norm of
    their mean, and the key's norm. Scores are standardized in each query head; the maximum of a
    group counts. As WeianMao/triattention (c3744ee6) `methods/triattention.py` with
    `per_layer_perhead_pruning` and `use_slack_trigger`, and with prompts evicted from like answers.
    By its runner's default, a KV head chooses alike in all layers, and prompts are kept.

    Args:
        size: entries kept by an eviction.
        every: tokens between two evictions.
        distances: their number; the largest of 17 is 65,536.
    """

    needs_rotation: ClassVar[bool] = True

    every: int = 128
    distances: int = 17

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(1, "distances")

    def for_tokenizer(self, tokenizer: Any) -> TriAttentionPolicy:
        """Measures queries on the text; without a tokenizer random tokens are taken."""
        ids = tokenizer.encode(TEXT, add_special_tokens=True)[:MOST]
        return _Calibrated(**{**vars(self), "ids": tuple(ids)})

    def for_model(self, model: Any) -> TriAttentionPolicy:
        return _Calibrated(**vars(self)).for_model(model)

    def score(self, entries: Entries) -> Tensor:
        """By the key's norm, before a model is known."""
        return entries.keys.float().norm(dim=-1)


class Queries(NamedTuple):
    """Statistics of queries of each layer that evicts, before RoPE.

    Attributes:
        mean: float32 [layers, heads, head_dim].
        beyond: for each pair of dimensions that RoPE rotates together, the mean norm less the
            norm of the mean; float32 [layers, heads, head_dim / 2], 0 for dimensions without RoPE.
    """

    mean: Tensor
    beyond: Tensor


@dataclass(frozen=True, kw_only=True)
class _Calibrated(TriAttentionPolicy):
    """With a text, and after :meth:`for_model` with a model's measurements.

    Attributes:
        ids: of the text; empty: random ones.
        measured: by device; empty before a model is known.
    """

    ids: Sequence[int] = ()
    measured: dict[torch.device, Queries] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "ids", tuple(self.ids))  # a list, where it was read from a file

    def for_model(self, model: Any) -> TriAttentionPolicy:
        queries = measured_queries(model, self.ids)
        return _Calibrated(**{**vars(self), "measured": {queries.mean.device: queries}})

    def score(self, entries: Entries) -> Tensor:
        keys = entries.keys.float()
        mean, beyond = self._queries(keys.device)
        layers = entries.layers
        rows = slice(layers, layers + 1) if isinstance(layers, int) else layers.flatten()
        expected = entries.ahead(mean[rows], [2**i for i in range(self.distances)])
        sizes = entries.sizes(keys)
        queries = torch.cat([expected, beyond[rows][..., : sizes.shape[-1]]], dim=-1)
        logits = queries.unflatten(1, (keys.shape[1], -1)) @ torch.cat([keys, sizes], -1).mT
        centred = logits - logits.mean(-1, keepdim=True)
        deviation = logits.std(-1, unbiased=False, keepdim=True).clamp(min=1e-6)
        return (centred / deviation).amax(2)

    def _queries(self, device: torch.device) -> Queries:
        """The measurements on a device, transferred once."""
        if device not in self.measured:
            known = next(iter(self.measured.values()))
            with writable():
                self.measured[device] = Queries(*(x.to(device, non_blocking=True) for x in known))
        return self.measured[device]


@dataclass(frozen=True, kw_only=True)
class _Listening(FullPolicy):
    """Keeps everything, the queries too."""

    queries: ClassVar[int] = FOREVER
    moments_from: ClassVar[int] = 0


_known: weakref.WeakKeyDictionary[Any, dict[tuple[int, ...], Queries]]
_known = weakref.WeakKeyDictionary()


def measured_queries(model: Any, ids: Sequence[int]) -> Queries:
    """Statistics of a model's queries on a text, measured once.

    Args:
        ids: the text's; empty: random ones.
    """
    known = _known.setdefault(model, {})
    if (text := tuple(ids)) not in known:
        known[text] = Queries(*stored(model, text, lambda: _measured(model, text)))
    return known[text]


def _measured(model: Any, ids: Sequence[int]) -> list[Tensor]:
    cache = EvictionCache(model, _Listening())
    vocabulary: int = model.config.get_text_config().vocab_size
    drawn = torch.randint(vocabulary, (UNTOLD,), generator=torch.Generator().manual_seed(0))
    read = torch.tensor([ids]) if ids else drawn[None]
    with torch.no_grad():
        model.get_decoder()(input_ids=read.to(model.device), **{CACHE_ARGUMENT: cache})
    means, beyond = [], []
    for layer in cache.evicting:
        log = layer.log
        assert log.moments is not None and log.latest is not None
        mean = log.moments.mean[0]
        # A pair's size does not change as it is rotated.
        queries = log.latest[0].float() * log.scale
        sizes = layer.rotation.sizes(queries).mean(1) - layer.rotation.sizes(mean)
        room = torch.zeros_like(mean)[:, : mean.shape[-1] // 2]
        room[:, : sizes.shape[-1]] = sizes
        means.append(mean.to(cache.evicting[0].device))
        beyond.append(room.to(cache.evicting[0].device))
    cache.reset()  # a RoPE that goes by the text's length forgets this one
    return [torch.stack(means), torch.stack(beyond)]
