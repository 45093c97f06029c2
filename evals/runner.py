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

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    track,
)
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from buzz import Policy
from buzz.errors import ConfigError
from evals.compare import compare
from evals.forced import Fidelity, compare_with_full, read
from evals.generate import Generation, LengthMismatch, generate
from evals.models import load_model
from evals.plan import Plan, expand
from evals.records import Record, RunFolder, arithmetic_runs, digest, environment
from evals.summary import mean, summarize
from evals.task import Sample, StreamTask

FIDELITY = "fidelity.jsonl"

console = Console(stderr=True)


def _sha256(ids: list[int] | None) -> str:
    """First 16 digits of the hash of token ids."""
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]


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
        """Names the token ids."""
        return _sha256(self.ids)


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
    return _execute(Plan.of(cfg, fixed))


def run_all(cfg: DictConfig, fixed: Iterable[str] = ()) -> list[Path]:
    """As :func:`run`, for every task of a suite; all are checked before the first one runs."""
    fixed = frozenset(fixed)
    return [_execute(plan) for plan in [Plan.of(one, fixed) for one in expand(cfg)]]


def _execute(plan: Plan) -> Path:
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
        if full := plan.reference():
            theirs = full.read()
            if plan.compares:
                _compare(plan, folder, records, theirs, prompts, model, tokenizer)
            by_id = {record["id"]: record for record in ordered}
            summary["against_full"] = compare(by_id, theirs, summary, folder.read(FIDELITY))
        plan.task.draw([record for record in ordered if record["status"] == "ok"], folder.path)
        folder.write("summary.json", summary)
        if len(done) < len(prompts):
            plan.logger.log(folder.path, plan.config, ordered, summary)
    return folder.path


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
    for sample in plan.task.of_shard(plan.task.load(tokenizer)):
        if isinstance(plan.task, StreamTask):
            assert sample.ids is not None
            plan.check_reading(len(sample.ids))
            prompts.append(Prompt(sample, list(sample.ids), 0, False, 0))
            continue
        answer = plan.task.max_new_tokens or sample.max_new_tokens
        if sample.ids is not None:
            prompts.append(Prompt(sample, list(sample.ids), 0, False, answer))
            continue
        limit = plan.config["model"]["max_length"] - answer
        chat = plan.task.chat_template and sample.chat_template is not False
        chat = chat and tokenizer.chat_template is not None
        ids, truncated = encode(tokenizer, sample.prompt, chat, limit)
        if truncated and plan.task.longest_prompt():
            raise ConfigError(
                "model.max_length", limit + answer, f"{truncated} tokens too short for {sample.id}"
            )
        prompts.append(Prompt(sample, ids, truncated, chat, answer))
    if not prompts:
        raise ConfigError("task.shard", plan.task.shard, "there are fewer samples than shards")
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
                speed = mean(record["decode_tokens_per_s"] for record in ran) or 0
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
        if isinstance(plan.task, StreamTask):
            results = [_read(plan.task, plan, prompt, policy, model) for prompt in batch]
        else:
            results = _answer(plan, batch, policy, model, tokenizer)
    except LengthMismatch as error:
        for prompt in batch:
            folder.append(_identity(prompt) | frame | {"status": "failed", "error": str(error)})
        raise
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        oom = {"status": "oom", "error": str(error).partition("\n")[0]}  # names the bytes asked for
        return [_identity(prompt) | frame | oom for prompt in batch]
    return [
        _identity(prompt) | frame | {"status": "ok"} | result
        for prompt, result in zip(batch, results, strict=True)
    ]


def _answer(
    plan: Plan,
    batch: list[Prompt],
    policy: Policy,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Record]:
    generations = generate(
        model,
        tokenizer,
        [prompt.ids for prompt in batch],
        policy,
        batch[0].max_new_tokens,
        batch[0].sample.stop,
        plan.config["cache"],
    )
    return [
        {"scores": plan.task.score(prompt.sample, answer.text)} | _measurements(answer)
        for prompt, answer in zip(batch, generations, strict=True)
    ]


def _read(
    task: StreamTask, plan: Plan, prompt: Prompt, policy: Policy, model: PreTrainedModel
) -> Record:
    measured, losses = read(model, prompt.ids, policy, task.chunk, plan.config["cache"])
    blocks = [float(block.mean()) for block in np.array_split(losses, task.blocks)]
    scores = {"scores": task.score_losses(prompt.sample, losses), "blocks": blocks}
    return scores | _measurements(measured)


def _compare(
    plan: Plan,
    folder: RunFolder,
    records: dict[str, Record],
    full: dict[str, Record],
    prompts: list[Prompt],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Teacher-forces the method over the full run's answers, as far as that was not done before."""
    before = folder.read(FIDELITY)

    def answer(prompt: Prompt) -> list[int] | None:
        """The full cache's answer, if there is something left to compare it for."""
        own, theirs = records[prompt.sample.id], full.get(prompt.sample.id, {})
        if own["status"] != "ok" or theirs.get("prompt_sha256") != own["prompt_sha256"]:
            return None
        tokens = theirs.get("tokens")
        done = before.get(prompt.sample.id, {}).get("answer_sha256") == _sha256(tokens)
        return None if done else tokens

    todo = [
        [prompt for prompt in batch if answer(prompt)]
        for batch in batches(prompts, plan.task.batch_size)
    ]
    for batch in track(
        [batch for batch in todo if batch], "KL to full", console=console, transient=True
    ):
        answers = [answer(prompt) or [] for prompt in batch]
        policy = dataclasses.replace(plan.policy, **records[batch[0].sample.id]["policy"])
        ids, pad = [prompt.ids for prompt in batch], tokenizer.pad_token_id
        try:
            fidelity = compare_with_full(model, ids, answers, policy, pad, plan.config["cache"])
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            fidelity = [Fidelity(None, None)] * len(batch)
        for prompt, tokens, found in zip(batch, answers, fidelity, strict=True):
            identity = {"id": prompt.sample.id, "answer_sha256": _sha256(tokens)}
            folder.append(identity | dataclasses.asdict(found), FIDELITY)


def _out_of_memory(error: Exception) -> bool:
    """Whether that is what happened; if so, what is free goes back to the device."""
    kinds = (torch.cuda.OutOfMemoryError, MemoryError)
    found = isinstance(error, kinds) or "DefaultCPUAllocator: can't allocate" in str(error)
    if found and torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


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
    average, peak = statistics.fmean(lengths), max(lengths)
    return {
        "prediction": record.pop("text"),
        **record,
        "kv_entries_mean": average,
        "kv_entries_peak": peak,
        "kv_nbytes_mean": average * entry,
        "kv_nbytes_peak": peak * entry,
        "trace": arithmetic_runs(lengths),
    }
