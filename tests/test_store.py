"""Buffers: written in place, moved rarely, bounded whatever the prompt."""

from __future__ import annotations

import copy

import pytest
import torch
from methods import METHODS, every_method
from one_layer import feed, finish, held, projecting
from tiny import prompt, tiny

from buzz import EvictionCache
from buzz.eviction import Group
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["streaming_llm", "h2o", "h2o-mean", "buzz", "expected_attention"])
def test_rows_that_evict_as_one_hold_what_each_would_alone(name: str, dtype: torch.dtype) -> None:
    """Three prompts of three lengths; halfway, rows change places, and one is there twice."""
    random = torch.Generator().manual_seed(0)
    rotary = tiny("llama").get_decoder().rotary_emb
    policy, paddings, steps = METHODS[name], [9, 0, 4], [40, *[1] * 60]

    def layer(groups: list[Group]) -> EvictionLayer:
        made = EvictionLayer(policy, Rope(rotary))
        made.groups = groups
        return made

    kinds = [Group([1], 0, 0), Group([2], 4, 0), Group([0], 9, 0)]
    batch = layer(kinds)
    alone = [layer([Group([0])]) for _ in paddings]
    for number, new in enumerate(steps):
        if number == 30:
            batch.batch_select_indices(torch.tensor([2, 0, 2]))
            alone = [alone[2], alone[0], copy.deepcopy(alone[2])]
            paddings = [4, 9, 4]
        key, value, query = torch.randn(3, 3, 2, new, 16, generator=random).to(dtype)
        cut = paddings if number == 0 else [0, 0, 0]
        feed(batch, key, value, query)
        given = torch.rand(held(batch).shape, generator=random)
        lengths = batch.lengths
        finish(batch, given if batch.wants_scores else None)
        for row, own in enumerate(alone):
            one = slice(row, row + 1)
            feed(own, *(tensor[one, :, cut[row] :] for tensor in (key, value, query)))
            mine = given[one, :, given.shape[-1] - lengths[row] :]
            finish(own, mine if own.wants_scores else None)
    assert len(batch.groups) == 2 and batch.evictions == [own.evictions[0] for own in alone]
    for row, own in enumerate(alone):
        assert batch.lengths[row] == own.lengths[0]
        for tensor, due in zip(batch.store.tensors(), own.store.tensors(), strict=True):
            got = batch.view(tensor)[row, :, -own.lengths[0] :]
            torch.testing.assert_close(got, own.view(due)[0], atol=1e-6, rtol=1e-6)


def test_rows_of_one_store_are_joined_without_a_copy_unless_somebody_else_reads_them() -> None:
    def store(*held: float) -> Store:
        entries = torch.tensor(held)[None, None, :, None]
        return Store(entries, entries, entries[..., 0].int(), None, len(held))

    whole = Store.unwritten(store(0.0), 8, rows=2)
    rows = [whole.row(0).cleared(), whole.row(1).cleared()]
    for row, own in zip(rows, ([1.0, 2.0, 3.0], [4.0, 5.0, 6.0]), strict=True):
        row.append(*store(*own).tensors())
    due = [[[2.0, 3.0]], [[5.0, 6.0]]]
    joined = Store.joined(rows, 2)
    assert joined is whole and whole.keys[:, :, 1 : whole.end, 0].tolist() == due
    copies = [Store.joined(rows[::-1], 2), Store.joined([rows[0].shared(), rows[1]], 2)]
    assert copies[0].keys[:, :, :2, 0].tolist() == due[::-1]
    assert copies[1] is not whole and copies[1].keys[:, :, :2, 0].tolist() == due
    assert copies[1].end == 2 and not copies[1].keys[:, :, 2:].any()
