"""Honeycomb's corners are the methods it is made of; signals get their shares of what is kept."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import prompt, tiny

from baselines import H2OPolicy, KeyDiffPolicy, SnapKVEveryPolicy, VATPPolicy
from buzz import Budget, BuzzPolicy, EvictionCache, HoneycombPolicy
from buzz.errors import ConfigError

ALONE = {"attention": 0.0, "value": 0.0, "observed": 0.0, "keydiff": 0.0, "neighbours": 1} | {
    "layers": "flat"
}
CORNERS = {
    "h2o": (
        H2OPolicy(heavy=15, recent=10),
        {"window": 10, "keep": 15, "every": 1, "attention": 1.0},
    ),
    "vatp": (
        VATPPolicy(heavy=15, recent=10, sink=0),
        {"window": 10, "keep": 15, "every": 1, "value": 0.5},
    ),
    "keydiff": (
        KeyDiffPolicy(size=25, every=6),
        {"window": 0, "keep": 25, "every": 6, "keydiff": 1.0},
    ),
    "snapkv_every": (
        SnapKVEveryPolicy(size=30, every=20, window=16, kernel=5),
        {"window": 16, "keep": 14, "every": 20, "observed": 1.0},
    ),
}


@torch.inference_mode()
@pytest.mark.parametrize("name", CORNERS)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_one_signal_alone_is_its_method_to_the_bit(family, name) -> None:
    model = tiny(family)
    method, options = CORNERS[name]
    theirs = EvictionCache(model, method)
    own = EvictionCache(model, HoneycombPolicy(**ALONE | options))
    for part in prompt(100).split([60, *[1] * 40], dim=1):
        expected = model(part, past_key_values=theirs).logits
        assert torch.equal(model(part, past_key_values=own).logits, expected)
        assert torch.equal(own.kept_positions(1), theirs.kept_positions(1))
    assert own.evictions == theirs.evictions


class Given:
    """Entries of which only the signals are known."""

    def __init__(self, received: torch.Tensor, keys: torch.Tensor) -> None:
        self.attention_sums, self.keys = received, keys
        self.cache_length = received.shape[-1]


@given(
    st.integers(2, 40), st.integers(1, 40), st.sampled_from([0.25, 0.5, 0.75]), st.integers(0, 3)
)
@settings(max_examples=60)
def test_every_signal_chooses_about_its_share(keep, more, share, sink) -> None:
    """Of what stays, its best floor(share x keep) are there; window and sink take no ranks."""
    window = 5
    held = sink + keep + more + window
    random = torch.Generator().manual_seed(held * 100 + keep)
    entries = Given(
        torch.rand(2, 1, held, generator=random), torch.randn(2, 1, held, 8, generator=random)
    )
    both = {"attention": share, "keydiff": 1 - share}
    policy = HoneycombPolicy(sink=sink, window=window, keep=keep, **ALONE | both)
    kept = policy.select(held, 0, policy.score(entries))
    for name, part in both.items():
        alone = HoneycombPolicy(sink=sink, window=window, keep=keep, **ALONE | {name: 1.0})
        history = alone.score(entries)[..., sink : held - window]
        best = history.topk(min(keep, int(part * keep)), dim=-1).indices + sink
        for row in range(2):
            assert set(best[row, 0].tolist()) <= set(kept[row, 0].tolist())
    assert kept.shape[-1] == sink + keep


@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 90), st.integers(0, 4))
@settings(max_examples=100)
def test_every_cell_keeps_its_best(cells, each, more, sink) -> None:
    """As a loop over the cells finds them; with one entry a cell, BUZZ's local maxima."""
    keep, window = cells * each, 7
    held = sink + keep + more + window
    scores = torch.rand(2, 3, held, generator=torch.Generator().manual_seed(held))
    policy = HoneycombPolicy(sink=sink, window=window, keep=keep, every=1, cells=cells)
    found = policy.select(held, 0, scores)
    history = keep + more
    expected = torch.zeros_like(scores, dtype=torch.bool)
    expected[..., :sink] = True
    for cell in range(cells):
        low, high = (sink + bound * history // cells for bound in (cell, cell + 1))
        best = scores[..., low:high].topk(each, dim=-1).indices + low
        expected.scatter_(-1, best, True)
    assert torch.equal(found, found.sort(-1).values)
    assert torch.equal(torch.zeros_like(expected).scatter(-1, found, True), expected)


def test_its_cells_of_one_are_those_of_buzz() -> None:
    scores = torch.rand(1, 2, 4 + 60 + 8)
    buzz = BuzzPolicy(sink=4, window=8, stride=5, threshold=59)
    for cells in (12, 0):
        own = HoneycombPolicy(sink=4, window=8, keep=12, every=48, cells=cells)
        assert torch.equal(own.select(72, 0, scores), buzz.select(72, 0, scores))


@pytest.mark.parametrize("layers", ["flat", "rising", "late"])
@pytest.mark.parametrize("number", [1, 3, 30])
def test_layers_share_one_budget(layers, number) -> None:
    policy, _ = Budget(400).policy(HoneycombPolicy(layers=layers, early_window=0.8), 4000)
    each = [policy.for_layer(index, number) for index in range(number)]
    assert sum(one.peak for one in each) / number == pytest.approx(400, rel=0.01)
    for one in each:
        assert max(one.lengths([4000] + [1] * 300)) <= one.peak
    assert (len({one.peak for one in each}) > 1) == (layers != "flat" and number > 1)
    if layers == "late" and number == 30:
        assert [one.peak for one in each[:9]] == [120] * 8 + [each[8].peak]
        assert each[0].window == pytest.approx(0.8 * 120, abs=1)
        assert each[9].window / each[9].peak == pytest.approx(policy.window / 400, abs=0.01)


def test_values_and_fading_change_what_stays() -> None:
    model, text = tiny(), prompt(80)
    kept = []
    for options in ({"attention": 1.0}, {"value": 1.0}, {"attention": 1.0, "fading": 0.8}):
        sizes = {"window": 8, "keep": 16, "every": 5}
        cache = EvictionCache(model, HoneycombPolicy(**ALONE | sizes | options))
        model(text, past_key_values=cache)
        kept.append(cache.kept_positions(1))
    assert not torch.equal(kept[0], kept[1]) and not torch.equal(kept[0], kept[2])


def test_a_fitted_budget_evicts_at_least_once_in_a_tenth_of_it() -> None:
    for budget, every in ((1000, 64), (300, 30), (40, 4)):
        policy, _ = Budget(budget).policy(HoneycombPolicy(), 4000)
        assert policy.every == every and policy.peak == budget


@pytest.mark.parametrize("window", [0, 1, 5, 40])
def test_observed_judges_every_entry_before_the_window(window) -> None:
    """None stays for its age alone: of equal keys, only those that the queries attend."""
    keys = torch.zeros(1, 1, 60, 4)
    keys[..., 3, 0] = keys[..., 10, 0] = 1.0
    newest = [] if window else [59]  # which only its own query could judge
    options = {"window": window, "keep": 10 + len(newest), "observed": 1.0}
    policy = HoneycombPolicy(**ALONE | options)
    queries = torch.tensor([5.0, 0, 0, 0]).expand(1, 1, policy.queries, 4)
    entries = SimpleNamespace(keys=keys, queries=queries, cache_length=60)
    scores = policy.score(entries)
    assert policy.queries == max(1, min(16, window))
    assert scores[..., : 60 - max(1, window)].isfinite().all()
    kept = policy.select(60, 0, scores)[0, 0].tolist()
    assert kept == [*range(1, 6), *range(8, 13), *newest]


def test_without_any_signal_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="give one of attention, value, observed, keydiff"):
        HoneycombPolicy(**ALONE)


@pytest.mark.parametrize("width", [1, 4, 5])
def test_neighbours_share_what_keydiff_says_of_them(width) -> None:
    """As a loop averages them; at the ends over those that are there."""
    entries = Given(torch.rand(1, 2, 20), torch.randn(1, 2, 20, 8))
    options = {"window": 3, "keep": 5, **ALONE, "keydiff": 1.0}
    alone = HoneycombPolicy(**options).score(entries)
    pooled = HoneycombPolicy(**options | {"neighbours": width}).score(entries)
    for place in range(20):
        low, high = max(0, place - width // 2), place - width // 2 + width
        expected = alone[..., low:high].mean(-1)
        torch.testing.assert_close(pooled[..., place], expected)


def test_tokens_between_evictions_that_were_set_stay_or_are_refused() -> None:
    policy, _ = Budget(400).policy(HoneycombPolicy(), 4000, frozenset({"every"}))
    assert policy.every == 64
    with pytest.raises(ConfigError, match="budget=100"):
        Budget(100).policy(HoneycombPolicy(), 4000, frozenset({"every"}))


def test_a_budget_that_leaves_a_layer_too_little_is_refused_by_its_own_number() -> None:
    with pytest.raises(ConfigError, match="budget=40: leaves a layer of honeycomb too little"):
        Budget(40).policy(HoneycombPolicy(cells=7), 4000)
