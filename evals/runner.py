"""From a configuration to records: check, load, generate, score, record, summarize."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from buzz import Policy
from buzz.errors import ConfigError
from evals.generate import Generation, LengthMismatch, generate
from evals.loggers import Logger
from evals.metrics import bootstrap_interval
from evals.models import check_model, load_model
from evals.records import Record, RunFolder, arithmetic_runs, digest, environment
from evals.task import Sample, Task, at_least

MEASURED = (
    "prompt_tokens",
    "generated_tokens",
    "budget_entries",
    "kv_entries_mean",
    "kv_nbytes_mean",
    "ttft_s",
    "decode_tokens_per_s",
    "itl_p50_ms",
    "itl_p95_ms",
    "evictions",
)
PEAKS = ("kv_entries_peak", "kv_nbytes_peak", "allocated_nbytes", "memory_peak_nbytes")

console = Console(stderr=True)


class RunFailed(RuntimeError):
    """A run that was stopped because its measurements cannot be trusted."""


@dataclass(frozen=True)
class Prompt:
    """A sample as the model sees it."""

    sample: Sample
    ids: list[int]
    truncated: int
    chat: bool
    max_new_tokens: int

    @property
    def sha256(self) -> str:
        """First 16 digits of the hash of the token ids."""
        return hashlib.sha256(json.dumps(self.ids).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Plan:
    """A configuration, checked and built, before any model is loaded.

    Attributes:
        fixed: the method's parameters that a budget must leave alone.
        config: the resolved configuration as plain data.
    """

    policy: Policy
    task: Task
    logger: Logger
    budget: float | int | None
    fixed: frozenset[str]
    config: dict[str, Any]

    @classmethod
    def of(cls, cfg: DictConfig, fixed: Iterable[str] = ()) -> Plan:
        """Builds and checks what `cfg` asks for.

        Raises:
            ConfigError: something in `cfg` cannot be served.
        """
        config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
        method = {key: value for key, value in config["method"].items() if key != "name"}
        plan = cls(
            policy=_build("method", method),
            task=_build("task", config["task"]),
            logger=_build("logger", config["logger"]),
            budget=config["budget"],
            fixed=frozenset(fixed),
            config=config,
        )
        plan._check()
        return plan

    def _check(self) -> None:
        at_least(0, "seed", self.config["seed"])
        check_model(self.config["model"])
        self.task.check()
        context, task = self.config["model"]["max_length"], self.task
        answer = task.max_new_tokens or 0
        if answer >= context:
            raise ConfigError(
                "task.max_new_tokens", answer, f"must leave room in the model's {context} tokens"
            )
        if (longest := task.longest_prompt()) + answer > context:
            raise ConfigError(
                "model.max_length",
                context,
                f"too short for prompts of {longest} tokens and {answer} of answer;"
                " shorten the prompts or take another model",
            )
        for field in dataclasses.fields(self.policy):
            value = getattr(self.policy, field.name)
            if isinstance(value, int) and value > context:
                raise ConfigError(
                    f"method.{field.name}", value, f"larger than the model's {context} tokens"
                )
        base = self.config["cache"]["logn_base"]
        if base is not None and not (isinstance(base, int | float) and base > 1):
            raise ConfigError("cache.logn_base", base, "give a number above 1, or null")
        budget = self.budget
        if budget is None:
            return
        whole = isinstance(budget, int) and not isinstance(budget, bool) and budget >= 1
        if not whole and not (isinstance(budget, float) and 0 < budget < 1):
            raise ConfigError(
                "budget", budget, "give a fraction of the prompt between 0 and 1, or entries >= 1"
            )
        if whole and budget > context:
            raise ConfigError("budget", budget, f"larger than the model's {context} tokens")
        if whole or longest:
            self.fit(longest, answer)

    @property
    def fits(self) -> bool:
        """Whether there is a budget, and the method has parameters to meet it with."""
        return self.budget is not None and bool(dataclasses.fields(self.policy))

    def fit(self, prompt_tokens: int, new_tokens: int) -> tuple[Policy, int | None]:
        """The policy for a prompt and an answer of this length, and the entries it may hold."""
        if self.budget is None or not self.fits:
            return self.policy, None
        if isinstance(self.budget, int):
            entries = self.budget
        else:
            entries = max(1, round(self.budget * prompt_tokens))
        horizon = (prompt_tokens, new_tokens) if prompt_tokens and new_tokens else None
        return self.policy.fit(entries, self.fixed, horizon), entries

    @property
    def setting(self) -> str:
        """What runs must share to be comparable, as a hash."""
        return digest({key: self.config[key] for key in ("task", "model", "seed", "device")})

    @property
    def folder(self) -> Path:
        """Named by what determines the result."""
        method, task, model = (self.config[key] for key in ("method", "task", "model"))
        result = {
            "setting": self.setting,
            "method": method,
            "cache": self.config["cache"],
            "budget": [self.budget, sorted(self.fixed)] if self.fits else None,
        }
        name = f"{task['name']}-{method['name']}-{model['name']}-{digest(result)}"
        return Path(self.config["output"]) / name


def run(cfg: DictConfig, fixed: Iterable[str] = ()) -> Path:
    """Runs what is still missing of a configured run.

    Args:
        cfg: the composed configuration.
        fixed: names of the method's parameters that the user set, which a budget leaves alone.

    Returns:
        The run's folder.

    Raises:
        ConfigError: a setting cannot be served.
        RunFailed: the cache did not do what the method says.
    """
    plan = Plan.of(cfg, fixed)
    folder = RunFolder(plan.folder)
    with folder.lock():
        records = folder.read()
        model, tokenizer = _load(plan.config["model"], plan.config["device"])
        torch.manual_seed(plan.config["seed"])
        prompts = _encode(plan, tokenizer)
        shortest = min(prompts, key=lambda prompt: len(prompt.ids))
        plan.fit(len(shortest.ids), shortest.max_new_tokens)  # refuse a tight budget now, not later
        done = _finished(folder, records, prompts)
        if done:
            there = f"{folder.path}: {len(done)} of {len(prompts)} samples are there already"
            console.print(there, soft_wrap=True, highlight=False)
        else:
            folder.write("environment.json", environment(str(model.device), plan.config["seed"]))
        folder.write("config.yaml", OmegaConf.to_yaml(plan.config))
        try:
            _generate(plan, folder, records, prompts, done, model, tokenizer)
        except LengthMismatch as error:
            folder.write("summary.json", {"status": "failed", "error": str(error)})
            raise RunFailed(str(error)) from error
        ordered = [records[prompt.sample.id] for prompt in prompts]
        summary = summarize(plan, ordered)
        folder.write("summary.json", summary)
        if len(done) < len(prompts):
            plan.logger.log(folder.path, plan.config, ordered, summary)
    return folder.path


def _build(section: str, config: dict[str, Any]) -> Any:
    """Instantiates a section of the configuration; whatever goes wrong names the section."""
    try:
        return instantiate(config, _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ConfigError(section, config.get("_target_"), reason) from error


_loaded: dict[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]] = {}


def _load(config: dict[str, Any], device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, kept for the next run of this process as long as that wants the same."""
    key = digest([config, device])
    if key not in _loaded:
        _loaded.clear()
        _loaded[key] = load_model(config, device)
    return _loaded[key]


def _encode(plan: Plan, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    prompts = []
    for sample in plan.task.load(tokenizer):
        answer = plan.task.max_new_tokens or sample.max_new_tokens
        limit = plan.config["model"]["max_length"] - answer
        chat = plan.task.chat_template and sample.chat_template is not False
        chat = chat and tokenizer.chat_template is not None
        ids, truncated = encode(tokenizer, sample.prompt, chat, limit)
        if truncated and plan.task.longest_prompt():
            raise ConfigError(
                "model.max_length", limit + answer, f"{truncated} tokens too short for {sample.id}"
            )
        prompts.append(Prompt(sample, ids, truncated, chat, answer))
    return prompts


def encode(
    tokenizer: PreTrainedTokenizerBase, text: str, chat: bool, limit: int
) -> tuple[list[int], int]:
    """Token ids of a prompt, at most `limit`, and how many tokens were cut from its middle.

    As LongBench does, the two ends are joined as text and tokenized again; the chat template is
    applied afterwards and stays whole.

    Raises:
        ConfigError: not even the template fits.
    """

    def tokens(text: str) -> list[int]:
        if not chat:
            return tokenizer(text)["input_ids"]
        message = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    whole = tokens(text)
    if len(whole) <= limit:
        return whole, 0
    body = tokenizer(text, add_special_tokens=False)["input_ids"]
    room = limit - (len(whole) - len(body))
    while (half := room // 2) > 0:
        ends = body[:half], body[-half:]
        cut = tokens("".join(tokenizer.decode(end, skip_special_tokens=True) for end in ends))
        if len(cut) <= limit:
            return cut, len(whole) - len(cut)
        room -= len(cut) - limit
    raise ConfigError("model.max_length", limit, "leaves no room for the prompt")


def _finished(folder: RunFolder, records: dict[str, Record], prompts: list[Prompt]) -> set[str]:
    """Ids of the samples that need not run again."""
    done = set()
    for prompt in prompts:
        record = records.get(prompt.sample.id)
        if record is None or record["status"] == "failed":
            continue
        if record["prompt_sha256"] != prompt.sha256:
            raise ConfigError(
                "output",
                str(folder.path),
                f"sample {prompt.sample.id} had another prompt then; remove the folder",
            )
        done.add(prompt.sample.id)
    return done


def batches(prompts: list[Prompt], size: int) -> Iterator[list[Prompt]]:
    """Batches of equal generation settings, of neighbouring lengths when they hold several rows.

    They depend on all prompts and not on which are done, so that a resumed run is the same run.
    """
    settings: dict[tuple[int, tuple[str, ...]], list[Prompt]] = {}
    for prompt in prompts:
        settings.setdefault((prompt.max_new_tokens, prompt.sample.stop), []).append(prompt)
    for alike in settings.values():
        if size > 1:
            alike.sort(key=lambda prompt: len(prompt.ids))
        for start in range(0, len(alike), size):
            yield alike[start : start + size]


def _generate(
    plan: Plan,
    folder: RunFolder,
    records: dict[str, Record],
    prompts: list[Prompt],
    done: set[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    if len(done) == len(prompts):
        return
    # What runs once per process (kernels, allocator pools) must not count in the first sample.
    generate(model, tokenizer, [prompts[0].ids[:32]], plan.policy, 2, (), plan.config["cache"])
    headline = plan.task.headline
    columns = (
        TextColumn(f"{plan.config['method']['name']:>14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(prompts), completed=len(done), status="")
        for batch in batches(prompts, plan.task.batch_size):
            if all(prompt.sample.id in done for prompt in batch):
                continue
            for record in _run_batch(plan, folder, batch, model, tokenizer):
                if record["id"] not in done:
                    folder.append(record)
                    records[record["id"]] = record
                    progress.advance(bar)
            ran = [record for record in records.values() if record["status"] == "ok"]
            if ran:
                score = statistics.fmean(record["scores"][headline] for record in ran)
                speed = _mean(record["decode_tokens_per_s"] for record in ran) or 0
                progress.update(bar, status=f"{headline} {score:.3g}  {speed:.1f} tok/s")


def _run_batch(
    plan: Plan,
    folder: RunFolder,
    batch: list[Prompt],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Record]:
    policy, entries = plan.fit(min(len(p.ids) for p in batch), batch[0].max_new_tokens)
    frame = {
        "policy": dataclasses.asdict(policy),
        "budget_entries": entries,
        "batch_size": len(batch),
    }
    try:
        generations = generate(
            model,
            tokenizer,
            [prompt.ids for prompt in batch],
            policy,
            batch[0].max_new_tokens,
            batch[0].sample.stop,
            plan.config["cache"],
        )
    except LengthMismatch as error:
        for prompt in batch:
            folder.append(_identity(prompt) | frame | {"status": "failed", "error": str(error)})
        raise
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return [_identity(prompt) | frame | {"status": "oom"} for prompt in batch]
    return [
        _identity(prompt)
        | frame
        | {"status": "ok", "scores": plan.task.score(prompt.sample, generation.text)}
        | _measurements(generation)
        for prompt, generation in zip(batch, generations, strict=True)
    ]


def _out_of_memory(error: Exception) -> bool:
    kinds = (torch.cuda.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "DefaultCPUAllocator: can't allocate" in str(error)


def _identity(prompt: Prompt) -> Record:
    sample = prompt.sample
    return {
        "id": sample.id,
        "group": sample.group,
        "meta": sample.meta,
        "references": list(sample.references),
        "prompt_sha256": prompt.sha256,
        "prompt_tokens": len(prompt.ids),
        "truncated_tokens": prompt.truncated,
        "chat_template": prompt.chat,
        "max_new_tokens": prompt.max_new_tokens,
    }


def _measurements(generation: Generation) -> Record:
    record = dataclasses.asdict(generation)
    lengths, entry = record.pop("lengths"), record.pop("entry_nbytes")
    mean, peak = statistics.fmean(lengths), max(lengths)
    return {
        "prediction": record.pop("text"),
        **record,
        "kv_entries_mean": mean,
        "kv_entries_peak": peak,
        "kv_nbytes_mean": mean * entry,
        "kv_nbytes_peak": peak * entry,
        "trace": arithmetic_runs(lengths),
    }


def summarize(plan: Plan, records: list[Record]) -> dict[str, Any]:
    """Means over the samples that ran; with groups, the score is the mean of the groups' means.

    KV entries and bytes are per sample, over its decode phase: mean, and highest over all samples.
    """
    config, headline = plan.config, plan.task.headline
    ran = [record for record in records if record["status"] == "ok"]
    groups: dict[str, list[float]] = {}
    for record in ran:
        groups.setdefault(record["group"], []).append(record["scores"][headline])
    means = {group: statistics.fmean(values) for group, values in groups.items()}
    return {
        "status": "complete",
        "task": config["task"]["name"],
        "method": config["method"]["name"],
        "model": config["model"]["name"],
        "seed": config["seed"],
        "budget": plan.budget,
        "setting": plan.setting,
        "headline": headline,
        "score": _mean(means.values()),
        "score_ci95": _interval(list(groups.values())),
        "scores": {
            name: _mean(record["scores"].get(name) for record in ran)
            for name in sorted({name for record in ran for name in record["scores"]})
        },
        "groups": {name: {"n": len(groups[name]), "score": mean} for name, mean in means.items()},
        "n": len(ran),
        "oom": len(records) - len(ran),
        "truncated": sum(record["truncated_tokens"] > 0 for record in ran),
        **{name: _mean(record[name] for record in ran) for name in MEASURED},
        **{name: max((record[name] for record in ran), default=None) for name in PEAKS},
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _interval(groups: list[list[float]]) -> tuple[float, float] | None:
    return bootstrap_interval(groups) if groups else None
