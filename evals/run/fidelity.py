"""Many methods beside the full cache, at the cost of one prefill a prompt.

The full cache answers greedily; every method is fed that answer, token by token, and its next-token
distributions are compared. All of them are rows of one :class:`buzz.ForkedCache`.

One line of forks.jsonl a prompt, with the comparisons of all methods; texts are in none of them.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from omegaconf import DictConfig, OmegaConf
from pydantic import Field
from rich.progress import track
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from buzz import Budget, Policy
from buzz.errors import ConfigError
from evals.results.environment import environment
from evals.results.records import RunFolder, digest, sha256
from evals.results.runs import compression, settings_of
from evals.results.schema import Record
from evals.run.console import console
from evals.run.faults import attempt
from evals.run.forked import compare
from evals.run.generate import eos_ids
from evals.run.interrupt import deferred_signals
from evals.run.models import load_model, load_tokenizer
from evals.run.plan import Plan, expand, policy_of, with_class
from evals.run.prompt import Prompt
from evals.run.prompts import load_prompts
from evals.tasks.base import Task
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
    budget: Budget

    def fitted(self, context: int) -> Policy:
        """For so many tokens that are compressed together."""
        return self.budget.policy(self.policy, context)[0]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is compared, with what; the tokens of an answer, and whether rows answer themselves."""

    task: Task
    forks: Sequence[Fork]
    cache_options: dict[str, Any]
    tokens: int
    answers: bool
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def record(self, prompt: Prompt) -> Record:
        """The comparisons of every fork on one prompt."""
        start = time.perf_counter()
        ends = (self.tokenizer.encode(end, add_special_tokens=False) for end in prompt.sample.stop)
        answer, found, own = compare(
            self.model,
            prompt.ids,
            [fork.fitted(prompt.context) for fork in self.forks],
            self.tokens,
            eos_ids(self.model, self.tokenizer),
            self.cache_options,
            prompt.later,
            prompt.max_new_tokens if self.answers else 0,
            {tokens[-1] for tokens in ends},
        )
        scores = [self._score(prompt, tokens) for tokens in own]
        for one, score in zip(found, scores[1:], strict=False):
            one["score"] = score
        return {
            "status": "ok",
            "answer_tokens": len(answer),
            "answer_sha256": sha256(answer),
            "copied": dataclasses.asdict(copied(prompt.ids, answer)),
            "full_score": scores[0] if scores else None,
            "seconds": time.perf_counter() - start,
            "forks": [
                {"method": fork.label, "budget": fork.budget.size, "budget_by": fork.budget.by}
                | one
                for fork, one in zip(self.forks, found, strict=True)
            ],
        }

    def _score(self, prompt: Prompt, tokens: list[int]) -> float:
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        record: Record = {"prediction": text, "generated_tokens": len(tokens)}
        return self.task.score(prompt.sample, record)[self.task.headline]


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
    asked: Any = OmegaConf.to_container(cfg.fidelity, resolve=True)
    check("fidelity.tokens", asked["tokens"], Annotated[int, Field(ge=2)])
    check("fidelity.answers", asked["answers"], bool)
    for label, method in asked["methods"].items():
        asked["methods"][label] = with_class(f"fidelity.methods.{label}", method)
    plan = Plan.of(cfg)
    if plan.task.mode == "read":
        raise ConfigError("task", plan.task.name, "has no answers to compare; take another")
    if (base := plan.config["cache"]["logn_base"]) is not None:
        remedy = "methods share the full cache's prefill, which is not scaled; leave it out"
        raise ConfigError("cache.logn_base", base, remedy)
    if plan.cache_options["compiled"]:
        remedy = "rows that hold different numbers of entries are no graph; leave it out"
        raise ConfigError("model.compile", True, remedy)
    forks = [
        Fork(label, policy, Budget(size, plan.config["budget_by"]))
        for label, policy in _methods(asked["methods"]).items()
        for size in asked["budgets"]
    ]
    folder = RunFolder(_folder(plan, asked))
    with folder.lock():
        prompts = load_prompts(plan, load_tokenizer(plan.config["model"])).prompts
        for fork in forks:  # refuse a budget that cannot be met now, not later
            fork.fitted(min(prompt.context for prompt in prompts))
        done = folder.read(FORKS)
        todo = [prompt for prompt in prompts if _missing(done.get(prompt.sample.id), prompt)]
        if todo:
            folder.write("config.yaml", OmegaConf.to_yaml(plan.config | {"fidelity": asked}))
            _compare(plan, asked, forks, folder, todo)
    return folder.path


def _compare(
    plan: Plan,
    asked: dict[str, Any],
    forks: Sequence[Fork],
    folder: RunFolder,
    prompts: Sequence[Prompt],
) -> None:
    """Adds the record of each prompt to the folder."""
    model, tokenizer = load_model(plan.config["model"], plan.config["device"])
    parameters = sum(weights.numel() for weights in model.parameters())
    now = environment(str(model.device), plan.config["seed"], parameters)
    made = {"environment": folder.note(now)}
    told = [
        dataclasses.replace(fork, policy=fork.policy.for_tokenizer(tokenizer)) for fork in forks
    ]
    options, sizes = plan.config["cache"], (asked["tokens"], asked["answers"])
    experiment = Experiment(plan.task, told, options, *sizes, model, tokenizer)
    with deferred_signals() as stop_here:
        name = f"{plan.task.name}: {len(forks)} rows"
        for prompt in track(prompts, name, console=console):
            (found,) = attempt([prompt], lambda rows: [experiment.record(rows[0])], model.device)
            identity = {
                "id": prompt.sample.id,
                "group": prompt.sample.group,
                "prompt_sha256": prompt.sha256,
                "prompt_tokens": len(prompt.ids),
                "context_tokens": prompt.context,
            }
            folder.append(identity | made | found, FORKS)
            stop_here()


def _methods(configured: dict[str, dict[str, Any]]) -> dict[str, Policy]:
    return {
        label: policy_of(f"fidelity.methods.{label}", method)
        for label, method in configured.items()
    }


def _missing(record: Record | None, prompt: Prompt) -> bool:
    return (
        record is None or record["status"] == "failed" or record["prompt_sha256"] != prompt.sha256
    )


def _folder(plan: Plan, asked: dict[str, Any]) -> Path:
    """Named by what determines the result."""
    task, model, config = plan.config["task"], plan.config["model"], plan.config
    own = [
        asked,
        settings_of(config),
        model,
        config["cache"],
        config["budget_by"],
        config["seed"],
    ]
    own += compression(config).values()
    name = f"{task['name']}-{model['name']}-{digest([*own, config['model_digest']])}"
    return Path(config["output"]) / name


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
