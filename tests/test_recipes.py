"""The recipes' code runs as it stands, and does what the page says of it."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib
import pytest
import torch
import yaml
from runs import MODEL, NEEDLE
from test_docs import commands, jobs, planned  # noqa: F401  (a fixture)
from test_examples import ROOT, needs_model
from tiny import prompt, tiny

from buzz import CACHE_ARGUMENT, EvictionCache
from evals.results import load

matplotlib.use("Agg")


def code(page: str, heading: str, language: str = "python") -> str:
    """The only block of a language below a heading."""
    section = (ROOT / "docs" / page).read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    (block,) = re.findall(rf"```{language}\n(.*?)```", section, re.S)
    return block


def execute(text: str) -> tuple[dict[str, Any], str]:
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as told:
        exec(compile(text, "recipe", "exec"), names)
    return names, told.getvalue()


@needs_model
def test_a_chat_goes_on_with_one_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names, told = execute(code("recipes.md", "A chat of several turns"))
    cache, ids, messages = names["cache"], names["ids"], names["messages"]
    assert len(messages) == 6 and told.count("tokens seen") == 3
    assert cache.get_seq_length() == ids.shape[1] - 1  # the last token was not fed yet
    assert cache.evictions[0] > 0 and cache.lengths[0] < ids.shape[1] / 2
    chat = names["tokenizer"].decode(ids[0])
    assert [chat.count(f"<|im_start|>{who}") for who in ("system", "user", "assistant")] == [
        1,
        3,
        3,
    ]


def test_results_become_a_plot(main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    grid = ["-m", "method=h2o,buzz", "budget=0.1,0.25", "kl=true", "output=results/runs"]
    assert main(*grid, *MODEL, *NEEDLE, "time_samples=0") == 0
    names, told = execute(code("recipes.md", "Results as a DataFrame, and a plot of your own"))
    (axis,) = names["figure"].axes
    rows = load("results/runs")
    for line in axis.get_lines():
        own = rows[rows.label == line.get_label()].groupby("budget").kl_to_full.mean()
        assert line.get_ydata() == pytest.approx(own.to_numpy(float)) and len(own) == 2
    assert "kv_nbytes_mean" in told and Path("kl.pdf").stat().st_size > 1000
    matplotlib.pyplot.close(names["figure"])


@needs_model
def test_a_methods_scores_are_those_that_it_keeps_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names, told = execute(code("recipes.md", "Debugging a method"))
    ids, kept, scores = names["ids"], names["kept"], names["scores"][0, 0]
    assert len(names["seen"]) == len(names["cache"].layers) and names["layer"] == 0
    best = scores[:-8].topk(8).indices.sort().values.tolist()
    assert kept == best + [*range(ids.shape[1] - 8, ids.shape[1])]
    assert told.splitlines()[0] == "[16, 16, 16]" and "[('" not in told


@pytest.fixture
def max_attention(monkeypatch: pytest.MonkeyPatch) -> type:
    heading = "A method that needs the maximum attention over all queries"
    text = code("recipes.md", heading).replace("@register()", '@register("max_attention")')
    monkeypatch.setitem(sys.modules, "recipe", ModuleType("recipe"))
    monkeypatch.setattr("buzz.policy.POLICIES", {})
    names: dict[str, Any] = {"__name__": "recipe"}
    exec(compile(text, "recipe", "exec"), names)
    return names["MaxAttentionPolicy"]


@pytest.mark.parametrize("family", ["llama", "llama-mha"])
def test_a_maximum_over_all_queries_is_that_of_the_whole_matrix(max_attention, family) -> None:
    """Of a padded batch too: 90 and 70 tokens, more than a block of queries."""
    model, ids = tiny(family, "eager"), prompt(90, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    with torch.no_grad():
        weights = model(ids, attention_mask=mask, output_attentions=True).attentions
        cache = EvictionCache(model, max_attention(capacity=12))
        model(ids, attention_mask=mask, **{CACHE_ARGUMENT: cache})
    for index, layer in enumerate(weights):
        heads = layer.unflatten(1, (model.config.num_key_value_heads, -1))
        for row, padding in enumerate((0, 20)):
            highest = heads[row, :, :, padding:, padding:].amax((1, 2))
            expected = highest.topk(12).indices.sort().values
            assert torch.equal(cache.kept_positions(index)[row], expected)
    assert cache.evicting[0].log.latest is not None  # until the first token of the answer
    with torch.no_grad():
        model(ids[:, :1], **{CACHE_ARGUMENT: cache})
    assert cache.evicting[0].log.latest is None


def test_a_wandb_sweep_makes_commands_that_can_be_run(planned) -> None:  # noqa: F811
    sweep = yaml.safe_load(code("recipes.md", "W&B sweeps", "yaml"))
    arguments = {"method.window": 64, "method.stride": 5}
    assert arguments.keys() == sweep["parameters"].keys()
    env, python, program, *own, last = sweep["command"]
    assert (env, python, program, last) == (
        "${env}", "python", "${program}", "${args_no_hyphens}",
    )  # fmt: skip
    one = planned([*own, *(f"{name}={value}" for name, value in arguments.items())])
    policy = one.fit(400)[0]
    assert (policy.window, policy.stride, one.logger.project) == (64, 5, sweep["project"])


def test_every_command_can_be_run(planned) -> None:  # noqa: F811
    made = [jobs(command) for command in commands("recipes.md")]
    assert [[len(job) for job in one] for one in made] == [[6], [3], [12], [3]]
    for (job,) in made:
        assert planned(job[-1]).budget is not None


def test_a_pilots_timings_give_the_hours(main, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    pilot = ["-m", "method=h2o,buzz", "budget=0.25", "time_samples=1", "output=results/pilot"]
    assert main(*pilot, *MODEL, *NEEDLE) == 0
    names, told = execute(code("reproduce.md", "A pilot of ten minutes"))
    rows = load("results/pilot")
    timed = rows[rows.timed]
    assert len(timed) == 3 == names["R"]
    each = 1 / timed.decode_tokens_per_s.median() + 0.002 * 3
    seconds = timed.ttft_s.mean() + timed.generated_tokens.mean() * each
    assert names["hours"] == pytest.approx(1000 * seconds / 3600)
    assert "1,000 samples of 3 rows" in told
