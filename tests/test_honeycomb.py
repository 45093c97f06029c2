"""Honeycomb holds H2O and the local maxima of cells; its sizes fill what they are given."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import prompt, tiny

from baselines import H2OPolicy
from buzz import Budget, BuzzPolicy, EvictionCache, HoneycombPolicy


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_with_one_cell_and_no_slack_it_is_h2o_to_the_bit(family) -> None:
    model = tiny(family)
    h2o = EvictionCache(model, H2OPolicy(heavy=15, recent=10))
    own = EvictionCache(model, HoneycombPolicy(window=10, keep=15, threshold=15))
    for part in prompt(100).split([60, *[1] * 40], dim=1):
        expected = model(part, past_key_values=h2o).logits
        assert torch.equal(model(part, past_key_values=own).logits, expected)
        assert torch.equal(own.kept_positions(1), h2o.kept_positions(1))
    assert own.evictions == h2o.evictions == [41]


@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 90), st.integers(0, 4))
@settings(max_examples=100)
def test_every_cell_keeps_its_best(cells, each, more, sink) -> None:
    """As a loop over the cells finds them; with one entry a cell, BUZZ's local maxima."""
    keep, window = cells * each, 7
    held = sink + keep + more + window
    scores = torch.rand(2, 3, held, generator=torch.Generator().manual_seed(held))
    policy = HoneycombPolicy(sink=sink, window=window, keep=keep, threshold=keep, cells=cells)
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
        own = HoneycombPolicy(sink=4, window=8, keep=12, threshold=59, cells=cells)
        assert torch.equal(own.select(72, 0, scores), buzz.select(72, 0, scores))


@pytest.mark.parametrize("layers", ["flat", "rising", "late"])
@pytest.mark.parametrize("number", [1, 3, 30])
def test_layers_share_one_budget(layers, number) -> None:
    policy, _ = Budget(400).policy(HoneycombPolicy(layers=layers, early_window=0.8), 4000)
    each = [policy.for_layer(index, number) for index in range(number)]
    if number > 1:
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
    for options in ({}, {"score_by": "value"}, {"fading": 0.8}):
        cache = EvictionCache(model, HoneycombPolicy(window=8, keep=16, threshold=20, **options))
        model(text, past_key_values=cache)
        kept.append(cache.kept_positions(1))
    assert not torch.equal(kept[0], kept[1]) and not torch.equal(kept[0], kept[2])
