"""Many methods on one prefill give what each of them gives alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from methods import METHODS
from tiny import SHAPE, feed, from_config, padded, prompt, tiny
from transformers import MiMoV2FlashConfig, SmolLM3Config

import buzz.kernels
from baselines import FullPolicy
from buzz import POLICIES, Budget, ConfigError, EvictionCache, ForkedCache, repetition
from buzz.store import Store

TOKENS = 60
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
SINKS, NONE = "sliding_attention", "full_attention"  # of a window as long as the context
UNEVEN = [
    *(
        SmolLM3Config(
            **{**SHAPE, "max_position_embeddings": 64},
            no_rope_layers=layers,
            rope_parameters=DYNAMIC,
        )
        for layers in ([0, 1, 1], [1, 0, 1])
    ),
    *(
        MiMoV2FlashConfig(
            **SHAPE,
            **{"head_dim": 16, "v_head_dim": 16, "sliding_window": 512},
            layer_types=layers,
            mlp_layer_types=["dense"] * 3,
        )
        for layers in ([SINKS, NONE, NONE], [NONE, SINKS, NONE])
    ),
]


def fitted(budget: float = 0.5) -> list:
    """Every registered method that meets a budget of a short prompt."""
    return [Budget(budget).policy(cls(), TOKENS)[0] for _, cls in sorted(POLICIES.items())]


def continued(inputs: dict[str, torch.Tensor], rows: list[int], later: torch.Tensor) -> dict:
    """A batch whose row i is `rows[i]` of another, and goes on by `later` [rows, new]."""
    of = {name: given[rows] for name, given in inputs.items()}
    new = torch.arange(1, later.shape[1] + 1)
    return {
        "input_ids": torch.cat([of["input_ids"], later], 1),
        "attention_mask": F.pad(of["attention_mask"], (0, later.shape[1]), value=1),
        "position_ids": torch.cat([of["position_ids"], of["position_ids"][:, -1:] + new], 1),
    }


def alone(model, policy, ids: torch.Tensor, later: torch.Tensor, steps: list[int], **options):
    """The cache of one method and its logits, from a prompt [1, n] in one piece on."""
    cache = EvictionCache(model, policy, **options)
    inputs = padded([torch.cat([ids, later], 1)])
    return cache, feed(model, cache, inputs, [ids.shape[1], *steps])


def check_fork(fork, cache, name: str) -> None:
    assert fork.lengths == cache.lengths and fork.evictions == cache.evictions, name
    assert torch.equal(fork.kept_positions(1), cache.kept_positions(1)), name


@torch.inference_mode()
@pytest.mark.parametrize("positions", ["cache", "true"])
@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", torch.float32), ("qwen3", torch.float32), ("gemma3-mixed", torch.float32)]
    + [("llama", torch.float64), ("gpt-oss", torch.float32)],
)
def test_rows_are_what_methods_give_alone(family, dtype, positions) -> None:
    """Every method on two prompts, padded and in chunks, then tokens and a chunk of several."""
    model = tiny(family, dtype=dtype)
    served = [p for p in METHODS.values() if not p.needs_repetition or family != "gemma3-mixed"]
    policies = [served, [p for p in fitted(0.4) if p in served or not p.needs_repetition]]
    prompts = [prompt(45, seed=1), prompt(TOKENS, seed=2)]
    steps = [1] * 12 + [4, 1, 1]
    inputs, chunks = padded(prompts), [24, 20, 16]
    cache = ForkedCache(model, policies, positions=positions, hold_until=TOKENS)
    logits = feed(model, cache, inputs, chunks)
    rows = [0] * len(policies[0]) + [1] * len(policies[1])
    assert cache.prompts == rows and logits.shape[0] == 2
    later = prompt(sum(steps), batch=len(rows), seed=3)
    after = feed(model, cache, continued(inputs, rows, later), steps)
    for row, policy in enumerate([*policies[0], *policies[1]]):
        ids = prompts[rows[row]]
        one, expected = alone(model, policy, ids, later[row : row + 1], steps, positions=positions)
        found = torch.cat([logits[rows[row], -ids.shape[1] :], after[row]])
        torch.testing.assert_close(found, expected[0], atol=1e-4, rtol=1e-4, msg=policy.name)
        check_fork(cache.forks[row], one, policy.name)


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "gemma3-mixed", "llama-dynamic", "gpt-oss-mixed"])
def test_a_question_is_read_by_each_row(family) -> None:
    """A context that is thinned before the question comes, and after each of its chunks."""
    model, names = tiny(family), ("h2o", "buzz", "snapkv", "tova", "full")
    policies = [METHODS[name] for name in names]
    cache, steps = ForkedCache(model, policies), [20, 20, 5, 1, 1]
    inputs = padded([prompt(TOKENS)])
    feed(model, cache, inputs, [TOKENS])
    later = prompt(sum(steps), batch=len(policies), seed=4)
    found = feed(model, cache, continued(inputs, [0] * len(policies), later), steps)
    for row, policy in enumerate(policies):
        one, expected = alone(model, policy, prompt(TOKENS), later[row : row + 1], steps)
        own = expected[0, TOKENS:]
        torch.testing.assert_close(found[row], own, atol=1e-4, rtol=1e-4, msg=policy.name)
        check_fork(cache.forks[row], one, policy.name)


@torch.inference_mode()
@pytest.mark.parametrize("config", UNEVEN)
def test_layers_that_differ_go_one_way(config) -> None:
    """Some alone have sinks, or frequencies that no single call serves."""
    model, policies, steps = from_config(config), [METHODS["h2o"], METHODS["full"]], [1] * 8
    cache, inputs, later = ForkedCache(model, policies), padded([prompt(60)]), prompt(8, batch=2)
    feed(model, cache, inputs, [60])
    found = feed(model, cache, continued(inputs, [0, 0], later), steps)
    for row, policy in enumerate(policies):
        one, expected = alone(model, policy, prompt(60), later[row : row + 1], steps)
        torch.testing.assert_close(found[row], expected[0, 60:], atol=1e-4, rtol=1e-4)
        check_fork(cache.forks[row], one, policy.name)


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "gemma3-mixed"])
def test_copies_go_on_apart_and_rows_can_be_dropped(family) -> None:
    """A copy made after the prompt sees nothing of what the other reads, nor who leaves it."""
    model, policies = tiny(family), [[METHODS[name] for name in ("h2o", "buzz", "full")]] * 2
    prompts = [prompt(40, seed=5), prompt(50, seed=6)]
    inputs, cache = padded(prompts), ForkedCache(model, policies)
    feed(model, cache, inputs, [50])
    rows = cache.prompts
    later = prompt(12, batch=6, seed=7)
    expected = feed(model, cache.copy(), continued(inputs, rows, later), [1] * 12)
    others = continued(inputs, rows, prompt(3, batch=6, seed=8))
    other = cache.copy()
    feed(model, other, others, [1] * 3)
    other.keep([4])
    feed(model, other, continued(others, [4], prompt(3, seed=9)), [3])
    whole = continued(inputs, rows, later)
    found = feed(model, cache, whole, [1] * 5)
    torch.testing.assert_close(found, expected[:, :5], rtol=0, atol=0)
    left = [0, 2, 3]
    cache.keep(left)
    assert cache.prompts == [0, 0, 1] and len(cache.forks) == 3
    whole = {name: given[left] for name, given in whole.items()}
    found = feed(model, cache, whole, [1] * 7)
    torch.testing.assert_close(found, expected[left, 5:], atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="rows"):
        cache.keep([0, 0])
    cache.reset()
    with pytest.raises(RuntimeError, match="prompt"):
        cache.keep([0])


@torch.inference_mode()
@pytest.mark.parametrize("forked", [False, True])
def test_no_mask_of_a_chunk_is_as_long_as_the_prompt(forked: bool) -> None:
    """Nobody reads a full layer's; a window's has as many entries as the window and the chunk."""
    model, shapes = tiny("gemma3-mixed"), []

    def note(module, args, given) -> None:
        if given["attention_mask"] is not None:
            shapes.append(given["attention_mask"].shape)

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(note, with_kwargs=True)
    policy = METHODS["h2o"]
    kind = ForkedCache if forked else EvictionCache
    cache = kind(model, [policy] * 3 if forked else policy, hold_until=200)
    feed(model, cache, padded([prompt(200)]), [40] * 5)
    window = model.config.sliding_window
    assert max(shape[-1] for shape in shapes) == 40 + window - 1
    assert max(shape[-2] for shape in shapes) == 40


@torch.inference_mode()
def test_a_second_pass_over_a_prompt_is_made_once(monkeypatch) -> None:
    """For budgets of one method; another that asks otherwise reads it again."""
    model, passes = tiny(), []
    scores = repetition._scores
    monkeypatch.setattr(repetition, "_scores", lambda *a: passes.append(1) or scores(*a))
    one, other = METHODS["kvzip"], dataclasses.replace(METHODS["kvzip"], chunk=20)
    policies = [[one, dataclasses.replace(one, capacity=30), other]] * 2
    inputs = padded([prompt(40, seed=1), prompt(50, seed=2)])
    cache = ForkedCache(model, policies)
    feed(model, cache, inputs, [50])
    assert len(passes) == 4
    for fork, policy, row in zip(cache.forks, sum(policies, []), cache.prompts, strict=True):
        ids = prompt([40, 50][row], seed=row + 1)
        check_fork(fork, alone(model, policy, ids, prompt(0), [])[0], policy.name)


@torch.inference_mode()
def test_an_emptied_cache_reads_other_prompts() -> None:
    model, policies = tiny("gemma3-mixed"), [[METHODS["h2o"], METHODS["full"]]] * 2
    cache, steps = ForkedCache(model, policies), [50, 1, 1]
    for seed in (1, 2):
        inputs = padded([prompt(50 - 10 * seed, seed=seed), prompt(50, seed=seed + 5)])
        own = continued(inputs, cache.prompts, prompt(2, batch=4, seed=seed))
        first = feed(model, cache, inputs, steps[:1])
        found = feed(model, cache, own, steps[1:])
        fresh = ForkedCache(model, policies)
        assert torch.equal(first, feed(model, fresh, inputs, steps[:1]))
        assert torch.equal(found, feed(model, fresh, own, steps[1:]))
        cache.reset()


def test_what_is_refused() -> None:
    model = tiny()
    for nothing in ([], [[]], [[FullPolicy()], []]):
        with pytest.raises(ConfigError, match="at least one"):
            ForkedCache(model, nothing)
    cache = ForkedCache(model, [FullPolicy()] * 3)
    ids = prompt(8, batch=2)
    with pytest.raises(RuntimeError, match="2 rows and not 1"):
        model(ids, past_key_values=cache)
    model(ids[:1], past_key_values=cache)
    with pytest.raises(RuntimeError, match="2 rows and not 3"):
        model(ids, past_key_values=cache)
    with pytest.raises(ConfigError, match="attention_mask"):
        mask = torch.ones(3, 9).index_fill(1, torch.tensor(4), 0)
        model(ids[:1, :1].expand(3, -1), attention_mask=mask, past_key_values=cache)
    mixed = ForkedCache(tiny("gemma3-mixed"), [[FullPolicy()]] * 2)
    inputs = padded([ids[:1, :5], ids[1:]])
    mixed_model = tiny("gemma3-mixed")
    mixed = ForkedCache(mixed_model, [[FullPolicy()]] * 2)
    mixed_model(**inputs, past_key_values=mixed)
    with pytest.raises(ConfigError, match="attention_mask=None"):
        mixed_model(ids[:, :1], past_key_values=mixed)


@pytest.mark.parametrize("tokens", [0, 30])
def test_the_hold_can_be_set_later(tokens: int) -> None:
    """As that of a single cache: for all forks, whatever they were made with."""
    model, policies = tiny(), fitted()[:2]
    cache = ForkedCache(model, policies, hold_until=20)
    cache.hold_until = tokens
    assert cache.hold_until == tokens and [fork.hold_until for fork in cache.forks] == [tokens] * 2
    assert cache.copy().hold_until == tokens
    with pytest.raises(ConfigError, match="hold_until=-1"):
        cache.hold_until = -1


def test_every_member_is_served_or_refused_by_name() -> None:
    """Before and after a prompt: an AttributeError is neither."""
    model = tiny()
    cache = ForkedCache(model, fitted()[:2], logn_base=16)
    calls = {"nbytes": (), "trace": (), "kept_positions": (0,), "copy": (), "crop": (-1,)}
    calls |= dict.fromkeys(("reorder_cache", "batch_select_indices"), (torch.tensor([1, 0]),))
    calls |= {"batch_repeat_interleave": (2,), "get_seq_length": (), "__bool__": ()}
    refused = set()
    for ids in ([], [prompt(30)]):
        for one in ids:
            model(one, past_key_values=cache)
        for name in [*(name for name in vars(EvictionCache) if name[0] != "_"), *calls]:
            try:
                member = getattr(cache, name)
                member(*calls[name]) if name in calls else None
            except ConfigError as error:
                assert str(error).startswith(f"{name}='ForkedCache': "), name
                refused.add(name)
        assert cache and cache.positions == "cache" and cache.logn_base == 16
        assert not cache.compiled
    assert {"lengths", "nbytes", "trace", "reorder_cache", "crop"} <= refused
    assert all(fork.lengths for fork in cache.forks)


@torch.inference_mode()
def test_hold_until_that_moves_shares_nothing_that_has_parted() -> None:
    model, ids = tiny(), prompt(100)
    policies = [METHODS["tova"], METHODS["h2o"], METHODS["full"]]
    cache = ForkedCache(model, policies)
    model(ids[:, :60], past_key_values=cache)
    cache.hold_until = 80  # behind the prompt: every fork goes on by itself
    with pytest.raises(RuntimeError, match="1 rows and not 3"):
        model(ids[:, 60:80], past_key_values=cache)
    cache = ForkedCache(model, policies, hold_until=60)
    alone = [EvictionCache(model, policy, hold_until=60) for policy in policies]
    for part in ids[:, :40].split(20, dim=1):
        model(part, past_key_values=cache)
        for one in alone:
            model(part, past_key_values=one)
    for one in (cache, *alone):
        one.hold_until = 0
    logits = model(ids[:, 40:44].expand(3, -1), past_key_values=cache).logits
    for row, one in zip(logits, alone, strict=True):
        own = model(ids[:, 40:44], past_key_values=one).logits[0]
        torch.testing.assert_close(row, own, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_tokens_that_are_held_back_add_up() -> None:
    model, ids = tiny(), prompt(90)
    policies = [METHODS["buzz_fast"], METHODS["tova"], METHODS["h2o"]]
    cache = ForkedCache(model, policies)
    model(ids[:, :60], past_key_values=cache)
    model(ids[:, 60:61].expand(3, -1), past_key_values=cache)
    alone = [fork.copy() for fork in cache.forks]
    for one in (cache, *alone):
        one.hold_until = 70
    for token in ids[:, 61:].split(1, dim=1):
        logits = model(token.expand(3, -1), past_key_values=cache).logits
        for row, one in zip(logits, alone, strict=True):
            own = model(token, past_key_values=one).logits[0]
            torch.testing.assert_close(row, own, atol=1e-4, rtol=0)
    for fork, one in zip(cache.forks, alone, strict=True):
        assert torch.equal(fork.kept_positions(0), one.kept_positions(0))


@torch.inference_mode()
def test_a_copy_of_one_fork_is_left_alone() -> None:
    model, ids = tiny(), prompt(90)
    cache = ForkedCache(model, [METHODS["h2o"], METHODS["tova"]])
    model(ids[:, :60], past_key_values=cache)
    for token in ids[:, 60:64].split(1, dim=1):
        model(token.expand(2, -1), past_key_values=cache)
    copied = cache.forks[0].copy()
    keys = [layer.view(layer.store.keys).clone() for layer in copied.layers]
    for token in ids[:, 64:].split(1, dim=1):
        model(token.expand(2, -1), past_key_values=cache)
    for layer, before in zip(copied.layers, keys, strict=True):
        assert torch.equal(layer.view(layer.store.keys), before)


@torch.inference_mode()
def test_layers_of_forks_are_joined_at_either_kind_of_positions() -> None:
    model, ids = tiny(), prompt(60)
    for positions in ("cache", "true"):
        cache = ForkedCache(model, [METHODS["h2o"], METHODS["tova"]], positions=positions)
        model(ids, past_key_values=cache)
        model(ids[:, :1].expand(2, -1), past_key_values=cache)
        assert len(cache._rows.stacks) == 2


@torch.inference_mode()
def test_an_error_in_the_first_layer_is_found_out(monkeypatch) -> None:
    model, ids = tiny(), prompt(60)
    cache = ForkedCache(model, [METHODS["h2o"], METHODS["tova"]])
    model(ids, past_key_values=cache)
    token = ids[:, :1].expand(2, -1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(buzz.kernels, "step_rows", interrupted)
        model(token, past_key_values=cache)
    with pytest.raises(RuntimeError, match="call cache.reset"):
        model(token, past_key_values=cache)
    cache.reset()
    assert model(ids, past_key_values=cache).logits.isfinite().all()


def interrupted(*args: Any) -> None:
    raise KeyboardInterrupt


def test_a_refused_step_of_a_mixed_model_can_be_given_again() -> None:
    model, ids = tiny("gemma3-mixed"), prompt(60)
    cache = EvictionCache(model, METHODS["h2o"])
    model(ids, past_key_values=cache)
    with pytest.raises(ConfigError, match="position_ids"):
        model(ids[:, :1], past_key_values=cache, position_ids=torch.tensor([[7]]))
    assert model(ids[:, :1], past_key_values=cache).logits.isfinite().all()


@torch.inference_mode()
def test_a_prompt_is_evicted_to_where_its_layers_decode(monkeypatch) -> None:
    """One buffer for the layers of each row, none for a layer alone, and again for the next prompt.

    A method that keeps all has its prompt where the model wrote it, until the first token.
    """
    made, unwritten = [], Store.unwritten

    def counting(other, capacity, rows):
        made.append(rows)
        return unwritten(other, capacity, rows)

    monkeypatch.setattr(Store, "unwritten", counting)
    model, names = tiny("llama"), ("h2o", "tova", "snapkv", "full")
    cache = ForkedCache(model, [[METHODS[name] for name in names]] * 2)
    later = prompt(2, batch=8, seed=1)
    for expected in ([3] * 6, []):
        made.clear()
        inputs = padded([prompt(TOKENS)] * 2)
        feed(model, cache, inputs, [TOKENS])
        assert made == expected
        feed(model, cache, continued(inputs, cache.prompts, later), [1, 1])
        assert made == [*expected, 3, 3]
        cache.reset()
