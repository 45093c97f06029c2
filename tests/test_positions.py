"""`cache.positions` from the command line to the records, in every program that makes caches."""

from __future__ import annotations

import json

import pytest
import yaml
from runs import MODEL

import evals.run.forced
import evals.run.generate
import scripts.show_kept
from buzz import ConfigError, EvictionCache
from evals.report.beside import Setting
from evals.report.chosen import is_papers
from evals.results.reading import read_runs
from evals.run.config import check_config

H2O = ["method=h2o", "method.heavy=20", "method.recent=20"]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[EvictionCache]:
    """The caches that are made from now on."""
    caches: list[EvictionCache] = []

    def make(*args, **kwargs) -> EvictionCache:
        caches.append(EvictionCache(*args, **kwargs))
        return caches[-1]

    for module in (evals.run.generate, evals.run.forced, scripts.show_kept):
        monkeypatch.setattr(module, "EvictionCache", make)
    return caches


def test_they_reach_the_cache_and_are_recorded(go, made) -> None:
    plain, moved = go(*H2O, "kl=false"), made[:]
    made.clear()
    true = go(*H2O, "cache.positions=true")
    assert {cache.positions for cache in moved} == {"cache"}
    assert {cache.positions for cache in made} == {"true"}
    assert plain != true
    for folder, name in ((plain, "cache"), (true, "true")):
        config = yaml.safe_load((folder / "config.yaml").read_text())
        summary = json.loads((folder / "summary.json").read_text())
        assert config["cache"]["positions"] == summary["cache"]["positions"] == name
    (setting,) = Setting.of([plain, true])
    assert setting.names == ["h2o positions=cache", "h2o positions=true"]


def test_a_comparison_with_the_full_cache_is_at_the_same_positions(go, made) -> None:
    go("method=full")
    made.clear()
    go(*H2O, "kl=true", "cache.positions=true")
    by_method = {(cache.policy.name, cache.positions) for cache in made}
    assert by_method == {("h2o", "true"), ("full", "cache")}  # the latter moves nothing


def test_quotes_make_no_difference(go) -> None:
    folders = {go(*H2O, f"cache.positions={value}") for value in ("true", "'true'", '"true"')}
    assert len(folders) == 1


@pytest.mark.parametrize("value", ["false", "null", "1", "rope", "[cache]", "''"])
def test_others_are_refused_before_a_model_is_loaded(go, monkeypatch, value) -> None:
    monkeypatch.setattr("evals.run.runner.load_model", None)
    with pytest.raises(ConfigError, match="^cache.positions="):
        go(f"cache.positions={value}")


def test_a_configuration_that_lacks_them_is_refused(go) -> None:
    with pytest.raises(ConfigError, match="^cache.positions=None: is missing"):
        go("~cache.positions")


def test_they_are_checked_with_the_other_settings() -> None:
    with pytest.raises(ConfigError, match="is missing"):
        check_config({"cache": {"positions": True}})


def test_runs_of_before_were_at_cache_positions(go) -> None:
    """They had no such setting: they stand beside new ones, and nothing tells them apart."""
    old, new = go(*H2O), go(*H2O, "seed=1")
    for name in ("config.yaml", "summary.json"):
        content = yaml.safe_load((old / name).read_text())
        del content["cache"]["positions"]
        (old / name).write_text(json.dumps(content))
    (before,) = (run for run in read_runs(old.parent) if run.config["seed"] == 0)
    (after,) = (run for run in read_runs(new.parent) if run.config["seed"] == 1)
    assert before.parameters == after.parameters
    other = go(*H2O, "cache.positions=true")
    (setting,) = Setting.of([old, other])
    assert setting.names == ["h2o positions=cache", "h2o positions=true"]


@pytest.mark.parametrize(("value", "papers"), [("cache", True), ("true", False)])
def test_the_papers_buzz_is_at_cache_positions(go, value, papers) -> None:
    folder = go("method=buzz", f"cache.positions={value}")
    (run,) = read_runs(folder.parent)
    assert is_papers(run) == papers


@pytest.mark.parametrize("method", ["streaming_llm", "full"])
def test_at_true_positions_a_text_ends_with_the_context(go, monkeypatch, tmp_path, method) -> None:
    text = tmp_path / "text"
    text.write_text("word " * 900)
    monkeypatch.setattr("evals.run.runner.load_model", None)
    task = ["task=wikitext", f"task.data_file={text}", "task.tokens=1500", f"method={method}"]
    with pytest.raises(ConfigError, match="^task.tokens=1500: .*1024 tokens"):
        go(*task, "cache.positions=true", needle=False)


def test_the_picture_of_kept_tokens_takes_them(made, monkeypatch, tmp_path, capsys) -> None:
    pairs = (setting.removeprefix("model.").split("=") for setting in MODEL[1:])
    settings = {name: int(value) for name, value in pairs} | {"vocab_size": 300, "seed": 0}
    settings |= {"name": "tiny", "dtype": "float32", "attn_implementation": "sdpa"}
    monkeypatch.setattr(scripts.show_kept, "named_config", lambda name: settings)
    out = ["--prompt", "some words " * 20, "--new-tokens", "3", "--out", str(tmp_path / "kept")]
    assert scripts.show_kept.main([*out, "--methods", "h2o", "--positions", "true"]) == 0
    assert [cache.positions for cache in made] == ["true"]
    assert scripts.show_kept.main([*out, "--positions", "elsewhere"]) == 2
    assert "cache.positions='elsewhere': choose cache or true" in capsys.readouterr().err
