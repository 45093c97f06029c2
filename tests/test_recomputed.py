"""Every method, at both kinds of positions, against a pass over the same text without a cache."""

from __future__ import annotations

import pytest
import torch
from methods import METHODS, SEES_ALL, both_positions, core_methods, every_method, in_turn
from recomputed import check, check_long_decode, recompute, record
from tiny import prompt, tiny
from transformers import DynamicCache

from baselines import SnapKVEveryPolicy
from buzz import EvictionCache
from buzz.adapter import attention_of
from buzz.layer import EvictionLayer

# Frequencies that change are below; Gemma's other layers have a window of their own.
FAMILIES = ["llama-mqa", "llama3", "llama-yarn", "qwen3", "smollm3", "phi3-partial"]
FAMILIES += ["cohere-interleaved", "gpt-oss"]


SECOND_TURN = [60, *[1] * 20, 13, *[1] * 5]


@every_method
@both_positions
def test_prompts_chunks_and_tokens(positions, policy) -> None:
    """Two rows, one of them padded: a prompt, tokens, a chunk as of a second turn, tokens."""
    record(tiny("llama"), policy, [0, 7], SECOND_TURN, positions=positions).check("llama")


@both_positions
def test_queries_that_attended_other_entries_do_not_judge(positions) -> None:
    """It evicts in every fourth step, and would ask the last eight queries."""
    policy = SnapKVEveryPolicy(size=24, every=4, window=8)
    record(tiny("llama"), policy, [0, 7], SECOND_TURN, positions=positions).check("llama")


@in_turn("cache")
@pytest.mark.parametrize("family", ["llama", "gpt-oss"])
def test_by_eager_attention(family, policy, positions) -> None:
    """Also of models with attention sinks, which have no other."""
    recorder = record(tiny(family, "eager"), policy, [0, 7], SECOND_TURN, positions=positions)
    recorder.check(family)


@both_positions
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["streaming_llm", "h2o", "buzz", "tova", SEES_ALL])
def test_families(family, positions, name) -> None:
    steps = [50, *[1] * 15]
    record(tiny(family), METHODS[name], [3], steps, positions=positions).check(family)


@both_positions
@pytest.mark.parametrize("name", ["streaming_llm", "h2o", "buzz", "buzz_fast", "snapkv"])
def test_a_prompt_held_back_in_chunks(positions, name) -> None:
    steps = [21, 30, 1, 4, *[1] * 15]
    options = {"positions": positions, "hold_until": 56, "logn_base": 16.0}
    recorder = record(tiny("llama"), METHODS[name], [0, 9, 0], steps, **options)
    recorder.check("llama")


@in_turn("true")
def test_rows_that_change_places(policy, positions) -> None:
    recorder = record(tiny("llama"), policy, [0, 5, 9], [40, *[1] * 10], positions=positions)
    for rows in ([2, 0, 0, 1], [3, 3], [0, 1]):
        recorder.cache.batch_select_indices(torch.tensor(rows))
        recorder.select(rows)
        for token in prompt(9, batch=len(rows), seed=len(rows)).split(1, dim=1):
            recorder.step(token)
    recorder.check("llama")


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_at_true_positions_no_key_changes(policy, dtype, monkeypatch) -> None:
    """To the bit, however often its entry was moved to another slot."""
    model, arrived = tiny("llama", dtype=dtype), []
    cache = EvictionCache(model, policy, positions="true")
    update = EvictionLayer.update

    def noting(self, keys, values, *args, **kwargs):
        if self is cache.layers[1]:
            arrived.append(keys.clone())
        return update(self, keys, values, *args, **kwargs)

    monkeypatch.setattr(EvictionLayer, "update", noting)
    with torch.no_grad():
        for part in prompt(100).split([50, *[1] * 30, 20], dim=1):
            model(part, past_key_values=cache)
    layer, kept = cache.layers[1], cache.kept_positions(1)
    expected = torch.cat(arrived, 2).gather(2, kept[..., None].expand(*kept.shape, 16))
    assert torch.equal(layer.view(layer.store.keys), expected)


@pytest.mark.parametrize("family", ["llama-dynamic", "phi3-longrope", "gemma3-mixed"])
@pytest.mark.parametrize("name", ["streaming_llm", "h2o", "buzz"])
@pytest.mark.filterwarnings("ignore:the text grows past")
def test_true_positions_are_a_stock_cache_with_the_evicted_hidden(family, name) -> None:
    """Also where frequencies change: keys keep the rotation that they came with, as there."""
    model, stock, policy = tiny(family), tiny(family), METHODS[name]
    cache, whole = EvictionCache(model, policy, positions="true"), DynamicCache(config=model.config)
    masks: dict[int, torch.Tensor] = {}

    def masked(module, args, kwargs):
        mask = masks.get(module.layer_idx)
        return (args, kwargs) if mask is None else (args, {**kwargs, "attention_mask": mask})

    evicting = [i for i, layer in enumerate(cache.layers) if isinstance(layer, EvictionLayer)]
    for index in evicting:
        attention = attention_of(stock.get_decoder(), index)
        attention.register_forward_pre_hook(masked, with_kwargs=True)
    end = 0
    with torch.no_grad():
        for part in prompt(110).split([50, *[1] * 40, 12, *[1] * 8], dim=1):
            start, end = end, end + part.shape[1]
            for index in evicting:
                visible = torch.ones(4, end, dtype=torch.bool)
                if start:
                    visible[:, :start] = False
                    kept = cache.kept_positions(index)[0].repeat_interleave(2, 0)
                    visible.scatter_(1, kept, True)
                causal = torch.ones(end, end, dtype=torch.bool).tril()[start:]
                masks[index] = (visible[:, None] & causal)[None]
            expected = stock(part, past_key_values=whole).logits
            actual = model(part, past_key_values=cache).logits
            torch.testing.assert_close(actual, expected, atol=2e-4, rtol=2e-4)
    assert cache.evictions[0] > 1


def test_a_wrong_number_would_be_noticed() -> None:
    recorder = record(tiny("llama"), METHODS["h2o"], [0], [60, 1, 1])
    (text,) = recorder.texts
    with pytest.raises(AssertionError):
        check("llama", text, METHODS["h2o"], "true")
    with pytest.raises(AssertionError):
        check("llama", text, METHODS["tova"])
    text.logits[-1][0, 5] += 1e-2
    with pytest.raises(AssertionError):
        recorder.check("llama")


@every_method
def test_bfloat16_over_a_long_decode(policy) -> None:
    check_long_decode(policy, torch.bfloat16, 0.04)


@core_methods
def test_float16_over_a_long_decode(policy) -> None:
    check_long_decode(policy, torch.float16, 0.005)


@both_positions
@pytest.mark.parametrize("name", ["streaming_llm", "h2o", "buzz"])
@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.1), (torch.float16, 0.015)])
def test_half_precision_where_rows_change_places(positions, name, dtype, error) -> None:
    model = tiny("llama", dtype=dtype)
    steps = [40, *[1] * 12]
    recorder = record(model, METHODS[name], [0, 9, 9, 0], steps, positions=positions)
    rows = [2, 1, 3, 0, 1]
    recorder.cache.batch_select_indices(torch.tensor(rows))
    recorder.select(rows)
    for token in prompt(12, batch=len(rows), seed=9).split(1, dim=1):
        recorder.step(token)
    for text in recorder.texts:
        expected, _ = recompute("llama", text, positions)
        difference = (torch.cat(text.logits).float() - expected).abs().max()
        assert difference < error * expected.abs().max()
