"""A long decoding run: nothing grows, drifts or slows down.

Random tokens go one a step through a tiny Llama of random weights. `pytest --slow -s` runs 100,000
of them with each method, and prints what it measured. Linux only (/proc).
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from baselines import H2OPolicy, StreamingLLMPolicy
from buzz import CACHE_ARGUMENT, BuzzPolicy, EvictionCache, Policy

PROMPT, SHORT, LONG = 300, 2000, 100_000
METHODS: dict[str, tuple[Policy, int]] = {  # with the most entries after a step
    "buzz": (BuzzPolicy(sink=4, window=32, stride=5, threshold=80), 116),
    "h2o": (H2OPolicy(heavy=40, recent=40), 80),
    "streaming_llm": (StreamingLLMPolicy(sink=4, window=76), 80),
}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}
    return LlamaForCausalLM(LlamaConfig(**shape, **heads, initializer_range=0.2)).eval()


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("buzz", SHORT),
        ("h2o", SHORT),
        *(pytest.param(name, LONG, marks=pytest.mark.slow) for name in METHODS),
    ],
)
@torch.inference_mode()
def test_nothing_grows_or_drifts(model, name: str, tokens: int) -> None:
    """Lengths at every step, memory and time from the first tenth to the last, keys at the end."""
    policy, bound = METHODS[name]
    cache = EvictionCache(model, policy)
    ids = torch.randint(512, (1, PROMPT + tokens), generator=torch.Generator().manual_seed(1))
    seconds, memory = np.ones(tokens), np.ones(100)  # ones, so that their pages are there
    model(ids[:, :PROMPT], **{CACHE_ARGUMENT: cache})
    held, state = policy.next_length(PROMPT, 0)
    longest = 0
    for step in range(tokens):
        start = time.perf_counter()
        model(ids[:, PROMPT + step : PROMPT + step + 1], **{CACHE_ARGUMENT: cache})
        seconds[step] = time.perf_counter() - start
        held, state = policy.next_length(held + 1, state)
        assert cache.lengths == [held, held]
        longest = max(longest, held)
        percent, last = divmod(step * 100, tokens)
        if last + 100 >= tokens:  # the last step of a hundredth
            memory[percent] = memory_nbytes()
    assert longest == bound and cache.evictions[0] >= 30  # buzz, the rarest: one in 61 tokens
    steady = memory[10:]
    assert steady[-1] - steady[0] <= 2**20
    error = key_error(model, cache, ids)
    assert error <= (5e-5 if tokens == SHORT else 1e-4)
    slope = np.polyfit(np.arange(len(steady)) * tokens / 100, steady, 1)[0]
    tenth = tokens // 10
    first, last = (1e3 * np.median(part) for part in (seconds[:tenth], seconds[-tenth:]))
    print(f"{name}: {longest} of {bound}, {cache.evictions[0]:,} evictions, {slope:.1f} bytes a")
    print(f"token, keys off by {error:.1e}, {first:.2f} ms a token at first, {last:.2f} at last")
    assert tokens == SHORT or last <= 1.5 * first


def test_a_drifted_key_is_noticed(model) -> None:
    cache, ids = EvictionCache(model, METHODS["h2o"][0]), torch.arange(300)[None]
    with torch.inference_mode():
        model(ids, past_key_values=cache)
        assert key_error(model, cache, ids) < 1e-6
        cache.layers[0].view(cache.layers[0].store.keys)[0, 1, -1] += 1e-3
        assert key_error(model, cache, ids) > 1e-4


def key_error(model: LlamaForCausalLM, cache: EvictionCache, ids: torch.Tensor) -> float:
    """How far layer 0's keys are from keys of the same tokens that were turned once, in float64.

    Layer 0's depend on nothing but the token.

    Returns:
        The largest difference as a share of a key's length, which turning leaves as it is.
    """
    layer, decoder = cache.evicting[0], model.model
    attention = decoder.layers[0].self_attn
    arrival = cache.kept_positions(0)[0]  # [kv_heads, held]
    heads, held = arrival.shape
    hidden = decoder.layers[0].input_layernorm(decoder.embed_tokens(ids[0, arrival]))
    keys = attention.k_proj(hidden).view(heads, held, heads, -1)
    keys = torch.stack([keys[head, :, head] for head in range(heads)])
    place = cache.get_seq_length() - held + torch.arange(held)
    frequencies = decoder.rotary_emb.inv_freq
    # The model's own angles, at the tokens' own positions, are float32; what follows is exact.
    angle = (arrival[..., None].float() * frequencies).double()
    angle = angle + (place - arrival)[..., None] * frequencies.double()
    a, b = keys.double().chunk(2, dim=-1)
    exact = torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)
    difference = layer.view(layer.store.keys)[0] - exact
    return float((difference.norm(dim=-1) / exact.norm(dim=-1)).max())


def memory_nbytes() -> int:
    """Bytes of this process that no file holds, in RAM or swapped out."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(status[name].split()[0]) * 1024 for name in ("RssAnon", "VmSwap"))
