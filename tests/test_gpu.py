"""On a CUDA device: what the CPU gives, and no step of decoding that waits for the device."""

from __future__ import annotations

import pytest
import torch
from methods import METHODS, core_methods, every_method, generate, in_turn
from recomputed import check_long_decode, record
from tiny import prompt, tiny

from buzz import EvictionCache, Policy

pytestmark = pytest.mark.gpu

DECODED = 80  # tokens, of which each method evicts in some


def prescribed(policy: Policy, tokens: int) -> list[int]:
    """The first layer's lengths after a prompt of 60 tokens and each of those decoded."""
    return policy.for_layer(0, 3).lengths([60] + [1] * tokens)


@core_methods
def test_the_tokens_are_those_of_the_cpu(policy: Policy) -> None:
    found = []
    for device in ("cpu", "cuda"):
        model, ids = tiny().to(device), prompt(60).to(device)
        cache = EvictionCache(model, policy)
        tokens, logits = generate(model, ids, cache)
        kept = [cache.kept_positions(layer).cpu() for layer in range(3)]
        found.append((tokens.cpu(), logits.cpu(), kept, cache.trace()))
    (tokens, logits, kept, trace), (own, own_logits, own_kept, own_trace) = found
    assert torch.equal(own, tokens) and own_trace == trace
    torch.testing.assert_close(own_logits, logits, atol=1e-3, rtol=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(own_kept, kept, strict=True))


@in_turn("cache")
def test_every_method_is_that_of_a_pass_without_a_cache(policy: Policy, positions: str) -> None:
    """In float32, two rows: where scores are all but equal either entry may stay."""
    steps = [60, *[1] * 20, 13, *[1] * 5]
    record(tiny().to("cuda"), policy, [0, 7], steps, positions=positions).check("llama")


@every_method
def test_bfloat16_over_a_long_decode(policy: Policy) -> None:
    check_long_decode(policy, torch.bfloat16, 0.04, "cuda")


@every_method
def test_lengths_in_bfloat16_are_those_that_the_method_prescribes(policy: Policy) -> None:
    model = tiny(dtype=torch.bfloat16).to("cuda")
    cache = EvictionCache(model, policy)
    _, logits = generate(model, prompt(60).to("cuda"), cache, tokens=DECODED)
    assert logits.isfinite().all()
    assert [held for _, held, _ in cache.trace()] == prescribed(policy, DECODED - 1)


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_decoding_does_not_wait_for_the_device(policy: Policy, dtype) -> None:
    """What makes kernels and buffers comes first: a prompt, and half of the tokens."""
    model = tiny(dtype=dtype).to("cuda")
    cache = EvictionCache(model, policy)
    tokens = prompt(DECODED, seed=1).to("cuda").split(1, dim=1)
    with torch.inference_mode():
        model(prompt(60).to("cuda"), past_key_values=cache)
        for token in tokens[: DECODED // 2]:
            model(token, past_key_values=cache)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for token in tokens[DECODED // 2 :]:
                model(token, past_key_values=cache)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert cache.lengths[0] == prescribed(policy, DECODED)[-1]


def test_waiting_is_noticed() -> None:
    """So that the test above can fail."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.zeros(1, device="cuda").item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_scores_of_half_precision_are_float32() -> None:
    model = tiny(dtype=torch.float16).to("cuda")
    cache = EvictionCache(model, METHODS["h2o"])
    generate(model, prompt(60).to("cuda"), cache, tokens=5)
    store = cache.layers[0].store
    assert store.keys.device.type == "cuda" and store.keys.dtype == torch.float16
    assert store.scores.dtype == torch.float32
