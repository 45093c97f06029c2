"""Keys and values of int8: exact against their own numbers widened, and near the model's."""

from __future__ import annotations

import math

import pytest
import torch
from methods import METHODS
from runs import HEAD_DIM, KV_HEADS, LAYERS, read, refused
from tiny import padded, prompt, tiny
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from baselines import FullPolicy, H2OPolicy, KeyDiffPolicy, StreamingLLMPolicy
from buzz import EvictionCache, ForkedCache, Policy, kernels
from buzz.entries import Entries
from buzz.kernels import cpu, reference
from buzz.store import Store
from evals.run.memory import row_nbytes

IMPLEMENTATIONS = [reference, *[cpu] * cpu.available()]
TOKENS = 60
# Products of a batch are rounded otherwise, and that can tip a number of an entry to the next one.
CLOSE = {"atol": 0.02, "rtol": 0.02}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Vectors of very different sizes, so that a scale of another entry or head shows."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** torch.empty(*shape[:-1], 1).uniform_(-2, 2, generator=generator)
    return torch.randn(*shape, generator=generator) * sizes


def int8(model, policy: Policy, **options) -> EvictionCache:
    return EvictionCache(model, policy, positions="true", dtype="int8", **options)


def held(cache: EvictionCache) -> list[Tensor]:
    """Keys, values and positions of all layers."""
    layers = [(one, one.store) for one in cache.evicting]
    return [
        one.view(t) for one, store in layers for t in (store.keys, store.values, store.positions)
    ]


# --- kernels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [16, 64, 7])
@pytest.mark.parametrize("own", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_number_is_off_by_more_than_half_its_scale(dim, own, dtype) -> None:
    vectors = drawn(2, 5, 3, dim).transpose(1, 2).to(dtype)
    vectors[0, 1, 2] = 0
    entries = own.quantized(vectors)
    assert entries.dtype == torch.int8 and entries.shape == (2, 3, 5, dim + 4)
    assert kernels.width(entries) == dim
    wide = kernels.widened(entries)
    scale = vectors.float().abs().amax(-1, keepdim=True) / 127
    assert ((wide - vectors.float()).abs() <= scale * 0.50001).all()
    assert torch.equal(entries, reference.quantized(vectors))  # rounded alike, bit by bit
    assert (wide[0, 1, 2] == 0).all()


@pytest.mark.parametrize("wrong", [math.inf, math.nan])
@pytest.mark.parametrize("own", IMPLEMENTATIONS)
def test_what_is_no_number_does_not_become_one(wrong, own) -> None:
    vectors = drawn(1, 1, 2, 16)
    vectors[..., 0, 3] = wrong
    wide = kernels.widened(own.quantized(vectors))
    assert not wide[..., 0, :].isfinite().any() and wide[..., 1, :].isfinite().all()


@pytest.mark.parametrize("own", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (20, 36)])
def test_attention_is_that_of_the_widened_entries(own, dtype, dim, value_dim) -> None:
    """Of views inside longer buffers, with several query heads on one key head."""
    batch, heads, kv_heads, n = 2, 6, 2, 150
    keys = reference.quantized(drawn(batch, kv_heads, n + 9, dim))[:, :, 5 : n + 5]
    values = reference.quantized(drawn(batch, kv_heads, n + 9, value_dim, seed=1))[:, :, 3 : n + 3]
    wide = kernels.widened(keys), kernels.widened(values)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    starts, sinks = torch.tensor([0, 31]), torch.linspace(-1, 2, heads)
    for new in (1, 50):
        query = drawn(batch, heads, new, dim, seed=2).div(20).to(dtype)
        more = {"sinks": sinks, **({"starts": starts} if new == 1 else {"observe": 20})}
        name = "scored_decode" if new == 1 else "scored_prefill"
        output, received = getattr(own, name)(query, keys, values, 0.1, **more)
        expected = getattr(reference, name)(query.float(), *wide, 0.1, **more)
        size = wide[1].abs().max()
        assert output.dtype == dtype
        torch.testing.assert_close(
            output.float() / size, expected[0] / size, atol=tolerance, rtol=0
        )
        torch.testing.assert_close(received, expected[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("own", IMPLEMENTATIONS)
def test_a_step_in_one_call_writes_and_attends_the_same(own) -> None:
    query, key, value = drawn(2, 4, 1, 16), drawn(2, 2, 1, 16, seed=1), drawn(2, 2, 1, 16, seed=2)
    keys, values = (reference.quantized(drawn(2, 2, 30, 16, seed=n)) for n in (3, 4))
    positions, scores = torch.zeros(2, 2, 30, dtype=torch.int32), torch.zeros(2, 2, 30)
    bounds = torch.tensor([[3, 7], [20, 20], [90, 95]])
    output = own.step(query / 50, key, value, keys, values, positions, scores, bounds, 0.1, True)
    assert torch.equal(keys[:, :, 19:20], reference.quantized(key))
    assert torch.equal(values[:, :, 19:20], reference.quantized(value))
    part = (kernels.widened(t[:, :, :20]) for t in (keys, values))
    expected, received = reference.scored_decode(query / 50, *part, 0.1, bounds[0])
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(scores[:, :, :20], received, atol=1e-5, rtol=1e-5)


# --- caches --------------------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3-mixed", "gpt-oss"])
def test_logits_are_near_and_what_ignores_content_keeps_the_same(family, attention) -> None:
    model, ids = tiny(family, attention), prompt(TOKENS)
    policy = StreamingLLMPolicy(sink=2, window=20)
    caches = EvictionCache(model, policy, positions="true"), int8(model, policy)
    logits = [model(ids[:, :40], past_key_values=cache).logits for cache in caches]
    assert torch.equal(*logits)  # a prompt is attended as it came
    for step in (ids[:, 40:50], *ids[:, 50:].split(1, 1)):  # a chunk, then tokens
        logits = [model(step, past_key_values=cache).logits for cache in caches]
        difference = (logits[0] - logits[1]).abs().max()
        assert 0 < difference < 0.2 * logits[0].std(), difference
    layer = next(n for n, one in enumerate(caches[0].layers) if one in caches[0].evicting)
    assert torch.equal(*(cache.kept_positions(layer) for cache in caches))
    for plain, own in zip(caches[0].evicting, caches[1].evicting, strict=True):
        exact = plain.view(plain.store.values)  # of the first layer; later ones see the difference
        wide = kernels.widened(own.view(own.store.values))
        assert (wide - exact).abs().max() < 0.1 * exact.abs().max()


@torch.inference_mode()
@pytest.mark.parametrize("name", sorted(METHODS))
def test_methods_judge_what_is_held_and_a_row_of_a_pass_is_as_alone(name) -> None:
    """Beside a full cache of the model's type, in one prefill; padded, too."""
    model = tiny()
    ids = [prompt(TOKENS), prompt(TOKENS - 9, seed=1)]
    policy = METHODS[name]
    forked = ForkedCache(
        model, [[FullPolicy(), policy]] * 2, positions="true", dtype=[None, "int8"]
    )
    both = padded(ids)
    alone = [int8(model, policy) for _ in ids]
    model(**both, past_key_values=forked)
    for own, cache in zip(ids, alone, strict=True):
        model(own, past_key_values=cache)
    for number, step in enumerate(prompt(12, seed=2).split(1, 1)):
        at = torch.tensor([[own.shape[1] + number] for own in ids for _ in range(2)])
        rows = model(step.expand(4, 1), position_ids=at, past_key_values=forked).logits
        for prompted, cache in enumerate(alone):
            own = model(step, past_key_values=cache).logits[0]
            torch.testing.assert_close(rows[2 * prompted + 1], own, **CLOSE)
    assert forked.forks[0].evicting[0].store.keys.dtype == torch.float32
    for prompted, cache in enumerate(alone):
        fork = forked.forks[2 * prompted + 1]
        assert fork.lengths == cache.lengths and fork.nbytes() == cache.nbytes()
        for ours, theirs in zip(fork.evicting, cache.evicting, strict=True):
            assert ours.store.keys.dtype == theirs.store.keys.dtype == torch.int8
            assert torch.equal(ours.view(ours.store.positions), theirs.view(theirs.store.positions))


@torch.inference_mode()
def test_scales_move_and_are_copied_with_their_entries() -> None:
    """Kept entries are those of the full cache bit by bit, after evictions, growth and copies."""
    model, ids = tiny(), prompt(200)
    whole, cache = int8(model, FullPolicy()), int8(model, StreamingLLMPolicy(sink=4, window=30))
    twin = None
    for first in range(0, 200, 40):
        part = ids[:, first : first + 40]
        for one in (whole, cache):
            model(part, past_key_values=one)
            for token in ids[:, :3].split(1, 1):
                model(token, past_key_values=one)
        if first == 80:
            twin, kept = cache.copy(), [t.clone() for t in held(cache)]
    assert twin is not None
    assert all(map(torch.equal, held(twin), kept))  # whatever the other did since
    twin.batch_select_indices([0, 0])
    for t, before in zip(held(twin), kept, strict=True):
        assert torch.equal(t, before.expand(2, *before.shape[1:]))
    layer, full = cache.evicting[0], whole.evicting[0]  # whose inputs are the tokens alone
    where = layer.view(layer.store.positions).long()
    for name in ("keys", "values"):
        own, every = (one.view(getattr(one.store, name)) for one in (layer, full))
        assert torch.equal(own, every.gather(2, where[..., None].expand_as(own)))


@torch.inference_mode()
def test_a_held_prompt_in_chunks_and_padding_give_what_it_gives_whole() -> None:
    model, ids = tiny(), [prompt(TOKENS), prompt(TOKENS - 25, seed=1)]
    policy, both = H2OPolicy(heavy=8, recent=8), padded(ids)
    alone = [int8(model, policy) for _ in ids]
    logits = [
        model(own, past_key_values=c).logits[:, -1] for own, c in zip(ids, alone, strict=True)
    ]
    batch, chunks = int8(model, policy), int8(model, policy, hold_until=TOKENS)
    found = model(**both, past_key_values=batch).logits[:, -1]
    for part in ids[0].split(16, 1):
        last = model(part, past_key_values=chunks).logits[:, -1]
    for number, step in enumerate([None, *prompt(20, seed=3).split(1, 1)]):
        if step is not None:
            at = torch.tensor([[own.shape[1] + number - 1] for own in ids])
            logits = [model(step, past_key_values=cache).logits[:, -1] for cache in alone]
            found = model(step.expand(2, 1), position_ids=at, past_key_values=batch).logits[:, -1]
            last = model(step, past_key_values=chunks).logits[:, -1]
        torch.testing.assert_close(found, torch.cat(logits), **CLOSE)
        torch.testing.assert_close(last, logits[0], **CLOSE)
    assert torch.equal(chunks.kept_positions(1), alone[0].kept_positions(1))


@torch.inference_mode()
def test_bytes_are_those_of_the_numbers_and_their_scales() -> None:
    model, ids = tiny(), prompt(TOKENS)
    layers, heads, dim = 3, 2, 16
    cache = int8(model, H2OPolicy(heavy=8, recent=8))
    model(ids, past_key_values=cache)
    entry = layers * heads * 2 * (dim + 4)
    assert cache.entry_nbytes == entry == row_nbytes(model, 1, 1, "int8")
    assert row_nbytes(model, 1, 1) == layers * heads * 2 * dim * 4
    assert cache.nbytes() == 16 * entry
    slots = sum(one.store.capacity for one in cache.evicting)
    assert cache.nbytes(allocated=True) == slots * (entry // layers + heads * (4 + 4))
    cache.reset()
    model(ids, past_key_values=cache)  # in the buffers of before
    assert cache.nbytes() == 16 * entry


def test_a_policy_reads_widened_vectors() -> None:
    keys, values = drawn(1, 2, 9, 16), drawn(1, 2, 9, 16, seed=1)
    positions = torch.arange(9, dtype=torch.int32).expand(1, 2, 9)
    store = Store(keys, values, positions, None, 9).quantized(2)
    entries = Entries(store, slice(None), 7, 9)
    assert torch.equal(entries.keys, kernels.widened(reference.quantized(keys[:, :, 2:])))
    assert torch.equal(entries.values, kernels.widened(reference.quantized(values[:, :, 2:])))
    plain = Entries(Store(keys, values, positions, None, 9), slice(None), 7, 9)
    assert plain.keys.data_ptr() == keys[:, :, 2:].data_ptr()  # no copy where none is due
    scores = KeyDiffPolicy().score(entries), KeyDiffPolicy().score(plain)
    torch.testing.assert_close(*scores, atol=0.02, rtol=0)


# --- runs ----------------------------------------------------------------------------------------


def test_rows_of_both_types_are_of_one_setting_and_compared_with_the_full_cache(go) -> None:
    files = {}
    for dtype in ("null", "int8"):
        for method in ("h2o", "full"):
            given = "method=" + method, "budget=0.25", "kl=true"
            files[method, dtype] = go(*given, f"cache.dtype={dtype}", "cache.positions=true")
    names = [file.name for file in files.values()]
    assert names == [
        "h2o@0.25,positions=true.jsonl",
        "full.jsonl",
        "h2o@0.25,positions=true,dtype=int8.jsonl",
        "full,dtype=int8.jsonl",
    ]
    assert len({file.parent for file in files.values()}) == 1
    pairs = list(zip(*(read(files["h2o", dtype]) for dtype in ("null", "int8")), strict=True))
    ratio = (HEAD_DIM + 4) / (4 * HEAD_DIM)
    for plain, own in pairs:
        assert own["kv_nbytes_peak"] == plain["kv_nbytes_peak"] * ratio
        assert own["kv_entries_peak"] == plain["kv_entries_peak"]
        entry = LAYERS * KV_HEADS * 2 * (HEAD_DIM + 4)
        assert own["kv_nbytes_peak"] == own["kv_entries_peak"] * entry
        assert own["allocated_nbytes"] < plain["allocated_nbytes"]
    assert any(own["kl_to_full"] != plain["kl_to_full"] for plain, own in pairs)
    for record in read(files["full", "int8"]):
        assert abs(record["kl_to_full"]) < 0.01


def test_what_cannot_be_is_refused_in_one_line(go) -> None:
    with refused("cache.dtype", "set cache.positions=true"):
        EvictionCache(tiny(), FullPolicy(), dtype="int8")
    with refused("cache.dtype", "choose int8"):
        EvictionCache(tiny(), FullPolicy(), positions="true", dtype="int4")
    with refused("cache.dtype", "one for each"):
        ForkedCache(tiny(), [FullPolicy()] * 2, positions="true", dtype=["int8"])
    with FakeTensorMode(allow_non_fake_inputs=True), refused("cache.dtype", "kernels of CUDA"):
        kernels.implementation(torch.empty(0, dtype=torch.int8, device="cuda"))
    with refused("cache.dtype", "set cache.positions=true"):
        go("method=h2o", "cache.dtype=int8")
