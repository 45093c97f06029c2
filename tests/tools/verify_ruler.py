"""Holds task=ruler against lm-eval: `python tests/tools/verify_ruler.py --lengths 1024 4096`.

Of the same seed lm-eval's own tasks make their requests, for a base model and for a chat model,
with the model's tokenizer; prompts (tokens, where the needles stand) and scores of answers must be
the same. Prints a line per subtask and length; exits with 1 if anything differs. What is known to
differ is set right in lm-eval first:

- cwe: its worked example, which lm-eval leaves out of the prompt, is put in and counted, and the
  answer's beginning stands on the question's line, as everywhere else;
- fwe: lm-eval is asked for a length shorter by the answer;
- qa_*: lm-eval's score is a mean over the answers of which one will do, so answers are scored that
  are alone.
"""

from __future__ import annotations

import argparse
import io
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
from transformers import PreTrainedTokenizerBase

from evals.run.models import load_tokenizer, named_config
from evals.tasks.base import Sample
from evals.tasks.encoding import encode
from evals.tasks.ruler import SYNTHETIC, Ruler, score
from evals.tasks.ruler_data import LM_EVAL, NIAH, QA, SUBTASKS, family, modules, read_data
from evals.tasks.ruler_texts import ANSWER

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Request:
    """What lm-eval asks of a model, and the score that it gives to an answer, 0..1."""

    base: str
    chat: str
    answer_tokens: int
    answers: tuple[str, ...]
    score: Callable[[str], float]


def verify(
    tokenizer: PreTrainedTokenizerBase,
    subtask: str,
    length: int,
    samples: int,
    seed: int = 0,
    data_dir: str | None = None,
) -> list[str]:
    """What differs, a line each."""
    drawn = {"samples": samples, "seed": seed, "data_dir": data_dir, "chat_template": False}
    task = Ruler(name="ruler", subtasks=[subtask], lengths=[length], **drawn)
    task.prepare()
    ours = task.load(tokenizer)
    theirs = requests(tokenizer, subtask, length, samples, seed, data_dir)
    assert ours
    wrong = [] if len(ours) == len(theirs) else [f"{len(ours)} prompts, lm-eval {len(theirs)}"]
    for own, their in zip(ours, theirs, strict=False):
        wrong += [f"{own.id}: {problem}" for problem in _differences(tokenizer, own, their)]
        one = subtask not in QA or len(own.references) == 1
        for answer in _answers(own.references) if one else ():
            pair = score(subtask, answer, own.references), 100 * their.score(answer)
            if pair[0] != pair[1]:
                wrong.append(f"{own.id}: {answer!r} scores {pair[0]}, lm-eval {pair[1]}")
    return wrong


def _differences(tokenizer: PreTrainedTokenizerBase, own: Sample, their: Request) -> Iterator[str]:
    limit = 2**62
    if (
        encode(tokenizer, own.prompt, False, limit, own.answer_prefix)[0]
        != (tokenizer(their.base)["input_ids"])
    ):
        yield "another prompt"
    if tokenizer.chat_template is not None and (
        encode(tokenizer, own.prompt, True, limit, own.answer_prefix)[0]
        != tokenizer(their.chat, add_special_tokens=False)["input_ids"]
    ):
        yield "another prompt in the chat template"
    if own.references != their.answers:
        yield f"answers {own.references}, lm-eval {their.answers}"
    if (own.max_new_tokens or 0) > their.answer_tokens:
        yield f"{own.max_new_tokens} answer tokens, lm-eval {their.answer_tokens}"
    if not own.prompt.endswith(own.question) or own.references[0] in own.question:
        yield f"not the question: {own.question}"


def _answers(references: tuple[str, ...]) -> list[str]:
    """Right, half right, wrong and odd ones."""
    first = references[0]
    return [" ".join(references), first, f" {first.upper()}\x07 and", first[:-1], "", "\n\x00"]


def requests(
    tokenizer: PreTrainedTokenizerBase,
    subtask: str,
    length: int,
    samples: int,
    seed: int,
    data_dir: str | None = None,
) -> list[Request]:
    """lm-eval's own, from its task's definition on."""
    from lm_eval.api.task import ConfigurableTask

    if subtask == "fwe":
        length -= ANSWER["fwe"]
    config = dict(LM_EVAL.read(f"{subtask}.yaml"))
    for name in ("custom_dataset", "process_results"):
        config[name] = _function(config[name])
    config["metric_list"] = [{"metric": str(length), "aggregation": "mean"}]
    config["metadata"] = {"max_seq_lengths": [length], "tokenizer": "this"}

    def this(*args: Any, **kwargs: Any) -> PreTrainedTokenizerBase:
        random.seed(seed)
        np.random.seed(seed)
        return counting

    with ExitStack() as stack:
        counting = stack.enter_context(_set_right(subtask, tokenizer, samples, data_dir))
        module = sys.modules[config["custom_dataset"].__module__]
        stack.enter_context(patch.object(module, "get_tokenizer", this))
        stack.enter_context(redirect_stdout(io.StringIO()))
        stack.enter_context(redirect_stderr(io.StringIO()))
        task = ConfigurableTask(config=config)

    def render(history: Messages, add_generation_prompt: bool = True) -> str:
        return tokenizer.apply_chat_template(
            history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    found = []
    for doc in task.test_docs():
        prefix = {"gen_prefix": task.doc_to_prefix(doc)}
        base = task.fewshot_context(doc, 0, **prefix)
        chat = ""
        if tokenizer.chat_template is not None:
            options = {"apply_chat_template": True, "chat_template": render}
            chat = task.fewshot_context(doc, 0, **options, **prefix)
        if subtask == "cwe":
            base = f"{doc['input_example']}\n{base}".replace("?\n\nAnswer:", "? Answer:")
            chat = chat.replace("Below is", f"{doc['input_example']}\nBelow is", 1)
        process = partial(_score_of, task.process_results, doc, str(length))
        most = task.config.generation_kwargs["max_gen_toks"]
        found.append(Request(base, chat, most, tuple(doc["outputs"]), process))
    return found


def _function(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(".")
    __import__(path := f"lm_eval.tasks.ruler.{module}")
    return getattr(sys.modules[path], function)


def _score_of(process: Callable[..., dict], doc: dict, metric: str, answer: str) -> float:
    return process(doc, [answer])[metric]


@contextmanager
def _set_right(
    subtask: str, tokenizer: PreTrainedTokenizerBase, samples: int, data_dir: str | None
) -> Iterator[Any]:
    """lm-eval's modules made to draw so many samples, from local data; its tokenizer."""
    ruler, data = modules(), read_data(subtask, data_dir)
    kind = family(subtask)
    module, name = {
        "niah": (ruler.niah_tasks, "generate_samples"),
        "vt": (ruler.vt, "sys_vartrack_w_noise_random"),
        "cwe": (ruler.cwe, "sys_word_pair_random"),
        "fwe": (ruler.fwe, "sys_kwext"),
        "qa": (ruler.qa, "generate_samples"),
    }[kind]
    original = getattr(module, name)

    def fewer(*args: Any, **kwargs: Any) -> Any:
        return original(
            *args, **kwargs | {"num_samples": min(samples, kwargs.get("num_samples", samples))}
        )

    with ExitStack() as stack:
        stack.enter_context(patch.object(module, name, fewer))
        counting: Any = tokenizer
        if kind == "cwe":
            fresh = random.Random(42)
            fresh.shuffle(list(ruler.cwe.WORDS))
            ruler.cwe.RNG.setstate(fresh.getstate())
            counting = stack.enter_context(_with_example(tokenizer))
        if subtask in NIAH and data is not None:
            stack.enter_context(patch.object(ruler.niah_tasks, "get_haystack", lambda **_: data))
        if subtask in QA:
            read = "read_squad" if subtask == "qa_squad" else "read_hotpotqa"
            stack.enter_context(patch.object(ruler.qa, read, lambda: data))
        yield counting


@contextmanager
def _with_example(tokenizer: PreTrainedTokenizerBase) -> Iterator[Any]:
    """A tokenizer that counts cwe's example with the text drawn with it, as the owners do."""
    cwe = modules().cwe
    original, examples = cwe.generate_input_output, {}

    def remember(*args: Any, **kwargs: Any) -> tuple[str, str, list[str]]:
        example, text, words = original(*args, **kwargs)
        examples[text] = example
        return example, text, words

    def count(text: str) -> SimpleNamespace:
        whole = f"{examples[text]}\n{text}" if text in examples else text
        return SimpleNamespace(input_ids=tokenizer(whole)["input_ids"])

    with patch.object(cwe, "generate_input_output", remember):
        yield count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="a name in configs/model: its tokenizer")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-dir", help="as task.data_dir: all 13 subtasks instead of six")
    given = parser.parse_args()
    tokenizer = load_tokenizer(named_config(given.model))
    differ = 0
    for length in given.lengths:
        for subtask in SUBTASKS if given.data_dir else SYNTHETIC:
            drawn = given.samples, given.seed, given.data_dir
            wrong = verify(tokenizer, subtask, length, *drawn)
            told = [f"    differs: {problem}" for problem in wrong]
            print(f"{subtask:16} {length:6}: {len(wrong)} differences", *told, sep="\n", flush=True)
            differ += len(wrong)
    print(f"{differ} differences")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
