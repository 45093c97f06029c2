"""Many methods beside the full cache, at the cost of one prefill a prompt.

The full cache answers greedily; every method is fed that answer, token by token, and its next-token
distributions are compared. All of them are rows of one :class:`buzz.ForkedCache`.

One line of forks.jsonl a prompt, with the comparisons of all methods; texts are in none of them.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from omegaconf import DictConfig, OmegaConf
from pydantic import Field
from rich.progress import track
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel

from baselines import FullPolicy
from buzz import CACHE_ARGUMENT, Budget, ForkedCache, Policy
from buzz.errors import ConfigError
from evals.results.environment import environment
from evals.results.records import RunFolder, digest, sha256
from evals.results.runs import compression
from evals.results.schema import Record
from evals.run.faults import attempt
from evals.run.forced import fidelity_of
from evals.run.generate import eos_ids
from evals.run.interrupt import deferred_signals
from evals.run.lengths import Lengths
from evals.run.models import load_model, load_tokenizer
from evals.run.plan import Plan, expand, policy_of, with_class
from evals.run.prompts import Prompt, load_prompts
from evals.run.runner import console
from evals.tasks.build import check

FORKS = "forks.jsonl"


@dataclasses.dataclass(frozen=True)
class Fork:
    """A method at a budget.

    Attributes:
        label: the method's name among those that are compared.
    """

    label: str
    policy: Policy
    budget: float | int

    def fitted(self, prompt: int, by: Any, fixed: frozenset[str]) -> Policy:
        return Budget(self.budget, by).policy(self.policy, prompt, fixed)[0]


def run_all(cfg: DictConfig) -> list[Path]:
    """Compares the methods of `cfg.fidelity` on every prompt of the configured tasks.

    Prompts that were compared before are left as they are.

    Returns:
        The folders, one a task.

    Raises:
        ConfigError: a setting cannot be served.
        Interrupted: by a signal, after the prompt in flight.
    """
    return [_run(one) for one in expand(cfg)]


def _run(cfg: DictConfig) -> Path:
    settings: Any = OmegaConf.to_container(cfg.fidelity, resolve=True)
    check("fidelity.tokens", settings["tokens"], Annotated[int, Field(ge=2)])
    for label, method in settings["methods"].items():
        settings["methods"][label] = with_class(f"fidelity.methods.{label}", method)
    plan = Plan.of(cfg)
    if plan.task.mode == "read":
        raise ConfigError("task", plan.task.name, "has no answers to compare; take another")
    by = plan.config["budget_by"]
    forks = [
        Fork(label, policy, budget)
        for label, policy in _methods(settings["methods"]).items()
        for budget in settings["budgets"]
    ]
    folder = RunFolder(_folder(plan, settings))
    with folder.lock():
        prompts = load_prompts(plan, load_tokenizer(plan.config["model"])).prompts
        for fork in forks:  # refuse a budget that cannot be met now, not later
            fork.fitted(min(prompt.context for prompt in prompts), by, frozenset())
        done = folder.read(FORKS)
        todo = [prompt for prompt in prompts if _missing(done.get(prompt.sample.id), prompt)]
        if not todo:
            return folder.path
        model, tokenizer = load_model(plan.config["model"], plan.config["device"])
        folder.write("config.yaml", OmegaConf.to_yaml(plan.config | {"fidelity": settings}))
        made = {"environment": folder.note(environment(str(model.device), plan.config["seed"], 0))}
        eos = eos_ids(model, tokenizer)
        forks = [
            dataclasses.replace(fork, policy=fork.policy.for_tokenizer(tokenizer)) for fork in forks
        ]

        def compared(rows: list[Prompt]) -> list[Record]:
            start = time.perf_counter()
            policies = [fork.fitted(rows[0].context, by, frozenset()) for fork in forks]
            options, later = plan.config["cache"], rows[0].later
            answer, found = compare(
                model, rows[0].ids, policies, settings["tokens"], eos, options, later
            )
            own = {
                "answer_tokens": len(answer),
                "answer_sha256": sha256(answer),
                "copied": dataclasses.asdict(copied(rows[0].ids, answer)),
                "seconds": time.perf_counter() - start,
            }
            own["forks"] = [
                {"method": fork.label, "budget": fork.budget, "budget_by": by} | one
                for fork, one in zip(forks, found, strict=True)
            ]
            return [{"status": "ok"} | own]

        with deferred_signals() as stop_here:
            name = f"{plan.task.name}: {len(forks)} rows"
            for prompt in track(todo, name, console=console):
                found = attempt([prompt], compared, model.device)[0]
                identity = {
                    "id": prompt.sample.id,
                    "group": prompt.sample.group,
                    "prompt_sha256": prompt.sha256,
                    "prompt_tokens": len(prompt.ids),
                    "context_tokens": prompt.context,
                }
                folder.append(identity | made | found, FORKS)
                stop_here()
    return folder.path


def _methods(configured: dict[str, dict[str, Any]]) -> dict[str, Policy]:
    return {
        label: policy_of(f"fidelity.methods.{label}", method)
        for label, method in configured.items()
    }


def _missing(record: Record | None, prompt: Prompt) -> bool:
    return (
        record is None or record["status"] == "failed" or record["prompt_sha256"] != prompt.sha256
    )


def _folder(plan: Plan, settings: dict[str, Any]) -> Path:
    """Named by what determines the result."""
    task, model, config = plan.config["task"], plan.config["model"], plan.config
    own = [settings, task, model, config["cache"], config["budget_by"], config["seed"]]
    own += compression(config).values()
    name = f"{task['name']}-{model['name']}-{digest([*own, config['model_digest']])}"
    return Path(config["output"]) / name


def compare(
    model: PreTrainedModel,
    prompt: Sequence[int],
    policies: Sequence[Policy],
    tokens: int,
    eos: set[int],
    cache_options: dict[str, Any],
    later: Sequence[int] = (),
) -> tuple[list[int], list[Record]]:
    """One prompt, read once; then `policies` beside the full cache, on its greedy answer.

    The full cache takes part at its own positions: `cache_options` are the methods'. Where the
    context is compressed before the question is read, every method reads the question by itself,
    and the answer's first token is compared, too.

    Args:
        later: tokens of the steps behind the first in which the prompt is read, see
            :mod:`evals.run.compress`.

    Returns:
        The answer, at most `tokens`, the token that ended it included; and for each policy kl,
        kl_median, top1 (see :class:`evals.run.forced.Fidelity`; None of an answer of one token),
        kl_tokens, entries_mean, entries_peak (held after each step), evictions.

    Raises:
        LengthMismatch: a cache held another number of entries than its policy's recurrence says.
        NotFinite: a divergence is NaN or infinite.
    """
    device = model.device
    every = [FullPolicy(), *policies]
    cache = ForkedCache(model, every, **cache_options)
    lengths = [Lengths(fork) for fork in cache.forks]
    kls: list[Tensor] = []
    same: list[Tensor] = []

    def step(ids: Tensor) -> Tensor:
        """Logits [rows, vocab] of the last token."""
        given: dict[str, Any] = {CACHE_ARGUMENT: cache}
        logits = model(ids, **given, logits_to_keep=1).logits[:, -1]
        for held in lengths:
            held.note()
        return logits

    def next_token(logits: Tensor) -> int:
        """The full cache's, with which the others' distributions are compared."""
        found = log_softmax(logits, dim=-1, dtype=torch.float32)
        full, own = found[:1], found[1:]
        if len(own):
            kls.append((full.exp() * (full - own)).sum(-1))
            same.append(full.argmax(-1) == own.argmax(-1))
        return int(full.argmax())

    first = len(prompt) - sum(later)
    with torch.inference_mode():
        logits = step(torch.tensor([list(prompt[:first])], device=device))
        read = first
        for new in later:
            part = torch.tensor([list(prompt[read : read + new])], device=device)
            logits = step(part.expand(len(every), new))
            read += new
        answer = [next_token(logits)]
        while len(answer) < tokens and answer[-1] not in eos:
            logits = step(torch.full((len(every), 1), answer[-1], device=device))
            answer.append(next_token(logits))
    steps = [first, *later] + [1] * (len(answer) - 1)
    entries = [held.verified(0, steps) for held in lengths]
    results: list[Record] = []
    for row in range(len(policies)):
        kl = [float(nats[row]) for nats in kls]
        near = fidelity_of(kl, [float(one[row]) for one in same], model.dtype)
        held = entries[row + 1]
        results.append(
            {
                "kl": near.kl_to_full,
                "kl_median": statistics.median(kl) if kl else None,
                "top1": near.top1_to_full,
                "kl_tokens": [float(f"{nats:.4g}") for nats in kl],
                "entries_mean": statistics.fmean(held),
                "entries_peak": max(held),
                "evictions": cache.forks[row + 1].evictions[0],
            }
        )
    return answer, results


@dataclasses.dataclass(frozen=True)
class Copied:
    """The longest run of an answer's tokens that stands in its prompt, the last of equals.

    Attributes:
        tokens: its length.
        distance: tokens from its beginning to the prompt's end; None if nothing was copied.
        share: of the answer, its tokens in runs of at least four that stand in the prompt.
    """

    tokens: int
    distance: int | None
    share: float


def copied(prompt: Sequence[int], answer: Sequence[int], least: int = 4) -> Copied:
    """Where in its prompt an answer was copied from.

    >>> copied([1, 2, 3, 4, 5, 6], [9, 3, 4, 5, 8])
    Copied(tokens=3, distance=4, share=0.0)
    """
    places: dict[int, list[int]] = {}
    for place, token in enumerate(prompt):
        places.setdefault(token, []).append(place)
    best, begin = 0, None
    covered = [False] * len(answer)
    before: dict[int, int] = {}  # length of the match that ends at a place of the prompt
    for number, token in enumerate(answer):
        now = {place: before.get(place - 1, 0) + 1 for place in places.get(token, [])}
        for place, length in now.items():
            if length >= best:
                best, begin = length, place - length + 1
        longest = max(now.values(), default=0)
        if longest >= least:
            covered[number - longest + 1 : number + 1] = [True] * longest
        before = now
    distance = None if begin is None else len(prompt) - begin
    return Copied(best, distance, sum(covered) / len(answer))
