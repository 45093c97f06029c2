"""The same facts told in one cell, in neighbouring cells and over the prompt."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pandas as pd
import pytest
from runs import ROOT

from buzz import ConfigError
from evals.report.embedded_figures import draw_spread
from evals.results.frame import load
from evals.run.models import byte_tokenizer, load_tokenizer, named_config
from evals.tasks.needle import Needle
from evals.tasks.ruler import Ruler
from evals.tasks.types import SPREADS

TOKENIZER = byte_tokenizer()


def needle(spread: str | None) -> Needle:
    return Needle(name="needle", spread=spread, lengths=[2000], depths=[20], repeats=1)


@pytest.mark.parametrize("spread", SPREADS)
def test_digits_stand_where_they_are_said_to(spread: str) -> None:
    (sample,) = needle(spread).load(TOKENIZER)
    (key,) = sample.references
    told = re.compile(r"pass key is (\d)(?:\.|(\d)(\d)(\d)(\d))").finditer(sample.prompt)
    places = [one.start(i) for one in told for i in range(1, 6) if one[i]]
    assert "".join(sample.prompt[place] for place in places) == key
    gaps = [after - before for before, after in zip(places, places[1:], strict=False)]
    sentence = len("The second digit of the pass key is 7. ")
    if spread == "cell":
        assert gaps == [1] * 4
    elif spread == "neighbours":
        assert max(gaps) <= sentence
    else:
        assert min(gaps) > 3 * sentence
    begin = sample.prompt.index("\n\n")
    assert 0.1 < (places[0] - begin) / len(sample.prompt) < 0.35
    assert len(sample.prompt) <= 2000


def test_the_passkey_of_before_is_what_it_was() -> None:
    (sample,) = needle(None).load(TOKENIZER)
    assert sample.prompt.count(sample.references[0]) == 2


def test_spread_is_of_a_single_passkey() -> None:
    task = Needle(name="needle", spread="cell", variant="multikey")
    with pytest.raises(ConfigError, match=r"task.spread='cell'"):
        task.check()


def test_a_passkey_may_be_answered_digit_by_digit() -> None:
    task = needle("prompt")
    (sample,) = task.load(TOKENIZER)
    said = {"prediction": f"It is {', '.join(sample.references[0])}."}
    assert task.score(sample, said) == {"accuracy": 1}
    assert needle(None).score(sample, said) == {"accuracy": 0}


@pytest.fixture(scope="module")
def tokenizer():
    pytest.importorskip("lm_eval")
    pytest.importorskip("wonderwords")
    if not (ROOT / "models" / named_config("smollm2")["gguf_file"]).exists():
        pytest.skip("the embedded model is not there: make model")
    return load_tokenizer(named_config("smollm2"))


def vt(spread: str | None) -> Ruler:
    task = Ruler(name="ruler", subtasks=["vt"], lengths=[1600], samples=2, spread=spread, seed=3)
    task.check()
    task.prepare()
    return task


@pytest.mark.parametrize("spread", SPREADS)
def test_assignments_stand_where_they_are_said_to(tokenizer, spread: str) -> None:
    drawn, moved = (vt(one).load(tokenizer) for one in (None, spread))
    for before, after in zip(drawn, moved, strict=True):
        names = after.references
        assert names == before.references and after.question == before.question
        assert sorted(after.prompt) == sorted(before.prompt)  # nothing lost, nothing new
        assert re.findall(r"VAR ([A-Z]{5}) =", after.prompt) == [*names]
        places = [after.prompt.index(name) for name in names]
        assert places[0] == before.prompt.index(names[0])  # the first stays
        between = [after.prompt[place:end].count(".") for place, end in itertools.pairwise(places)]
        if spread == "prompt":
            after_last = after.prompt[places[-1] :].count(".")
            assert min(between) >= 8 and max([*between, after_last]) - min(between) <= 1
        else:
            assert between == [spread == "neighbours"] * 4
        for name, source in itertools.pairwise(names):
            assert f"VAR {source} = VAR {name} " in after.prompt
        assert after.meta["depths"] == sorted(after.meta["depths"])


def test_spread_is_of_vt() -> None:
    for subtasks in (["vt", "cwe"], None):
        with pytest.raises(ConfigError, match=r"task.spread='cell'.*task.subtasks=\[vt\]"):
            Ruler(name="ruler", subtasks=subtasks, spread="cell").check()


def test_both_tasks_in_one_figure(tmp_path: Path) -> None:
    rows = [
        {"task": task, "sample": f"{task}{spread}", "spread": spread, "method": method}
        | {"budget": 0.25, "kept": 1, "whole": 0, "kl": 0.5, "accuracy": 0.2 * (method == "full")}
        for task in ("needle", "vt")
        for spread in SPREADS
        for method in ("full", "buzz")
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "spread.csv", index=False)
    figure = draw_spread(load(tmp_path), tmp_path / "spread.png")
    titles = [axis.get_title() for axis in figure.axes]
    assert len(titles) == 8 and titles[1] == "vt: names of a chain kept, of 5"
    assert [len(axis.lines) for axis in figure.axes] == [2, 2, 2, 2, 1, 1, 2, 2]  # full has no KL
    assert (tmp_path / "spread.png").stat().st_size > 10_000
