"""Bytes are those of all layers that hold keys and values, of those that evict apart."""

from __future__ import annotations

import copy

import pytest
import torch
from methods import METHODS
from tiny import FAMILIES, from_config, prompt, tiny

from baselines import FullPolicy, H2OPolicy, PyramidKVPolicy
from buzz import EvictionCache, Policy
from evals.run.generate import generate, left_padded
from evals.run.memory import row_nbytes
from evals.run.models import byte_tokenizer
from evals.run.read import read

WINDOW = 16  # of gemma3-mixed's first layer, which holds one less
ENTRY = 2 * 2 * 16 * 4  # bytes of a layer's entry: keys and values, 2 heads, float32
TOKENIZER = byte_tokenizer()
TOKENIZER.eos_token = None

methods = pytest.mark.parametrize(
    "policy", [policy for policy in METHODS.values() if not policy.needs_repetition], ids=str
)


def gemma(window: int, *kinds: str):
    config = copy.deepcopy(FAMILIES["gemma3-mixed"])
    config.sliding_window, config.num_hidden_layers = window, len(kinds)
    config.max_position_embeddings = 2048
    config.layer_types = [f"{kind}_attention" for kind in kinds]
    return from_config(config)


@methods
@pytest.mark.parametrize("tokens", [3, 14, 15, 16, 17, 40])
def test_a_cache_counts_all_its_layers(policy: Policy, tokens: int) -> None:
    """Padded rows, by what each has alone: there, every tensor is counted as it is."""
    model = tiny("gemma3-mixed")
    ids, mask = left_padded([prompt(tokens - cut, seed=cut)[0].tolist() for cut in (0, 1, 2)], 0)
    mask = torch.cat([mask, torch.ones(3, 4, dtype=mask.dtype)], 1)
    together = EvictionCache(model, policy)
    alone = [EvictionCache(model, policy) for _ in range(3)]
    for step, end in enumerate([tokens, tokens + 1, tokens + 2, tokens + 4]):
        begin = together.get_seq_length()
        new = ids if step == 0 else prompt(end - begin, 3, seed=step)
        with torch.no_grad():
            model(new, attention_mask=mask[:, :end], past_key_values=together)
            for row, cache in enumerate(alone):
                own = new[row : row + 1, row if step == 0 else 0 :]
                model(own, past_key_values=cache)
        counted = []
        for row, cache in enumerate(alone):
            window, *others = cache.layers
            assert window.keys.shape[2] == min(end - row, WINDOW - 1)
            held = [
                sum(t.nbytes for t in map(o.view, (o.store.keys, o.store.values))) for o in others
            ]
            counted.append((window.keys.nbytes + window.values.nbytes, sum(held)))
            assert cache.nbytes() == sum(counted[-1])
            assert cache.lengths == [window.keys.shape[2], *(other.longest for other in others)]
        assert together.nbytes() == sum(map(sum, counted))
        assert together.nbytes(evicting=True) == sum(own for _, own in counted)
        assert together.nbytes() <= together.nbytes(allocated=True)
        assert together.nbytes(evicting=True) <= together.nbytes(allocated=True, evicting=True)
        twin = together.copy()
        assert twin.nbytes() == together.nbytes() and twin.lengths == together.lengths
    together.reset()
    assert together.nbytes() == 0 and together.lengths == [0, 0, 0]


@pytest.mark.parametrize("policy", [H2OPolicy(heavy=64, recent=64), FullPolicy()], ids=str)
@pytest.mark.parametrize("kinds", [("sliding", "sliding", "full"), ("full", "full")], ids=str)
def test_records_have_both(policy: Policy, kinds: tuple[str, ...]) -> None:
    """Of 600 tokens, by hand; of a batch, each row's own; and of a text that is read."""
    model, windows = gemma(257, *kinds), kinds.count("sliding")
    prompts = [prompt(n, seed=n)[0].tolist() for n in (600, 200)]
    answers = generate(model, TOKENIZER, prompts, policy, 4)
    for ids, answer in zip(prompts, answers, strict=True):
        record = answer.record()
        held = [min(len(ids) + i, 128 if policy.name == "h2o" else 1000) for i in range(4)]
        own = [ENTRY * kinds.count("full") * entries for entries in held]
        whole = [one + ENTRY * windows * min(len(ids) + i, 256) for i, one in enumerate(own)]
        assert record["kv_nbytes_peak"] == max(whole)
        assert record["kv_nbytes_mean"] == pytest.approx(sum(whole) / 4)
        assert record.get("kv_evicting_nbytes_peak") == (max(own) if windows else None)
        assert record.get("kv_evicting_nbytes_mean") == (sum(own) / 4 if windows else None)
        assert record["kv_entries_peak"] == max(held)
        assert record["allocated_nbytes"] >= record["kv_nbytes_peak"]
    assert row_nbytes(model, 128, 600) == ENTRY * (windows * 256 + kinds.count("full") * 128)
    measured, _ = read(model, prompts[1], policy, 50, {})
    record = measured.record()
    assert record["allocated_nbytes"] >= record["kv_nbytes_peak"] > 0
    assert ("kv_evicting_nbytes_mean" in record) == bool(windows)


@pytest.mark.parametrize("family", ["llama", "gemma3-mixed"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("new", [1, 2, 40])
@pytest.mark.parametrize(
    "policy",
    [*(METHODS[name] for name in ("full", "h2o", "buzz")), PyramidKVPolicy().fit(24)],
    ids=str,
)
def test_what_was_allocated_is_no_less_than_what_was_held(
    family: str, rows: int, new: int, policy: Policy
) -> None:
    """After any step, whatever the buffers are at the end."""
    model = tiny(family)
    prompts = [prompt(n, seed=n)[0].tolist() for n in (70, 13, 41)[:rows]]
    for answer in generate(model, TOKENIZER, prompts, policy, new):
        record = answer.record()
        assert record["allocated_nbytes"] >= record["kv_nbytes_peak"]
