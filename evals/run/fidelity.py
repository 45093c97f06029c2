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
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Annotated, Any

import torch
from omegaconf import DictConfig, OmegaConf
from pydantic import Field
from rich.progress import track
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from baselines import FullPolicy
from buzz import CACHE_ARGUMENT, Budget, ForkedCache, Policy
from buzz.errors import ConfigError
from evals.results.environment import environment
from evals.results.records import RunFolder, digest, sha256
from evals.results.runs import compression, settings_of
from evals.results.schema import Record
from evals.run.faults import attempt
from evals.run.forced import fidelity_of
from evals.run.generate import eos_ids
from evals.run.interrupt import deferred_signals
from evals.run.lengths import Lengths
from evals.run.models import load_model, load_tokenizer
from evals.run.plan import Plan, expand, policy_of, with_class
from evals.run.prompt import Prompt
from evals.run.prompts import load_prompts
from evals.run.runner import console
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
    check("fidelity.answers", settings["answers"], bool)
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
            prompt, longest = rows[0], rows[0].max_new_tokens if settings["answers"] else 0
            answer, found, own_answers = compare(
                model,
                prompt.ids,
                policies,
                settings["tokens"],
                eos,
                plan.config["cache"],
                prompt.later,
                longest,
                {tokenizer.encode(end, add_special_tokens=False)[-1] for end in prompt.sample.stop},
            )
            scores = [_score(plan.task, prompt, tokenizer, one) for one in own_answers]
            for one, score in zip(found, scores[1:], strict=bool(scores)):
                one["score"] = score
            own = {
                "answer_tokens": len(answer),
                "answer_sha256": sha256(answer),
                "copied": dataclasses.asdict(copied(prompt.ids, answer)),
                "full_score": scores[0] if scores else None,
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


def _score(
    task: Task, prompt: Prompt, tokenizer: PreTrainedTokenizerBase, tokens: list[int]
) -> float:
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return task.score(prompt.sample, {"prediction": text})[task.headline]  # type: ignore[typeddict-item]


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
    own = [
        settings,
        settings_of(config),
        model,
        config["cache"],
        config["budget_by"],
        config["seed"],
    ]
    own += compression(config).values()
    name = f"{task['name']}-{model['name']}-{digest([*own, config['model_digest']])}"
    return Path(config["output"]) / name


class _Rows:
    """The full cache and other methods that have read a prompt, each a row of one batch.

    Attributes:
        logits: of the last token read, [rows, vocab], or [1, vocab] while it is the same for all.
    """

    def __init__(self, model: PreTrainedModel, policies: Sequence[Policy], **options: Any) -> None:
        self.model = model
        every = [FullPolicy(), *policies]
        self.cache = ForkedCache(model, every, **options)
        self.lengths = [Lengths(*pair) for pair in zip(self.cache.forks, every, strict=True)]
        self.logits = torch.empty(0)

    def read(self, prompt: Sequence[int], later: Sequence[int]) -> None:
        """Reads a prompt; `later` are the tokens of the steps behind the first."""
        start = 0
        for new in (len(prompt) - sum(later), *later):
            part = torch.tensor([list(prompt[start : start + new])], device=self.model.device)
            self.step(part if not start else part.expand(len(self.lengths), new))
            start += new

    def feed(self, token: int) -> None:
        """One token to every row."""
        self.step(torch.full((len(self.lengths), 1), token, device=self.model.device))

    def step(self, ids: Tensor) -> None:
        given: dict[str, Any] = {CACHE_ARGUMENT: self.cache}
        with torch.inference_mode():
            self.logits = self.model(ids, **given, logits_to_keep=1).logits[:, -1]
        for held in self.lengths:
            held.note()

    def answers(self, tokens: int, eos: AbstractSet[int]) -> list[list[int]]:
        """Every row's own greedy answer, by a copy: the rows stay where they are."""
        cache, logits = self.cache.copy(), self.logits
        given: dict[str, Any] = {CACHE_ARGUMENT: cache}
        found: list[list[int]] = [[] for _ in self.lengths]
        ends = torch.tensor(sorted(eos), device=logits.device)
        over = torch.zeros(len(found), dtype=torch.bool, device=logits.device)
        for _ in range(tokens):
            chosen = logits.argmax(-1).expand(len(found))
            for row, token in enumerate(chosen.tolist()):
                if not over[row]:
                    found[row].append(token)
            over = over | torch.isin(chosen, ends)
            if over.all() or len(found[0]) == tokens:
                break
            with torch.inference_mode():
                logits = self.model(chosen[:, None], **given, logits_to_keep=1).logits[:, -1]
        return found


def compare(
    model: PreTrainedModel,
    prompt: Sequence[int],
    policies: Sequence[Policy],
    tokens: int,
    eos: AbstractSet[int],
    cache_options: dict[str, Any],
    later: Sequence[int] = (),
    own_tokens: int = 0,
    stop: AbstractSet[int] = frozenset(),
) -> tuple[list[int], list[Record], list[list[int]]]:
    """One prompt, read once; then `policies` beside the full cache, on its greedy answer.

    The full cache takes part at its own positions: `cache_options` are the methods'. Where the
    context is compressed before the question is read, every method reads the question by itself,
    and the answer's first token is compared, too.

    Args:
        later: tokens of the steps behind the first in which the prompt is read, see
            :mod:`evals.run.compress`.
        own_tokens: of each row's own greedy answer, at most; 0: none is made.
        stop: tokens that end own answers too.

    Returns:
        The answer, at most `tokens`, the token that ended it included; for each policy kl,
        kl_median, top1 (see :class:`evals.run.forced.Fidelity`; None of an answer of one token),
        kl_tokens, entries_mean, entries_peak (held after each step), evictions; and the own
        answers, the full cache's first.

    Raises:
        LengthMismatch: a cache held another number of entries than its policy's recurrence says.
        NotFinite: a divergence is NaN or infinite.
    """
    rows = _Rows(model, policies, **cache_options)
    kls: list[Tensor] = []
    same: list[Tensor] = []

    def next_token() -> int:
        """The full cache's, with which the others' distributions are compared."""
        found = log_softmax(rows.logits, dim=-1, dtype=torch.float32)
        full, own = found[:1], found[1:]
        if len(own):
            kls.append((full.exp() * (full - own)).sum(-1))
            same.append(full.argmax(-1) == own.argmax(-1))
        return int(full.argmax())

    rows.read(prompt, later)
    answers = rows.answers(own_tokens, eos | stop) if own_tokens else []
    answer = [next_token()]
    while len(answer) < tokens and answer[-1] not in eos:
        rows.feed(answer[-1])
        answer.append(next_token())
    steps = [len(prompt) - sum(later), *later] + [1] * (len(answer) - 1)
    entries = [held.verified(0, steps) for held in rows.lengths]
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
                "evictions": rows.cache.forks[row + 1].evictions[0],
            }
        )
    return answer, results, answers


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
