"""Invariants that every policy must have, whatever its parameters and the scores."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, reject
from hypothesis import strategies as st
from one_layer import feed, finish, held, projecting
from runs import refused
from tiny import tiny

from baselines import (
    A2SFPolicy,
    ChunkKVPolicy,
    CriticalKVPolicy,
    H2OPolicy,
    KnormPolicy,
    LocalPolicy,
    RandomPolicy,
    RKVPolicy,
    SnapKVPolicy,
    StreamingLLMPolicy,
    TOVAPolicy,
    VATPPolicy,
)
from baselines.ranking import PromptPolicy, RankingPolicy
from buzz import (
    POLICIES,
    BuzzPolicy,
    BuzzStridedPolicy,
    ConfigError,
    EvictionCache,
    HoneycombPolicy,
    Policy,
)
from buzz.layer import EvictionLayer
from buzz.rope import Rope

small = st.integers(1, 12)
buzz_parameters = {
    "sink": st.integers(0, 6),
    "window": small,
    "stride": st.integers(3, 7),
    "threshold": st.integers(2, 20),
}
VALUES = {  # by parameter; of others, whole numbers are `small` and the rest is as it is
    **buzz_parameters,
    "capacity": st.integers(13, 24),
    "scoring": st.sampled_from(["sum", "mean"]),
    "pooling": st.sampled_from(["avg", "max"]),
    "history": st.sampled_from(["strided", "local_max"]),
    "compact": st.sampled_from(["once", "until_fits", "widen"]),
    "step": st.sampled_from(["floor", "exact"]),
    **dict.fromkeys(["decay", "trade", "similar", "first", "epsilon", "mass"], st.floats(0, 1)),
}
ONLY = {  # by method
    "buzz_strided": {"history": st.just("strided")},
    "h2o": {"heavy": st.integers(0, 12)},
    "honeycomb": {
        "keep": st.just(12),
        "every": st.integers(1, 9),
        "cells": st.sampled_from([0, 1, 3]),
        "attention": st.floats(0, 1),
        "value": st.floats(0.1, 1),
        "observed": st.sampled_from([0, 0.3]),
        "keydiff": st.floats(0, 1),
        "neighbours": st.sampled_from([1, 5]),
        "fading": st.floats(0, 1),
        "layers": st.sampled_from(["flat", "rising", "late"]),
    },
    "vatp": {"heavy": st.integers(6, 12)},
    "random": {"size": st.integers(13, 24), "window": st.integers(1, 6)},
    "kvzip": {"chunk": st.integers(8, 20)},
    "snapkv_every": {"size": st.integers(13, 24)},
    "r_kv": {"size": st.integers(13, 24)},
}


def any_of(name: str) -> st.SearchStrategy[Policy]:
    fields = dataclasses.fields(POLICIES[name])
    values = {
        field.name: VALUES[field.name]
        if field.name in VALUES
        else (small if type(field.default) is int else st.just(field.default))
        for field in fields
    }
    return st.builds(functools.partial(allowed, name), **{**values, **ONLY.get(name, {})})


def allowed(name: str, **values: Any) -> Policy:
    """A method with these values; where it refuses them, others are drawn."""
    try:
        return POLICIES[name](**values)
    except ConfigError:
        reject()


policies = st.sampled_from(sorted(POLICIES)).flatmap(any_of)
chunks = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def steps(
    policy: Policy, new: list[int], seed: int, batch: int = 1, heads: int = 2
) -> Iterator[tuple[EvictionLayer, torch.Tensor, torch.Tensor | None]]:
    """Run `policy` on random numbers: the layer, token indices before eviction, what it received.

    In a second attribute of the layer, `took`, are the step's keys, values and queries.
    """
    layer = EvictionLayer(policy, Rope(None), module=projecting(heads))
    generator = torch.Generator().manual_seed(seed)
    for count in new:
        layer.took = torch.randn(3, batch, heads, count, 4, generator=generator)
        feed(layer, *layer.took)
        assert layer.store is not None
        before = layer.view(layer.store.positions).clone()
        received = None
        if layer.wants_scores:
            received = torch.rand(before.shape, generator=generator)
        finish(layer, received)
        yield layer, before, received


@given(policies, chunks, st.integers(0, 9))
def test_kept_entries_are_a_temporal_subset_with_the_sink_and_the_last_ones(
    policy, new, seed
) -> None:
    for layer, before, _ in steps(policy, new, seed):
        after = held(layer)
        sink = min(getattr(policy, "sink", 0), before.shape[-1])
        assert torch.equal(after[..., :sink], before[..., :sink])
        assert (after.diff(dim=-1) > 0).all()
        assert torch.isin(after, before).all()
        protected = min(policy.num_recent, before.shape[-1])
        assert torch.equal(after[..., after.shape[-1] - protected :], before[..., -protected:]) or (
            protected == 0
        )


@given(policies, chunks)
def test_counts_depend_on_lengths_alone(policy, new) -> None:
    expected = policy.lengths(new)
    for seed in (0, 1):
        counts = [layer.lengths[0] for layer, _, _ in steps(policy, new, seed)]
        assert counts == expected


@given(st.builds(BuzzPolicy, **buzz_parameters), chunks, st.integers(0, 9))
def test_one_survivor_a_cell_and_it_is_the_best(policy, new, seed) -> None:
    scores = {}  # accumulated by token, for one head
    sampled = 0
    for layer, before, received in steps(policy, new, seed, heads=1):
        tokens = before[0, 0].tolist()
        for token, score in zip(tokens, received[0, 0].tolist(), strict=True):
            scores[token] = scores.get(token, 0.0) + score
        others = tokens[policy.sink : max(len(tokens) - policy.window, 0)]
        kept = held(layer)[0, 0].tolist()
        if len(others) <= policy.threshold:
            assert kept == tokens
            continue
        old, fresh = others[:sampled], others[sampled:]
        cells = [fresh[i : i + policy.stride] for i in range(0, len(fresh), policy.stride)]
        best = [max(cell, key=lambda token: scores[token]) for cell in cells]
        history = old[:: (policy.stride + 1) // 2] + best
        assert kept == tokens[: policy.sink] + history + tokens[len(tokens) - policy.window :]
        sampled = len(history)


@given(st.integers(2, 40), st.integers(3, 9), st.integers(1, 900), st.booleans())
def test_cells_widen_until_a_long_prompts_history_fits(threshold, stride, new, local_max) -> None:
    """And not by one token more; each still keeps its best entry (or its first)."""
    policy_class = BuzzPolicy if local_max else BuzzStridedPolicy
    sizes = {"sink": 2, "window": 3, "stride": stride, "threshold": threshold}
    policy = policy_class(**sizes, compact="widen")
    scores = torch.rand(1, 1, new + 5, generator=torch.Generator().manual_seed(new))
    kept, sampled = policy.next_length(new + 5, 0)
    if new <= threshold:
        assert (kept, sampled) == (new + 5, 0)
        return
    width = next(w for w in range(stride, new + stride) if -(-new // w) <= threshold)
    cells = scores[0, 0, 2 : new + 2].split(width)
    assert sampled == len(cells) and kept == sampled + 5
    best = [2 + i * width + (int(c.argmax()) if local_max else 0) for i, c in enumerate(cells)]
    given = scores if local_max else None
    assert policy.select(new + 5, 0, given)[0, 0].tolist() == [0, 1, *best]


def test_the_first_of_equals_survives() -> None:
    policy = BuzzPolicy(sink=0, window=1, stride=3, threshold=0)
    assert policy.select(7, 0, torch.zeros(1, 1, 7)).tolist() == [[[0, 3]]]


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_method_says_when_it_evicts(name) -> None:
    policy = POLICIES[name]()
    lengths = policy.lengths([2000] + [1] * 1000)
    assert (lengths[0] < 2000) == (policy.evicts != "never")
    assert (lengths[-1] < lengths[0] + 1000) == (policy.evicts == "always")


@given(policies.filter(lambda policy: policy.evicts == "always"), st.integers(1, 200))
def test_memory_is_bounded_once_decoding_goes_on(policy, prompt) -> None:
    lengths = policy.lengths([prompt] + [1] * 400)
    if isinstance(policy, BuzzPolicy):
        bound = policy.sink + policy.window + max(policy.threshold, 3)
    else:
        bound = sum(v for v in dataclasses.asdict(policy).values() if isinstance(v, int))
    assert max(lengths[20:]) <= bound
    if getattr(policy, "compact", "once") != "once":
        assert max(lengths) <= bound


@given(policies, chunks, st.integers(0, 9))
def test_rows_of_a_batch_do_not_mix(policy, new, seed) -> None:
    together = [held(layer).clone() for layer, _, _ in steps(policy, new, seed, batch=3, heads=2)]
    swapped = EvictionLayer(policy, Rope(None), module=projecting(2))
    order = torch.tensor([2, 0, 1])
    for (layer, before, received), expected in zip(
        steps(policy, new, seed, batch=3, heads=2), together, strict=True
    ):
        feed(swapped, *layer.took[:, order])
        swapped.after_attention(None if received is None else received[order])
        if swapped.awaits_repetition:
            scores = torch.rand(before.shape, generator=torch.Generator().manual_seed(0))
            swapped.judge(scores[order])
        assert torch.equal(held(swapped), expected[order])


WRONG = {
    BuzzPolicy: [
        {"stride": 0},
        {"window": 0},
        {"sink": -1},
        {"threshold": 1.5},
        {"history": "best"},
        {"compact": "never"},
        {"compact": "until_fits", "stride": 2},
        {"compact": "widen", "stride": 2},
        {"threshold": 1, "compact": "widen"},
    ],
    BuzzStridedPolicy: [{"history": "local_max"}],
    LocalPolicy: [{"window": -3}],
    StreamingLLMPolicy: [{"window": "9"}],
    H2OPolicy: [{"recent": 0}, {"scoring": "max"}],
    TOVAPolicy: [{"size": 0}],
    SnapKVPolicy: [{"window": 0}, {"kernel": 0}, {"capacity": 32}, {"pooling": "sum"}],
    KnormPolicy: [{"every": 0}],
    RandomPolicy: [{"size": 20, "sink": 10, "window": 11}],
    VATPPolicy: [{"heavy": 3, "sink": 4}],
    A2SFPolicy: [{"decay": 1.5}, {"decay": float("nan")}],
    CriticalKVPolicy: [{"first": True}],
    ChunkKVPolicy: [{"chunk": 0}],
    RKVPolicy: [{"size": 8}],
    HoneycombPolicy: [
        {"every": 0},
        {"cells": 3, "keep": 10},
        {"value": 0, "keydiff": 0},
        {"observed": 1.5},
        {"neighbours": 0},
        {"layers": "falling"},
        {"fading": 1.5},
        {"window": -1},
    ],
}


@pytest.mark.parametrize(
    ("policy", "values"), [(policy, one) for policy, all_ in WRONG.items() for one in all_], ids=str
)
@pytest.mark.filterwarnings("ignore:method.stride")
def test_bad_values_are_named(policy, values) -> None:
    with refused(f"method.{next(iter(values))}"):
        policy(**values)


@pytest.mark.parametrize(
    ("policy", "entries", "fixed"),
    [
        (StreamingLLMPolicy(sink=8), 8, ""),
        (BuzzPolicy(), 5, ""),
        (BuzzPolicy(window=160), 100, "window"),
        (H2OPolicy(), 1, ""),
        (TOVAPolicy(), 0, ""),
        (RandomPolicy(), 0, ""),
        (RKVPolicy(), 1, ""),
        (HoneycombPolicy(cells=59), 12, ""),
    ],
    ids=str,
)
def test_a_budget_without_room_is_refused(policy, entries, fixed) -> None:
    with refused("budget"):
        policy.fit(entries, frozenset(fixed.split()))
    with refused("method.stride"), pytest.warns(UserWarning):
        BuzzPolicy(stride=2).fit(100)


def test_an_unbounded_stride_warns() -> None:
    with pytest.warns(UserWarning, match="unbounded"):
        BuzzPolicy(stride=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BuzzPolicy(stride=3)


def test_local_max_history_keeps_as_many_but_better_entries() -> None:
    torch.manual_seed(0)
    scores = torch.rand(1, 1, 60)
    plain = BuzzPolicy(sink=2, window=8, stride=5, threshold=10)
    better = BuzzPolicy(sink=2, window=8, stride=5, threshold=10, history="local_max")
    a, b = plain.select(60, 12, scores), better.select(60, 12, scores)
    assert a.shape == b.shape
    assert scores.gather(-1, b).sum() > scores.gather(-1, a).sum()


def farthest_from_one_turn(policy: Policy, tokens: int) -> float:
    """How far bfloat16 keys are, after so many steps, from what one exact turn makes of them.

    As a share of the key's largest number; a single rounding is 2^-9 of its own.
    """
    model = tiny("llama")
    rope = Rope(model.get_decoder().rotary_emb)
    layer = EvictionLayer(policy, rope, module=projecting(2))
    generator = torch.Generator().manual_seed(0)
    arrived = torch.randn(3, 1, 2, tokens, 16, generator=generator).bfloat16()
    for low, high in itertools.pairwise([0, *range(60, tokens + 1)]):
        keys, values, queries = arrived[..., low:high, :]
        feed(layer, keys, values[..., :4], queries)
        received = None
        if layer.wants_scores:  # the same tokens receive the most in every step
            favour = layer.view(layer.store.positions) % 7 == 0
            received = torch.rand(favour.shape, generator=generator) + favour
        finish(layer, received)
    index = held(layer).long()
    old = arrived[0].float().gather(2, index[..., None].expand(*index.shape, 16))
    new = torch.arange(tokens - index.shape[-1], tokens)
    exact = rope.rotate(old, rope.turn(new, index, index))
    error = (layer.view(layer.store.keys).float() - exact).abs().amax(-1)
    return float((error / exact.abs().amax(-1)).max())


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_rounding_does_not_build_up_over_a_thousand_steps(name) -> None:
    assert farthest_from_one_turn(POLICIES[name]().fit(24), 1060) < 2**-7


def test_keys_turned_step_by_step_would_drift(monkeypatch) -> None:
    monkeypatch.setattr(H2OPolicy, "num_pinned", 0)
    assert farthest_from_one_turn(H2OPolicy().fit(24), 1060) > 2**-5


@pytest.mark.parametrize("kind", [PromptPolicy, RankingPolicy])
@pytest.mark.parametrize("name", ["attention_sums", "queries", "moments"])
def test_what_is_read_and_not_declared_is_named(kind: type[Policy], name: str) -> None:
    """Where the method has to say so; all else is there for the asking."""

    class Curious(kind):
        name = "curious"

        def score(self, entries) -> torch.Tensor:
            assert entries.keys.shape == entries.values.shape
            return getattr(entries, name)

    model, ids = tiny(), torch.arange(3, 63)[None]
    with pytest.raises(ConfigError, match=f"entries.{name}=None: .*declare") as error:
        model(ids, past_key_values=EvictionCache(model, Curious().fit(24)))
    assert "\n" not in str(error.value)
    if name == "attention_sums":
        plain = type("Plain", (kind,), {"name": "plain"})().fit(24)
        with pytest.raises(ConfigError, match="needs_scores = True"):
            model(ids, past_key_values=EvictionCache(model, plain))
        declared = type("Declared", (Curious,), {"needs_scores": True})().fit(24)
        cache = EvictionCache(model, declared)
        model(ids, past_key_values=cache)
        assert cache.lengths == [24] * 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Former(Policy):
    """H2O, written with the names of version 0.2; one is a parameter, another a property."""

    name = "former"
    needs_scores = True

    heavy: int = 12
    protected: int = 5

    @property
    def resident(self) -> int:
        return self.heavy

    def survivors(self, held: int, state: Any) -> tuple[int, Any]:
        return min(held, self.heavy + self.protected), 0

    def score(self, entries) -> torch.Tensor:
        assert entries.received.shape[-1] == entries.held
        return entries.received

    def select(self, held: int, state: Any, scores: torch.Tensor | None) -> torch.Tensor:
        assert scores is not None
        return scores[..., : held - self.protected].topk(self.heavy).indices.sort().values


class Later(Former):
    """A subclass by the new names, of one by the old."""

    @property
    def num_pinned(self) -> int:
        return super().resident

    def next_length(self, cache_length: int, state: Any) -> tuple[int, Any]:
        return super().survivors(cache_length, state)


class Narrow(H2OPolicy):
    """The other way round."""

    @property
    def protected(self) -> int:
        return super().num_recent

    def survivors(self, held: int, state: Any) -> tuple[int, Any]:
        return super().next_length(held, state)


class Mixin:
    """No policy itself, by the old names."""

    @property
    def protected(self) -> int:
        return super().num_recent  # type: ignore[misc]

    def survivors(self, held: int, state: Any) -> tuple[int, Any]:
        return super().survivors(held=held, state=state)  # type: ignore[misc]


class Mixed(Mixin, H2OPolicy):
    """Inherits the old names from a class that is no policy."""


@pytest.mark.parametrize(
    "policy",
    [
        Former(protected=7),
        Later(protected=7),
        Narrow(heavy=12, recent=7),
        Mixed(heavy=12, recent=7),
    ],
    ids=["old", "new-of-old", "old-of-new", "mixin"],
)
def test_a_method_by_the_names_of_version_0_2_still_serves(policy: Policy) -> None:
    expected = H2OPolicy(heavy=12, recent=7)
    for names in (("num_recent", "protected"), ("num_pinned", "resident")):
        assert {getattr(policy, name) for name in names} == {getattr(expected, names[0])}
    assert policy.next_length(40, 0) == policy.survivors(held=40, state=0) == (19, 0)
    model, ids, kept = tiny(), torch.arange(3, 63)[None], []
    for one in (policy, expected):
        cache = EvictionCache(model, one)
        with torch.no_grad():
            for part in ids.split([57, 1, 1, 1], dim=1):
                model(part, past_key_values=cache)
        kept.append([cache.kept_positions(layer) for layer in range(3)])
    assert all(map(torch.equal, *kept))


def test_a_mixin_by_an_old_name_is_heard() -> None:
    class Lazy:
        def survivors(self, held: int, state: Any) -> tuple[int, Any]:
            grown = held < 24
            return (held, state) if grown else super().survivors(held, state)  # type: ignore[misc]

    class LazyH2O(Lazy, H2OPolicy):
        pass

    assert LazyH2O(heavy=8, recent=8).lengths([16, *[1] * 8]) == [*range(16, 24), 16]
