"""The whole of an evicting cache once more, naively: one pass over a text, with no cache at all.

The model runs all tokens at once, by an attention of its own here, in which a query attends exactly
the entries that it should have attended, each at the position that it should have had. Entries are
kept and dropped by the policy, on the attention weights of this pass. It holds n x n weights and n
x n rotated keys of every head: for texts of a few hundred tokens.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from tiny import prompt, tiny
from torch import Tensor
from transformers import AttentionInterface

from buzz import EvictionCache, Policy
from buzz.adapter import attention_of

TOLERANCE = 2e-4


@dataclass
class Text:
    """One row of a batch as a cache saw it.

    Attributes:
        tokens: all of them, without padding.
        steps: how many each forward pass brought.
        kept: after each step, by layer: int64 [kv_heads, held], the tokens whose entries stayed.
        logits: of each step, [new, vocab].
    """

    tokens: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    kept: list[list[Tensor]] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    def copy(self) -> Text:
        return Text(list(self.tokens), list(self.steps), list(self.kept), list(self.logits))

    def visible(self, layer: int) -> Tensor:
        """Whether a token was attended by another, bool [kv_heads, queries, keys]."""
        heads, count = self.kept[0][layer].shape[0], len(self.tokens)
        visible = torch.ones(count, count, dtype=torch.bool).tril().repeat(heads, 1, 1)
        end = 0
        for step, new in enumerate(self.steps):
            if step:
                held = torch.zeros(heads, end, dtype=torch.bool)
                held.scatter_(1, self.kept[step - 1][layer], True)
                visible[:, end : end + new, :end] = held[:, None]
            end += new
        return visible


@dataclass
class _Pass:
    """What the attention of the pass that is going on needs, and what it leaves."""

    text: Text
    positions: str
    logn_base: float | None
    rotary: torch.nn.Module
    layers: list[_Layer]


@dataclass
class _Layer:
    """What one layer's attention saw and gave.

    Attributes:
        weights: [heads, queries, keys].
        query, key, value: [heads or kv_heads, n, D], not rotated.
        scale: of the logits, of each query: [n].
        module: the attention module.
    """

    weights: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    scale: Tensor
    module: torch.nn.Module

    @property
    def group(self) -> int:
        return self.query.shape[0] // self.key.shape[0]

    def rotated(self, states: Tensor, positions: Tensor) -> Tensor:
        """States [heads, n, D] at positions [heads, n]."""
        if not getattr(self.module, "use_rope", True):
            return states
        each = zip(states, positions, strict=True)
        return torch.stack([_rotated(self.module, s[None, None], at)[0, 0] for s, at in each])


_now: _Pass


def _attend(module, query, key, value, mask, scaling, s_aux=None, **kwargs) -> tuple[Tensor, None]:
    """Query and key come rotated to position 0: as they are before any rotation."""
    kv_heads, count = key.shape[1:3]
    visible = _now.text.visible(module.layer_idx)
    if _now.positions == "cache":  # an entry's index among those that the query attends
        key_at = visible.long().cumsum(-1) - 1
        query_at = visible.long().sum(-1) - 1
    else:
        key_at = torch.arange(count).expand(kv_heads, count, count)
        query_at = torch.arange(count).expand(kv_heads, count)
    outputs, weights = [], []
    for head in range(kv_heads):
        q = query[:, head * module.num_key_value_groups :][:, : module.num_key_value_groups]
        k = key[:, head].expand(count, count, -1).reshape(1, 1, count * count, -1)
        if getattr(module, "use_rope", True):
            q = _rotated(module, q, query_at[head])
            k = _rotated(module, k, key_at[head].flatten())
        logits = torch.einsum("bgqd,qkd->gqk", q, k.view(count, count, -1)) * scaling
        if _now.logn_base is not None:
            logits *= (visible[head].sum(-1).log() / math.log(_now.logn_base))[:, None]
        logits = logits.masked_fill(~visible[head], -torch.inf)
        if s_aux is not None:
            sinks = s_aux.view(kv_heads, -1)[head, :, None, None].expand(*logits.shape[:2], 1)
            logits = torch.cat([logits, sinks], dim=-1)
        own = logits.softmax(-1)[..., :count]
        outputs.append(own @ value[0, head])
        weights.append(own)
    scale = torch.full((count,), scaling)
    if _now.logn_base is not None:
        scale *= visible[0].sum(-1).log() / math.log(_now.logn_base)
    _now.layers.append(_Layer(torch.cat(weights), query[0], key[0], value[0], scale, module))
    return torch.cat(outputs).transpose(0, 1)[None], None


def _rotated(module: torch.nn.Module, states: Tensor, positions: Tensor) -> Tensor:
    """States [1, heads, n, D] at positions [n], by the model's own code."""
    apply = sys.modules[type(module).__module__].apply_rotary_pos_emb
    cos, sin = _now.rotary(states, positions[None])
    # A factor on cos and sin is in the states already.
    return apply(states, states, *(table / _now.rotary.attention_scaling for table in (cos, sin)))[
        0
    ]


AttentionInterface.register("recomputed", _attend)
_models: dict[str, torch.nn.Module] = {}


@torch.no_grad()
def recompute(
    family: str, text: Text, positions: str, logn_base: float | None = None
) -> tuple[Tensor, list[_Layer]]:
    """Logits [tokens, vocab] of `tiny(family)`, and what its layers saw."""
    global _now
    model = _models.get(family) or _models.setdefault(family, tiny(family, "recomputed"))
    _now = _Pass(text, positions, logn_base, model.get_decoder().rotary_emb, [])
    ids = torch.tensor([text.tokens])
    unread = torch.empty(1, 1, 1, 1)
    logits = model(
        ids, attention_mask=unread, position_ids=torch.zeros_like(ids), use_cache=False
    ).logits
    return logits[0], _now.layers


def check(
    family: str,
    text: Text,
    policy: Policy,
    positions: str = "cache",
    hold_until: int = 0,
    logn_base: float | None = None,
) -> None:
    """Asserts that the cache gave the logits, and kept the entries, that it should have."""
    logits, layers = recompute(family, text, positions, logn_base)
    torch.testing.assert_close(torch.cat(text.logits), logits, atol=TOLERANCE, rtol=TOLERANCE)
    for index, layer in enumerate(layers):
        own = policy.for_layer(index, len(layers))
        _check_kept(family, text, index, layer, own, positions, hold_until)


def repeated(family: str, prompt: list[int], layer: int, positions: str) -> Tensor:
    """The highest attention that a prompt's entries get when all of it is read once more."""
    steps, shape = [len(prompt)] * 2, (_now.layers[layer].key.shape[0], -1)
    every = [torch.arange(len(prompt)).expand(shape)] * len(_now.layers)
    _, layers = recompute(family, Text(prompt * 2, steps, [every] * 2), positions)
    second = layers[layer].weights.unflatten(0, shape)[..., len(prompt) :, : len(prompt)]
    return second.amax((1, 2))


def _check_kept(
    family: str,
    text: Text,
    index: int,
    layer: _Layer,
    policy: Policy,
    positions: str,
    hold_until: int,
) -> None:
    heads = layer.key.shape[0]
    weights = layer.weights.unflatten(0, (heads, -1)).sum(1)
    entries = torch.empty(heads, 0, dtype=torch.int64)
    total = torch.zeros(heads, len(text.tokens))  # received since arrival
    judged_from = cut = sampled = end = 0
    for new, kept in zip(text.steps, text.kept, strict=True):
        start, end = end, end + new
        fresh = torch.arange(start, end).expand(heads, -1)
        entries = torch.cat([entries, fresh], dim=1)
        age = torch.arange(new - 1, -1, -1)
        total *= policy.decay**new
        total += (weights[:, start:end] * (policy.decay**age)[:, None]).sum(1)
        held = entries.shape[1]
        if end < hold_until:
            assert torch.equal(kept[index], entries)
            continue
        stay, sampled_after = policy.next_length(held, sampled)
        assert kept[index].shape[1] == stay
        if stay < held:
            received = None
            if policy.needs_scores:
                first = max(judged_from, end - (policy.observe or end))
                step = weights[:, first:end].sum(1)
                received = (step if policy.score_rule == "step" else total).gather(1, entries)
                if policy.score_rule == "mean":
                    received = received / (end - entries)
                received = received[None]
            if policy.needs_repetition:
                received = repeated(family, text.tokens[:end], index, positions)[None]
            recent = slice(max(cut, end - policy.queries), end)
            moved = positions == "cache"
            view = _View(layer, entries, recent, moved, received, index, policy.moments_from)
            scores = policy.score(view)
            chosen = policy.select(held, sampled, scores)[0].expand(heads, -1)
            tail = entries[:, held - min(policy.num_recent, stay) :]
            expected = torch.cat([entries.gather(1, chosen), tail], dim=1)
            _check_same(kept[index], expected, entries, scores, policy)
            cut = end
        else:
            assert torch.equal(kept[index], entries)
        entries, sampled, judged_from = kept[index], sampled_after, end


@dataclass
class _View:
    """What a policy may look at, of one row, as :class:`buzz.entries.Entries`.

    Attributes:
        of: the layer.
        tokens: int64 [kv_heads, cache_length].
        recent: the queries that count.
        moved: whether entries stand at cache positions.
    """

    of: _Layer
    tokens: Tensor
    recent: slice
    moved: bool
    attention_sums: Tensor | None
    layers: int
    moments_from: int | None

    @property
    def layer(self) -> int:
        return self.layers

    @property
    def cache_length(self) -> int:
        return self.tokens.shape[1]

    @property
    def keys(self) -> Tensor:
        at = torch.arange(self.cache_length).expand_as(self.tokens) if self.moved else self.tokens
        return self.of.rotated(self._of_entries(self.of.key), at)[None]

    @property
    def values(self) -> Tensor:
        return self._of_entries(self.of.value)[None]

    @property
    def positions(self) -> Tensor:
        return self.tokens[None]

    @property
    def queries(self) -> Tensor:
        shift = self.cache_length - self.recent.stop if self.moved else 0
        at = torch.arange(self.recent.start, self.recent.stop) + shift
        queries = self.of.query[:, self.recent]
        turned = self.of.rotated(queries, at.expand(queries.shape[:2]))
        return (turned * self.of.scale[self.recent, None])[None]

    @property
    def moments(self) -> Any:
        start = self.moments_from
        raw = (self.of.query * self.of.scale[:, None])[:, start : self.recent.stop]
        if not raw.shape[1]:
            raw = raw.new_zeros(raw.shape[0], 1, raw.shape[2])
        centred = raw - raw.mean(1, keepdim=True)
        covariance = centred.mT @ centred / raw.shape[1]
        return SimpleNamespace(mean=raw.mean(1)[None], covariance=covariance[None])

    def ahead(self, vectors: Tensor, steps: Sequence[int]) -> Tensor:
        """By turning them to every position."""
        at = torch.tensor(steps) + (self.cache_length if self.moved else self.recent.stop)
        flat = vectors.flatten(0, -2)[:, None].expand(-1, len(at), -1)
        return self.of.rotated(flat, at.expand(len(flat), -1)).mean(1).view_as(vectors)

    @property
    def keys_from_zero(self) -> Tensor:
        return self.keys  # as no row's text has anything before it here

    @property
    def unrotated(self) -> Tensor:
        return self._of_entries(self.of.key)[None]

    def sizes(self, vectors: Tensor) -> Tensor:
        """Of vectors whose halves are rotated together."""
        return torch.hypot(*vectors.chunk(2, dim=-1))

    @property
    def output_projection(self) -> Tensor:
        weight = self.of.module.o_proj.weight.detach()
        return weight.T.unflatten(0, (-1, self.of.value.shape[-1]))

    def _of_entries(self, states: Tensor) -> Tensor:
        return states.gather(1, self.tokens[..., None].expand(-1, -1, states.shape[-1]))


def _check_same(
    kept: Tensor, expected: Tensor, entries: Tensor, scores: Tensor | None, policy: Policy
) -> None:
    """Equal, but for entries whose scores are so close that rounding decides between them."""
    for head, (own, due) in enumerate(zip(kept.tolist(), expected.tolist(), strict=True)):
        assert own == sorted(set(own)) and set(own) <= set(entries[head].tolist())
        if own != due:
            assert scores is not None
            each = scores[0].expand(entries.shape[0], -1)
            judged = each.mean(0) if policy.name == "tova" else each[head]
            known = dict(zip(entries[head].tolist(), judged.tolist(), strict=True))
            kept_more = sorted(known[token] for token in set(own) - set(due))
            due_more = sorted(known[token] for token in set(due) - set(own))
            torch.testing.assert_close(kept_more, due_more, atol=1e-4, rtol=1e-4)


def kept_now(cache, row: int) -> list[Tensor]:
    """What a cache holds of a row: by layer, int64 [kv_heads, held]."""
    kept = []
    for layer in range(len(cache.layers)):
        positions = cache.kept_positions(layer)[row].cpu()
        kept.append(positions[:, (positions[0] >= 0).nonzero()[:1, 0] :].clone())
    return kept


class Recorder:
    """Runs steps of a batch through a model and its cache, and notes what each row saw."""

    def __init__(self, model, cache, padding: list[int]) -> None:
        self.model, self.cache, self.padding = model, cache, padding
        self.texts = [Text() for _ in padding]
        self.seen = 0

    def mask(self, new: int) -> Tensor:
        """The mask [rows, seen + new] of a further step."""
        mask = torch.arange(self.seen + new) >= torch.tensor(self.padding)[:, None]
        return mask.long().to(self.model.device)

    def step(self, ids: Tensor, gradients: bool = False, **inputs) -> None:
        """One forward pass; `inputs` are its mask and positions."""
        with torch.set_grad_enabled(gradients):
            on_device = ids.to(self.model.device)
            logits = self.model(on_device, past_key_values=self.cache, **inputs).logits
        logits = logits.detach().cpu()
        new = ids.shape[1]
        for row, (text, padding) in enumerate(zip(self.texts, self.padding, strict=True)):
            skipped = min(new, max(0, padding - self.seen))
            text.tokens += ids[row, skipped:].tolist()
            text.steps.append(new - skipped)
            text.logits.append(logits[row, skipped:])
            text.kept.append(kept_now(self.cache, row))
        self.seen += new

    def select(self, rows: list[int]) -> None:
        """The cache's rows were re-ordered: row i is now what row `rows[i]` was."""
        self.texts = [self.texts[row].copy() for row in rows]
        self.padding = [self.padding[row] for row in rows]

    def check(self, family: str) -> None:
        """Every row against the pass without a cache."""
        cache = self.cache
        seen = set()
        for text, padding in zip(self.texts, self.padding, strict=True):
            if (key := (*text.tokens, -1, *text.steps)) in seen:
                continue
            seen.add(key)
            hold = max(0, cache.hold_until - padding)
            check(family, text, cache.policy, cache.positions, hold, cache.logn_base)


def record(model, policy, padding: list[int], steps: list[int], **options) -> Recorder:
    """A batch whose rows begin with padding, fed in steps."""
    cache = EvictionCache(model, policy, **options)
    recorder = Recorder(model, cache, padding)
    for part in prompt(sum(steps), batch=len(padding)).split(steps, dim=1):
        recorder.step(part, attention_mask=recorder.mask(part.shape[1]))
    return recorder


def check_long_decode(
    policy: Policy, dtype: torch.dtype, error: float, device: str = "cpu"
) -> None:
    """With the entries that it kept, which rounding has a say in: nothing builds up.

    `error` is the last 40 logits' mean distance from float32's, as a share of those. The full
    cache's is 0.028 in bfloat16; keys that are turned once a step make it 0.05 to 0.14.
    """
    recorder = record(tiny("llama", dtype=dtype).to(device), policy, [0], [40, *[1] * 120])
    (text,) = recorder.texts
    logits, (expected, _) = torch.cat(text.logits).float(), recompute("llama", text, "cache")
    distance = (logits - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert distance[-40:].mean() < error
    store = recorder.cache.layers[0].store
    assert store.keys.dtype == dtype
    if policy.needs_scores and policy.score_rule != "step":
        assert store.scores.dtype == torch.float32


class Keys:
    """Records, of one attention layer, keys before rotation and the last query after it."""

    def __init__(self, model, layer, monkeypatch) -> None:
        self.module = attention_of(model.get_decoder(), layer)
        source = sys.modules[type(self.module).__module__]
        self.apply = source.apply_rotary_pos_emb
        self.active, self.raw = False, []

        def record(q, k, cos, sin, *args, **kwargs):
            q_rotated, k_rotated = self.apply(q, k, cos, sin, *args, **kwargs)
            if self.active:
                self.raw.append(k)
                self.query = q_rotated
            return q_rotated, k_rotated

        monkeypatch.setattr(source, "apply_rotary_pos_emb", record)
        self.module.register_forward_pre_hook(lambda *_: setattr(self, "active", True))
        self.module.register_forward_hook(lambda *_: setattr(self, "active", False))

    def keys_at(self, model, kept, seen, layer_type) -> torch.Tensor:
        """Kept keys, rotated by the model's own code so that the newest stands at `seen - 1`."""
        raw = torch.cat(self.raw, dim=2)
        keys = raw.gather(2, kept[..., None].expand(*kept.shape, raw.shape[-1]))
        held = kept.shape[-1]
        positions = torch.arange(seen - held, seen)[None]
        rotary = model.get_decoder().rotary_emb
        kwargs = {"layer_type": layer_type} if layer_type else {}
        return self.apply(keys, keys, *rotary(keys, positions, **kwargs))[1]
