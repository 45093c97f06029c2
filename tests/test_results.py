"""Run folders put together: what counts, what is left out by name, and what is done anew."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from runs import cells, read, stub_generate, write_lines

import evals.report.terminal
import evals.run.runner
from buzz import ConfigError
from evals.report import tables as report
from evals.report.beside import Setting
from evals.report.claims import judge
from evals.report.kinds import sections
from evals.report.marks import varied
from evals.report.terminal import paired_table, tables
from evals.results.compare import same_sample
from evals.results.reading import read_run, read_runs, read_summary
from evals.results.records import RunFolder
from evals.results.runs import differing_settings
from evals.run.models import load_model
from scripts import make_tables

# Of four samples one is half right: F of one word in two, so 12.5 on average.
WORDS = ["bees sing", "wax", "comb", "hive"]
ANSWERS = {"text 0": "bees dance", "text 1": "no", "text 2": "no", "text 3": "no"}


@pytest.fixture
def news(go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs summaries of four texts with the tiny model, whose answers are given; the folder."""

    def answer(prompt: str) -> str:
        return next((text for part, text in news.answers.items() if part in prompt), "")

    def write(references: list[str], first: int = 0) -> None:
        texts = [f"text {i + first} of many" for i in range(len(references))]
        rows = [{"article": a, "summary": b} for a, b in zip(texts, references, strict=True)]
        write_lines(data, rows)

    def news(*overrides: str, **options: Any) -> Path:
        settings = ["task=xsum", f"task.data_file={data}", "task.max_new_tokens=3"]
        method = [] if any("method=" in one for one in overrides) else ["method=local"]
        return go(*settings, *method, *overrides, needle=False, **options)

    data = tmp_path / "data.jsonl"
    news.answers, news.write, news.runs = dict(ANSWERS), write, go.runs
    news.asked = stub_generate(monkeypatch, answer)
    write(WORDS)
    return news


def shown(*folders: Path) -> str:
    """The terminal tables of folders."""
    console = Console(width=250)
    with console.capture() as capture:
        for part in tables(folders):
            console.print(part, highlight=False)
    return capture.get()


def costs(*folders: Path) -> dict[str, dict[str, str]]:
    """The terminal's table of scores and costs, by row and column."""
    return cells(next(part for part in tables(folders) if isinstance(part, Table)))


def row_of(text: str, method: str) -> list[str]:
    return next(line.split() for line in text.splitlines() if line.startswith(method))


def edit(folder: Path, number: int, **fields: Any) -> None:
    records = read(folder)
    records[number] |= fields
    write_lines(folder / "samples.jsonl", records)


# --- one sample counts once -----------------------------------------------------------------------


def test_overlapping_shards_count_each_sample_once(news) -> None:
    folders = [news(f"task.shard={shard}") for shard in ("0/2", "1/2", "0/3")]
    (run,) = read_runs(news.runs)
    assert len(run.ran) == 4 and run.score() == 12.5 and run.status == "complete"
    row = costs(*folders)["local"]
    assert row["score"] == "12.50" and row["n"] == "4"
    whole = read_summary(news(f"output={news.runs}/whole"))
    (setting,) = Setting.of(folders)
    together = json.loads(json.dumps(setting.rows[0]))
    for key in ("n", "score", "score_ci95", "scores", "kv_entries_mean", "conditions"):
        assert together[key] == whole[key]
    assert list(run.by_id) == ["0", "1", "2", "3"]


@pytest.mark.parametrize("shard", [[], ["task.shard=0/2"]])
def test_a_copied_folder_and_another_device_count_once(news, shard: list[str]) -> None:
    folders = [news(*shard), news(*shard, "device=cpu")]
    assert len(set(folders)) == 2  # device=auto is the same CPU
    folders.append(news.runs / "copy")
    shutil.copytree(folders[0], folders[2])
    if shard:
        folders.append(news("task.shard=1/2"))
    (run,) = read_runs(news.runs)
    assert (len(run.ran), run.score(), run.status) == (4, 12.5, "complete")
    (setting,) = Setting.of(folders)
    assert [row["n"] for row in setting.rows] == [4] and setting.rows[0]["score"] == 12.5


def test_overlapping_shards_that_leave_a_sample_out_are_unfinished(news, capsys) -> None:
    folders = [news(f"task.shard={shard}") for shard in ("0/2", "0/3", "2/3")]
    (run,) = read_runs(news.runs)  # samples 0, 2 and 3
    assert run.status == "unfinished: without shards 1/3" and not run.scored
    assert evals.report.terminal.main([str(folder) for folder in folders]) == 2
    assert "without shards 1/3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"prediction": "other words"}, "prediction"),
        ({"scores": {"rougeL": 99.0}}, "scores"),
        ({"prompt_sha256": "0" * 16}, "prompt"),
        ({"tokens": [1, 2, 3]}, "tokens"),
    ],
)
@pytest.mark.parametrize("shard", [[], ["task.shard=0/2"]])
def test_records_that_contradict_each_other_are_left_out_by_name(
    news, capsys, fields: dict, what: str, shard: list[str]
) -> None:
    folder, copy = news(*shard), news.runs / "a copy"
    good = news("method=h2o", "budget=60")
    shutil.copytree(folder, copy)
    if "scores" in fields:
        fields = {"scores": read(copy)[1]["scores"] | fields["scores"]}
    edit(copy, 1, **fields)
    sample = read(copy)[1]["id"]
    one, two = sorted([folder, copy])
    problem = f"sample {sample} has another {what} in {one} than in {two}; remove one of them"
    bad, fine = sorted(read_runs(news.runs), key=lambda run: run.status == "complete")
    assert bad.status == f"LEFT OUT: {problem}" and not bad.records and not bad.scored
    assert fine.method == "h2o" and fine.scored
    assert evals.report.terminal.main([str(path) for path in (folder, copy, good)]) == 1
    out = capsys.readouterr().out
    assert "h2o" in out and problem in " ".join(out.split()).replace(" -", "-")
    assert evals.report.terminal.main([str(path) for path in (folder, copy)]) == 2


def test_shards_of_different_data_are_left_out(news) -> None:
    first = news("task.shard=0/2")
    news.write(WORDS[:3])
    second = news("task.shard=1/2")
    (run,) = read_runs(news.runs)
    both = sorted([first, second])
    assert run.problem == (
        f"{both[0]} and {both[1]} are of different data; run both again, or remove one"
    )
    news("task.shard=0/2")
    (run,) = read_runs(news.runs)
    assert (len(run.ran), run.stale, run.status) == (3, 0, "complete")


def test_a_sample_that_ran_elsewhere_counts_for_one_that_did_not(news) -> None:
    folder = news("task.shard=0/2")
    shutil.copytree(folder, news.runs / "a copy")
    record = read(folder)[0]
    missed = {k: record[k] for k in ("format", "id", "prompt_sha256", "sample_sha256")}
    lines = [missed | {"status": "failed", "error": "x"}, read(folder)[1]]
    write_lines(news.runs / "a copy/samples.jsonl", lines)
    news("task.shard=1/2")
    (run,) = read_runs(news.runs)
    assert run.status == "complete" and run.score() == 12.5


# --- data that were changed -----------------------------------------------------------------------


def test_edited_references_are_scored_again_from_the_stored_answers(news, capsys) -> None:
    folder = news()
    assert read_summary(folder)["score"] == 12.5
    before = read(folder)
    news.write(["bees dance", *WORDS[1:]])
    news.asked.clear()
    assert news() == folder and news.asked == []
    assert read_summary(folder)["score"] == 25
    (run,) = read_runs(news.runs)
    assert run.score() == 25 and run.status == "complete" and run.stale == 0
    assert costs(folder)["local"]["score"] == "25.00"
    assert read(folder)[:4] == before  # nothing is lost
    (again,) = read(folder)[4:]
    same = before[0].keys() - {"scores", "references", "sample_sha256"}
    assert {key: again[key] for key in same} == {key: before[0][key] for key in same}
    assert again["references"] == ["bees dance"]
    assert "1 answers scored again" in capsys.readouterr().err


def test_another_version_of_what_scores_is_noticed(news, monkeypatch) -> None:
    folder = news()
    monkeypatch.setattr("evals.tasks.base.package_version", lambda package: "9.9")
    news.asked.clear()
    news()
    assert news.asked == [] and len(read(folder)) == 8


def test_texts_whose_references_changed_are_read_again(go, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "text").write_text("Bees dance to tell each other where flowers are. " * 20)
    text = ["task=wikitext", f"task.data_file={tmp_path}/text", "task.tokens=65", "task.chunk=16"]
    folder = go(*text, "method=local", needle=False)
    monkeypatch.setattr("evals.tasks.wikitext.Wikitext.scoring", "a newer one")
    go(*text, "method=local", needle=False)
    first, again = read(folder)
    assert again["scores"] == first["scores"]  # losses are measured, there is nothing to score
    assert again["sample_sha256"] != first["sample_sha256"]


def test_a_re_scoring_that_was_killed_leaves_the_run_unfinished(news, monkeypatch) -> None:
    folder = news()
    news.write(["bees dance", "no", *WORDS[2:]])
    append = RunFolder.append

    def die(self: RunFolder, record: dict, *rest: str) -> None:
        append(self, record, *rest)
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append", die)
        with pytest.raises(MemoryError):
            news()
    (run,) = read_runs(news.runs)
    assert run.status == "unfinished: 3 of 4 samples" and not run.scored
    with pytest.raises(ConfigError, match="unfinished: 3 of 4 samples"):
        tables([folder])
    news()
    assert read_runs(news.runs)[0].score() == read_summary(folder)["score"] == 50


def test_records_of_a_longer_file_do_not_count(news, capsys) -> None:
    folder = news()
    news.write(WORDS[:3])
    news.asked.clear()
    news()
    note = "1 more records are of other data and do not count"
    assert news.asked == [] and note in capsys.readouterr().err
    summary = read_summary(folder)
    assert (summary["n"], summary["stale"]) == (3, 1)
    (run,) = read_runs(news.runs)
    assert (len(run.ran), run.stale, run.status) == (3, 1, "complete")
    assert run.score() == summary["score"] == pytest.approx(50 / 3)
    assert f"xsum, local: {note}" in shown(folder)
    assert make_tables.main([f"runs={news.runs}", f"out={news.runs.parent}"]) == 0
    assert note in (news.runs.parent / "tables/runs.md").read_text()
    assert note in (news.runs.parent / "report.html").read_text()
    news.write(WORDS)
    news()
    assert news.asked == [] and read_summary(folder)["n"] == 4  # it had not gone


def test_a_longer_file_makes_a_run_unfinished(news, monkeypatch) -> None:
    news()
    news.write([*WORDS, "honey", "nectar"])
    with monkeypatch.context() as patch:
        patch.setattr(evals.run.runner, "make_answers", lambda *_: 1 / 0)  # killed at once
        with pytest.raises(ZeroDivisionError):
            news()
    (run,) = read_runs(news.runs)
    assert run.status == "unfinished: 4 of 6 samples" and not run.scored


def test_other_prompts_than_before_are_refused(news) -> None:
    folder = news()
    news.write(WORDS, first=1)
    with pytest.raises(ConfigError, match="sample 0 had another prompt then"):
        news()
    news.write(WORDS)
    edit(folder, 0, max_new_tokens=2)
    with pytest.raises(ConfigError, match="sample 0 had another prompt then"):
        news()


# --- the model, the method and the machine --------------------------------------------------------


def checkpoint(path: Path, seed: int) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 300}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_length": 1024, "seed": seed}
    rest = {"name": "x", "dtype": "float32", "attn_implementation": "sdpa"}
    model, tokenizer = load_model(shape | heads | rest, "cpu")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def test_a_model_replaced_under_its_path_is_another(tmp_path: Path, monkeypatch) -> None:
    """Killed after two samples, resumed with other weights: no run mixes answers of both."""
    from hydra import compose, initialize_config_dir
    from runs import NEEDLE, ROOT

    def go(*overrides: str, output: str = "runs") -> Path:
        model = ["model=hf", f"model.name_or_path={tmp_path}/m", "model.name=m"]
        rest = ["model.max_length=1024", "model.dtype=float32", f"output={tmp_path}/{output}"]
        with initialize_config_dir(str(ROOT / "configs"), version_base=None):
            return evals.run.runner.run(compose("config", [*model, *NEEDLE, *rest, *overrides]))

    def tokens(folder: Path) -> dict[str, list[int]]:
        return {record["id"]: record["tokens"] for record in read(folder)}

    checkpoint(tmp_path / "m", seed=0)
    old = go("method=full")
    answers = tokens(old)
    write_lines(old / "samples.jsonl", read(old)[:2])
    checkpoint(tmp_path / "m", seed=1)  # same names, same sizes
    new = go("method=full")
    assert new != old and tokens(new) == tokens(go("method=full", output="fresh")) != answers
    assert read_run(old).config["model_digest"] != read_run(new).config["model_digest"]
    assert read_run(old).status == "unfinished: 2 of 3 samples"
    shutil.rmtree(new)
    with pytest.raises(ConfigError, match="kl=True: needs the full run of the same task, model"):
        go("method=local", "kl=true")
    checkpoint(tmp_path / "m", seed=0)
    assert go("method=full") == old and tokens(old) == answers


def test_the_difference_to_the_nearest_full_run_is_named(news) -> None:
    full = news("method=full")
    with pytest.raises(ConfigError) as caught:
        news("method=h2o", "kl=true", "task.words=20")
    assert str(caught.value).endswith(f" ({full.name} has task.words 50, here 20)")
    (full / "summary.json").write_text("{")
    with pytest.raises(ConfigError, match=rf"\({full}/summary.json: not JSON .*\)$"):
        news("method=h2o", "kl=true")


def test_parameters_that_a_budget_left_alone_are_on_record(news) -> None:
    """Set to what they are anyway: the policies differ, and nothing else in the configuration."""
    setting = ("method=h2o", "budget=600")
    own = news(*setting, "method.heavy=280", fixed=frozenset({"heavy", "name"}))
    free = news(*setting)
    assert [read(folder)[0]["policy"]["heavy"] for folder in (own, free)] == [280, 300]
    configs = [read_run(folder).config for folder in (own, free)]
    assert [config.pop("fixed") for config in configs] == [["heavy"], []]
    assert configs[0] == configs[1]
    (setting,) = Setting.of([own, free])
    assert setting.names == ["h2o fixed=heavy", "h2o fixed=none"]
    runs = read_runs(news.runs)
    assert {varied(run, runs) for run in runs} == {"fixed=heavy", "fixed=none"}
    unbudgeted = news("method=h2o", "method.heavy=280", fixed=frozenset({"heavy"}))
    assert unbudgeted == news("method=h2o")  # where nothing is fitted, nothing is left alone
    assert read_run(unbudgeted).config["fixed"] == []


def test_shards_of_other_fixed_parameters_are_of_another_run(news) -> None:
    setting = ("method=h2o", "budget=600")
    news(*setting, "task.shard=0/2", "method.heavy=280", fixed=frozenset({"heavy"}))
    news(*setting, "task.shard=1/2")
    runs = read_runs(news.runs)
    assert sorted(run.status for run in runs) == [
        "unfinished: without shards 0/2",
        "unfinished: without shards 1/2",
    ]


def on_another_machine(folder: Path, **fields: Any) -> None:
    """As if a folder's samples had been run elsewhere."""
    files = RunFolder(folder)
    (known,) = files.environments().values()
    (folder / "environment.json").unlink()
    name = files.note(known | fields)
    write_lines(folder / "samples.jsonl", [r | {"environment": name} for r in read(folder)])


def test_devices_share_a_setting_and_are_told_apart_by_their_rows(news) -> None:
    full, there = news("method=full"), news("method=full", "device=cpu")
    here = news("method=h2o", "budget=60")
    on_another_machine(there, device="NVIDIA H100 80GB HBM3")
    (setting,) = Setting.of([full, there, here])
    machine = read_run(full).machine
    assert setting.names[:2] == [f"full machine={machine}", "full machine=NVIDIA H100 80GB HBM3"]
    assert {run.setting for run in read_runs(news.runs)} == {setting.runs[0].setting}
    assert len(read_runs(news.runs)) == 3  # one sample, two timings
    text = shown(full, there, here)
    beside = [
        costs(*folders)["h2o"]["tok/s /full"] for folders in ((full, there, here), (there, here))
    ]
    assert beside[0].rstrip("~") != "-" == beside[1]  # beside those of the same machine
    kl = read_summary(news("method=h2o", "budget=60", "kl=true"))["against_full"]
    assert kl["n"] == 4 and "rows differ" not in text


def test_settings_that_differ_in_the_task_alone_are_named_by_that(news) -> None:
    folders = [news(), news("task.words=20")]
    text = shown(*folders)
    assert "xsum words=50" in text and "xsum words=20" in text
    configs = [read_run(folder).config for folder in folders]
    assert differing_settings(configs) == {"task.words": [50, 20]}


def test_records_name_their_environment_and_process(news, monkeypatch) -> None:
    folder = news()
    write_lines(folder / "samples.jsonl", read(folder)[:3])
    threads = torch.get_num_threads()
    monkeypatch.setattr("evals.results.environment.torch.get_num_threads", lambda: threads + 1)
    monkeypatch.setattr("evals.results.environment._processes", {})
    news()
    run = read_run(folder)
    first, last = run.records[0], run.records[3]
    assert first["environment"] != last["environment"] and first["process"] != last["process"]
    assert list(run.environments) == [first["environment"], last["environment"]]
    assert run.environment["threads"] == threads  # that of most samples
    assert run.environment["model_parameters"] == sum(
        weights.numel() for weights in next(iter(evals.run.runner._loaded.values()))[0].parameters()
    )
    note = f"its samples ran in 2 environments, which differ in threads ({threads}, {threads + 1})"
    assert run.notes == [note] and f"xsum, local: {note}" in shown(folder)
    assert make_tables.main([f"runs={news.runs}", f"out={news.runs.parent}"]) == 0
    assert note in (news.runs.parent / "tables/runs.md").read_text()


def test_timings_of_a_busy_machine_are_marked(news, monkeypatch) -> None:
    loads = iter([0.0, 1.5, 0.0, 0.9])
    monkeypatch.setattr("evals.run.answers.psutil.cpu_count", lambda: 2)
    monkeypatch.setattr("evals.run.answers.Neighbours.load", lambda self: next(loads))
    folder = news()
    records = read(folder)
    assert [record["load"] for record in records] == [0, 1.5, 0, 0.9]
    assert [record["loaded"] for record in records] == [False, True, False, True]
    assert {record["threads"] for record in records} == {torch.get_num_threads()}
    assert read_summary(folder)["loaded"] == 2
    text = shown(folder)
    row = costs(folder)["local"]
    assert row["TTFT s"].endswith("~") and row["decode tok/s"].endswith("~")
    note = (
        "xsum, local: other processes kept up to 1.5 cores busy during 2 of 4 samples: its timings"
    )
    assert note in text
    monkeypatch.setattr("evals.run.answers.Neighbours.load", lambda self: None)  # nobody knows
    quiet = news("method=h2o")
    assert read_summary(quiet)["loaded"] == 0 and "~" not in "".join(costs(quiet)["h2o"].values())


# --- broken files ---------------------------------------------------------------------------------

BROKEN = ["", "{", "[]", "{}", "null", '{"status": "complete"}', '{"status": "fine"}', "\xff\xfe"]


def spoil(path: Path, content: str) -> None:
    path.write_bytes(content.encode("latin-1"))


@pytest.mark.parametrize("content", BROKEN, ids=repr)
@pytest.mark.parametrize("name", ["summary.json", "config.yaml", "samples.jsonl", "prompts.json"])
def test_a_broken_folder_is_left_out_by_name(news, capsys, name: str, content: str) -> None:
    good, bad = news("method=local"), news("method=full")
    if name == "samples.jsonl":
        content = f"{content}\n" + (bad / name).read_text(encoding="latin-1")
    spoil(bad / name, content)
    news("method=h2o", "budget=60")  # a new run beside it goes on
    err = capsys.readouterr().err
    status = evals.report.terminal.main([str(good), str(bad)])
    out = capsys.readouterr().out
    assert row_of(out, "local")
    runs = {run.folders[0]: run for run in read_runs(news.runs)}
    if name == "samples.jsonl" and content.startswith("\n"):  # a blank line is nothing
        assert status == 0 and row_of(out, "full") and runs[bad].status == "complete"
        return
    assert status == 1 and f"not shown: {bad}: " in out and "LEFT OUT: " in out
    assert runs[bad].problem.startswith(f"{bad}/{name}") and runs[good].status == "complete"
    if name != "config.yaml" and "complete" not in content:
        assert f"left out: {bad}/{name}" in err


def test_the_report_names_what_it_leaves_out(news, capsys) -> None:
    good = news("method=h2o", "budget=60")
    bad = [news("method=local", f"method.window={size}") for size in (20, 30, 40, 50)]
    names = ["summary.json", "config.yaml", "samples.jsonl", "fidelity.jsonl"]
    for folder, name in zip(bad, names, strict=True):
        spoil(folder / name, '{"id": "0"}\n')
    assert make_tables.main([f"runs={news.runs}", f"out={news.runs.parent}"]) == 0
    report = capsys.readouterr().err
    listed = (news.runs.parent / "tables/runs.md").read_text()
    page = (news.runs.parent / "report.html").read_text()
    for folder, name in zip(bad, names, strict=True):
        assert f"left out: {folder}: {folder}/{name}" in report
        assert f"LEFT OUT: {folder}/{name}" in listed and f"{folder}/{name}" in page
    assert report.count("left out: ") == 4 and str(good) not in report


@pytest.mark.parametrize("content", ["NaN", "Infinity", "1e999"])
def test_a_number_that_is_none_is_refused_by_file_and_line(news, capsys, content: str) -> None:
    news("method=full")
    folder = news("method=h2o", "budget=60", "kl=true")
    for name, field in (("samples.jsonl", '"ttft_s": '), ("fidelity.jsonl", '"kl_to_full": ')):
        text = (folder / name).read_text()
        head, _, tail = text.partition("\n")
        before, _, after = tail.partition(field)
        spoiled = f"{head}\n{before}{field}{content}{after[after.index(',') :]}"
        (folder / name).write_text(spoiled)
        place = f"{folder}/{name}:2"
        remedy = f"not JSON ({content} is no number); remove that line, and the same command"
        with pytest.raises(ConfigError) as caught:
            news("method=h2o", "budget=60", "kl=true")
        assert str(caught.value).startswith(f"output='{place}': {remedy} makes it anew")
        assert evals.report.terminal.main([str(folder)]) == 2
        assert f"{place}: {remedy}" in capsys.readouterr().err
        assert read_run(folder).problem.startswith(f"{place}: {remedy}")
        lines = spoiled.splitlines(keepends=True)
        del lines[1]
        (folder / name).write_text("".join(lines))
        news("method=h2o", "budget=60", "kl=true")  # as the remedy says
        assert read_run(folder).status == "complete" and read_run(folder).kl_n == 4


def test_what_is_written_is_json_even_where_numbers_overflow(news, monkeypatch) -> None:
    """A perplexity's interval can be infinite where the perplexity is not."""
    monkeypatch.setattr("evals.tasks.summarization.Summarization.statistic", "exp")
    scores = iter([1.0, 1e300, 1.0, 1e-300])
    monkeypatch.setattr(
        "evals.tasks.summarization.Summarization.score",
        lambda self, sample, prediction: {"rougeL": next(scores)},
    )
    monkeypatch.setattr("evals.results.compare.draws", lambda record, headline: [1500.0, 0.0])
    text = (news() / "summary.json").read_text()
    assert "Infinity" not in text and "NaN" not in text
    assert json.loads(text)["n"] == 4 and math.isfinite(json.loads(text)["score"])


ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=3,
)


def changed(content: Any, draw: Any) -> Any:
    """The content with something in it, or all of it, replaced or removed."""
    keys = list(content) if isinstance(content, dict) else list(range(len(content)))
    if not keys or draw(st.integers(0, 4)) == 0:
        return draw(ANY)
    key = draw(st.sampled_from(keys))
    copy = content.copy()
    if isinstance(copy[key], dict | list) and draw(st.booleans()):
        copy[key] = changed(copy[key], draw)
    elif draw(st.booleans()):
        del copy[key]
    else:
        copy[key] = draw(ANY)
    return copy


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of runs, with groups, breakdowns and comparisons with the full cache."""
    from hydra import compose, initialize_config_dir
    from runs import MODEL, NEEDLE, ROOT

    runs = tmp_path_factory.mktemp("finished")
    setting = [*MODEL, *NEEDLE, "task.lengths=[300,400]", "task.depths=[0]", f"output={runs}"]
    for method in (["method=full"], ["method=h2o", "budget=60", "kl=true"]):
        with initialize_config_dir(str(ROOT / "configs"), version_base=None):
            evals.run.runner.run(compose("config", [*setting, *method]))
    return runs


FILES = ("samples.jsonl", "fidelity.jsonl", "summary.json", "prompts.json", "environment.json")


@given(data=st.data(), name=st.sampled_from([*FILES, "config.yaml"]), method=st.booleans())
def test_no_edit_of_any_file_ends_a_table(finished: Path, data, name: str, method: bool) -> None:
    full, other = sorted(path for path in finished.glob("*/") if path.name[0] != ".")
    folder = other if method or name == "fidelity.jsonl" else full
    path, whole = folder / name, (folder / name).read_bytes()
    try:
        if name == "config.yaml":
            path.write_text(yaml.dump(changed(yaml.safe_load(whole), data.draw)))
        elif name.endswith("jsonl"):
            rows = changed([json.loads(line) for line in whole.splitlines()], data.draw)
            rows = rows if isinstance(rows, list) else [rows]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            path.write_text(json.dumps(changed(json.loads(whole), data.draw)))
        runs = read_runs(finished)
        assert sum(len(run.folders) for run in runs) == 2
        judge(runs)
        own = [report.section(one, runs) for one in sections()]
        for table in (*own, report.costs(runs), report.ablations(runs), report.overview(runs)):
            table.markdown()
        text = shown(full, other)
        for run in runs:
            assert run.scored or run.status != "complete"
            assert run.finished or "not shown: " in text
    except ConfigError as error:
        assert not any(run.finished for run in runs) and "\n" not in str(error)
    finally:
        path.write_bytes(whole)


def test_a_configuration_that_is_no_yaml_is_named(news) -> None:
    folder = news()
    for content in ("a: [", "method: {name: 3}", "a: ${b", "- 1"):
        (folder / "config.yaml").write_text(content)
        (run,) = read_runs(news.runs)
        assert run.problem.startswith(f"{folder}/config.yaml: ") and "\n" not in run.problem
    news()
    assert OmegaConf.load(folder / "config.yaml").task.name == "xsum"
    assert read_runs(news.runs)[0].status == "complete"


def test_a_torn_line_of_a_sweeps_jobs_is_one_failed_job(tmp_path: Path) -> None:
    from evals.launch.sweep import JOBS, read_jobs

    (tmp_path / JOBS).write_text('{"overrides": [], "status": "complete", "folder": "x"}\n{"over')
    assert [job["status"] for job in read_jobs(tmp_path)] == ["complete", "failed"]


def test_a_distance_to_answers_that_are_no_more_is_none(news) -> None:
    full, folder = news("method=full"), news("method=h2o", "budget=60")
    news("method=h2o", "budget=60", "kl=true")
    assert read_summary(folder)["against_full"]["kl_n"] == 4
    edit(full, 0, tokens=[5, 6, 7])
    (setting,) = Setting.of([full, folder])
    assert setting.against_full()[1]["kl_n"] == 3
    assert next(run for run in read_runs(news.runs) if run.method == "h2o").kl_n == 3
    news("method=h2o", "budget=60", "kl=true")  # compared with the answer that is there now
    assert read_summary(folder)["against_full"]["kl_n"] == 4
    assert next(run for run in read_runs(news.runs) if run.method == "h2o").kl_n == 4


# --- paired differences ---------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["status", "prompt_sha256", "sample_sha256"])
def test_answers_to_another_question_are_no_pair(other: str) -> None:
    """`sample_sha256` is also of the references."""
    record = {"status": "ok", "prompt_sha256": "p", "sample_sha256": "s"}
    assert same_sample(record, dict(record))
    assert not same_sample(record, record | {other: "another"})
    assert not same_sample(record | {other: "another"}, record)


def test_paired_differences_are_those_of_the_files(news, capsys) -> None:
    news("method=full")
    setting = ("budget=60", "kl=true")
    ours, theirs = news("method=h2o", *setting), news("method=local", *setting)
    for folder, kls, scores in (
        (ours, [0.1, 0.2, 0.4, None], [50.0, 0.0, 0.0, 10.0]),
        (theirs, [0.6, 0.9, 0.6, 0.5], [0.0, 0.0, 20.0, 0.0]),
    ):
        lines = map(json.loads, (folder / "fidelity.jsonl").read_text().splitlines())
        changed = [line | {"kl_to_full": kl} for line, kl in zip(lines, kls, strict=True)]
        write_lines(folder / "fidelity.jsonl", changed)
        for number, score in enumerate(scores):
            edit(folder, number, scores={"rougeL": score})
    assert evals.report.terminal.main(["--paired", "h2o", str(ours), str(theirs)]) == 0
    assert row_of(capsys.readouterr().out, "h2o")
    row = cells(paired_table([ours, theirs], "h2o"))["h2o"]
    assert (row["less"], row["score"], row["n"]) == ("local", "+10.00", "4")  # 60 / 4 - 20 / 4
    assert (row["KL, nats"], row["n 2"]) == (f"{(0.7 - 2.1) / 3:+.3f}", "3")
    low, high = map(float, row["95% CI 2"].split(".."))
    assert -0.7 <= low < (0.7 - 2.1) / 3 < high <= -0.2
    other = map(json.loads, (theirs / "fidelity.jsonl").read_text().splitlines())
    write_lines(theirs / "fidelity.jsonl", [one | {"answer_sha256": "another"} for one in other])
    row = cells(paired_table([ours, theirs], "h2o"))["h2o"]
    assert (row["KL, nats"], row["95% CI 2"], row["n 2"]) == ("-", "-", "0")
    assert evals.report.terminal.main(["--paired", "tova", str(ours), str(theirs)]) == 2
    assert "--paired='tova': name a method that others were run beside" in capsys.readouterr().err
