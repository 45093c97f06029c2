"""What a layer's heads gain if they share its budget (Ada-KV), measured by masks at equal totals.

    python scripts/shared_heads.py task=nq10 task.data_file=... task.samples=12 out=heads.csv

The prompt's entries are chosen once, by a method's scores: so many for each head, or the layer's
best ones wherever they are, of which a fifth of what is outside the window is each head's own. The
full cache's greedy answer is then fed to the model, which cannot attend to what was not chosen.
Nothing is freed: this measures what a cache with heads of unlike lengths would be worth.

Writes to OUT, for each prompt, method, budget and way to share, the KL to the full cache (nats a
token, mean over the answer) and the longest head's length over the mean; prints paired differences.
Ada-KV: https://arxiv.org/abs/2407.11550, Algorithm 1 (floor alpha = 0.2).
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor
from transformers import DynamicCache

import baselines  # noqa: F401  (registers its methods)
from buzz import POLICIES, EvictionCache, Policy
from evals.results.frame import interval
from evals.run.models import load_model
from evals.run.plan import Plan
from evals.run.prompts import load_prompts

METHODS, BUDGETS = ("h2o", "snapkv", "defensive_kv"), (0.1, 0.25)
FLOOR, ANSWER = 0.2, 40


def spy(policy: Policy, seen: list[Tensor]) -> Policy:
    """The policy, which leaves the scores of every layer, [heads, entries], in `seen`."""

    def select(self: Any, held: int, state: int, scores: Tensor) -> Tensor:
        seen.append(scores[0] if scores.dim() == 3 else scores)
        return super(type(self), self).select(held, state, scores)

    spying = type(type(policy).__name__, (type(policy),), {"select": select})
    return spying(**{one.name: getattr(policy, one.name) for one in fields(policy)})


def shared(scores: Tensor, policy: Policy, each: int) -> Tensor:
    """Which entries stay if heads compete: boolean [heads, entries], `each` a head on average."""
    window = policy.num_recent
    heads, rivals = scores[:, :-window].shape
    ranked = scores[:, :-window].clone()
    own = ranked.topk(int(FLOOR * (each - window)), dim=-1).indices
    ranked.scatter_(1, own, torch.inf)
    kept = torch.zeros(heads * rivals, dtype=torch.bool)
    kept[ranked.flatten().topk(heads * (each - window)).indices] = True
    return torch.cat([kept.view(heads, rivals), torch.ones(heads, window, dtype=torch.bool)], 1)


@torch.inference_mode()
def main(arguments: Sequence[str]) -> int:
    out = Path(next((a[4:] for a in arguments if a.startswith("out=")), "shared_heads.csv"))
    configs = str(Path(__file__).resolve().parents[1] / "configs")
    with initialize_config_dir(configs, version_base=None):
        given = [one for one in arguments if not one.startswith("out=")]
        plan = Plan.of(compose("config", ["method=full", *given]))
    model, tokenizer = load_model(plan.config["model"], plan.config["device"])
    masks: dict[int, Tensor] = {}

    def mask(index: int, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | ({"attention_mask": masks[index]} if index in masks else {})

    for i, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_pre_hook(partial(mask, i), with_kwargs=True)
    queries = model.config.num_attention_heads // model.config.num_key_value_heads
    lines = []
    for prompt in load_prompts(plan, tokenizer).prompts:
        ids, full = torch.tensor([prompt.ids]), DynamicCache(config=model.config)
        n = ids.shape[1]
        model(ids, past_key_values=full, logits_to_keep=1)
        told = model.generate(
            ids, past_key_values=copy.deepcopy(full), max_new_tokens=ANSWER, do_sample=False
        )
        answer = told[:, n:]
        expected = model(answer, past_key_values=copy.deepcopy(full)).logits[0].log_softmax(-1)
        for budget in BUDGETS:
            each = round(budget * n)
            for name in METHODS:
                seen: list[Tensor] = []
                policy = spy(POLICIES[name]().fit(each), seen)
                cache = EvictionCache(model, policy, positions="true")
                model(ids, past_key_values=cache, logits_to_keep=1)
                for way in ("own", "shared"):
                    longest = 0.0
                    for i, scores in enumerate(seen):
                        if way == "own":
                            kept = torch.zeros(scores.shape, dtype=torch.bool)
                            kept.scatter_(1, cache.kept_positions(i)[0].long(), True)
                        else:
                            kept = shared(scores, policy, each)
                        assert kept.sum() == len(kept) * each
                        longest += float(kept.sum(1).max()) / each / len(seen)
                        fed = answer.shape[1]
                        visible = torch.cat([kept, torch.ones(len(kept), fed, dtype=torch.bool)], 1)
                        rows = visible.repeat_interleave(queries, 0)[None, :, None]
                        masks[i] = rows.repeat(1, 1, fed, 1)
                        masks[i][..., n:] &= torch.ones(fed, fed, dtype=torch.bool).tril()
                    found = model(answer, past_key_values=copy.deepcopy(full)).logits[0]
                    masks.clear()
                    kl = (expected.exp() * (expected - found.log_softmax(-1))).sum(-1).mean()
                    line = {"task": plan.config["task"]["name"], "sample": prompt.sample.id}
                    line |= {"budget": budget, "method": name, "heads": way}
                    lines.append(line | {"kl": float(kl), "longest": longest})
        print(f"{prompt.sample.id}: {n} tokens", flush=True)
    frame = pd.DataFrame(lines)
    frame.to_csv(out, index=False, float_format="%.5g")
    for (budget, name), own in frame.groupby(["budget", "method"]):
        wide = own.pivot(index="sample", columns="heads", values="kl")
        less = interval(wide.shared - wide.own)
        print(
            f"{name} at {budget:g}: own {wide.own.mean():.3f}, shared {wide.shared.mean():.3f},"
            f" difference {less.value:+.3f} {less.ends}, n = {less.n}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
