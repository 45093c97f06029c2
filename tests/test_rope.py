"""Moved keys are the keys that the model would have computed at their new positions."""

from __future__ import annotations

import pytest
import torch
from methods import METHODS
from recomputed import Keys
from tiny import FAMILIES, prompt, tiny

from baselines import StreamingLLMPolicy
from buzz import EvictionCache


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "smollm3"])
@pytest.mark.parametrize("name", ["streaming_llm", "h2o", "buzz"])
def test_attention_equals_that_of_recomputed_keys(family, name, monkeypatch) -> None:
    model, policy, layer = tiny(family), METHODS[name], 2
    recorder = Keys(model, layer, monkeypatch)
    cache = EvictionCache(model, policy)
    ids = prompt(90)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        for step, token in enumerate(prompt(99, seed=1)[0]):
            before = cache.evictions
            model(token.view(1, 1), past_key_values=cache)
            if step > 40 and cache.evictions != before:  # look right after an eviction
                break
    kept, store = cache.kept_positions(layer), cache.layers[layer]
    actual = store.view(store.store.keys)
    moved = kept.shape[-1] - policy.num_recent
    layer_type = "full_attention" if family == "gemma3-mixed" else None
    expected = recorder.keys_at(model, kept, cache.get_seq_length(), layer_type)
    if not cache.layers[layer].rope.static:
        # Keys that never moved keep the frequencies that they came with.
        expected[:, :, moved:] = actual[:, :, moved:]
    assert moved > 0
    outputs = [attend(recorder.query, keys, store) for keys in (actual, expected)]
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-4)


def attend(query, keys, layer) -> torch.Tensor:
    values = layer.view(layer.store.values)
    group = query.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
    return torch.nn.functional.scaled_dot_product_attention(query, keys, values)


def test_layers_without_rope_do_not_rotate(monkeypatch) -> None:
    model = tiny("smollm3")
    recorder = Keys(model, 1, monkeypatch)
    projected = []
    recorder.module.k_proj.register_forward_hook(lambda _, __, out: projected.append(out))
    cache = EvictionCache(model, METHODS["h2o"])
    assert cache.layers[1].rope.module is None and cache.layers[0].rope.module is not None
    with torch.no_grad():
        model(prompt(60), past_key_values=cache)
    raw = projected[0].view(1, 60, 2, 16).transpose(1, 2)
    kept = cache.kept_positions(1)
    expected = raw.gather(2, kept[..., None].expand(*kept.shape, 16))
    assert torch.equal(cache.layers[1].view(cache.layers[1].store.keys), expected)


@torch.no_grad()
@pytest.mark.parametrize("family", ["phi3-longrope", "llama-dynamic"])
def test_changed_frequencies_are_noticed_and_a_new_text_begins_with_the_first(family: str) -> None:
    """Wherever the model keeps them: LongRoPE has one buffer, dynamic RoPE brings others."""
    model = tiny(family)
    policy = StreamingLLMPolicy(sink=4, window=30)
    first = []
    for tokens in (50, 90, 50):
        cache = EvictionCache(model, policy)
        model(prompt(50), past_key_values=cache)
        first.append(cache.evicting[0].rope.frequencies().clone())
        for number in range(tokens - 50):
            model(prompt(1, seed=number), past_key_values=cache)
        tables = [table for _, table in cache.evicting[0].rope._history]
        assert len(tables) == 1 if tokens == 50 else len(tables) > 1
        torch.testing.assert_close(tables[0], first[0])
        torch.testing.assert_close(tables[-1], cache.evicting[0].rope.frequencies())
    torch.testing.assert_close(first[2], first[0])
