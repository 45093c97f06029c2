"""Inference mode, no_grad and gradients by turns: what one mode leaves, another goes on with."""

from __future__ import annotations

import itertools

import pytest
import torch
from methods import METHODS, every_method
from tiny import prompt, tiny

from buzz import EvictionCache, ForkedCache, Policy

MODES = {"inference": torch.inference_mode, "no_grad": torch.no_grad, "grad": torch.enable_grad}
HALF, DYNAMIC = METHODS["buzz"], METHODS["h2o"]


def feed(model, cache, modes, seed: int = 0, rows: int = 2) -> torch.Tensor:
    """Logits of a prompt, tokens and a chunk, each under the next of `modes`; row 0 is padded."""
    mask = torch.ones(rows, 100, dtype=torch.int64)
    mask[0, :3] = 0
    found, seen = [], 0
    for step, (new, mode) in enumerate(zip([40, 1, 1, 1, 5, 1, 1], itertools.cycle(modes))):
        seen += new
        ids = prompt(new, rows, seed=100 * seed + step)
        with MODES[mode]():
            out = model(ids, attention_mask=mask[:, :seen], past_key_values=cache)
        found.append(out.logits[:, -1].detach().clone())
    return torch.stack(found)


@every_method
@pytest.mark.parametrize("modes", [("inference", "grad"), ("grad", "inference", "no_grad")])
def test_steps_in_any_mode(policy: Policy, modes: tuple[str, ...]) -> None:
    """By turns; then a copy, other rows, and another prompt in the buffers of the first."""
    model = tiny()
    expected = [feed(model, EvictionCache(model, policy), ["no_grad"], seed) for seed in (0, 1)]
    cache = EvictionCache(model, policy)
    assert torch.equal(feed(model, cache, modes), expected[0])
    others = []
    for mode in MODES:
        twin = cache.copy()
        with MODES[mode]():
            twin.batch_select_indices(torch.tensor([1, 0, 1]))
        for inner in (*MODES, *MODES):
            with MODES[inner]():
                last = model(prompt(1, 3, seed=9), past_key_values=twin, use_cache=True).logits
        others.append(last.detach().clone())
    assert torch.equal(others[0], others[1]) and torch.equal(others[0], others[2])
    cache.reset()
    assert torch.equal(feed(model, cache, modes[::-1], 1), expected[1])


@pytest.mark.parametrize("family", ["llama-dynamic", "gemma3-mixed", "phi3-longrope", "smollm3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_other_models_and_types(family: str, dtype: torch.dtype) -> None:
    model, policy = tiny(family, dtype=dtype), METHODS["buzz"]
    expected = [feed(model, EvictionCache(model, policy), ["no_grad"], seed) for seed in (0, 1)]
    cache = EvictionCache(model, policy)
    for seed in (0, 1):
        assert torch.equal(feed(model, cache, ["inference", "grad"], seed), expected[seed])
        cache.reset()


def test_stock_generate_goes_on_with_a_prompt_of_inference_mode() -> None:
    model, ids = tiny(), prompt(40)
    more = torch.cat([ids, prompt(4, seed=1)], 1)
    answers = []
    for mode in MODES:
        for copies in (False, True):
            cache = EvictionCache(model, METHODS["h2o"])
            with MODES[mode]():
                model(ids, past_key_values=cache)
            cache = cache.copy() if copies else cache
            answers.append(model.generate(more, past_key_values=cache, max_new_tokens=8))
    assert all(torch.equal(one, answers[0]) for one in answers)


def test_forks_in_any_mode() -> None:
    model, policies = tiny(), [METHODS["h2o"], METHODS["buzz"]]
    found = []
    for modes in (["no_grad"], ["inference", "grad"]):
        cache = ForkedCache(model, policies)
        logits = []
        for step, mode in zip(range(8), itertools.cycle(modes)):
            ids = prompt(40) if step == 0 else prompt(1, 2, seed=step)
            with MODES[mode]():
                logits.append(model(ids, past_key_values=cache).logits[:, -1].detach().clone())
        found.append(torch.cat(logits))
    assert torch.equal(*found)
