"""Claim by claim: what runs, made by hand, are said to show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from report_runs import BUZZ, found, judged, write_row

from evals.report.claims import (
    CLAIMS,
    ELSEWHERE,
    FAILS,
    HOLDS,
    NOT_RUN,
    UNDECIDED,
    UNEQUAL,
    Claim,
    judge,
    verdict,
)
from evals.results.frame import Estimate, load

SMOLLM = {"name": "smollm2", "name_or_path": "models"}
RANDOM = {"name": "llama_random", "hidden_size": 4096}


def scores(n: int = 400) -> list[float]:
    return [20 + i % 5 for i in range(n)]


def pair(root: Path, own: list[float] | None = None, n: int = 400, **more: Any) -> None:
    """The full cache, and BUZZ at a quarter of it with the same scores if no others are given."""
    write_row(root, "full", scores(n), kv=4e6, **more)
    write_row(root, "buzz", own or scores(n), kv=1e6, **{"budget": 0.25, **more})


@pytest.mark.parametrize(
    "interval, at_least, expected",
    [
        ((1.0, 1.2), True, HOLDS),  # the bar belongs to the right side
        ((1.1, 1.2), True, HOLDS),
        ((0.9, 1.2), True, UNDECIDED),
        ((0.8, 0.999), True, FAILS),
        ((0.8, 1.0), True, UNDECIDED),
        ((0.8, 1.0), False, HOLDS),
        ((0.8, 1.1), False, UNDECIDED),
        ((1.001, 1.1), False, FAILS),
        (None, True, UNDECIDED),
    ],
)
def test_a_verdict_needs_the_whole_interval_on_one_side(
    interval: tuple[float, float] | None, at_least: bool, expected: str
) -> None:
    assert said(interval, at_least, 50) == expected


def said(
    interval: tuple[float, float] | None, at_least: bool = True, n: int = 30, condition: str = HOLDS
) -> str:
    claim = Claim("a statement", "a unit", 1.0, "paper", "ratio", at_least=at_least)
    return verdict(Estimate(None, *(interval or (None, None)), n), claim, condition)


def test_a_verdict_needs_enough_samples_and_its_condition() -> None:
    assert said((1.1, 1.2), n=29) == UNDECIDED
    assert said((1.1, 1.2), condition=UNDECIDED) == UNDECIDED
    assert said((1.1, 1.2), condition=FAILS) == FAILS
    assert said((0.8, 0.9), condition=UNDECIDED) == FAILS


def test_claims_that_no_run_bears_on_are_not_run(tmp_path: Path) -> None:
    assert [one.verdict for one in judge(load(tmp_path))] == [NOT_RUN] * len(CLAIMS)
    assert len({claim.statement for claim in CLAIMS}) == len(CLAIMS)


# Scores and memory


@pytest.mark.parametrize("loss, expected", [(0.0, HOLDS), (0.1, FAILS)])
def test_quality_and_memory_are_judged_together(tmp_path: Path, loss: float, expected: str) -> None:
    pair(tmp_path, [s * (1 - loss) for s in scores()])
    quality, memory = found(tmp_path, "At 2.5x"), found(tmp_path, "KV memory")
    assert quality.verdict == memory.verdict == expected
    assert quality.measured and memory.measured
    assert quality.measured.number.value == pytest.approx(1 - loss)
    assert memory.measured.number.value == pytest.approx(4)
    assert quality.measured.number.n == 400
    pair(tmp_path / "few", n=40)  # equal answers of forty do not show 99 %
    assert found(tmp_path / "few", "At 2.5x").verdict == UNDECIDED


def test_memory_is_judged_by_what_is_allocated(tmp_path: Path) -> None:
    """Batches share their buffers; a full cache in another batch is compared sample by sample."""
    write_row(tmp_path, "full", scores(), kv=4e6, batch_size=2)  # a record has a row's share
    write_row(tmp_path, "buzz", scores(), kv=1e6, allocated=2e6, budget=0.25)
    memory = found(tmp_path, "KV memory")
    assert memory.verdict == FAILS
    assert memory.measured and memory.measured.number.value == pytest.approx(2)
    assert found(tmp_path, "At 2.5x").verdict == NOT_RUN  # nor is it quality at 2.5x less
    pair(tmp_path / "b", edit=lambda one: one.pop("allocated_nbytes"))
    assert found(tmp_path / "b", "KV memory").verdict == UNDECIDED


def test_swept_parameters_are_no_test_of_the_paper(tmp_path: Path) -> None:
    write_row(tmp_path, "full", [20.0] * 40, kv=4e6)
    write_row(tmp_path, "buzz", [20.0] * 40, row="stride", parameters={**BUZZ, "stride": 3})
    true = {"logn_base": None, "logn_clamp": False, "positions": "true"}
    write_row(tmp_path, "buzz", [20.0] * 40, row="positions", cache=true)
    write_row(tmp_path, "buzz", [20.0] * 40, row="window", budget=0.25, fixed=["window"])
    assert found(tmp_path, "At 2.5x").verdict == NOT_RUN

    cache = true | {"positions": "cache"}
    widen = {**BUZZ, "compact": "widen"}  # what a budget sets
    told = {"row": "paper", "budget": 0.25, "cache": cache, "parameters": widen}
    write_row(tmp_path, "buzz", [20.0] * 40, **told)
    assert found(tmp_path, "At 2.5x").verdict == UNDECIDED


def test_only_samples_of_the_same_prompt_are_paired(tmp_path: Path) -> None:
    pair(tmp_path, n=40)
    (file,) = tmp_path.glob("*/buzz*.jsonl")
    file.write_text(file.read_text().replace('"hash 0 3"', '"another"'))
    quality = found(tmp_path, "At 2.5x")
    assert quality.measured and quality.measured.number.n == 39


def test_10_qa_is_compared_with_the_best_other_of_the_same_budget(tmp_path: Path) -> None:
    right = [1.0] * 30 + [0.0] * 10
    write_row(tmp_path, "buzz", right * 10, task="nq10", budget=0.25)
    write_row(tmp_path, "h2o", ([1.0] * 20 + [0.0] * 20) * 10, task="nq10", budget=0.25)
    write_row(tmp_path, "local", [0.0] * 400, task="nq10", budget=0.25)
    write_row(tmp_path, "h2o", [1.0] * 400, row="h2o more", task="nq10", budget=0.5)
    write_row(tmp_path, "h2o", [1.0] * 400, row="h2o mean", task="nq10", budget=0.25, by="mean")
    write_row(tmp_path, "buzz_strided", [1.0] * 400, row="strided", task="nq10", budget=0.25)
    points, share = judged(tmp_path, "10-QA")
    assert "points" in points.claim.statement and "share" in share.claim.statement
    assert points.measured and points.measured.number.value == pytest.approx(25)
    assert share.measured and share.measured.number.value == pytest.approx(50)
    assert "against h2o" in points.measured.of and points.verdict == share.verdict == HOLDS


def test_10_qa_is_not_decided_between_runs_of_other_memory(tmp_path: Path) -> None:
    right, wrong = [1.0] * 30 + [0.0] * 10, [1.0] * 10 + [0.0] * 30
    write_row(tmp_path, "buzz", right * 10, task="nq10", budget=0.25, kv=1.38e6, held=1.38)
    write_row(tmp_path, "h2o", wrong * 10, task="nq10", budget=0.25, kv=1e6)
    for one in judged(tmp_path, "10-QA"):
        assert one.kind == UNEQUAL and one.verdict == "not at equal memory: 1.38x"
        assert one.measured and one.measured.number.value is not None
        assert "budget 0.25† (holds 1.38x), against h2o" in one.measured.of

    write_row(tmp_path, "tova", wrong * 10, task="nq10", budget=0.25, kv=1.32e6)
    equal, unequal = judged(tmp_path, "10-QA")[:2]
    assert equal.verdict == HOLDS and equal.measured and "against tova" in equal.measured.of
    assert unequal.verdict == "not at equal memory: 1.38x"


def test_sizes_of_ones_own_are_compared_by_what_they_hold(tmp_path: Path) -> None:
    """As the original ran them; the full cache is no rival."""
    for method, kv in (("full", 4e6), ("buzz", 1e6), ("h2o", 1.366e6)):
        write_row(tmp_path, method, [1.0] * 40, task="nq10", kv=kv)
    for one in judged(tmp_path, "10-QA"):
        assert one.verdict == "not at equal memory: 0.73x"
        assert one.measured and "its own sizes, against h2o at 0.73x" in one.measured.of


def test_questions_over_documents_are_10_qa_and_longbenchs(tmp_path: Path) -> None:
    better = [1.01 * score for score in scores()]
    pair(tmp_path, better, task="nq10", budget=None)
    pair(tmp_path, better, task="longbench", groups="musique", budget=None)
    pair(tmp_path, better, task="longbench", groups="lcc", seed=1, budget=None)
    ten, category = judged(tmp_path, "Questions over several documents")
    assert ten.verdict == category.verdict == HOLDS
    of = {one.measured.of for one in (ten, category) if one.measured}
    assert of == {"nq10, its own sizes", "longbench (documents), its own sizes"}


def test_quality_beyond_32k_is_of_longer_prompts_alone(tmp_path: Path) -> None:
    for prompt in (32_000, 65_000):
        where = {"prompt": prompt, "lengths": [prompt]}
        for method in ("full", "buzz"):
            score = 0.5 if (method, prompt) == ("buzz", 65_000) else 1.0
            write_row(tmp_path, method, [score] * 39 + [1.0], task="needle", **where)
            write_row(tmp_path, method, [1.0] * 40, task="throughput", **where)
    beyond = found(tmp_path, "Beyond 32K")
    assert beyond.verdict == FAILS and beyond.measured and beyond.measured.number.n == 40


def test_less_perplexity_is_more_quality(tmp_path: Path) -> None:
    facts = {"headline": "token_perplexity", "statistic": "exp", "higher_is_better": False}
    where = {"task": "wikitext", "prompt": 40_000, "blocks": True, "metric": facts}
    for method, loss in (("full", 2.0), ("buzz", 2.2)):
        write_row(tmp_path, method, [loss + i % 7 / 10 for i in range(100)], **where)
    beyond = found(tmp_path, "Beyond 32K")
    assert beyond.verdict == FAILS and beyond.measured
    assert beyond.measured.number.value == pytest.approx(0.8187, abs=1e-3)  # exp(-0.2)


# Sensitivity


def sweep(root: Path, values: dict[Any, float], name: str = "window", **more: Any) -> None:
    for value, score in values.items():
        parameters = {**BUZZ, name: value}
        scores = [score * (1 + i % 2 / 10) for i in range(200)]
        write_row(root, "buzz", scores, row=f"{name} {value}", parameters=parameters, **more)


def test_sensitivity_is_the_range_over_one_parameter_alone(tmp_path: Path) -> None:
    write_row(tmp_path, "full", [20.0, 22.0] * 100)
    sweep(tmp_path, {40: 15.0, 80: 18.0, 160: 16.0})
    write_row(
        tmp_path, "buzz", [1.0] * 200, row="other", parameters={**BUZZ, "window": 1, "sink": 0}
    )
    window = found(tmp_path, "The score depends little on the window")
    assert window.measured and window.measured.number.value == pytest.approx(0.15)
    assert "window 40, 80, 160" in window.measured.of
    assert window.verdict == FAILS


@pytest.mark.parametrize("name", ["window", "sink", "threshold", "stride"])
def test_every_parameter_has_its_claim(tmp_path: Path, name: str) -> None:
    write_row(tmp_path, "full", [20.0, 22.0] * 100)
    sweep(tmp_path, {3: 20.0, 8: 20.2}, name)
    assert found(tmp_path, f"The score depends little on the {name}").verdict == HOLDS


def test_sensitivity_is_buzzs_alone(tmp_path: Path) -> None:
    """A sweep of another method beside a full run used to end in a KeyError."""
    write_row(tmp_path, "full", [20.0] * 40)
    for window in (40, 80):
        parameters = {"sink": 4, "window": window}
        write_row(tmp_path, "streaming_llm", [20.0] * 40, row=f"{window}", parameters=parameters)
        strided = {k: v for k, v in BUZZ.items() if k != "history"} | {"window": window}
        write_row(tmp_path, "buzz_strided", [20.0] * 40, row=f"s{window}", parameters=strided)
    assert found(tmp_path, "The score depends little on the window").verdict == NOT_RUN


def test_sensitivity_needs_equal_memory(tmp_path: Path) -> None:
    write_row(tmp_path, "full", [20.0, 22.0] * 100)
    sweep(tmp_path, {40: 20.0, 80: 20.0}, kv=1e6)
    sweep(tmp_path, {160: 20.0}, kv=1.2e6)
    window = found(tmp_path, "The score depends little on the window")
    assert window.kind == UNEQUAL and window.verdict == "not at equal memory: 1.20x"
    sink = found(tmp_path, "The score depends little on the sink")
    assert sink.verdict == NOT_RUN


def test_sizes_that_a_budget_chose_are_no_settings(tmp_path: Path) -> None:
    write_row(tmp_path, "full", [20.0, 22.0] * 100)
    sweep(tmp_path, {40: 20.0, 80: 20.0}, budget=0.2, fixed=["window"])
    sweep(tmp_path, {160: 1.0}, budget=0.2, fixed=[])  # it says 160 and has what the budget gave
    window = found(tmp_path, "The score depends little on the window")
    assert window.verdict == HOLDS and window.measured
    assert window.measured.of.endswith("window 40, 80 with sink=4 stride=5")


def test_sizes_fixed_beside_a_budget_are_another_family(tmp_path: Path) -> None:
    write_row(tmp_path, "full", [20.0, 22.0] * 100)
    sweep(tmp_path, {0: 20.0, 4: 20.0}, "sink", budget=0.2, fixed=["sink"])
    sweep(tmp_path, {16: 1.0}, "sink", budget=0.2, fixed=["sink", "threshold"])
    sink = found(tmp_path, "The score depends little on the sink")
    assert sink.verdict == HOLDS and sink.measured and "sink 0, 4 with" in sink.measured.of


# Models


def test_the_papers_claims_are_about_its_model(tmp_path: Path) -> None:
    pair(tmp_path, model=SMOLLM, weights=134_515_008)
    pair(tmp_path, model=RANDOM)
    said = {one.measured.model: one for one in judged(tmp_path, "At 2.5x") if one.measured}
    small, random = said["smollm2"], said["llama_random"]
    assert small.kind == random.kind == ELSEWHERE
    assert small.verdict == "not run on Llama-2-7B; on smollm2 (135M parameters): holds"
    assert random.verdict == "not run on Llama-2-7B; on llama_random (random weights): holds"
    assert small.measured.number.value == pytest.approx(1)
    # Other claims on a small model are for it alone.
    more = {"model": SMOLLM, "weights": 134_515_008}
    write_row(tmp_path, "full", [20.0, 22.0] * 100, seed=1, **more)
    sweep(tmp_path, {40: 20.0, 80: 20.0}, seed=1, **more)
    window = found(tmp_path, "The score depends little on the window")
    assert window.kind == HOLDS
    assert window.verdict == "holds, for smollm2 (135M parameters) alone"


@pytest.mark.parametrize(
    "model, weights, expected",
    [
        ({"name": "llama2_7b", "name_or_path": "mirror/llama2"}, 6_738_415_616, HOLDS),
        ({"name": "mine", "name_or_path": "/models/Llama-2-7b-hf/"}, 6_738_415_616, HOLDS),
        (
            {"name": "mine", "name_or_path": "/models/Llama-2-7b-hf/"},
            None,
            "not run on Llama-2-7B; on mine (a model of unknown size): holds",
        ),
        (
            {"name": "llama2_7b", "name_or_path": "/models/tiny"},
            10_000_000,
            "not run on Llama-2-7B; on llama2_7b (10M parameters): holds",
        ),
        ({"name": "qwen", "name_or_path": "Qwen/Qwen2.5-7B"}, 7_600_000_000, "holds, on qwen"),
    ],
)
def test_a_model_is_known_by_its_weights_and_name(
    tmp_path: Path, model: dict[str, Any], weights: int | None, expected: str
) -> None:
    pair(tmp_path, model=model, weights=weights)
    assert found(tmp_path, "At 2.5x").verdict == expected
