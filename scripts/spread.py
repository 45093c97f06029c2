"""The same facts in one cell, in neighbouring cells, and spread over the prompt.

    python scripts/spread.py --samples 8 --out results/spread

Of needle, the five digits of a passkey: side by side, each in a sentence of its own next to the
others, or in these sentences spread over the filler. Of ruler's vt, the five assignments of a chain
of variables: one right after the other, with a sentence of filler between two, or spread
(`task.spread=cell|neighbours|prompt` of both). Every method reads the same prompts at the same
budget. Measured: how many of the digits, or of the assigned names, a head keeps, and how often all
five; KL to the full cache on the full cache's own answer; accuracy of the method's own answer.
Writes OUT/spread.csv, a row for each prompt and method, and OUT/spread.png. Prompts that
OUT/spread.csv has are not run again.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from hydra import compose, initialize_config_dir
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from buzz import Budget, ConfigError, Policy
from evals.report.drawing import RC, legend, panels, plt
from evals.report.methods import style_of
from evals.run.checkpoints import ROOT
from evals.run.forked import Rows
from evals.run.generate import eos_ids
from evals.run.models import load_model
from evals.run.plan import Plan, policy_of
from evals.run.prompt import Prompt
from evals.run.prompts import load_prompts
from evals.tasks import ruler
from evals.tasks.types import SPREADS

METHODS = (
    "local,streaming_llm,h2o,tova,snapkv,chunk_kv,keydiff,buzz,buzz_strided,buzz_fast,honeycomb"
)
MEASURES = {
    "kept": "{} kept, of 5",
    "whole": "heads that keep all five",
    "kl": "KL to the full cache (nats)",
    "accuracy": "accuracy",
}


def passkey_found(text: str, key: Sequence[str]) -> float:
    # A key that was told digit by digit may be answered so.
    return float(key[0] in re.sub(r"(?<=\d)[\s,]+(?=\d)", "", text))


def names_found(text: str, names: Sequence[str]) -> float:
    return ruler.score("vt", text, names) / 100


@dataclass(frozen=True)
class Facts:
    """A task that tells five facts.

    Attributes:
        what: they are called.
        pattern: its groups are the facts, or five digits, where a prompt tells them.
        accuracy: of an answer and the references, 0..1.
        tokens: of an answer.
        length: of a prompt, in tokens.
        settings: of the task.
    """

    what: str
    pattern: re.Pattern[str]
    accuracy: Callable[[str, Sequence[str]], float]
    tokens: int
    length: int
    settings: tuple[str, ...]


TASKS = {
    "needle": Facts(
        "digits of a passkey",
        re.compile(r"pass key is (\d)(?:\.|(\d)(\d)(\d)(\d))"),
        passkey_found,
        16,
        512,
        ("task=needle", "task.depths=[{depth}]", "task.repeats={samples}"),
    ),
    # Of an assignment the new name counts: the answer is made of these. The worked example before
    # the text has shorter names.
    "vt": Facts(
        "names of a chain",
        re.compile(r"VAR ([A-Z]{5}) ="),
        names_found,
        30,
        1280,
        ("task=ruler", "task.subtasks=[vt]", "task.samples={samples}"),
    ),
}


def fact_tokens(text: str, tokenizer: PreTrainedTokenizerBase, task: str) -> list[list[int]]:
    """Of each of the five facts, where in the prompt's tokens it stands."""
    spans = [
        match.span(group)
        for match in TASKS[task].pattern.finditer(text)
        for group in range(1, match.re.groups + 1)
        if match[group]
    ]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    places = [*enumerate(encoded["offset_mapping"])]
    return [[i for i, (b, e) in places if b < end and e > begin] for begin, end in spans]


def kept(cache: Any, facts: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Facts that a head keeps, on average over heads and layers; the share of those with all.

    Of a fact of several tokens a part may be kept.
    """
    shares, whole = [], []
    for index in range(len(cache.layers)):
        positions = cache.kept_positions(index)[0]
        found = torch.stack(
            [
                (positions[..., None] == torch.tensor(fact, device=positions.device))
                .any(1)
                .float()
                .mean(-1)
                for fact in facts
            ],
            dim=-1,
        )
        shares.append(found.sum(-1))
        whole.append((found == 1).all(-1))
    return float(torch.cat(shares).mean()), float(torch.cat(whole).float().mean())


def measure(
    model: PreTrainedModel,
    prompt: Prompt,
    policies: Sequence[Policy],
    facts: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    task: Facts,
) -> list[dict[str, Any]]:
    """The full cache and every method on one prompt."""
    eos = eos_ids(model, tokenizer)
    rows = Rows(model, policies)
    rows.read(prompt.ids)
    found = [kept(fork, facts) for fork in rows.cache.forks]
    answers = rows.own_answers(task.tokens, eos)
    _, kls, _ = rows.forced(task.tokens, eos)
    results = []
    for (some, whole), kl, answer in zip(found, [[0.0], *kls], answers, strict=True):
        text = tokenizer.decode(answer, skip_special_tokens=True)
        right = task.accuracy(text, prompt.sample.references)
        nats = statistics.fmean(kl) if kl else None
        results.append({"kept": some, "whole": whole, "kl": nats, "accuracy": right})
    return results


def run(given: argparse.Namespace) -> pd.DataFrame:
    target = given.out / "spread.csv"
    frame = pd.read_csv(target) if target.exists() else pd.DataFrame()
    model = tokenizer = None
    for told, spread in product(given.tasks.split(","), SPREADS):
        task = TASKS[told]
        with initialize_config_dir(str(ROOT / "configs"), version_base=None):
            settings = [
                *(f"+method@tested.{name}={name}" for name in given.methods.split(",")),
                *(one.format(depth=given.depth, samples=given.samples) for one in task.settings),
                f"model={given.model}",
                f"task.spread={spread}",
                f"task.lengths=[{given.length or task.length}]",
            ]
            cfg = compose("config", settings)
        plan = Plan.of(cfg)
        if model is None or tokenizer is None:
            model, tokenizer = load_model(plan.config["model"], given.device)
        tested = plan.config["tested"]
        for prompt in load_prompts(plan, tokenizer).prompts:
            key = f"{spread}-{prompt.sample.id}-{given.budget}"
            if len(frame) and key in set(frame["sample"]):
                continue
            policies: list[Policy] = []
            for label, own in tested.items():
                policy = policy_of(f"tested.{label}", own)
                policies.append(Budget(given.budget).policy(policy, len(prompt.ids))[0])
            facts = fact_tokens(tokenizer.decode(prompt.ids), tokenizer, told)
            if len(facts) != 5 or len({one[0] for one in facts}) != 5:
                raise ConfigError("model", given.model, f"its tokens do not tell {task.what} apart")
            found = measure(model, prompt, policies, facts, tokenizer, task)
            shared = {"task": told, "sample": key, "spread": spread, "budget": given.budget}
            rows = [
                shared | {"method": label} | one
                for label, one in zip(["full", *tested], found, strict=True)
            ]
            frame = pd.concat([frame, pd.DataFrame(rows)], ignore_index=True)
            given.out.mkdir(parents=True, exist_ok=True)
            frame.to_csv(target, index=False, float_format="%.5g")
    return frame


def draw(frame: pd.DataFrame, path: Path) -> Any:
    """A column a task, a row a measure: methods over the three ways to spread the facts."""
    tasks = [name for name in TASKS if name in set(frame.task)]
    with plt.rc_context(RC):
        figure, axes = panels(len(MEASURES) * len(tasks), height=2.3, most=len(tasks))
        for axis, (name, task) in zip(axes, product(MEASURES, tasks), strict=True):
            own = frame[frame.task == task]
            for method in frame.method.unique():
                if method == "full" and name == "kl":
                    continue
                means = own[own.method == method].groupby("spread")[name].mean()
                style = style_of(method)
                look = {"color": style.color, "marker": style.marker, "markersize": 4}
                axis.plot(SPREADS, [means.get(one) for one in SPREADS], label=style.label, **look)
            axis.set_title(f"{task}: {MEASURES[name].format(TASKS[task].what)}")
            axis.set_ylim(bottom=0)
        legend(figure, axes)
        figure.savefig(path, dpi=150, bbox_inches="tight")
        plt.close(figure)
    return figure


def main(arguments: Sequence[str]) -> int:
    """Exit status: 2 if something asked for cannot be served."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="of configs/model")
    parser.add_argument("--tasks", default=",".join(TASKS), help="or one of them")
    parser.add_argument("--methods", default=METHODS, help="beside the full cache")
    parser.add_argument("--budget", type=float, default=0.25, help="fraction of the prompt")
    parser.add_argument("--length", type=int, help="tokens of a prompt; by default 512, of vt 1280")
    parser.add_argument("--depth", type=float, default=30, help="of the first digit, in percent")
    parser.add_argument("--samples", type=int, default=8, help="prompts of each kind")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("results/spread"))
    given = parser.parse_args(arguments)
    try:
        for name in given.tasks.split(","):
            if name not in TASKS:
                raise ConfigError("tasks", name, f"choose of {', '.join(TASKS)}")
        draw(run(given), given.out / "spread.png")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
