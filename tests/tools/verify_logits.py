"""Decode as the original implementations did: same tokens, same cache lengths, same logits?

    python tests/tools/verify_logits.py PREFIX

reads PREFIX.json (model config, and per run the policy's parameters), PREFIX_model.safetensors and
PREFIX.npz (`prompt`; per run `logits` float32 [steps, vocab], `tokens`, `cache_len` of the recorded
greedy steps). Every run goes through stock `model.generate` with an EvictionCache. Prints per run
whether tokens and lengths are equal and the largest difference of a logit; exits with 1 if one
differs by more than 2e-3.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import baselines  # noqa: F401  (registers its policies)
from buzz import CACHE_ARGUMENT, POLICIES, EvictionCache
from evals.run.generate import Trace
from evals.run.lengths import Lengths

TOLERANCE = 2e-3


def load_model(prefix: str, spec: dict[str, Any]) -> LlamaForCausalLM:
    config = LlamaConfig(
        **spec["config"],
        rope_theta=spec["rope_theta"],
        tie_word_embeddings=spec["tie_word_embeddings"],
    )
    model = LlamaForCausalLM(config).eval()
    weights = load_file(f"{prefix}_model.safetensors")
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if missing or unexpected:
        raise SystemExit(f"error: weights do not fit: {missing=} {unexpected=}")
    model.generation_config.eos_token_id = None  # the recordings run to their last step
    return model


def policy_of(run: str, params: dict[str, int]) -> Any:
    """The registered policy whose name the run's name begins with (``buzz_s3`` is buzz)."""
    name = max((name for name in POLICIES if run.startswith(name)), key=len)
    return POLICIES[name](**params)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prefix", help="path of the recording without .json / .npz")
    prefix = parser.parse_args().prefix
    try:
        spec = json.loads(Path(f"{prefix}.json").read_text())
        arrays = np.load(f"{prefix}.npz", allow_pickle=False)
        model = load_model(prefix, spec)
    except OSError as error:
        print(f"error: prefix={prefix}: cannot read the recording ({error})", file=sys.stderr)
        return 2
    prompt = torch.from_numpy(arrays["prompt"]).long().view(1, -1)
    failed = False
    for run, params in spec["runs"].items():
        logits, tokens = arrays[f"{run}/logits"], arrays[f"{run}/tokens"]
        policy = policy_of(run, params)
        cache = EvictionCache(model, policy)
        trace = Trace(Lengths(cache, policy))
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            **{CACHE_ARGUMENT: cache},
            max_new_tokens=len(tokens),
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            stopping_criteria=[trace],
        )
        same_tokens = np.array_equal(out.sequences[0, prompt.shape[1] :].numpy(), tokens)
        steps = [prompt.shape[1]] + [1] * (len(tokens) - 1)
        same_lengths = np.array_equal(trace.lengths.verified(0, steps), arrays[f"{run}/cache_len"])
        difference = float(np.abs(torch.cat(out.logits).numpy() - logits).max())
        ok = same_tokens and same_lengths and difference <= TOLERANCE
        failed |= not ok
        print(
            f"{run:15} tokens {'equal' if same_tokens else 'DIFFER':6}"
            f"  lengths {'equal' if same_lengths else 'DIFFER':6}"
            f"  largest logit difference {difference:.1e}  {'ok' if ok else 'FAILED'}"
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
