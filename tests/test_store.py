"""Buffers: written in place, moved rarely, bounded whatever the prompt."""

from __future__ import annotations

import pytest
import torch
from methods import METHODS, every_method
from one_layer import feed, finish, projecting
from tiny import prompt, tiny

from buzz import EvictionCache
from buzz.layer import EvictionLayer
from buzz.rope import Rope
from buzz.store import Store, with_spare


def layer_of(policy) -> EvictionLayer:
    return EvictionLayer(policy, Rope(None), module=projecting(2))


def step(layer: EvictionLayer, new: int, heads: int = 2) -> None:
    keys = torch.randn(1, heads, new, 4)
    feed(layer, keys, keys, keys)
    assert layer.store is not None
    entries = layer.view(layer.store.positions)
    finish(layer, torch.rand(entries.shape) if layer.wants_scores else None)


@every_method
def test_a_token_costs_few_copied_entries(policy, monkeypatch) -> None:
    """No step copies the cache, but for the slide when spare slots run out: amortised, a few."""
    copied = []
    with_room = Store.with_room

    def counting(self, start, new, idle):
        moved = not (self.owned and self.end + new <= self.capacity)
        copied.append(self.end - start if moved else 0)
        return with_room(self, start, new, idle)

    monkeypatch.setattr(Store, "with_room", counting)
    layer = layer_of(policy)
    for new in [100] + [1] * 1000:
        step(layer, new)
    assert sum(copied[1:]) / 1000 < 10
    assert sum(count > 0 for count in copied) < 1000 / 10


@every_method
def test_buffers_are_bounded_after_any_prompt(policy) -> None:
    if policy.name == "full":
        return
    layer = layer_of(policy)
    for new in [5_000] + [1] * 30:
        step(layer, new)
    assert layer.store is not None
    assert layer.store.capacity <= 2 * with_spare(max(policy.lengths([5_000] + [1] * 30)[1:]))
    assert layer.store.owned  # nothing keeps the prompt's tensors alive


@pytest.mark.parametrize("name", ["streaming_llm", "buzz", "h2o"])
def test_chunked_prefill_with_eviction_needs_memory_for_a_chunk(name) -> None:
    """A prompt beyond the model's 512 positions, in chunks: buffers stay the size of two chunks."""
    model, policy = tiny("llama"), METHODS[name]
    cache, largest = EvictionCache(model, policy), 0
    with torch.no_grad():
        for chunk in prompt(2_048).split(64, dim=1):
            logits = model(chunk, past_key_values=cache).logits
            largest = max(largest, *(layer.store.capacity for layer in cache.layers))
    assert logits.isfinite().all()
    assert cache.lengths[0] == policy.lengths([64] * 32)[-1]
    assert largest <= with_spare(2 * 64)


def test_allocated_bytes_count_everything() -> None:
    layer = layer_of(METHODS["h2o"])
    step(layer, 200)
    store = layer.store
    assert store is not None and store.scores is not None
    per_slot = 2 * (4 + 4) * 4 + 2 * 4 + 2 * 4  # two heads: key and value, position, score
    assert layer.nbytes(allocated=True) == store.capacity * per_slot
    assert layer.nbytes() == 24 * 2 * (4 + 4) * 4 == layer.entry_nbytes * 24
