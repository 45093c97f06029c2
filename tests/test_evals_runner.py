"""Runs on a tiny random model: records, resuming, refusals, failures, the table."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from runs import (
    HEAD_DIM,
    KV_HEADS,
    LAYERS,
    MODEL,
    NEEDLE,
    composed,
    full_of,
    read,
    shown,
    summary_of,
    write_lines,
)
from tiny import tiny

import evals.run.generate
import evals.run.runner
from baselines import FullPolicy, StreamingLLMPolicy
from buzz import BuzzPolicy, ConfigError, EvictionCache
from evals.results.folder import RunFailed, SettingFolder, digest, sha256
from evals.results.frame import load
from evals.run.models import byte_tokenizer
from evals.run.prompts import Prompt, batches
from evals.tasks.encoding import encode
from evals.tasks.needle import FILLER


def test_records_and_summary(go) -> None:
    file = go("method=streaming_llm", "method.sink=4", "method.window=60")
    assert file.name == "streaming_llm,window=60.jsonl"
    records, summary = read(file), summary_of(file)
    assert [record["group"] for record in records] == ["0%", "50%", "100%"]
    entry = 2 * LAYERS * KV_HEADS * HEAD_DIM * 4  # K and V, float32
    for record in records:
        assert record["trace"] == [[64, record["generated_tokens"], 0]]
        assert record["evictions"] == record["generated_tokens"]
        assert record["kv_nbytes_mean"] == record["kv_nbytes_peak"] == 64 * entry
        assert record["allocated_nbytes"] >= 64 * entry
        assert record["memory_peak_nbytes"] > 50e6
        assert record["ttft_s"] > 0 and record["decode_tokens_per_s"] > 0
        assert 0 < record["itl_p50_ms"] <= record["itl_p95_ms"]
        assert not record["chat_template"] and record["truncated_tokens"] == 0
    assert summary["n"] == 3 and summary["kv_entries_peak"] == 64
    ((name, environment),) = json.loads((file.parent / "environments.json").read_text()).items()
    assert environment["versions"]["transformers"] and environment["threads"] > 0
    assert {record["environment"] for record in records} == {name} == {digest(environment)}


def test_fractional_budget_is_of_each_prompt(go) -> None:
    folder = go("method=streaming_llm", "budget=0.25")
    for record in read(folder):
        assert record["budget_entries"] == round(0.25 * record["prompt_tokens"])
        assert record["kv_entries_peak"] == record["budget_entries"]


def test_batch_budget_is_that_of_the_shortest_row(go) -> None:
    records = read(go("method=local", "budget=0.5", "task.batch_size=3"))
    shortest = min(record["prompt_tokens"] for record in records)
    for name in ("budget_entries", "kv_entries_peak"):
        assert {record[name] for record in records} == {round(0.5 * shortest)}


def test_a_killed_run_goes_on_where_it_stopped(go) -> None:
    file = go("method=buzz")
    whole, records = file.read_text(), read(file)
    first, second, *_ = whole.splitlines(keepends=True)
    file.write_text(first + second[: len(second) // 2])
    assert go("method=buzz") == file and file.read_text().startswith(first)
    assert [r["prediction"] for r in read(file)] == [r["prediction"] for r in records]
    assert len(file.read_text().splitlines()) == 3


def test_records_of_other_prompts_are_not_reused(go) -> None:
    file = go("method=buzz")
    first, *others = read(file)
    write_lines(file, [first | {"prompt_sha256": "0" * 16}, *others])
    with pytest.raises(ConfigError, match="another prompt"):
        go("method=buzz")


def test_repeated_run_generates_nothing(go, monkeypatch) -> None:
    file = go("method=buzz")
    before = [path.read_bytes() for path in (file, full_of(file))]
    monkeypatch.setattr(evals.run.runner, "load_model", None)
    evals.run.runner._loaded.clear()
    assert go("method=buzz") == file
    assert [path.read_bytes() for path in (file, full_of(file))] == before


def test_a_row_in_use_is_refused_and_the_full_cache_beside_it_is_not_waited_for(go) -> None:
    file = go("method=buzz")
    folder = SettingFolder(file.parent)
    with folder.lock(file), pytest.raises(ConfigError, match="in use by another run"):
        go("method=buzz")
    full_of(file).unlink()
    with folder.lock(full_of(file)):
        other = go("method=h2o", "budget=60", "kl=true")  # makes its answers anew
    assert not full_of(file).exists() and all(r["kl_to_full"] > 0 for r in read(other))
    go("method=buzz")  # what a process leaves is void


def test_cache_that_does_not_evict_fails_the_run(go, monkeypatch) -> None:
    silent = lambda model, policy, **options: EvictionCache(model, FullPolicy())  # noqa: E731
    monkeypatch.setattr(evals.run.generate, "EvictionCache", silent)
    with pytest.raises(RunFailed, match=r"holds \d+ entries, the method's own recurrence says 64"):
        go("method=streaming_llm", "method.window=60", "task.lengths=[400]")
    monkeypatch.undo()
    (file,) = go.runs.glob("*/streaming_llm*.jsonl")
    assert [record["status"] for record in read(file)] == ["failed"]
    assert go("method=streaming_llm", "method.window=60") == file  # failed samples run again
    assert summary_of(file)["n"] == 3


def test_command_line_from_another_folder(main, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(*MODEL, *NEEDLE, "budget=7.5", "output=runs") == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: budget=7.5: ")
    assert {path.name for path in tmp_path.iterdir()} <= {"runs"}  # no other folder is left behind


def test_a_method_has_the_full_cache_of_its_setting_beside_it(go) -> None:
    file = go("method=buzz")
    answers = read(full_of(file))
    assert [r["prompt_sha256"] for r in answers] == [r["prompt_sha256"] for r in read(file)]
    before = full_of(file).read_bytes()
    assert go("method=h2o").parent == file.parent and full_of(file).read_bytes() == before
    assert go("method=full", "budget=0.5") == full_of(file)  # no budget changes it
    assert go("method=full", "seed=1").parent != file.parent
    scaled = go("method=full", "cache.logn_base=16")  # a method of its own
    assert scaled.name == "full,logn_base=16.jsonl" and scaled.parent == file.parent


def test_comparison_with_full_is_recorded_and_made_once(go, monkeypatch) -> None:
    method = ["method=local", "method.window=40"]
    own = read(go(*method))
    file = go(*method, "kl=true")
    lines, theirs = file.read_bytes(), {r["id"]: r["tokens"] for r in read(full_of(file))}
    for record, before in zip(read(file), own, strict=True):
        assert record["kl_to_full"] > 0 and record["tokens"] == before["tokens"]
        assert record["kl_to_full"] == pytest.approx(sum(record["kl_tokens"]) / 7, rel=1e-3)
        assert record["reference_sha256"] == sha256(theirs[record["id"]])
    monkeypatch.setattr(evals.run.runner, "answer_together", None)
    go(*method, "kl=true")
    assert file.read_bytes() == lines


def test_a_row_that_outgrows_its_budget_is_marked(go) -> None:
    """SnapKV has its budget at the prompt's end; 39 tokens later it holds 139 of 100."""
    long = ["budget=100", "task.max_new_tokens=40"]
    files = [go(f"method={name}", *long) for name in ("snapkv", "h2o")]
    rows = load(files[0].parent)
    held = rows.groupby("row").held.mean()
    assert held["snapkv@100"] == pytest.approx(1.39) and held["h2o@100"] == pytest.approx(1.0)
    lines = [line for line in shown(files[0]).splitlines() if line.split()[:1] != []]
    marked = {line.split()[0].rstrip("†"): "†" in line for line in lines}
    assert marked["snapkv@100"] and not marked["h2o@100"]


@pytest.mark.parametrize(
    "method",
    ["method=buzz method.window=20 method.threshold=40", "method=h2o budget=60"],
)
def test_records_do_not_depend_on_the_batch_size(go, tmp_path: Path, method: str) -> None:
    rows = [{"document": " ".join(FILLER[i : 2 * i]), "summary": "words"} for i in (1, 2, 4, 6, 8)]
    data = write_lines(tmp_path / "data.jsonl", rows)
    setting = ["task=xsum", f"task.data_file={data}", "task.max_new_tokens=48", *method.split()]
    runs, distances = [], []
    for size in (1, 2, 5):
        own = [*setting, f"task.batch_size={size}"]
        records = sorted(read(go(*own, needle=False)), key=lambda record: record["id"])
        runs.append([(r["tokens"], r["trace"], r["scores"]) for r in records])
        compared = {r["id"]: r["kl_to_full"] for r in read(go(*own, "kl=true", needle=False))}
        distances.append([compared[record["id"]] for record in records])
    assert len({record["prompt_tokens"] for record in records}) == 5  # so there is padding
    assert len({tuple(tokens) for tokens, *_ in runs[0]}) == 5
    assert runs[1] == runs[0] and runs[2] == runs[0]
    for one in distances[1:]:
        assert one == pytest.approx(distances[0], rel=1e-3)


@pytest.mark.parametrize("by", ["peak", "mean"])
def test_records_say_what_was_given_and_what_was_held(go, by) -> None:
    folder = go("method=buzz", "budget=0.5", f"budget_by={by}", "task.max_new_tokens=60")
    for record in read(folder):
        assert record["budget_by"] == by
        policy = BuzzPolicy(**record["policy"])
        lengths = policy.lengths([record["prompt_tokens"]] + [1] * (record["generated_tokens"] - 1))
        assert record["kv_entries_peak"] == max(lengths)
        assert record["kv_entries_mean"] == pytest.approx(sum(lengths) / len(lengths))
        assert record["allocated_nbytes"] > record["kv_nbytes_peak"]
        footprint = policy.footprint()
        promised = footprint.peak if by == "peak" else footprint.mean
        assert promised == pytest.approx(record["budget_entries"], abs=1)


def test_text_is_read_with_one_cache(go, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Bees dance to tell each other where flowers are. " * 20)
    setting = ["task=wikitext", f"task.data_file={tmp_path}/text.txt", "task.tokens=321"]
    file = go(*setting, "method=local", "budget=100", "task.chunk=8", needle=False)
    (record,), summary = read(file), summary_of(file)
    assert record["prompt_tokens"] == 321 and record["kv_entries_peak"] == 100
    assert record["trace"][0] == [8, 12, 8]
    perplexity = record["scores"]["token_perplexity"]
    assert 100 < perplexity < 1e4  # a random model's: of 512 tokens
    assert summary["score"] == pytest.approx(perplexity) and len(record["blocks"]) == 16
    assert summary["score_low"] < perplexity < summary["score_high"]
    assert math.exp(sum(record["blocks"]) / 16) == pytest.approx(perplexity)
    assert "1-20" in shown(file) and "301-320" in shown(file)
    (full,) = read(full_of(file))
    assert full["kv_entries_peak"] == 320
    assert full["scores"]["token_perplexity"] != pytest.approx(perplexity, rel=1e-4)


def test_a_suite_has_one_model_and_one_table(main, monkeypatch, capsys) -> None:
    loads = []
    original = evals.run.runner.load_model
    monkeypatch.setattr(evals.run.runner, "load_model", lambda *a: loads.append(a) or original(*a))
    evals.run.runner._loaded.clear()
    settings = [setting.replace("task.", "task.settings.needle.") for setting in NEEDLE]
    settings += ["task.settings.pydoc.samples=2", "task.settings.pydoc.shortest=100"]
    settings += ["task.settings.pydoc.max_new_tokens=8", "task.settings.pydoc.longest=900"]
    assert main("-m", *MODEL, "task=suite", *settings, "method=full,local", "budget=0.5") == 0
    out = capsys.readouterr().out
    assert len(loads) == 1 and "4 complete" in out and "local@0.5" in out
    rows = load(main.runs)
    assert set(zip(rows.task, rows.row, strict=True)) == {
        (task, row) for task in ("needle", "pydoc") for row in ("full", "local@0.5")
    }


def test_summaries_come_from_the_owners_test_splits() -> None:
    tasks = [composed(f"task={name}").task for name in ("xsum", "cnn_dailymail")]
    assert [(task.hub, task.hub_config, task.split, task.headline) for task in tasks] == [
        ("EdinburghNLP/xsum", None, "test", "rougeL"),
        ("abisee/cnn_dailymail", "3.0.0", "test", "rougeL"),
    ]


class Words:
    """A tokenizer of one token per word, with a template of three."""

    chat_template = "yes"

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[str]]:
        return {"input_ids": text.split()}

    def decode(self, ids: list[str], skip_special_tokens: bool) -> str:
        return " ".join(ids) + " "

    def apply_chat_template(self, messages, tokenize, add_generation_prompt) -> str:
        return f"user {messages[0]['content']} end assistant"


@pytest.mark.parametrize(("chat", "limit"), [(True, 20), (True, 21), (False, 20), (False, 99)])
def test_truncation_keeps_both_ends_and_the_whole_template(chat: bool, limit: int) -> None:
    words = [str(i) for i in range(100)]
    ids, truncated = encode(Words(), " ".join(words), chat, limit)
    assert len(ids) in (limit - 1, limit) and truncated == 100 + 3 * chat - len(ids)
    if chat:
        assert (ids[0], ids[-2:]) == ("user", ["end", "assistant"])
        ids = ids[1:-2]
    half = len(ids) // 2
    assert ids == words[:half] + words[-half:]
    with pytest.raises(ConfigError, match="no room"):
        encode(Words(), "one two three four", True, 3)


def test_an_answer_stops_at_end_of_sequence_and_stop_string() -> None:
    model, tokenizer = tiny(), byte_tokenizer()

    def answer(**changes):
        policy = StreamingLLMPolicy(sink=1, window=4)
        return evals.run.generate.generate(model, tokenizer, [[5, 6, 7]], policy, 12, **changes)[0]

    free = answer()
    assert free.stop_reason == "length" and free.generated_tokens == 12
    character = next(c for c in free.text[1:] if c != free.text[0])
    stopped = answer(stop=(character,))
    assert stopped.stop_reason == "stop"
    assert stopped.generated_tokens == free.text.index(character) + 1 == len(stopped.lengths)
    model.generation_config.eos_token_id = free.tokens[1]
    assert (ended := answer()).stop_reason == "eos" and ended.generated_tokens <= 2


def test_batches_do_not_mix_settings_and_neighbour_lengths() -> None:
    from evals.tasks.base import Sample

    def prompt(length: int, stop: tuple[str, ...] = ()) -> Prompt:
        return Prompt(Sample(str(length), "", (), stop=stop), [0] * length, 0, False, 8)

    prompts = [prompt(9), prompt(4, ("\n",)), prompt(1), prompt(8), prompt(2)]
    lengths = [[len(p.ids) for p in batch] for batch in batches(prompts, 2)]
    assert lengths == [[1, 2], [8, 9], [4]]
    assert [[len(p.ids) for p in b] for b in batches(prompts, 1)] == [[9], [1], [8], [2], [4]]


ROOM = ["task=throughput", "task.lengths=[100]", "task.max_new_tokens=8", "task.batch_size=max"]


def test_the_largest_batch_that_a_limit_holds(main, capsys, tmp_path) -> None:
    """One row more would not fit: 512 bytes an entry, of which full holds 107, a window 30."""
    assert main(*MODEL, *ROOM, "task.kv_limit=1kB") == 2
    assert "a single row takes" in capsys.readouterr().err
    for method, rows in (("full", 9), ("local method.window=30", 32)):
        asked = [*ROOM, "task.kv_limit=0.5MB", f"method={method.split()[0]}", *method.split()[1:]]
        assert main(*MODEL, *asked, "task.samples=8") == 2
        assert f"{rows} rows fit into 500,000 bytes" in capsys.readouterr().err
        runs = tmp_path / str(rows)
        assert main(*MODEL, *asked, f"task.samples={rows}", f"output={runs}") == 0
        (file,) = runs.glob(f"*/{method.split()[0]}*.jsonl")
        records = read(file)
        assert [record["batch_size"] for record in records] == [rows] * rows
        taken = records[0]["kv_nbytes_peak"]
        assert taken * rows <= 5e5 < taken * (rows + 1)
