"""Methods that share a pass give what each of them gives alone."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import MODEL, NEEDLE, composed, read
from tiny import from_config, prompt, tiny
from torch.nn.functional import kl_div, log_softmax
from transformers import Ministral3Config

import evals.run.runner
from baselines import FullPolicy, H2OPolicy
from buzz import POLICIES, Budget, EvictionCache, Policy
from evals.launch.sweep import run_all
from evals.run.forked import answer_together
from evals.run.generate import answer_questions, generate
from evals.run.models import byte_tokenizer
from evals.run.prompts import Prompt
from evals.run.sampling import Sampling
from evals.tasks.base import Sample

TOKENS, NEW = 60, 12
TOKENIZER = byte_tokenizer()
TOKENIZER.eos_token = None  # an answer has the length that is asked for
POSITIONS = ("cache", "true")


@pytest.fixture(scope="module")
def model():
    return tiny()


def fitted(tokens: int = TOKENS) -> list[Policy]:
    """The full cache, and every registered method that meets a budget of a short prompt."""
    return [Budget(0.5).policy(cls(), tokens)[0] for _, cls in sorted(POLICIES.items())]


def asked(ids: Sequence[int], before: tuple[int, ...] = (), **sample: Any) -> Prompt:
    return Prompt(Sample("0", "", (), **sample), list(ids), 0, False, NEW, before=before)


def together(model, prompts: list[Prompt], policies, positions="cache", **options: Any) -> Any:
    options = {"own": True, "kl": False, "sampling": [None] * len(prompts)} | options
    references = options.pop("references", [None] * len(prompts))
    own = {"positions": positions}
    drawn = options.pop("sampling")
    each = [policies] * len(prompts)
    return answer_together(model, TOKENIZER, prompts, each, own, drawn, references, **options)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("before", [(), (48,), (16, 16, 16)], ids=["prompt", "context", "stream"])
def test_every_methods_answer_is_its_own(model, positions, before) -> None:
    one, policies = asked(prompt(TOKENS)[0].tolist(), before), fitted()
    (found,) = together(model, [one], policies, positions)
    for policy, record in zip(policies, found, strict=True):
        options = {"positions": positions}
        (alone,) = generate(model, TOKENIZER, [one.ids], policy, NEW, (), options, one.later)
        expected = alone.record()
        for name in ("tokens", "trace", "kv_entries_mean", "kv_nbytes_peak", "stop_reason"):
            assert record[name] == expected[name], (policy.name, name)
        assert record["evictions"] == expected["evictions"], policy.name
        assert expected["timed"] and not record["timed"] and "ttft_s" not in record
    assert len({tuple(record["tokens"]) for record in found}) > 1


@pytest.mark.parametrize("family", ["llama", "gemma3-mixed"])
@pytest.mark.parametrize("before", [(), (48,)], ids=["prompt", "context"])
def test_a_prompt_in_chunks_is_answered_as_in_one_piece(family, before) -> None:
    model, one = tiny(family), asked(prompt(TOKENS)[0].tolist(), before)
    policies = [policy for policy in fitted() if not policy.needs_repetition]
    for policy in policies:
        EvictionCache(model, policy)  # some read a text of their own, once for a model
    fed: list[int] = []
    model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    (whole,) = together(model, [one], policies)
    assert fed[: len(before) + 1] == ([60] if not before else [48, 12])
    fed.clear()
    (chunks,) = together(model, [one], policies, chunk=20)
    assert fed[:3] == ([20, 20, 20] if not before else [20, 20, 8])
    for policy, record, expected in zip(policies, chunks, whole, strict=True):
        assert record["tokens"] == expected["tokens"], policy.name
        assert record["trace"] == expected["trace"], policy.name
    for policy, expected in zip(policies[::4], whole[::4], strict=True):
        fed.clear()
        (alone,) = generate(model, TOKENIZER, [one.ids], policy, NEW, (), None, one.later, chunk=20)
        assert fed[:3] == ([20, 20, 20] if not before else [20, 20, 8])
        record = alone.record()
        assert record["tokens"] == expected["tokens"], policy.name
        assert record["trace"] == expected["trace"], policy.name
        assert ("question_s" in record) == bool(before)


@pytest.mark.parametrize("before", [(), (51,), (35, 16)], ids=["prompt", "context", "stream"])
def test_a_comparison_is_that_of_two_plain_loops(model, before) -> None:
    """Behind a compressed context the answer's first token counts, as it can differ too."""
    ids, policies = prompt(TOKENS), [FullPolicy(), *fitted()]
    (found,) = together(model, [asked(ids[0].tolist(), before)], policies, kl=True)
    answered = found[0]["tokens"]
    distributions = []
    for policy in policies:
        cache = EvictionCache(model, policy)
        parts = [*ids.split([*before, TOKENS - sum(before)], dim=1)]
        parts += [torch.tensor([[one]]) for one in answered[:-1]]
        logits = [model(part, past_key_values=cache).logits[:, -1] for part in parts]
        distributions.append(log_softmax(torch.cat(logits[max(len(before), 1) :]), -1))
    full = distributions[0]
    assert "kl_to_full" not in found[0]
    for policy, own, record in zip(policies[1:], distributions[1:], found[1:], strict=True):
        kl = kl_div(own, full, reduction="batchmean", log_target=True).item()
        assert record["kl_to_full"] == pytest.approx(kl, abs=1e-5), policy.name
        same = (own.argmax(-1) == full.argmax(-1)).float().mean().item()
        assert record["top1_to_full"] == pytest.approx(same)
        assert len(record["kl_tokens"]) == len(full)
    assert max(record["kl_to_full"] for record in found[1:]) > 0.01


@pytest.mark.parametrize("before", [(), (51,)])
def test_an_answer_of_one_token_can_differ_where_the_context_was_compressed(model, before) -> None:
    one, options = asked(prompt(TOKENS)[0].tolist(), before), {"own": False, "kl": True}
    policies = [FullPolicy(), H2OPolicy(heavy=8, recent=8)]
    ((_, found),) = together(model, [one], policies, references=[[5]], **options)
    assert (found["kl_to_full"] is None) == (found["top1_to_full"] is None) == (not before)


def test_answers_that_are_there_are_compared_without_being_made_again(model) -> None:
    one, policies = asked(prompt(TOKENS)[0].tolist()), fitted()
    (whole,) = together(model, [one], [FullPolicy(), *policies], kl=True)
    references = [whole[0]["tokens"]]
    (found,) = together(
        model, [one], [FullPolicy(), *policies], own=False, kl=True, references=references
    )
    for before, after in zip(whole[1:], found[1:], strict=True):
        assert after["kl_to_full"] == before["kl_to_full"] and "tokens" not in after
        assert after["reference_sha256"] == before["reference_sha256"]


@pytest.mark.parametrize("place", [0, 3])
def test_rows_end_where_each_of_them_ends(model, place) -> None:
    """By end-of-sequence anywhere; by the last token of a stop string not as its first token."""
    ids, policies = prompt(TOKENS)[0].tolist(), fitted()
    (free,) = together(model, [asked(ids)], policies)
    end = free[0]["tokens"][place]
    text = TOKENIZER.decode([end])
    for options in ({"eos": end}, {"stop": (text,)}):
        if "stop" in options and TOKENIZER.encode(text, add_special_tokens=False) != [end]:
            continue
        one = asked(ids, stop=options.get("stop", ()))
        model.generation_config.eos_token_id = options.get("eos")
        try:
            (found,) = together(model, [one], policies)
            for policy, record in zip(policies, found, strict=True):
                (alone,) = generate(model, TOKENIZER, [ids], policy, NEW, one.sample.stop)
                assert record["tokens"] == alone.tokens, policy.name
                assert record["stop_reason"] == alone.stop_reason
                assert record["trace"] == alone.record()["trace"]
        finally:
            model.generation_config.eos_token_id = None


@pytest.mark.parametrize("family", ["llama", "gemma3-mixed"])
@pytest.mark.parametrize("before", [False, True], ids=["prompt", "context"])
def test_several_prompts_in_a_pass_are_answered_as_one_by_one(family, before) -> None:
    """Of unlike lengths, padded; with sampling; the full cache's answers of unlike lengths."""
    model = tiny(family)
    policies = [FullPolicy(), *(p for p in fitted(40) if not p.needs_repetition)]
    texts = [prompt(n, seed=n)[0].tolist() for n in (TOKENS, 44, 53)]
    prompts = [asked(ids, (len(ids) - 9,) if before else ()) for ids in texts]
    (free,) = together(model, prompts[:1], policies)
    model.generation_config.eos_token_id = free[0]["tokens"][4]
    try:
        several = together(model, prompts, policies, kl=True)
        for chunk in (20, 10):  # the second is all padding of a prompt: they are read as one
            again = together(model, prompts, policies, chunk=chunk)
            for found, expected in zip(again, several, strict=True):
                assert [r["tokens"] for r in found] == [r["tokens"] for r in expected]
        drawn = [(0.9, 0.8, [seed]) for seed in (3, 4, 5)]
        sampled = together(model, prompts, policies, sampling=drawn)
        for number, one in enumerate(prompts):
            (alone,) = together(model, [one], policies, kl=True)
            (by_chance,) = together(model, [one], policies, sampling=drawn[number : number + 1])
            for policy, record, expected in zip(policies, several[number], alone, strict=True):
                for name in ("tokens", "trace", "evictions", "prompt_tokens", "stop_reason"):
                    assert record[name] == expected[name], (policy.name, name)
                if policy != FullPolicy():
                    near = pytest.approx(expected["kl_tokens"], abs=1e-3)
                    assert record["kl_tokens"] == near, policy.name
            assert [r["tokens"] for r in sampled[number]] == [r["tokens"] for r in by_chance]
        assert len({len(found[0]["tokens"]) for found in several}) > 1
    finally:
        model.generation_config.eos_token_id = None


def test_sampled_rows_draw_as_they_do_alone(model) -> None:
    one, policies = asked(prompt(TOKENS)[0].tolist()), fitted()
    (found,) = together(model, [one], policies, sampling=[(0.9, 0.8, [7])])
    for policy, record in zip(policies, found, strict=True):
        sampling = Sampling(0.9, 0.8, [7])
        (alone,) = generate(model, TOKENIZER, [one.ids], policy, NEW, sampling=sampling)
        assert record["tokens"] == alone.tokens, policy.name


def test_questions_on_one_context_are_answered_from_copies(model) -> None:
    context, policies = prompt(48)[0].tolist(), fitted(48)
    questions = [prompt(n, seed=n)[0].tolist() for n in (9, 12)]
    prompts = [asked([*context, *q], (48,), shared="c") for q in questions]
    found = together(model, prompts, policies)
    for row, policy in enumerate(policies):
        alone = answer_questions(model, TOKENIZER, prompts, policy, {}, conversation=False)
        for made, one in zip(found, alone, strict=True):
            assert made[row]["tokens"] == one.tokens, policy.name
            assert made[row]["trace"] == one.record()["trace"], policy.name


def test_a_row_whose_logits_are_not_finite_fails_alone(model, monkeypatch) -> None:
    policies = fitted()

    def spoiled(module, args, output):
        if output.shape[0] > 1:
            output[1] = float("nan")

    hook = model.lm_head.register_forward_hook(spoiled)
    try:
        (found,) = together(model, [asked(prompt(TOKENS)[0].tolist())], policies)
    finally:
        hook.remove()
    assert [isinstance(one, ArithmeticError) for one in found] == [
        number == 1 for number in range(len(policies))
    ]
    assert "logits were not finite at step 1" in str(found[1])


@pytest.mark.parametrize("budget", [0.5, 200])
def test_the_runner_puts_several_prompts_into_one_pass(tmp_path, monkeypatch, budget) -> None:
    """Each with its own budget, or with that of their batch; one that fails is found."""
    passes: list[tuple[int, int]] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        passes.append((len(args[2]), len(args[3][0])))
        if fails and len(args[2]) > 1:
            raise RuntimeError("too many prompts")
        return answer_together(*args, **kwargs)

    monkeypatch.setattr(evals.run.runner, "answer_together", counted)
    two = "variants=[['method=h2o'],['method=tova']]"
    asked = [*MODEL, *NEEDLE, "time_samples=0", "kl=true", f"budget={budget}", two]
    together = [(3, 3)]
    found = []
    for size, most, fails in ((1, 1, False), (1, 4, False), (1, 4, True), (3, 4, False)):
        passes.clear()
        monkeypatch.setattr(evals.run.runner, "PROMPTS", most)
        output = f"output={tmp_path / f'{size}{most}{fails}'}"
        run = [*asked, f"task.batch_size={size}", output]
        rows = run_all(composed(*run), run)
        if not fails:
            assert passes == (together if most > 1 else [(1, 3)] * 3)
        found.append(
            [
                {r["id"]: (r["status"], r["tokens"], r["trace"]) for r in row.outcome.records}
                for row in rows
            ]
        )
        assert all(r["kl_to_full"] > 0 for row in rows for r in row.outcome.records)
    assert found[0] == found[1] == found[2] and len(found[0][0]) == 3
    assert budget < 1 or found[3] == found[0]


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([100, 90, 80, 100, 100], [[100, 90, 80, 100], [100]]),  # at most four
        ([100, 75, 74, 100], [[100, 75], [74], [100]]),  # padded by at most a quarter
        ([9_000, 9_000, 5_000, 5_000, 5_000], [[9_000], [9_000], [5_000] * 3]),  # 16,384 tokens
    ],
)
def test_prompts_of_like_lengths_share_a_pass_as_far_as_it_has_room(lengths, expected) -> None:
    plan = SimpleNamespace(task=SimpleNamespace(timed=False))
    job = SimpleNamespace(plan=plan, running=[1, 2], _shares=lambda row: True, chunk=None)
    parts = [[asked([0] * tokens)] for tokens in lengths]
    groups = evals.run.runner.Job._groups(job, parts)
    assert [[len(one.ids) for (one,) in group] for group in groups] == expected
    job.chunk = 10  # of which padding leaves a part to every prompt
    for group in evals.run.runner.Job._groups(job, parts):
        sizes = [len(one.ids) for (one,) in group]
        assert max(sizes) - min(sizes) < 10


def test_a_group_that_goes_on_answers_no_sample_twice(tmp_path) -> None:
    two = "variants=[['method=h2o'],['method=tova']]"
    run = [*MODEL, *NEEDLE, "time_samples=0", "budget=0.5", two, f"output={tmp_path}"]
    rows = run_all(composed(*run), run)
    whole = [read(row.outcome.file) for row in rows]
    for place, row in enumerate(rows):
        file = row.outcome.file
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(line for at, line in enumerate(lines) if at != place + 1))
    for row, records in zip(run_all(composed(*run), run), whole, strict=True):
        lines = row.outcome.file.read_text().splitlines()
        assert len(lines) == 3 and row.outcome.failed == 0
        again = {r["id"]: r["tokens"] for r in read(row.outcome.file)}
        assert again == {r["id"]: r["tokens"] for r in records}


def test_padding_is_no_position() -> None:
    """Where a model scales queries by position, prompts in a pass stand where they do alone."""
    ropes = {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 5.0}
    ropes["original_max_position_embeddings"] = 16
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "head_dim": 8}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Ministral3Config(**sizes, **heads, rope_parameters=ropes, sliding_window=None)
    model = from_config(config)
    prompts = [asked(prompt(n, seed=n)[0].tolist()) for n in (TOKENS, 46)]
    policies = [policy for policy in fitted(40) if not policy.needs_repetition][::3]
    several = together(model, prompts, policies, "true")
    for number, one in enumerate(prompts):
        (alone,) = together(model, [one], policies, "true")
        assert [r["tokens"] for r in several[number]] == [r["tokens"] for r in alone]
