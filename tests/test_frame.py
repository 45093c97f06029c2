"""The frame of all records: what is read, what is paired, what committed samples amount to."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from report_runs import B, write_row

from evals.report import views
from evals.report.embedded import summarize
from evals.results.frame import (
    COLUMNS,
    DIFFERENCE,
    NOT_RUN,
    RATIO,
    estimate,
    interval,
    load,
    partner,
    view,
)

EMBEDDED = Path(__file__).resolve().parents[1] / "results/embedded"


# Reading


def test_a_row_is_a_sample_of_a_method(tmp_path: Path) -> None:
    write_row(tmp_path, "full", [1.0, 0.0], task="needle", lengths=[512])
    write_row(tmp_path, "h2o", [0.0, 0.0], task="needle", budget=0.25, held=1.2, lengths=[512])
    rows = load(tmp_path)
    assert list(rows.columns[: len(COLUMNS)]) == list(COLUMNS) and len(rows) == 4
    h2o = rows[rows.row == "h2o@0.25"]
    assert list(h2o.score) == list(h2o["scores.accuracy"]) == [0.0, 0.0]
    assert list(h2o.held) == [1.2, 1.2] and set(h2o.budget_by) == {"peak"}
    assert set(rows.machine) == {"a CPU, 2 threads"} and set(rows.headline) == {"accuracy"}
    assert rows.attrs["left_out"] == [] and h2o.timed.all()
    assert len(load(tmp_path / h2o.setting.iloc[0], tmp_path / h2o.setting.iloc[0])) == 4
    write_row(tmp_path, "h2o", [1.0], task="nq10", budget=B, by="mean", held=1.5)
    rows = load(tmp_path)
    assert rows.held.iloc[-1] == pytest.approx(0.8 * 1.5) and rows.budget.iloc[-1] == B


def test_samples_without_a_record_are_there(tmp_path: Path) -> None:
    write_row(tmp_path, "full", [1.0, 1.0, 1.0])
    write_row(tmp_path, "h2o", [1.0, None, 0.0], status={2: "oom"})
    rows = load(tmp_path)
    assert list(rows[rows.row == "h2o"].status) == ["ok", NOT_RUN, "oom"]
    assert rows[rows.row == "h2o"].score.isna().tolist() == [False, True, True]


def test_the_last_record_of_a_sample_counts_and_a_torn_line_does_not(tmp_path: Path) -> None:
    file = write_row(tmp_path, "h2o", [1.0, 1.0])
    write_row(tmp_path, "h2o", [0.5, None])
    with open(file, "a") as lines:
        lines.write('{"format": 3, "id": "1", "status": "o')
    rows = load(tmp_path)
    assert list(rows.score) == [0.5, 1.0] and rows.attrs["left_out"] == []


@pytest.mark.parametrize(
    "line, reason",
    [
        ("nonsense", "not JSON"),
        ('{"format": 2, "id": "0"}', "written by another version (format 2, not 3)"),
        ('{"format": 3, "id": "0", "status": "ok", "scores": 5}', "Field required"),
    ],
)
def test_a_line_that_is_no_record_is_left_out_by_name(
    tmp_path: Path, line: str, reason: str
) -> None:
    file = write_row(tmp_path, "h2o", [1.0, 1.0])
    file.write_text(f"{line}\n{file.read_text()}")
    rows = load(tmp_path)
    assert list(rows.score) == [1.0, 1.0]
    (told,) = rows.attrs["left_out"]
    assert told.startswith(f"{file}:1: ") and reason in told


@pytest.mark.parametrize(
    "name, content",
    [
        ("setting.yaml", "task: ["),
        ("setting.yaml", "version: 2\n"),
        ("setting.yaml", "[]"),
        ("prompts.json", "{}"),
        ("prompts.json", None),
    ],
)
def test_a_broken_folder_is_left_out_by_name(
    tmp_path: Path, name: str, content: str | None
) -> None:
    write_row(tmp_path, "h2o", [1.0])
    bad = write_row(tmp_path, "h2o", [1.0], task="needle", lengths=[1]).parent
    (bad / name).unlink() if content is None else (bad / name).write_text(content)
    rows = load(tmp_path)
    assert set(rows.task) == {"xsum"}
    (told,) = rows.attrs["left_out"]
    assert told.startswith(f"{bad}: ") and "\n" not in told


def test_records_of_other_data_do_not_count(tmp_path: Path) -> None:
    file = write_row(tmp_path, "h2o", [1.0, 1.0])
    file.write_text(file.read_text().replace('"sample 1"', '"sample 1, edited"'))
    rows = load(tmp_path)
    assert list(rows.status) == ["ok", NOT_RUN]
    assert rows.attrs["left_out"] == [f"{file}: 1 of 2 records are of other data"]


def test_shards_are_one_row_and_contradictions_are_named(tmp_path: Path) -> None:
    file = write_row(tmp_path, "h2o", [1.0, 0.0, 1.0])
    lines = file.read_text().splitlines(keepends=True)
    file.with_name("h2o.1of2.jsonl").write_text("".join(lines[:2]))
    file.with_name("h2o.2of2.jsonl").write_text("".join(lines[1:]))
    file.unlink()
    rows = load(tmp_path)
    assert list(rows.row) == ["h2o"] * 3 and rows.attrs["left_out"] == []
    other = file.with_name("h2o.2of2.jsonl")
    other.write_text(other.read_text().replace("[1, 2, 1]", "[9]"))
    rows = load(tmp_path)
    assert list(rows.status) == ["ok", NOT_RUN, "ok"]  # neither counts
    (told,) = rows.attrs["left_out"]
    assert "h2o.1of2.jsonl: sample 1 contradicts h2o.2of2.jsonl in its tokens" in told


def test_records_of_other_data_are_counted_by_file(tmp_path: Path) -> None:
    file = write_row(tmp_path, "h2o", [1.0, 0.0, 1.0])
    lines = file.read_text().splitlines(keepends=True)
    old = file.with_name("h2o.0of2.jsonl")
    old.write_text("".join(lines[:2]).replace('"sample ', '"sample, as it was, '))
    file.rename(file.with_name("h2o.1of2.jsonl"))
    rows = load(tmp_path)
    assert rows.attrs["left_out"] == [f"{old}: 2 of 2 records are of other data"]
    assert set(rows.status) == {"ok"}


def test_a_distance_to_an_answer_that_is_no_more_is_none(tmp_path: Path) -> None:
    file = write_row(tmp_path, "full", [1.0, 1.0])
    write_row(tmp_path, "h2o", [1.0, 1.0], budget=0.25, kls=[0.5, 0.7])
    file.write_text(file.read_text().replace("[1, 2, 1]", "[7]"))
    rows = load(tmp_path)
    own = rows[rows.row != "full"]
    assert own.kl_to_full.fillna(-1).tolist() == [0.5, -1]
    file.unlink()
    assert load(tmp_path).kl_to_full.isna().all()


def test_empty_folders_have_all_columns(tmp_path: Path) -> None:
    rows = load(tmp_path)
    assert rows.empty and list(rows.columns) == list(COLUMNS)
    assert view(rows, ["task", "row"]).empty


def test_copies_of_a_setting_are_two_settings_and_a_folder_named_twice_is_one(
    tmp_path: Path,
) -> None:
    for place in ("mine", "theirs"):
        write_row(tmp_path / place, "full", [1.0, 0.0])
        write_row(tmp_path / place, "h2o", [0.0, 0.0], budget=0.25)
    rows = load(tmp_path, tmp_path / "mine")
    assert len(rows) == 8 and rows.setting.nunique() == 2
    assert not any("/" in name for name in rows.setting)  # they name files of tables
    own = rows[rows.method == "h2o"]
    assert partner(rows).score[own.index].tolist() == [1.0, 0.0] * 2


# Pairing


def test_only_the_same_question_is_paired(tmp_path: Path) -> None:
    write_row(tmp_path, "full", [1.0, 2.0, 3.0, 4.0], status={3: "oom"})
    file = write_row(tmp_path, "h2o", [0.0, 0.0, None, 0.0], budget=0.25)
    file.write_text(file.read_text().replace('"hash 0 1"', '"another prompt"'))
    rows = load(tmp_path)
    own = rows[(rows.row != "full") & (rows.status == "ok")]
    assert partner(rows).score[own.index].fillna(-1).tolist() == [1.0, -1, -1]


def test_a_rival_is_of_the_same_budget_and_setting(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_row(tmp_path, "full", [1.0], seed=seed)
        for budget, score in ((0.25, 0.2), (0.5, 0.5)):
            write_row(tmp_path, "h2o", [score + seed], budget=budget, seed=seed)
            write_row(tmp_path, "buzz", [0.0], budget=budget, seed=seed)
    write_row(tmp_path, "h2o", [9.0], row="h2o@0.25,recent=3", budget=0.25)
    rows = load(tmp_path)
    beside = partner(rows, "h2o").score[rows.label == "buzz"]
    assert sorted(beside) == [0.2, 0.5, 1.2, 1.5]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_every_ratio_is_over_the_samples_that_both_have(data: st.DataObject) -> None:
    """Whichever are missing on either side; of bytes, times and scores alike."""
    n = 12
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    lost = [data.draw(st.sets(st.integers(0, n - 1), max_size=8)) for _ in range(2)]
    rows = pd.DataFrame(
        {
            **{"setting": "s", "row": ["full"] * n + ["h2o"] * n, "group": "", "unit": ""},
            **{"label": ["full"] * n + ["h2o"] * n, "id": [*range(n)] * 2, "budget": None},
            **{"prompt_sha256": "", "sample_sha256": "", "budget_by": None, "statistic": "mean"},
            **{"status": ["oom" if i in bad else "ok" for bad in lost for i in range(n)]},
            **{name: rng.lognormal(size=2 * n) for name in ("score", "kv_nbytes_mean")},
            "blocks": None,
        }
    )
    full, own = (rows[rows.row == row].set_index("id") for row in ("full", "h2o"))
    both = sorted(set(range(n)) - lost[0] - lost[1])
    part = rows[(rows.row == "h2o") & (rows.status == "ok")]
    other = partner(rows).loc[part.index]
    for metric in ("score", "kv_nbytes_mean"):
        ratio, less = (estimate(part, metric, other, of) for of in (RATIO, DIFFERENCE))
        assert ratio.n == less.n == len(both)
        if both:
            means = own[metric][both].mean(), full[metric][both].mean()
            assert ratio.value == pytest.approx(means[0] / means[1])
            assert less.value == pytest.approx(means[0] - means[1])


@settings(max_examples=25, deadline=None)
@given(st.sets(st.tuples(st.integers(0, 5), st.sampled_from("049")), min_size=1))
def test_a_score_is_the_mean_of_the_places_means(asked: set[tuple[int, str]]) -> None:
    """Of questions that were asked at several places, whichever are missing."""
    rng = np.random.default_rng(0)
    samples = pd.DataFrame(sorted(asked), columns=["question", "place"])
    samples["score"] = rng.random(len(samples)).round()
    found = interval(samples.score, group=samples.place, unit=samples.question.astype(str))
    assert found.value == pytest.approx(samples.groupby("place").score.mean().mean())
    if found.ends:
        assert found.ends[0] <= found.value + 1e-9 and found.value <= found.ends[1] + 1e-9


def test_a_texts_interval_is_over_its_blocks(tmp_path: Path) -> None:
    facts = {"headline": "token_perplexity", "statistic": "exp", "higher_is_better": False}
    where = {"task": "wikitext", "blocks": True, "metric": facts}
    write_row(tmp_path, "full", [2.0, 2.2], **where)
    write_row(tmp_path, "h2o", [2.1, 2.5], budget=0.25, **where)
    found = view(load(tmp_path), ["row"], against="full").loc["h2o@0.25"]
    assert found.value == pytest.approx(np.exp(2.3 + 0.5))
    assert found.low < found.value < found.high
    assert found.ratio == pytest.approx(np.exp(0.2)) and found.n == found.ratio_n == 2


# Seeds, and the view


def test_a_view_groups_by_whatever_columns(tmp_path: Path) -> None:
    for seed, gain in ((0, 0.0), (1, 1.0), (2, 2.0)):
        write_row(tmp_path, "full", [10.0, 20.0], seed=seed)
        write_row(tmp_path, "h2o", [10.0 + gain, 20.0 + gain], seed=seed, budget=0.25)
    rows = load(tmp_path)
    by_seed = view(rows, ["row", "seed"], against="full")
    assert list(by_seed.loc["h2o@0.25"].sort_index().difference) == [0.0, 1.0, 2.0]
    over = view(rows, ["row"], against="full", across="seed").loc["h2o@0.25"]
    assert over.difference == 1.0 and over.difference_n == 3 and over.value == 16.0
    assert over.difference_low < 0 and over.difference_high > 2  # of three seeds little is known


def test_a_view_has_the_tables_intervals_and_no_method_beside_itself(tmp_path: Path) -> None:
    write_row(tmp_path, "full", [1.0, 1.0], task="needle")
    write_row(tmp_path, "h2o", [0.0, 0.0], task="needle", budget=0.25)
    rows = load(tmp_path)
    found = view(rows, ["row"], against="full")
    full, h2o = found.loc["full"], found.loc["h2o@0.25"]
    assert full.filter(like="difference").dropna().tolist() == [0] == full[["ratio_n"]].tolist()
    table = views.make("scores", rows).frame.set_index("method")
    for name, own in (("full", full), ("h2o", h2o)):
        assert (own.low, own.high) == (table["score low"][name], table["score high"][name])
    assert h2o.difference_low == table["score - full low"]["h2o"]


def test_seeds_stay_within_the_scores_that_samples_have(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        write_row(tmp_path, "full", [1.0, 1.0], task="needle", seed=seed)
        write_row(tmp_path, "h2o", [0.0, 0.0], task="needle", seed=seed, budget=0.25)
        write_row(tmp_path, "buzz", [1.0, 0.5 * seed], task="needle", seed=seed, budget=0.25)
    found = view(load(tmp_path), ["row"], against="full", across="seed")
    high, low, between = (found.loc[row] for row in ("full", "h2o@0.25", "buzz@0.25"))
    assert 0 <= high.low < high.high == 1 and 0 == low.low < low.high <= 1  # not up to 2, not none
    assert low.difference_low == -1 < low.difference_high <= 1
    assert 0 <= between.low < between.value == 0.75 < between.high <= 1
    assert between.difference_high <= 1


# What is committed


@pytest.mark.parametrize("file", sorted(EMBEDDED.rglob("fidelity.csv")), ids=str)
def test_committed_numbers_are_those_of_their_samples(file: Path) -> None:
    """To the printed digits: each is a right rounding of what the frame makes of the samples."""
    rows = load(file.parent)
    found = summarize(rows[~rows.setting.str.contains("/|-spread=")])
    keys = ["task", "method", "budget", "budget_by"]
    printed, found = pd.read_csv(file).set_index(keys), found.set_index(keys)
    assert sorted(found.index) == sorted(printed.index) and len(printed)
    found = found.loc[printed.index]
    assert set(printed.columns) == set(found.columns)
    for name in printed:
        want, have = printed[name].astype(float), found[name].astype(float)
        assert (want.isna() == have.isna()).all(), name
        size = np.floor(np.log10(want.abs().where(want != 0, 1.0)))
        unit = 10.0 ** (size - 4)
        off = ((want - have).abs() / unit).fillna(0)
        assert off.max() <= 0.5 + 1e-6, (name, off.idxmax())


def test_committed_spread_is_in_the_frame() -> None:
    told, rows = pd.read_csv(EMBEDDED / "spread.csv"), load(EMBEDDED)
    rows = rows[rows.setting.str.contains("-spread=")]
    assert len(rows) == len(told)
    for (task, spread, method), own in told.groupby(["task", "spread", "method"]):
        same = rows[(rows.setting == f"{task}-spread={spread}") & (rows.label == method)]
        for name, column in (("kl", "kl_to_full"), ("accuracy", "score"), ("kept", "kept")):
            assert same[column].astype(float).mean() == pytest.approx(own[name].mean(), nan_ok=True)


def test_committed_samples_are_beside_records(tmp_path: Path) -> None:
    write_row(tmp_path, "full", [1.0])
    rows = load(tmp_path, EMBEDDED / "quality")
    assert {"xsum"} == set(rows.task) and rows.setting.nunique() == 2
    assert all(isinstance(seed, int | np.integer) for seed in load(EMBEDDED / "quality").seed)
    assert json.dumps(yaml.safe_load(json.dumps(list(rows.budget.dropna().unique())))) == "[0.4]"


def test_folders_of_an_earlier_version_are_left_out_by_name(tmp_path: Path) -> None:
    write_row(tmp_path, "h2o", [1.0])
    old = tmp_path / "needle-h2o-1234"
    old.mkdir()
    (old / "samples.jsonl").write_text("{}\n")
    (told,) = load(tmp_path).attrs["left_out"]
    assert told.startswith(f"{old}: a run folder of version 0.2")


def test_a_folder_counts_wholly_or_is_named(tmp_path: Path) -> None:
    write_row(tmp_path, "h2o", [1.0])
    half = write_row(tmp_path, "buzz", [1.0], task="needle", lengths=[1])
    write_row(tmp_path, "h2o", [1.0], task="needle", lengths=[1])
    bare = write_row(tmp_path, "h2o", [1.0], seed=1)
    half.unlink()
    half.mkdir()
    (bare.parent / "setting.yaml").unlink()
    rows = load(tmp_path)
    assert rows.setting.nunique() == 1 and set(rows.task) == {"xsum"}
    told = "\n".join(rows.attrs["left_out"])
    assert f"{half.parent}: " in told and half.name in told
    assert f"{bare.parent}: no setting.yaml" in told
