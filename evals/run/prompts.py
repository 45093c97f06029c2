"""A task's prompts: its samples in token ids, cut to the model's context, in batches."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from buzz.errors import ConfigError
from evals.results import record
from evals.run.compress import steps_before
from evals.run.memory import row_nbytes
from evals.run.plan import Plan
from evals.run.prompt import Prompt
from evals.run.questions import share_contexts
from evals.tasks.base import Sample
from evals.tasks.encoding import encode_prompt


class Asked(NamedTuple):
    """What a run is of.

    Attributes:
        prompts: in the task's order; of a shard, its own.
        stored: of prompts.json.
        order: ids of all samples, those of other shards among them.
    """

    prompts: list[Prompt]
    stored: record.Asked
    order: list[str]


def load_prompts(plan: Plan, tokenizer: PreTrainedTokenizerBase) -> Asked:
    """All prompts of a run, in the task's order.

    Raises:
        ConfigError: there is none, or one that the model cannot take.
    """
    prompts = []
    scoring = plan.task.scoring
    samples = plan.task.load(tokenizer)
    compress = plan.config["compress"], plan.config["compress_chunk"]
    for sample in plan.task.of_shard(samples):
        answer = plan.task.max_new_tokens or sample.max_new_tokens or 0
        if sample.ids is not None:
            if plan.task.mode == "read":
                plan.check_reading(len(sample.ids) - len(sample.starts) + 1)
            before = steps_before(*compress, sample, None, tokenizer)
            prompts.append(Prompt(sample, list(sample.ids), 0, False, answer, scoring, before))
            continue
        limit = plan.config["model"]["max_length"] - answer
        chat = plan.task.chat_template and sample.chat_template is not False
        chat = chat and tokenizer.chat_template is not None
        encoded = encode_prompt(tokenizer, sample.prompt, chat, limit, sample.answer_prefix)
        ids, truncated = encoded.ids, encoded.truncated
        if truncated and plan.task.longest_prompt():
            raise ConfigError(
                "model.max_length", limit + answer, f"{truncated} tokens too short for {sample.id}"
            )
        before = steps_before(*compress, sample, encoded, tokenizer)
        prompts.append(Prompt(sample, ids, truncated, chat, answer, scoring, before))
    if not prompts:
        raise ConfigError("task.shard", plan.task.shard, "there are fewer samples than shards")
    whole = plan.config["model"]["max_length"] if plan.task.conversation else None
    prompts = share_contexts(prompts, *compress, tokenizer, whole)
    known = {prompt.sample.id: prompt.sample_sha256 for prompt in prompts}
    stored: record.Asked = {"samples": known, "of": len(samples), "data": _digest(samples)}
    return Asked(prompts, stored, [sample.id for sample in samples])


def _digest(samples: Sequence[Sample]) -> str:
    found = hashlib.sha256()
    for sample in samples:
        found.update(json.dumps(dataclasses.asdict(sample)).encode())
    return found.hexdigest()[:16]


def batch_size(plan: Plan, prompts: Sequence[Prompt], model: PreTrainedModel) -> int:
    """Prompts per batch: the task's number, or the most whose keys and values it has room for.

    Raises:
        ConfigError: not one fits, or there are fewer samples than fit.
    """
    room = plan.task.room
    if room is None:
        return plan.task.batch_size
    prompt = prompts[0]
    policy, _ = plan.fit(prompt.context)
    steps = [len(prompt.ids)] + [1] * (prompt.max_new_tokens - 1)
    dtype = plan.cache_options["dtype"]
    each = row_nbytes(model, max(policy.lengths(steps)), sum(steps), dtype)
    rows = room // each
    if not rows:
        raise ConfigError("task.kv_limit", f"{room:,} bytes", f"a single row takes {each:,}")
    if rows > len(prompts):
        remedy = f"{rows} rows fit into {room:,} bytes; give as many, or a multiple"
        raise ConfigError("task.samples", len(prompts), remedy)
    return rows


def batches(prompts: list[Prompt], size: int) -> Iterator[list[Prompt]]:
    """Batches that are generated alike, of neighbouring lengths when they hold several rows.

    Rows whose questions, or chunks, have other lengths are in other batches: nothing would tell the
    padding between a context and its question. Questions on one context are together.

    They depend on all prompts and not on which are done, so that a resumed run is the same run.
    """
    kinds: dict[Any, list[Prompt]] = {}
    contexts: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        if prompt.sample.shared:
            contexts.setdefault(prompt.sample.shared, []).append(prompt)
            continue
        key = prompt.max_new_tokens, prompt.sample.stop, prompt.before and prompt.later
        if prompt.sample.ids is not None:  # of an exact length: none is padded
            key = *key, len(prompt.ids)
        kinds.setdefault(key, []).append(prompt)
    for alike in kinds.values():
        if size > 1:
            alike.sort(key=lambda prompt: len(prompt.ids))
        for start in range(0, len(alike), size):
            yield alike[start : start + size]
    yield from contexts.values()
