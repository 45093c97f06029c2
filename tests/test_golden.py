"""The originals' outputs: what they kept, the logits they computed from it, and their scores.

`golden/eviction_traces.json` is a list of {case, policy, params, kv_heads, chunks}; its `.npz` has
for every case and step `{case}/{step}/scores` (float32 [kv_heads, n], what each of the n entries
received in that step) and `{case}/{step}/kept` (int32 [kv_heads, kept], token indices held after
it). `golden/tiny_llama.json` has a model's config, and per run a policy's parameters; its `.npz`
`prompt`, and per run `logits` float32 [steps, vocab], `tokens` and `cache_len` of greedy steps.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from buzz import CACHE_ARGUMENT, POLICIES, EvictionCache
from buzz.layer import EvictionLayer
from buzz.rope import Rope
from evals.run.generate import Trace
from evals.run.lengths import Lengths

GOLDEN = Path(__file__).parent / "golden"
TRACES = json.loads((GOLDEN / "eviction_traces.json").read_text())
SPEC = json.loads((GOLDEN / "tiny_llama.json").read_text())


def differing_steps(case: dict[str, Any], arrays: Any) -> list[int]:
    """Steps after which other entries are held, each through the cache's own append and evict."""
    layer = EvictionLayer(POLICIES[case["policy"]](**case["params"]), Rope(None))
    found = []
    for step, new in enumerate(case["chunks"]):
        nothing = torch.zeros(1, case["kv_heads"], new, 1)
        layer.update(nothing, nothing)
        received = torch.from_numpy(arrays[f"{case['case']}/{step}/scores"])[None]
        layer.after_attention(received if layer.wants_scores else None)
        held = layer.view(layer.store.positions)[0].numpy()
        if not np.array_equal(held, arrays[f"{case['case']}/{step}/kept"]):
            found.append(step)
    return found


@pytest.mark.filterwarnings("ignore:method.stride")
def test_every_recorded_eviction_is_reproduced() -> None:
    arrays = np.load(GOLDEN / "eviction_traces.npz")
    count = Counter(case["policy"] for case in TRACES)
    assert set(count) == {"buzz", "buzz_strided", "h2o", "streaming_llm"}
    with torch.inference_mode():
        for case in TRACES:
            assert differing_steps(case, arrays) == [], case
        case = next(case for case in TRACES if case["policy"] == "h2o")
        kept = f"{case['case']}/0/kept"
        assert 0 in differing_steps(case, dict(arrays) | {kept: arrays[kept] + 1})


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    shared = {name: SPEC[name] for name in ("rope_theta", "tie_word_embeddings")}
    model = LlamaForCausalLM(LlamaConfig(**SPEC["config"], **shared)).eval()
    model.load_state_dict(load_file(GOLDEN / "tiny_llama_model.safetensors"))
    model.generation_config.eos_token_id = None  # the recordings run to their last step
    return model


@pytest.mark.parametrize("run", SPEC["runs"])
def test_every_recorded_run_decodes_the_same(model, run: str) -> None:
    """By stock `model.generate`: same tokens, same cache lengths, same logits."""
    arrays = np.load(GOLDEN / "tiny_llama.npz")
    tokens, prompt = arrays[f"{run}/tokens"], torch.from_numpy(arrays["prompt"]).long().view(1, -1)
    name = max((name for name in POLICIES if run.startswith(name)), key=len)  # buzz_s3 is buzz
    policy = POLICIES[name](**SPEC["runs"][run])
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
    assert np.array_equal(out.sequences[0, prompt.shape[1] :].numpy(), tokens)
    steps = [prompt.shape[1]] + [1] * (len(tokens) - 1)
    assert np.array_equal(trace.lengths.verified(0, steps), arrays[f"{run}/cache_len"])
    logits = torch.cat(out.logits).numpy()
    assert np.abs(logits - arrays[f"{run}/logits"]).max() <= 2e-3
    assert len(SPEC["runs"]) == 7
