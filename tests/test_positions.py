"""`cache.positions` from the command line to the records, in every program that makes caches."""

from __future__ import annotations

import pytest
from runs import MODEL, read

import evals.run.generate
import evals.run.read
import scripts.show_kept
from buzz import ConfigError, EvictionCache

H2O = ["method=h2o", "method.heavy=20", "method.recent=20"]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[EvictionCache]:
    """The caches that are made from now on."""
    caches: list[EvictionCache] = []

    def make(*args, **kwargs) -> EvictionCache:
        caches.append(EvictionCache(*args, **kwargs))
        return caches[-1]

    for module in (evals.run.generate, evals.run.read, scripts.show_kept):
        monkeypatch.setattr(module, "EvictionCache", make)
    return caches


def test_they_reach_the_cache_and_are_recorded(go, made) -> None:
    plain, moved = go(*H2O), made[:]
    made.clear()
    true = go(*H2O, "cache.positions=true")
    assert {cache.positions for cache in moved} == {"cache"}
    assert {cache.positions for cache in made if cache.policy.name == "h2o"} == {"true"}
    names = [file.name.removeprefix("h2o,heavy=20,recent=20") for file in (plain, true)]
    assert names == [".jsonl", ",positions=true.jsonl"] and plain.parent == true.parent
    for file, name in ((plain, "cache"), (true, "true")):
        assert {record["cache"]["positions"] for record in read(file)} == {name}


def test_quotes_make_no_difference(go) -> None:
    folders = {go(*H2O, f"cache.positions={value}") for value in ("true", "'true'", '"true"')}
    assert len(folders) == 1


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
