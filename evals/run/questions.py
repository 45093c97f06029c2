"""Several questions on one context, which is read and compressed once.

copies        each question is answered from a copy of the compressed cache, as if it came first.
conversation  they follow each other on one cache: what an earlier question and its answer made a
              method give up is gone for the later ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from os.path import commonprefix
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from buzz import EvictionCache, Policy
from buzz.errors import ConfigError
from evals.run.compress import Compress, in_steps
from evals.run.generate import Generation, eos_ids, generate, left_padded, read
from evals.run.prompt import Prompt
from evals.tasks.base import Sample
from evals.tasks.encoding import in_template

MARKER = "@ANSWER@"


def share_contexts(
    prompts: Sequence[Prompt],
    compress: Compress,
    chunk: int,
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None = None,
) -> list[Prompt]:
    """The prompts, those of one context with the same first steps, and how each follows another.

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
        remedy = "is of whole prompts, each with its question; write compress=context or stream"
        raise ConfigError("compress", compress, f"{remedy} for task.questions")
    found = {}
    for name, asked in contexts.items():
        least = min(prompt.context for prompt in asked)
        if len(commonprefix([prompt.ids for prompt in asked])) < least:
            remedy = f"cuts the questions on {name} from different contexts; give a longer one"
            raise ConfigError("model.max_length", len(asked[0].ids), remedy)
        turns = [follow_up(tokenizer, prompt.sample, prompt.chat) for prompt in asked]
        for prompt, turn in zip(asked, turns, strict=True):
            before = in_steps(least, compress, chunk)
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


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    policy: Policy,
    cache_options: dict[str, Any],
    conversation: bool,
    chunk: int | None = None,
    cache: EvictionCache | None = None,
) -> list[Generation]:
    """Answers to the questions on one context, in their order.

    `ttft_s` counts the reading of the context, once for every copy; in a conversation only with
    its first question.

    Args:
        chunk: tokens of the chunks in which the context is read; None: it is read as one.
        cache: an empty one for a conversation, or in whose buffers copies answer; None: new ones.

    Raises:
        LengthMismatch, NotFinite: as :func:`evals.run.generate.generate`.
    """
    ids, eos = prompts[0].ids, eos_ids(model, tokenizer)
    inputs = left_padded([ids], tokenizer.pad_token_id).to(model.device)
    of_all = cache if conversation else None
    reading = read(model, inputs, policy, prompts[0].later, cache_options, chunk, of_all)
    found: list[Generation] = []
    for prompt in prompts:
        if not conversation:
            ids, own = prompt.ids, reading.copy()
            if cache is not None:
                own.cache.take_buffers(cache)
        else:
            own = reading
            if found:
                said, turn = found[-1].tokens, list(prompt.turn)
                if said[-1] in eos and turn[:1] == said[-1:]:
                    turn = turn[1:]  # the template ends an answer, too
                ids = [*ids, *said, *turn]
        found += generate(
            model,
            tokenizer,
            [ids],
            policy,
            prompt.max_new_tokens,
            prompt.sample.stop,
            reading=own,
        )
        if conversation:
            reading.go_on(len(ids), found[-1].generated_tokens)
        elif cache is not None:
            cache.take_buffers(own.cache)
    return found
