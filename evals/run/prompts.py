"""A task's prompts: its samples as token ids that fit the model's context, in steps and batches.

`compress` says what a method has read when it first evicts:

prompt    (query-aware) the whole prompt: what a method keeps may depend on the question.
context   (query-agnostic) all before the question. The question is read from the thinned cache.
stream    (chunked) as context, read in chunks with an eviction after each.

A prompt is read in steps. All but the first have the same size in every row of a batch; padding, if
there is any, is in the first.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from os.path import commonprefix
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from buzz.errors import ConfigError
from evals.results import record
from evals.results.folder import sha256
from evals.results.record import Record
from evals.run.config import Compress
from evals.run.memory import row_nbytes
from evals.run.plan import Plan
from evals.tasks.base import Sample
from evals.tasks.encoding import Encoded, encode_prompt, in_template

MARKER = "@ANSWER@"


@dataclass(frozen=True)
class Prompt:
    """A sample as the model sees it.

    Attributes:
        truncated: tokens that were cut from its middle.
        chat: whether it is in the chat template.
        scoring: names the version of what scores the answer.
        before: tokens of the steps that end with the context; () if it is read in one step.
        turn: the tokens that put its question after the answer to another one on its context.
    """

    sample: Sample
    ids: list[int]
    truncated: int
    chat: bool
    max_new_tokens: int
    scoring: str = ""
    before: tuple[int, ...] = ()
    turn: tuple[int, ...] = ()

    @property
    def context(self) -> int:
        """Tokens of which a fractional budget is a fraction: those that are compressed together."""
        return sum(self.before) or len(self.ids)

    @property
    def later(self) -> tuple[int, ...]:
        """Tokens of the steps in which it is read, without the first."""
        return (*self.before, len(self.ids) - sum(self.before))[1:]

    @property
    def steps(self) -> list[list[int]]:
        """Its tokens by the step that reads them."""
        ends = list(accumulate(self.before, initial=0))
        return [self.ids[i:j] for i, j in zip(ends, [*ends[1:], len(self.ids)], strict=True)]

    @property
    def question(self) -> Record:
        """What decides the answer. A record in which it differs is of another prompt."""
        return {
            "prompt_sha256": self.sha256,
            "max_new_tokens": self.max_new_tokens,
            "stop": list(self.sample.stop),
        }

    @cached_property
    def sha256(self) -> str:
        """Names the token ids."""
        return sha256(self.ids)

    @cached_property
    def sample_sha256(self) -> str:
        """Names all that decides the record: the question, the references, how it is scored."""
        own = self.sample
        references = [list(own.references), own.group, own.unit, own.meta]
        return sha256([*self.question.values(), *references, self.scoring])


class Asked(NamedTuple):
    """What a job is of.

    Attributes:
        prompts: in the task's order; of a shard, its own.
        stored: the content of prompts.json.
        order: ids of all samples, those of other shards among them.
    """

    prompts: list[Prompt]
    stored: record.Asked
    order: list[str]


def load_prompts(plan: Plan, tokenizer: PreTrainedTokenizerBase) -> Asked:
    """All prompts of a job, in the task's order.

    Raises:
        ConfigError: there is none, or one that the model cannot take.
    """
    task, length = plan.task, plan.config["model"]["max_length"]
    scoring, samples = task.scoring, task.load(tokenizer)
    compress = plan.config["compress"], plan.config["compress_chunk"]
    prompts = []
    for sample in task.of_shard(samples):
        answer = task.max_new_tokens or sample.max_new_tokens or 0
        encoded, chat = None, False
        if sample.ids is None:
            chat = task.chat_template and sample.chat_template is not False
            chat = chat and tokenizer.chat_template is not None
            rest = chat, length - answer, sample.answer_prefix
            encoded = encode_prompt(tokenizer, sample.prompt, *rest)
            if encoded.truncated and task.longest_prompt():
                remedy = f"{encoded.truncated} tokens too short for {sample.id}"
                raise ConfigError("model.max_length", length, remedy)
        elif task.mode == "read":
            plan.check_reading(len(sample.ids) - len(sample.starts) + 1)
        ids, truncated = (encoded.ids, encoded.truncated) if encoded else ([*sample.ids], 0)
        before = steps_before(*compress, sample, encoded, tokenizer)
        prompts.append(Prompt(sample, ids, truncated, chat, answer, scoring, before))
    if not prompts:
        raise ConfigError("task.shard", task.shard, "there are fewer samples than shards")
    prompts = share_contexts(prompts, *compress, tokenizer, length if task.conversation else None)
    data = hashlib.sha256()
    for sample in samples:
        data.update(json.dumps(dataclasses.asdict(sample)).encode())
    stored: record.Asked = {
        "samples": {prompt.sample.id: prompt.sample_sha256 for prompt in prompts},
        "of": len(samples),
        "data": data.hexdigest()[:16],
    }
    return Asked(prompts, stored, [sample.id for sample in samples])


def steps_before(
    compress: Compress,
    chunk: int,
    sample: Sample,
    encoded: Encoded | None,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[int, ...]:
    """Tokens of the steps that read a prompt up to its question; () if it is read in one step.

    Args:
        chunk: tokens of a step of a stream.
        encoded: the sample's prompt; None where the task tokenized it.

    Raises:
        ConfigError: the prompt has no question that is apart from a context.
    """
    if compress == "prompt":
        return ()
    if encoded is None or not sample.question.strip():
        remedy = f"sample {sample.id} has no question that follows a context"
        raise ConfigError("compress", compress, f"{remedy}; write compress=prompt")
    context = encoded.tokens_before(sample.question, tokenizer)
    if not 0 < context < len(encoded.ids):
        reason = "its question was cut" if encoded.truncated else "there is no context"
        remedy = f"sample {sample.id} cannot be split: {reason}; write compress=prompt"
        raise ConfigError("compress", compress, remedy)
    return _in_steps(context, compress, chunk)


def _in_steps(context: int, compress: Compress, chunk: int) -> tuple[int, ...]:
    """Tokens of the steps that read a context of so many."""
    if compress == "context":
        return (context,)
    whole, rest = divmod(context, chunk)
    return (chunk,) * whole + (rest,) * bool(rest)


# --- several questions on one context ---------------------------------------------------------


def share_contexts(
    prompts: Sequence[Prompt],
    compress: Compress,
    chunk: int,
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None = None,
) -> list[Prompt]:
    """Gives prompts on one context the same first steps, and the tokens that follow an answer.

    Args:
        limit: tokens of a whole conversation; None: every question is put to a copy.

    Raises:
        ConfigError: nothing is compressed before the questions are known; questions of one context
            were cut so that it is no longer the same; a conversation is too long.
    """
    contexts: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        if prompt.sample.shared:
            contexts.setdefault(prompt.sample.shared, []).append(prompt)
    if contexts and compress == "prompt":
        remedy = "evicts with a single question in sight; write compress=context or stream"
        raise ConfigError("compress", compress, f"{remedy}, or task.questions=1")
    found = {}
    for name, asked in contexts.items():
        least = min(prompt.context for prompt in asked)
        if len(commonprefix([prompt.ids for prompt in asked])) < least:
            remedy = f"cuts the questions on {name} to different contexts; give a longer one"
            raise ConfigError("model.max_length", len(asked[0].ids), remedy)
        turns = [follow_up(tokenizer, prompt.sample, prompt.chat) for prompt in asked]
        for prompt, turn in zip(asked, turns, strict=True):
            before = _in_steps(least, compress, chunk)
            found[prompt.sample.id] = replace(prompt, before=before, turn=tuple(turn))
        answers = sum(prompt.max_new_tokens for prompt in asked)
        tokens = len(asked[0].ids) + sum(map(len, turns[1:])) + answers
        if limit is not None and tokens > limit:
            remedy = f"too short for the {tokens} tokens of the questions on {name} in one go"
            raise ConfigError("model.max_length", limit, f"{remedy}; ask fewer, or from copies")
    return [found.get(prompt.sample.id, prompt) for prompt in prompts]


def follow_up(tokenizer: PreTrainedTokenizerBase, sample: Sample, chat: bool) -> list[int]:
    """The tokens that put a sample's question after an earlier answer, from its end on."""
    question, prefix = sample.question.strip(), sample.answer_prefix
    if not chat:
        text = f"\n\n{question} {prefix}" if prefix else f"\n\n{question}"
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": MARKER},
        {"role": "user", "content": question},
    ]
    if prefix:
        messages.append({"role": "assistant", "content": prefix})
    whole = in_template(tokenizer, messages)
    return tokenizer(whole.rpartition(MARKER)[2], add_special_tokens=False)["input_ids"]


# --- batches ----------------------------------------------------------------------------------


def batch_size(plan: Plan, prompts: Sequence[Prompt], model: PreTrainedModel) -> int:
    """Prompts of the largest batch whose keys and values fit into the task's `kv_limit`.

    Raises:
        ConfigError: not one fits, or there are fewer samples than fit.
    """
    room, prompt = plan.task.room, prompts[0]
    assert room is not None
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
    alike: dict[Any, list[Prompt]] = {}
    contexts: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        if prompt.sample.shared:
            contexts.setdefault(prompt.sample.shared, []).append(prompt)
            continue
        key = prompt.max_new_tokens, prompt.sample.stop, prompt.before and prompt.later
        if prompt.sample.ids is not None:  # of an exact length: none is padded
            key = *key, len(prompt.ids)
        alike.setdefault(key, []).append(prompt)
    for group in alike.values():
        if size > 1:
            group.sort(key=lambda prompt: len(prompt.ids))
        for start in range(0, len(group), size):
            yield group[start : start + size]
    yield from contexts.values()
