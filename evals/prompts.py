"""A task's samples as the model sees them: token ids, cut to its context, in batches."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from buzz.errors import ConfigError
from evals import schema
from evals.plan import Plan
from evals.records import Record, sha256
from evals.task import Sample, StreamTask


@dataclass(frozen=True)
class Prompt:
    """A sample as the model sees it.

    Attributes:
        scoring: names the version of what scores the answer.
    """

    sample: Sample
    ids: list[int]
    truncated: int
    chat: bool
    max_new_tokens: int
    scoring: str = ""

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


@dataclass(frozen=True)
class Asked:
    """What a run is of.

    Attributes:
        prompts: in the task's order; of a shard, its own.
        of: samples of the whole task.
        data: names them all.
    """

    prompts: list[Prompt]
    of: int
    data: str

    def stored(self) -> schema.Asked:
        """For prompts.json."""
        known = {prompt.sample.id: prompt.sample_sha256 for prompt in self.prompts}
        return {"samples": known, "of": self.of, "data": self.data}


def load_prompts(plan: Plan, tokenizer: PreTrainedTokenizerBase) -> Asked:
    """All prompts of a run, in the task's order.

    Raises:
        ConfigError: there is none, or one that the model cannot take.
    """
    prompts = []
    scoring = plan.task.scoring
    samples = plan.task.load(tokenizer)
    for sample in plan.task.of_shard(samples):
        if isinstance(plan.task, StreamTask):
            assert sample.ids is not None
            plan.check_reading(len(sample.ids) - len(sample.starts) + 1)
            prompts.append(Prompt(sample, list(sample.ids), 0, False, 0, scoring))
            continue
        answer = plan.task.max_new_tokens or sample.max_new_tokens
        if sample.ids is not None:
            prompts.append(Prompt(sample, list(sample.ids), 0, False, answer, scoring))
            continue
        limit = plan.config["model"]["max_length"] - answer
        chat = plan.task.chat_template and sample.chat_template is not False
        chat = chat and tokenizer.chat_template is not None
        ids, truncated = encode(tokenizer, sample.prompt, chat, limit, sample.answer_prefix)
        if truncated and plan.task.longest_prompt():
            raise ConfigError(
                "model.max_length", limit + answer, f"{truncated} tokens too short for {sample.id}"
            )
        prompts.append(Prompt(sample, ids, truncated, chat, answer, scoring))
    if not prompts:
        raise ConfigError("task.shard", plan.task.shard, "there are fewer samples than shards")
    return Asked(prompts, len(samples), _digest(samples))


def _digest(samples: Sequence[Sample]) -> str:
    found = hashlib.sha256()
    for sample in samples:
        found.update(json.dumps(dataclasses.asdict(sample)).encode())
    return found.hexdigest()[:16]


def encode(
    tokenizer: PreTrainedTokenizerBase, text: str, chat: bool, limit: int, prefix: str = ""
) -> tuple[list[int], int]:
    """Token ids of a prompt, at most `limit`, and how many tokens were cut from its middle.

    As LongBench does, the two ends are joined as text and tokenized again; the chat template is
    applied afterwards and stays whole. So does `prefix`, the beginning of the answer.

    Raises:
        ConfigError: not even the template fits; the prompt is empty, or holds half a surrogate
            pair, which no tokenizer takes.
    """

    def tokens(text: str) -> list[int]:
        if not chat:
            return tokenizer(f"{text} {prefix}" if prefix else text)["input_ids"]
        messages = [{"role": "user", "content": text}]
        if prefix:
            messages.append({"role": "assistant", "content": prefix})
        kind = {"continue_final_message" if prefix else "add_generation_prompt": True}
        text = tokenizer.apply_chat_template(messages, tokenize=False, **kind)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError("prompt", text[:40], "holds a lone surrogate; remove it") from error
    whole = tokens(text)
    if not whole:
        raise ConfigError("prompt", text[:40], "has no tokens; give a text")
    if len(whole) <= limit:
        return whole, 0
    body = tokenizer(text, add_special_tokens=False)["input_ids"]
    room = limit - (len(whole) - len(body))
    while (half := room // 2) > 0:
        ends = body[:half], body[-half:]
        cut = tokens("".join(tokenizer.decode(end, skip_special_tokens=True) for end in ends))
        if not cut:
            break
        if len(cut) <= limit:
            return cut, len(whole) - len(cut)
        room -= len(cut) - limit
    raise ConfigError("model.max_length", limit, "leaves no room for the prompt")


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
