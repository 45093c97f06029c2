"""The bridge to lm-evaluation-harness, on a tiny random model and local tasks; no network."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import checkpoint
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from buzz import ConfigError, EvictionCache
from evals.lm_eval import main
from evals.lm_eval.model import EvictionLM

WORDS = [f"w{i}" for i in range(60)]
CONTEXT = 64  # tokens, of the tiny model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint: a random Llama with one token per word, and no bos token."""
    path = tmp_path_factory.mktemp("tiny")
    vocab = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    shape = {"vocab_size": len(vocab), "max_position_embeddings": CONTEXT, "bos_token_id": None}
    return checkpoint(path, tokenizer, **shape)


def text(words: int, seed: int) -> str:
    picks = torch.randint(len(WORDS), (words,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[i] for i in picks)


PAIRS = [
    (text(40, 1), " " + text(3, 2)),
    (text(40, 1), " " + text(6, 3)),  # shares its context, is longer
    (text(25, 4), " w5"),  # one token
    (text(70, 5), " " + text(4, 6)),  # cut on the left
    ("", text(5, 7)),  # empty context: the prefix token
    ("w3", " " + text(2, 8)),
]
TEXTS = [text(30, 9), text(50, 10), text(150, 11)]  # the last is longer than the model's context


def model(folder: Path, method: str, **arguments: object) -> EvictionLM:
    return EvictionLM(str(folder), method=method, device="cpu", dtype="float32", **arguments)


def stock(folder: Path, **arguments: object) -> HFLM:
    return HFLM(str(folder), device="cpu", dtype="float32", **arguments)


def loglikelihood(lm: HFLM) -> tuple[list[float], list[bool]]:
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(PAIRS)]
    scores, greedy = zip(*lm.loglikelihood(requests, disable_tqdm=True), strict=True)
    return list(scores), list(greedy)


def rolling(lm: HFLM) -> list[float]:
    requests = [Instance("loglikelihood_rolling", {}, (t,), i) for i, t in enumerate(TEXTS)]
    return lm.loglikelihood_rolling(requests, disable_tqdm=True)


@pytest.mark.parametrize(("batch_size", "chunk"), [(1, 1), (4, 1), (3, 16)])
def test_full_cache_scores_as_stock_lm_eval_does(folder, batch_size, chunk):
    ours, theirs = model(folder, "full", batch_size=batch_size, chunk=chunk), stock(folder)
    expected, expected_greedy = loglikelihood(theirs)
    found, greedy = loglikelihood(ours)
    assert found == pytest.approx(expected, abs=1e-4)
    assert greedy == expected_greedy
    assert rolling(ours) == pytest.approx(rolling(theirs), abs=1e-3)  # sums of up to 150


def test_greedy_continuation_is_recognised(folder):
    """Beside a longer one that is none."""
    lm = stock(folder)
    ids = torch.tensor([lm.tok_encode(PAIRS[0][0])])
    answer = lm.model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    pairs = [(PAIRS[0][0], " " + lm.tok_decode(answer)), PAIRS[1]]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    for other in (model(folder, "full", batch_size=2), lm):
        scores = other.loglikelihood(requests, disable_tqdm=True)
        assert [greedy for _, greedy in scores] == [True, False]


@pytest.mark.parametrize(
    "method",
    [
        {"method": "streaming_llm", "sink": 2, "window": 6},
        {"method": "h2o", "heavy": 4, "recent": 4},
        {"method": "buzz", "sink": 2, "window": 4, "stride": 3, "threshold": 6},
    ],
    ids=lambda method: method["method"],
)
def test_eviction_is_seen_by_every_scored_token(folder, method):
    """Also by the first: the scores are those of a loop that evicts, then predicts."""
    lm = model(folder, **method)
    found, _ = loglikelihood(lm)
    assert found == pytest.approx(loglikelihood(model(folder, **method, batch_size=4))[0], abs=1e-4)
    full, _ = loglikelihood(model(folder, "full"))
    for i in range(4):  # the last two are short enough to stay whole
        context, continuation = (lm.tok_encode(part) for part in PAIRS[i])
        tokens = (context + continuation)[-CONTEXT - 1 :]
        first = len(tokens) - len(continuation)
        cache = EvictionCache(lm.model, lm.policy)
        with torch.no_grad():
            lm.model(torch.tensor([tokens[: first - 1]]), past_key_values=cache)
            expected = 0.0
            for token, target in zip(tokens[first - 1 :], tokens[first:], strict=False):
                logits = lm.model(torch.tensor([[token]]), past_key_values=cache).logits
                expected += logits.log_softmax(-1)[0, -1, target].item()
        assert found[i] == pytest.approx(expected, abs=1e-4)
        assert abs(found[i] - full[i]) > 1e-2
    assert found[4:] == pytest.approx(full[4:], abs=1e-4)


def test_rolling_carries_one_cache_through_a_text_longer_than_the_model(folder):
    lm = model(folder, "streaming_llm", sink=2, window=6, batch_size=3)
    tokens = [lm.prefix_token_id, *lm.tok_encode(TEXTS[2])]
    cache = EvictionCache(lm.model, lm.policy)
    expected = 0.0
    with torch.no_grad():
        for token, target in zip(tokens, tokens[1:], strict=False):
            logits = lm.model(torch.tensor([[token]]), past_key_values=cache).logits
            expected += logits.log_softmax(-1)[0, -1, target].item()
    assert rolling(lm)[2] == pytest.approx(expected, abs=1e-3)


def test_generation_is_that_of_generate_with_the_cache(folder):
    lm = model(folder, "streaming_llm", sink=2, window=6, batch_size=2)
    until = {"until": ["nothing"], "max_gen_toks": 8}
    prompts = [text(40, 1), text(20, 2), text(30, 3)]
    requests = [Instance("generate_until", {}, (p, until), i) for i, p in enumerate(prompts)]
    answers = lm.generate_until(requests, disable_tqdm=True)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([lm.tok_encode(prompt)])
        cache = EvictionCache(lm.model, lm.policy)
        out = lm.model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)
        assert answer == lm.tok_decode(out[0, ids.shape[1] :])
    assert answers != stock(folder).generate_until(requests, disable_tqdm=True)


def test_budget_sets_what_is_not_given(folder):
    lm = model(folder, "streaming_llm", budget=0.25, sink=3)
    assert lm.fitted(40).lengths([40]) == [10]
    assert lm.fitted(40).sink == 3
    assert model(folder, "h2o", budget=12).fitted(40).lengths([40]) == [12]


def test_tasks_run_through_lm_eval(folder, tmp_path):
    rows = [
        {"question": text(30, i), "choices": WORDS[i : i + 3], "answer": i % 3} for i in range(4)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = (
        f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\n"
    )
    (tmp_path / "choose.yaml").write_text(
        f"task: choose\n{common}output_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: answer\n'
        "metric_list:\n  - metric: acc\n"
    )
    (tmp_path / "answer.yaml").write_text(
        f"task: answer\n{common}output_type: generate_until\n"
        'doc_to_text: "{{question}}"\ndoc_to_target: "{{choices[answer]}}"\n'
        'generation_kwargs:\n  until: ["w0"]\n  max_gen_toks: 6\n'
        "metric_list:\n  - metric: exact_match\n"
    )
    (tmp_path / "perplexity.yaml").write_text(
        f"task: perplexity\n{common}output_type: loglikelihood_rolling\n"
        'doc_to_text: ""\ndoc_to_target: "{{question}}"\n'
        "metric_list:\n  - metric: word_perplexity\n"
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    metrics = {"choose": "acc", "answer": "exact_match", "perplexity": "word_perplexity"}

    def evaluate(model: str, arguments: str = "") -> tuple[dict[str, float], list[list[str]]]:
        """Each task's metric, and the answers."""
        results = lm_eval.simple_evaluate(
            model=model,
            model_args=f"pretrained={folder},dtype=float32{arguments}",
            tasks=list(metrics),
            task_manager=manager,
            device="cpu",
            batch_size=3,
            bootstrap_iters=0,
        )
        assert results["n-samples"]["choose"]["effective"] == 4
        found = {name: results["results"][name][f"{metrics[name]},none"] for name in metrics}
        return found, [sample["filtered_resps"] for sample in results["samples"]["answer"]]

    (stock, expected), (full, answers) = evaluate("hf"), evaluate("buzz", ",method=full")
    assert full == pytest.approx(stock, rel=1e-4) and answers == expected
    small, answers = evaluate("buzz", ",method=buzz,budget=0.25")
    assert math.isfinite(small["perplexity"]) and answers != expected
    assert abs(small["perplexity"] - full["perplexity"]) > 1e-2


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"method": "nosuchmethod"}, "method"),
        ({"method": "h2o", "window": 4}, "window"),
        ({"method": "local", "window": 0}, "method.window"),
        ({"method": "local", "budget": 1.5}, "budget"),
        ({"method": "buzz", "budget": 3}, "budget"),
        ({"method": "full", "chunk": 0}, "chunk"),
        ({"method": "full", "batch_size": "auto"}, "batch_size"),
    ],
)
def test_mistakes_are_refused_before_a_model_is_loaded(arguments, field):
    with pytest.raises(ConfigError) as caught:
        EvictionLM("no/such-model", **arguments)
    assert caught.value.field == field


def test_command_prints_one_line_for_a_mistake(monkeypatch, capsys, tmp_path):
    task = tmp_path / "task.yaml"  # without the index of lm-eval's own, which takes seconds
    task.write_text("task: any\n")
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    arguments = f"--model buzz --model_args method=nosuchmethod --tasks {task} --device cpu"
    monkeypatch.setattr("sys.argv", ["lm_eval", *arguments.split()])
    assert main() == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: method='nosuchmethod'")


def test_constraints_are_the_methods(folder):
    arguments = {"method": "h2o", "budget": 64}
    lm = model(folder, **arguments, granularity="page:16", heads="all")
    policy = lm.new_cache(lm.fitted(200)).policy
    assert (policy.granularity, policy.heads, policy.footprint().peak) == ("page:16", "all", 64)
    with pytest.raises(ConfigError, match="^cache.granularity='page:128': a page exceeds"):
        model(folder, **arguments, granularity="page:128")


def test_true_positions_end_with_the_context(folder):
    arguments = {"method": "streaming_llm", "sink": 2, "window": 6}
    lms = {value: model(folder, positions=value, **arguments) for value in ("cache", "true", True)}
    assert [lm.new_cache(lm.policy).positions for lm in lms.values()] == ["cache", "true", "true"]
    tokens = list(range(3, 50)) * 3
    assert len(lms["cache"]._windows(tokens)) == 1 < len(lms["true"]._windows(tokens))
    assert rolling(lms["true"]) == rolling(lms[True]) != pytest.approx(rolling(lms["cache"]))
    with pytest.raises(ConfigError, match="^cache.positions='rope': choose cache or true"):
        model(folder, positions="rope", **arguments)
