"""Many methods on one prefill give what each of them gives alone."""

from __future__ import annotations

import json
import re

import pandas as pd
import pytest
import torch
from runs import MODEL, NEEDLE, ROOT
from tiny import prompt, tiny

from baselines import FullPolicy
from buzz import POLICIES, Budget, ConfigError, EvictionCache, ForkedCache
from evals.report import fidelity as report
from evals.run.fidelity import copied
from evals.run.forced import compare_with_full
from evals.run.forked import compare

TOKENS = 60
FORKED = [*MODEL, *NEEDLE, "+experiment=fidelity", "task=needle", "fidelity.budgets=[0.25,0.5]"]


def fitted(budget: float = 0.5) -> list:
    """Every registered method that meets a budget of a short prompt."""
    return [Budget(budget).policy(cls(), TOKENS)[0] for _, cls in sorted(POLICIES.items())]


@torch.inference_mode()
@pytest.mark.parametrize("positions", ["cache", "true"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_rows_are_what_methods_give_alone(family, positions) -> None:
    """A prompt, tokens, and a chunk of several: logits, lengths and kept entries of each."""
    model, policies = tiny(family), fitted()
    parts = prompt(TOKENS + 16).split([TOKENS, *[1] * 12, 4], dim=1)
    forked = ForkedCache(model, policies, positions=positions)
    together = [model(parts[0], past_key_values=forked).logits.expand(len(policies), -1, -1)]
    for part in parts[1:]:
        together.append(model(part.expand(len(policies), -1), past_key_values=forked).logits)
    for row, policy in enumerate(policies):
        alone = EvictionCache(model, policy, positions=positions)
        for part, logits in zip(parts, together, strict=True):
            expected = model(part, past_key_values=alone).logits[0]
            torch.testing.assert_close(logits[row], expected, atol=1e-4, rtol=1e-4)
        fork = forked.forks[row]
        assert fork.lengths == alone.lengths and fork.evictions == alone.evictions
        assert torch.equal(fork.kept_positions(1), alone.kept_positions(1)), policy.name


def test_comparison_is_that_of_separate_runs() -> None:
    """To 1e-5: the divergences of every method, on the answer that the full cache gives."""
    model, policies, ids = tiny(), fitted(), prompt(TOKENS)[0].tolist()
    answer, found, own = compare(model, ids, policies, 12, set(), {}, (), 8)
    greedy = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)
    assert answer == greedy[0, TOKENS:].tolist()
    for policy, one in zip(policies, found, strict=True):
        (alone,) = compare_with_full(model, [ids], [answer], policy, 0, {})
        assert one["kl"] == pytest.approx(alone.kl_to_full, abs=1e-5)
        assert one["top1"] == alone.top1_to_full
        each = [policy.for_layer(layer, 3).lengths([TOKENS] + [1] * 11) for layer in range(3)]
        assert one["entries_peak"] == max(sum(held) / 3 for held in zip(*each, strict=True))
    assert any(one["kl"] > 0.01 for one in found)
    for policy, tokens in zip([FullPolicy(), *policies], own, strict=True):
        cache = EvictionCache(model, policy)
        greedy = model.generate(
            torch.tensor([ids]), past_key_values=cache, max_new_tokens=8, do_sample=False
        )
        assert tokens == greedy[0, TOKENS:].tolist(), policy.name
    assert len({tuple(tokens) for tokens in own}) > 1


def test_answers_end_where_the_full_cache_ends_them() -> None:
    model, ids = tiny(), prompt(TOKENS)[0].tolist()
    answer, *_ = compare(model, ids, [FullPolicy()], 12, set(), {})
    ended, (found,), own = compare(model, ids, [FullPolicy()], 12, {answer[0]}, {}, (), 12)
    assert ended == own[0] == own[1] == answer[:1] and found["kl"] is None and found["top1"] is None
    *_, own = compare(model, ids, [FullPolicy()], 12, set(), {}, (), 12, {answer[0]})
    assert own[0] == own[1] == answer[:1]


def test_what_is_refused() -> None:
    model = tiny()
    with pytest.raises(ConfigError, match="at least one"):
        ForkedCache(model, [])
    with pytest.raises(ConfigError, match="do not evict"):
        ForkedCache(tiny("gemma3-mixed"), [FullPolicy()])
    cache = ForkedCache(model, [FullPolicy()] * 2)
    ids = prompt(8, batch=2)
    with pytest.raises(ConfigError, match="attention_mask"):
        model(ids[:1], attention_mask=torch.ones(1, 8), past_key_values=cache)
    with pytest.raises(RuntimeError, match="2 rows and not 1"):
        model(ids, past_key_values=cache)


def test_where_an_answer_comes_from() -> None:
    text = list(range(100))
    found = copied(text, [7, 40, 41, 42, 43, 44, 3])
    assert (found.tokens, found.distance, found.share) == (5, 60, 5 / 7)
    assert copied(text, [200]).distance is None
    assert copied([1, 2, 3, 9, 1, 2, 3], [1, 2, 3]).distance == 3  # the last of equals
    assert copied([1, 1, 1, 1, 1], [1, 1, 1, 1]).share == 1


def test_an_experiment_from_config_to_table(main, tmp_path, capsys) -> None:
    """Resumes without work, is put together from shards, and is rebuilt from its numbers alone."""
    shared = [*FORKED, "fidelity.tokens=6", "fidelity.answers=true", f"output={tmp_path}/runs"]
    for shard in ("0/2", "1/2", "1/2"):
        assert main(*shared, f"task.shard={shard}") == 0
    assert "| 0.250 | h2o |" in capsys.readouterr().out
    files = sorted(tmp_path.glob("runs/*/forks.jsonl"))
    records = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert sorted(record["status"] for record in records) == ["ok"] * 3
    out = tmp_path / "out"
    written = [f"out={out}", f"pictures={out}"]

    def files_of() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    assert report.main([f"runs={tmp_path}/runs", *written]) == 0
    before = files_of()
    assert {"samples.csv.gz", "fidelity.csv", "sources.png", "contrasts.md"} <= before.keys()
    environment, *_ = json.loads(before["environment.json"])  # of a checkout that changes, more
    assert torch.__version__.startswith(environment["versions"]["torch"])
    assert report.main(written) == 0
    assert files_of() == before
    lines = before["fidelity.csv"].decode().splitlines()
    methods = {line.split(",")[1] for line in lines[1:]}
    assert methods == {one["method"] for one in records[0]["forks"]} and "h2o" in methods
    assert all(0 <= one["score"] <= 1 for record in records for one in record["forks"])
    assert "score,full_score" in lines[0]
    table = before["answers_prompt_0.25.md"].decode()
    assert "| method | mean | 0% | 100% | 50% |" in table and "| full | " in table


def test_more_prompts_are_put_beside_committed_numbers(main, tmp_path, capsys) -> None:
    """As if all had been measured at once; other answers to the same prompts are refused."""
    for shard in ("0/2", "1/2"):
        folder = f"output={tmp_path}/{shard[0]}"
        assert main(*FORKED, "fidelity.tokens=6", folder, f"task.shard={shard}") == 0
    assert main(*FORKED, "fidelity.tokens=6", f"output={tmp_path}/both") == 0

    def write(*arguments: str) -> int:
        return report.main([*arguments, f"pictures={tmp_path}"])

    one, two, both = (tmp_path / name for name in ("one", "two", "whole"))
    assert write(f"runs={tmp_path}/both", f"out={both}") == 0
    assert write(f"runs={tmp_path}/0", f"out={one}") == 0
    assert write(f"runs={tmp_path}/1", f"beside={one}", f"out={two}") == 0
    assert (two / "fidelity.csv").read_bytes() != (one / "fidelity.csv").read_bytes()
    for name in ("samples.csv.gz", "fidelity.csv", "environment.json"):
        assert (two / name).read_bytes() == (both / name).read_bytes(), name
    assert main(*FORKED, "fidelity.tokens=4", f"output={tmp_path}/4") == 0
    assert write(f"runs={tmp_path}/4", f"beside={both}", f"out={both}") == 2
    assert "two answers" in capsys.readouterr().err
    assert write(f"runs={tmp_path}/4", f"beside={tmp_path}") == 2
    assert "beside" in capsys.readouterr().err


def test_the_figure_of_cells(tmp_path) -> None:
    rows = [
        {"task": "needle", "sample": str(sample), "prompt_tokens": 100, "answer": "same"}
        | {"method": method, "budget": budget, "budget_by": "peak", "kl": kl, "kl_median": kl}
        | {"top1": 0.5, "entries_mean": 9.0, "entries_peak": 10, "evictions": 2}
        | {"copied_distance": None}
        for sample in range(3)
        for budget in (0.1, 0.25)
        for kl, method in enumerate(("h2o", "lazy", "cells_4", "cells_16", "cells_all"))
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "samples.csv.gz", index=False)
    assert [path.name for path in report.build(tmp_path, tmp_path)] == ["cells.png"]


@pytest.mark.parametrize(
    "override, reason",
    [
        ("fidelity.tokens=1", "fidelity.tokens"),
        ("fidelity.budgets=[1.5]", "budget"),
        ("fidelity.budgets=[0.001]", "budget"),
        ("fidelity.methods.h2o.scoring=none", "scoring"),
        ("task=wikitext", "task"),
        ("cache.logn_base=512", "cache.logn_base"),
        ("model.compile=true", "model.compile"),
    ],
)
def test_refusals(main, capsys, override, reason) -> None:
    task = [] if override.startswith("task") else ["task=needle", *NEEDLE]
    assert main(*MODEL, "+experiment=fidelity", *task, override) == 2
    assert reason in capsys.readouterr().err.splitlines()[-1]


def test_the_readme_shows_the_committed_results() -> None:
    """Cell by cell."""
    summary = pd.read_csv(ROOT / "results/embedded/fidelity.csv")
    summary = summary[summary.budget == 0.25].set_index(["method", "task"])
    lines = (ROOT / "README.md").read_text().splitlines()
    rows = [
        [c.strip() for c in line.strip("|").split("|")] for line in lines if line.startswith("| `")
    ]
    rows = [row for row in rows if len(row) == 6]
    assert len(rows) > 10
    for name, *cells, held, evictions in rows:
        own = summary.loc[name.strip("`")]
        for task, cell in zip(("nq10", "xsum", "multi_news"), cells, strict=True):
            one = own.loc[task]
            assert cell == f"{one.kl:.2f} [{one.kl_low:.2f}, {one.kl_high:.2f}]"
        three = own.loc[["nq10", "xsum", "multi_news"]]
        assert held == f"{three.held_over_budget.mean():.2f}"
        assert evictions == f"{three.evictions.mean():.0f}"


def test_the_page_on_honeycomb_shows_what_was_measured() -> None:
    """Cell by cell: differences to H2O, and evictions as a part of H2O's."""
    summary = pd.read_csv(ROOT / "results/embedded/honeycomb_check/fidelity.csv")
    summary = summary.set_index(["method", "task", "budget"])
    columns = [(task, budget) for task in ("nq10", "xsum", "multi_news") for budget in (0.1, 0.25)]
    page = (ROOT / "docs/honeycomb.md").read_text().split("## The other half, looked at once")[1]
    rows = [line for line in page.splitlines() if line.startswith("| ")][2:]
    shown = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if row[2] != "-"]
    method = ""
    for name, *cells in shown:
        method = name.split("`")[1] if "`" in name else method
        for cell, (task, budget) in zip(cells, columns, strict=True):
            own, rival = summary.loc[method, task, budget], summary.loc["h2o", task, budget]
            if "`" in name:
                ends = [own[f"kl_less_h2o{end}"] for end in ("", "_low", "_high")]
                told = [float(number) for number in re.findall(r"[-+]?\d\.\d{3}", cell)]
                assert told == pytest.approx(ends, abs=6e-4), name  # both are rounded
                assert cell.startswith("**") == (ends[2] < 0)
            else:
                assert cell == f"{own.evictions / rival.evictions:.0%}".replace("%", " %"), method
    assert len(shown) == 8
