"""The same five digits in one cell, in neighbouring cells, and spread over the prompt.

    python scripts/spread.py --length 512 --samples 8 --out results/spread

A passkey's digits stand side by side, each in a sentence of its own next to the others, or in these
sentences spread over the filler (`task=needle task.spread=cell|neighbours|prompt`). Every method
reads the same prompts at the same budget. Measured: how many of the digits a head keeps, and how
often all five; KL to the full cache on the full cache's own answer; accuracy of the method's own
answer. Writes OUT/spread.csv, a row for each prompt and method, and OUT/spread.png. Prompts that
OUT/spread.csv has are not run again.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from baselines import FullPolicy
from buzz import CACHE_ARGUMENT, Budget, ConfigError, ForkedCache, Policy
from evals.report.drawing import RC, legend, panels, plt
from evals.report.methods import style_of
from evals.run.generate import eos_ids
from evals.run.models import ROOT, load_model
from evals.run.plan import Plan, policy_of
from evals.run.prompt import Prompt
from evals.run.prompts import load_prompts
from evals.tasks.needle import SPREADS

DIGITS = {"cell": re.compile(r"pass key is (\d{5})"), "other": re.compile(r"pass key is (\d)\.")}
METHODS = (
    "local,streaming_llm,h2o,tova,snapkv,chunk_kv,keydiff,buzz,buzz_strided,buzz_fast,honeycomb"
)
MEASURES = {
    "kept": "digits kept, of 5",
    "whole": "heads that keep all five",
    "kl": "KL to the full cache (nats)",
    "accuracy": "accuracy",
}


def digit_tokens(text: str, tokenizer: PreTrainedTokenizerBase, spread: str) -> list[int]:
    """Where in a prompt's tokens its five digits stand."""
    pattern = DIGITS["cell" if spread == "cell" else "other"]
    places = [i for match in pattern.finditer(text) for i in range(*match.span(1))]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ends = [end for _, end in encoded["offset_mapping"]]
    return [next(i for i, end in enumerate(ends) if end > place) for place in places]


def kept(cache: Any, digits: Sequence[int]) -> tuple[float, float]:
    """Digits that a head keeps, on average over heads and layers; the share of those with all."""
    counts = []
    for index in range(len(cache.layers)):
        positions = cache.kept_positions(index)[0]
        found = (positions[..., None] == torch.tensor(digits, device=positions.device)).any(1)
        counts.append(found.sum(-1))
    count = torch.cat(counts).float()
    return float(count.mean()), float((count == len(digits)).float().mean())


@torch.inference_mode()
def measure(
    model: PreTrainedModel,
    prompt: Prompt,
    policies: Sequence[Policy],
    digits: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
) -> list[dict[str, Any]]:
    """Every method on one prompt; the first is the full cache."""
    eos = eos_ids(model, tokenizer)
    cache = ForkedCache(model, policies)

    def step(cache: ForkedCache, ids: Tensor) -> Tensor:
        given: dict[str, Any] = {CACHE_ARGUMENT: cache}
        return model(ids.to(model.device), **given, logits_to_keep=1).logits[:, -1]

    first = step(cache, torch.tensor([prompt.ids])).argmax(-1).expand(len(policies))
    found = [kept(fork, digits) for fork in cache.forks]
    forced, free = cache.copy(), cache
    kls, own = [], [first]
    token = first
    for _ in range(tokens - 1):
        own.append(step(free, own[-1][:, None]).argmax(-1))
        if int(token[0]) not in eos:
            logits = log_softmax(step(forced, token[:1].expand(len(policies))[:, None]).float(), -1)
            kls.append((logits[:1].exp() * (logits[:1] - logits)).sum(-1))
            token = logits.argmax(-1)
    results = []
    for row, answer in enumerate(torch.stack(own, dim=1).tolist()):
        end = next((i for i, one in enumerate(answer) if one in eos), len(answer))
        text = tokenizer.decode(answer[:end], skip_special_tokens=True)
        # A key that was told digit by digit may be answered so.
        said = re.sub(r"(?<=\d)[\s,]+(?=\d)", "", text)
        kl = float(torch.stack(kls)[:, row].mean())
        right = prompt.sample.references[0] in said
        results.append({"kept": found[row][0], "whole": found[row][1], "kl": kl, "accuracy": right})
    return results


def run(given: argparse.Namespace) -> pd.DataFrame:
    target = given.out / "spread.csv"
    frame = pd.read_csv(target) if target.exists() else pd.DataFrame()
    model = tokenizer = None
    for spread in SPREADS:
        with initialize_config_dir(str(ROOT / "configs"), version_base=None):
            settings = [
                *(f"+method@tested.{name}={name}" for name in given.methods.split(",")),
                f"model={given.model}",
                f"task.spread={spread}",
                f"task.lengths=[{given.length}]",
                f"task.depths=[{given.depth}]",
                f"task.repeats={given.samples}",
            ]
            cfg = compose("config", settings)
        plan = Plan.of(cfg)
        if model is None or tokenizer is None:
            model, tokenizer = load_model(plan.config["model"], given.device)
        tested = plan.config["tested"]
        for prompt in load_prompts(plan, tokenizer).prompts:
            name = f"{spread}-{prompt.sample.id}-{given.budget}"
            if len(frame) and name in set(frame["sample"]):
                continue
            policies: list[Policy] = [FullPolicy()]
            for label, own in tested.items():
                policy = policy_of(f"tested.{label}", own)
                policies.append(Budget(given.budget).policy(policy, len(prompt.ids))[0])
            digits = digit_tokens(tokenizer.decode(prompt.ids), tokenizer, spread)
            if len(digits) != 5:
                raise ConfigError("model", given.model, "its tokens do not tell digits apart")
            found = measure(model, prompt, policies, digits, tokenizer, given.tokens)
            shared = {"sample": name, "spread": spread, "budget": given.budget}
            rows = [
                shared | {"method": label} | one
                for label, one in zip(["full", *tested], found, strict=True)
            ]
            frame = pd.concat([frame, pd.DataFrame(rows)], ignore_index=True)
            given.out.mkdir(parents=True, exist_ok=True)
            frame.to_csv(target, index=False, float_format="%.5g")
    return frame


def draw(frame: pd.DataFrame, path: Path) -> None:
    """A panel a measure: methods over the three ways to spread the digits."""
    with plt.rc_context(RC):
        figure, axes = panels(len(MEASURES), most=2)
        for axis, (name, title) in zip(axes, MEASURES.items(), strict=True):
            for method in frame.method.unique():
                if method == "full" and name == "kl":
                    continue
                means = frame[frame.method == method].groupby("spread")[name].mean()
                style = style_of(method)
                look = {"color": style.color, "marker": style.marker, "markersize": 4}
                axis.plot(SPREADS, [means.get(one) for one in SPREADS], label=style.label, **look)
            axis.set_title(title)
            axis.set_ylim(bottom=0)
        legend(figure, axes)
        figure.savefig(path, dpi=150, bbox_inches="tight")
        plt.close(figure)


def main(arguments: Sequence[str]) -> int:
    """Exit status: 2 if something asked for cannot be served."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="of configs/model")
    parser.add_argument("--methods", default=METHODS, help="beside the full cache")
    parser.add_argument("--budget", type=float, default=0.25, help="fraction of the prompt")
    parser.add_argument("--length", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--depth", type=float, default=30, help="of the first digit, in percent")
    parser.add_argument("--samples", type=int, default=8, help="prompts of each kind")
    parser.add_argument("--tokens", type=int, default=16, help="of an answer")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("results/spread"))
    given = parser.parse_args(arguments)
    try:
        draw(run(given), given.out / "spread.png")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
