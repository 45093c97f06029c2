"""Copies of a cache: each goes on as if it were alone, and costs nothing until it does."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from methods import METHODS
from tiny import prompt, tiny
from torch import Tensor
from transformers import PreTrainedModel

from baselines import (
    KVzipPolicy,
)
from buzz import EvictionCache

KINDS = ("full", "streaming_llm", "h2o", "snapkv", "buzz", "expected_attention")


def feed(model: PreTrainedModel, cache: EvictionCache, steps: Sequence[Tensor], pad: int) -> Tensor:
    """Logits [steps, rows, vocab]; the first row has `pad` tokens of padding."""
    logits = []
    for ids in steps:
        seen = cache.get_seq_length() + ids.shape[1]
        mask = torch.ones(len(ids), seen, dtype=torch.int64)
        mask[0, :pad] = 0
        with torch.inference_mode():
            logits.append(model(ids, attention_mask=mask, past_key_values=cache).logits[:, -1])
    return torch.stack(logits)


def tokens(count: int, seed: int) -> list[Tensor]:
    return list(prompt(count, batch=2, seed=seed).split(1, dim=1))


@pytest.mark.parametrize(
    ("family", "method", "dtype"),
    [
        *(("llama", method, torch.float32) for method in KINDS),
        # residents' keys are kept as they came
        ("llama", "buzz", torch.bfloat16),
        ("llama-dynamic", "buzz", torch.float32),
        # layers with a window of their own
        ("gemma3-mixed", "h2o", torch.float32),
    ],
)
def test_both_go_on_as_if_alone(family: str, method: str, dtype: torch.dtype) -> None:
    """By turns, after evictions, and with padding."""
    model = tiny(family, dtype=dtype)
    before = [prompt(40, batch=2), *tokens(3, 1)]
    questions = [[prompt(7, batch=2, seed=seed), *tokens(5, seed)] for seed in (2, 3)]
    alone = []
    for question in questions:
        cache = EvictionCache(model, METHODS[method])
        feed(model, cache, before, 5)
        alone.append((feed(model, cache, question, 5), cache))

    cache = EvictionCache(model, METHODS[method])
    feed(model, cache, before, 5)
    twin = cache.copy()
    assert [one.store.keys.data_ptr() for one in twin.evicting] == [
        one.store.keys.data_ptr() for one in cache.evicting
    ]
    assert twin.trace() == cache.trace()
    for step, both in enumerate(zip(*questions, strict=True)):  # by turns
        for ids, one, (logits, _) in zip(both, (cache, twin), alone, strict=True):
            assert torch.equal(feed(model, one, [ids], 5)[0], logits[step])
    for one, (_, other) in zip((cache, twin), alone, strict=True):
        assert one.evictions == other.evictions and one.trace() == other.trace()
        assert torch.equal(one.kept_positions(-1), other.kept_positions(-1))


@pytest.mark.parametrize("family", ["llama", "gemma3-mixed"])
@pytest.mark.parametrize(
    "rows",
    [[2, 0], [False, True, True], [-1, -3], torch.tensor([1]), torch.tensor([True] * 3)],
    ids=str,
)
def test_rows_are_chosen_as_of_a_stock_cache(family: str, rows) -> None:
    model, ids = tiny(family), prompt(40, 3)
    chosen = torch.arange(3)[rows]
    cache, alone = (EvictionCache(model, METHODS["h2o"]) for _ in range(2))
    with torch.no_grad():
        model(ids, past_key_values=cache)
        cache.batch_select_indices(rows)
        model(ids[chosen], past_key_values=alone)
        step = prompt(1, len(chosen), seed=1)
        found, want = (model(step, past_key_values=one).logits for one in (cache, alone))
    torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-4)
    assert torch.equal(cache.kept_positions(1), alone.kept_positions(1))
    before = cache.nbytes()
    with pytest.raises(IndexError):
        cache.batch_select_indices(torch.tensor([5]))
    assert cache.nbytes() == before and cache.evicting[0].batch_size == len(chosen)


@pytest.mark.parametrize("family", ["llama", "gemma3-mixed"])
@pytest.mark.parametrize("tokens", [0, 5, 40])
def test_no_layer_is_cropped(family: str, tokens: int) -> None:
    model = tiny(family)
    cache = EvictionCache(model, METHODS["h2o"])
    if tokens:
        model(prompt(tokens), past_key_values=cache)
    with pytest.raises(NotImplementedError, match="cannot be cropped"):
        cache.crop(-1)


@pytest.mark.parametrize("first", ["cache", "twin"])
def test_a_reset_leaves_the_other(first: str) -> None:
    model, question = tiny(), tokens(6, 2)
    cache = EvictionCache(model, METHODS["h2o"])
    feed(model, cache, [prompt(40, batch=2)], 0)
    expected = feed(model, cache.copy(), question, 0)
    twin = cache.copy()
    gone, other = (cache, twin) if first == "cache" else (twin, cache)
    gone.reset()
    feed(model, gone, [prompt(50, batch=2, seed=9)], 0)  # into buffers that nobody else reads
    torch.testing.assert_close(feed(model, other, question, 0), expected, rtol=0, atol=0)


def test_copies_of_a_copy() -> None:
    model, question = tiny(), tokens(6, 2)
    cache = EvictionCache(model, METHODS["buzz"])
    feed(model, cache, [prompt(40, batch=2)], 0)
    copies = [cache.copy() for _ in range(2)]
    copies.append(copies[0].copy())
    found = [feed(model, one, question, 0) for one in (*copies, cache)]
    assert all(torch.equal(one, found[0]) for one in found)


def test_a_prompt_that_is_to_be_read_twice_belongs_to_one_of_them() -> None:
    """Copied between two chunks: neither repeats what the other was fed."""
    model, policy = tiny(), KVzipPolicy(capacity=12, chunk=16)
    first, *others = prompt(100).split(20, dim=1)
    cache, alone = (EvictionCache(model, policy, hold_until=60) for _ in range(2))
    feed(model, cache, [first], 0)
    other = cache.copy()
    feed(model, cache, others[:2], 0)
    feed(model, other, others[2:], 0)
    feed(model, alone, [first, *others[2:]], 0)
    assert torch.equal(other.kept_positions(1), alone.kept_positions(1))
    assert not torch.equal(other.kept_positions(1), cache.kept_positions(1))
