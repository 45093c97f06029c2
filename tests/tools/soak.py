"""A long decoding run: does anything grow, drift or slow down?

    python tests/tools/soak.py --tokens 100000

Feeds random tokens, one a step, through a tiny Llama of random weights, and checks for each method

- the cache's length at every step, against the method's recurrence and its bound;
- anonymous memory, in RAM or swapped out, from the first tenth to the end: at most 1 MiB more (the
  slope is printed). Pages of files, such as libraries, come and go as the system likes;
- the keys of layer 0 at the end, against keys computed anew from their tokens and turned once, in
  float64: they differ by at most 1e-4 of their length, which turning leaves as it is (layer 0,
  because its keys depend on nothing but the token);
- the median time of a token, last tenth against first: at most 1.5 times as long.

Prints a row per method; exits with 1 if a check fails. Linux only (/proc).
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from baselines import H2OPolicy, StreamingLLMPolicy
from buzz import CACHE_ARGUMENT, BuzzPolicy, EvictionCache, Policy

PROMPT = 300
METHODS: dict[str, tuple[Policy, int]] = {  # with the most entries after a step
    "buzz": (BuzzPolicy(sink=4, window=32, stride=5, threshold=80), 116),
    "h2o": (H2OPolicy(heavy=40, recent=40), 80),
    "streaming_llm": (StreamingLLMPolicy(sink=4, window=76), 80),
}
MOST_GROWTH, MOST_ERROR, MOST_SLOWER = 2**20, 1e-4, 1.5


@dataclass(frozen=True)
class Soak:
    """What a run measured.

    Attributes:
        wrong_lengths: steps after which the cache held what it should not.
        longest: most entries held after a step.
        evictions: in all.
        growth: bytes of memory from the first tenth to the end.
        slope: bytes per token over the same part, by least squares.
        error: largest difference of a key, as a share of its length.
        difference: largest difference of a key's component.
        first_ms, last_ms: median time of a token in the first and last tenth.
    """

    wrong_lengths: int
    longest: int
    evictions: int
    growth: float
    slope: float
    error: float
    difference: float
    first_ms: float
    last_ms: float

    def failures(self) -> list[str]:
        checks = {
            "cache length": self.wrong_lengths == 0,
            "memory": self.growth <= MOST_GROWTH,
            "keys": self.error <= MOST_ERROR,
            "time": self.last_ms <= MOST_SLOWER * self.first_ms,
        }
        return [name for name, passed in checks.items() if not passed]


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


@torch.inference_mode()
def soak(policy: Policy, bound: int, tokens: int) -> Soak:
    """Decode `tokens` tokens (at least 100) after a prompt of 300."""
    model = tiny_llama()
    cache = EvictionCache(model, policy)
    ids = torch.randint(512, (1, PROMPT + tokens), generator=torch.Generator().manual_seed(1))
    seconds, memory = np.ones(tokens), np.ones(100)  # ones, so that their pages are there
    model(ids[:, :PROMPT], **{CACHE_ARGUMENT: cache})
    held, sampled = policy.survivors(PROMPT, 0)
    wrong = longest = 0
    for step in range(tokens):
        start = time.perf_counter()
        model(ids[:, PROMPT + step : PROMPT + step + 1], **{CACHE_ARGUMENT: cache})
        seconds[step] = time.perf_counter() - start
        held, sampled = policy.survivors(held + 1, sampled)
        wrong += cache.lengths != [held, held] or held > bound
        longest = max(longest, *cache.lengths)
        percent, last = divmod(step * 100, tokens)
        if last + 100 >= tokens:  # the last step of a hundredth
            memory[percent] = memory_nbytes()
    steady = memory[10:]
    slope = np.polyfit(np.arange(len(steady)) * tokens / 100, steady, 1)[0]
    tenth = tokens // 10
    error, difference = key_error(model, cache, ids)
    return Soak(
        wrong_lengths=wrong,
        longest=longest,
        evictions=cache.evictions[0],
        growth=float(steady[-1] - steady[0]),
        slope=float(slope),
        error=error,
        difference=difference,
        first_ms=float(np.median(seconds[:tenth])) * 1e3,
        last_ms=float(np.median(seconds[-tenth:])) * 1e3,
    )


def key_error(
    model: LlamaForCausalLM, cache: EvictionCache, ids: torch.Tensor
) -> tuple[float, float]:
    """How far layer 0's keys are from keys of the same tokens that were turned once.

    Returns:
        The largest difference as a share of a key's length, and of a component.
    """
    layer, decoder = cache.evicting[0], model.model
    assert layer.store is not None
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
    first, second = keys.double().chunk(2, dim=-1)
    exact = torch.cat(
        [
            first * angle.cos() - second * angle.sin(),
            second * angle.cos() + first * angle.sin(),
        ],
        dim=-1,
    )
    difference = layer.view(layer.store.keys)[0] - exact
    relative = difference.norm(dim=-1) / exact.norm(dim=-1)
    return float(relative.max()), float(difference.abs().max())


def memory_nbytes() -> int:
    """Bytes of this process that no file holds, in RAM or swapped out."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(status[name].split()[0]) * 1024 for name in ("RssAnon", "VmSwap"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=100_000, help="per method, at least 100")
    tokens = parser.parse_args().tokens
    if tokens < 100:
        parser.error("--tokens: give at least 100")
    titles = ("method", "longest/bound", "evictions", "bytes/token", "key error", "(component)")
    print("{:<14}{:>14}{:>11}{:>13}{:>11}{:>13}{:>10}{:>8}".format(*titles, "ms first", "last"))
    failed = False
    for name, (policy, bound) in METHODS.items():
        found = soak(policy, bound, tokens)
        print(
            f"{name:<14}{found.longest:>9}/{bound:<4}{found.evictions:>11}{found.slope:>13.2f}"
            f"{found.error:>11.1e}{found.difference:>13.1e}"
            f"{found.first_ms:>10.3f}{found.last_ms:>8.3f}",
            flush=True,
        )
        for failure in found.failures():
            failed = True
            print(f"{name}: {failure} out of bounds: {found}", file=sys.stderr)
    sys.exit(failed)


if __name__ == "__main__":
    main()
