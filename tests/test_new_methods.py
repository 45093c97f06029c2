"""TOVA and SnapKV against their papers' formulas, on a model's own attention weights."""

from __future__ import annotations

import pytest
import torch
from tiny import prompt, tiny
from torch import Tensor
from transformers import DynamicCache

from baselines import SnapKVPolicy, TOVAPolicy
from buzz import Budget, ConfigError, EvictionCache


def attention_of(ids: Tensor) -> list[Tensor]:
    """Stock attention weights of each layer, [heads, query, key]."""
    with torch.no_grad():
        out = tiny("llama", "eager")(ids, output_attentions=True, past_key_values=DynamicCache())
    return [weights[0] for weights in out.attentions]


def kept_after(ids: Tensor, policy, chunks: list[int] | None = None, **options) -> list[Tensor]:
    """Token indices that each layer holds after a prompt, [kv_heads, held]."""
    model = tiny("llama")
    cache = EvictionCache(model, policy, **options)
    with torch.no_grad():
        for part in ids.split(chunks or [ids.shape[1]], dim=1):
            model(part, past_key_values=cache)
    return [cache.kept_positions(layer)[0] for layer in range(3)]


def test_tova_keeps_what_the_last_query_attends() -> None:
    ids = prompt(60)
    kept = kept_after(ids, TOVAPolicy(size=20))
    for weights, held in zip(attention_of(ids), kept, strict=True):
        best = weights[:, -1].mean(0).topk(20).indices.sort().values
        assert torch.equal(held, best.expand(2, -1))


def test_tova_drops_the_least_attended_even_if_it_is_the_newest() -> None:
    scores = torch.tensor([[[0.6, 0.1, 0.2, 0.1], [0.0, 0.4, 0.1, 0.1]]])
    assert TOVAPolicy(size=3).select(4, 0, scores).tolist() == [[[0, 1, 2]]]
    assert TOVAPolicy(size=2).select(4, 0, scores).tolist() == [[[0, 1]]]


@pytest.mark.parametrize("kernel", [1, 4, 5])
@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_snapkv_keeps_what_the_window_attends(kernel, pooling) -> None:
    ids, window, capacity = prompt(70), 8, 30
    policy = SnapKVPolicy(capacity=capacity, window=window, kernel=kernel, pooling=pooling)
    for weights, held in zip(attention_of(ids), kept_after(ids, policy), strict=True):
        votes = weights[:, -window:, :-window].sum(1).view(2, 2, -1).sum(1).tolist()
        for vote, own in zip(votes, held.tolist(), strict=True):
            near = [
                [
                    vote[j] if 0 <= j < 62 else 0.0
                    for j in range(i - kernel // 2, i - kernel // 2 + kernel)
                ]
                for i in range(62)
            ]
            pooled = [max(n) if pooling == "max" else sum(n) for n in near]
            best = sorted(range(62), key=pooled.__getitem__)[window - capacity :]
            threshold = min(pooled[i] for i in best)
            assert own[-window:] == list(range(62, 70)) and len(own) == capacity
            assert own == sorted(own) and own[capacity - window - 1] < 62
            # Neighbours share a maximum, so any of the equals at the limit may stay.
            assert all(pooled[i] >= threshold - 1e-5 for i in own[:-window])


def test_snapkv_evicts_once() -> None:
    policy = SnapKVPolicy(capacity=30, window=8)
    assert policy.lengths([70, 1, 1, 50, 1]) == [30, 31, 32, 82, 83]
    assert policy.lengths([20, 1, 50]) == [20, 21, 71]  # it fits: nothing is ever evicted


def test_snapkv_of_a_chunked_prompt() -> None:
    ids, policy = prompt(70), SnapKVPolicy(capacity=30, window=8)
    whole = kept_after(ids, policy)
    for chunks in ([35, 35], [50, 12, 8]):
        held_back = kept_after(ids, policy, chunks, hold_until=70)
        assert all(torch.equal(a, b) for a, b in zip(whole, held_back, strict=True))


@pytest.mark.parametrize("by", ["peak", "mean"])
def test_snapkv_has_its_budget_at_the_prompts_end_and_grows(by) -> None:
    policy, _ = Budget(100, by).policy(SnapKVPolicy(), prompt=400)
    assert policy.lengths([400] + [1] * 50) == list(range(100, 151))
    assert policy.window == 32


def test_snapkv_narrows_its_window_for_a_tight_budget_unless_it_is_fixed() -> None:
    assert SnapKVPolicy().fit(40) == SnapKVPolicy(capacity=40, window=20)
    fixed = SnapKVPolicy(capacity=9, window=2)
    assert fixed.fit(40, frozenset({"capacity"})) == fixed
    with pytest.raises(ConfigError, match="^budget="):
        SnapKVPolicy().fit(1)
    with pytest.raises(ConfigError, match="^budget=32: leaves 0 entries for method.capacity"):
        SnapKVPolicy().fit(32, frozenset({"window"}))


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: TOVAPolicy(size=0), "method.size"),
        (lambda: SnapKVPolicy(window=0), "method.window"),
        (lambda: SnapKVPolicy(kernel=0), "method.kernel"),
        (lambda: SnapKVPolicy(capacity=32), "method.capacity"),
        (lambda: SnapKVPolicy(pooling="sum"), "method.pooling"),
        (lambda: TOVAPolicy().fit(0), "budget"),
    ],
)
def test_bad_values_are_named(make, field) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert caught.value.field == field
