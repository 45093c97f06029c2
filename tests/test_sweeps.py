"""Sweeps: every config composes, jobs that cannot run stop no others, shards make a whole."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.plugins import Plugins
from omegaconf import DictConfig

import evals.launch.sweep as sweep
from buzz.errors import ConfigError
from evals.results.reading import read_runs
from evals.run.runner import run

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
TINY = [
    "model=llama_random",
    "model.hidden_size=32",
    "model.intermediate_size=32",
    "model.num_hidden_layers=1",
    "model.num_attention_heads=2",
    "model.num_key_value_heads=1",
    "model.max_length=768",
    "task.lengths=[600]",
    "task.max_new_tokens=3",
]


def config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base=None):
        return compose("config", [*TINY, *overrides])


def job(folder: Path, *overrides: str) -> sweep.Objectives:
    fixed = [o.partition("=")[0].removeprefix("method.") for o in overrides if "method." in o]
    return sweep.run_job(config(f"output={folder}", *overrides), list(overrides), fixed, folder)


def installed(group: str, name: str) -> bool:
    Plugins.instance()  # registers what is installed
    from hydra.core.config_store import ConfigStore

    return f"{name}.yaml" in ConfigStore.instance().list(group)


def test_the_demo_is_a_sweep_whose_scores_are_drawn(tmp_path: Path, capsys) -> None:
    with initialize_config_dir(str(CONFIGS), version_base=None):
        cfg = compose("config", ["+experiment=demo"], return_hydra_config=True)
    assert cfg.hydra.mode.name == "MULTIRUN" and cfg.budget == 0.25
    assert cfg.task.tasks == ["needle", "pydoc"] and cfg.task.settings.needle.repeats == 2
    assert cfg.hydra.callbacks.results.picture == "results/figures/demo.png"
    with_hydra = DictConfig({"hydra": {"sweep": {"dir": str(tmp_path)}}, "output": str(tmp_path)})
    callback = sweep.ResultsCallback(picture=str(tmp_path / "figures/demo.png"))
    small = ("task.depths=[0,100]", "task.repeats=1")
    for drawn, method in enumerate(["full", "local"]):
        job(tmp_path, f"method={method}", *small)
        callback.on_multirun_end(with_hydra)
        assert (tmp_path / "figures/demo.png").is_file() == bool(drawn)
        assert ("picture: " in capsys.readouterr().out) == bool(drawn)


@pytest.mark.parametrize("path", sorted((CONFIGS / "sweep").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_sweep_composes_and_names_itself(path: Path) -> None:
    if path.stem in ("optuna", "pareto") and not installed("hydra/sweeper", "optuna"):
        pytest.skip("hydra-optuna-sweeper is not installed")
    with initialize_config_dir(str(CONFIGS), version_base=None):
        cfg = compose("config", [f"+sweep={path.stem}"], return_hydra_config=True)
    assert cfg.sweep_name == path.stem
    assert cfg.hydra.mode.name == "MULTIRUN"
    for name in cfg.hydra.sweeper.params:
        group, _, field = name.partition(".")
        assert group in cfg and (not field or field in cfg[group])


@pytest.mark.parametrize(
    "launcher, plugin",
    [
        ("joblib", "joblib"),
        ("ray", "ray"),
        ("slurm", "submitit_slurm"),
        ("submitit_local", "submitit_local"),
    ],
)
def test_every_launcher_composes(launcher: str, plugin: str) -> None:
    if not installed("hydra/launcher", plugin):
        pytest.skip(f"hydra's {plugin} launcher is not installed")
    with initialize_config_dir(str(CONFIGS), version_base=None):
        cfg = compose("config", [f"+launcher={launcher}"], return_hydra_config=True)
    assert cfg.hydra.runtime.choices["hydra/launcher"] == plugin


def test_a_combination_that_cannot_be_served_is_skipped_with_its_reason(tmp_path: Path) -> None:
    assert job(tmp_path, "method.threshold=9999") is None
    (line,) = sweep.read_jobs(tmp_path)
    assert line["status"] == "skipped"
    assert "method.threshold=9999" in line["reason"]
    assert line["overrides"] == ["method.threshold=9999"]


def test_a_job_that_fails_is_recorded_and_runs_when_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("the disk is on fire\nand more")

    with monkeypatch.context() as patch:
        patch.setattr("evals.run.answers.generate", broken)
        assert job(tmp_path, "method=local", "task.depths=[0]", "task.repeats=2") is None
    (line,) = sweep.read_jobs(tmp_path)
    assert line["status"] == "failed"
    (failed,) = read_runs(tmp_path)
    reason = "all 2 samples failed, the first with RuntimeError: the disk is on fire"
    assert line["reason"] == reason and failed.status == f"FAILED: {reason}"
    assert not failed.scored

    job(tmp_path, "method=local", "task.depths=[0]", "task.repeats=2")
    (repeated,) = read_runs(tmp_path)
    assert repeated.status == "complete" and len(repeated.ran) == 2


def test_out_of_memory_ends_in_the_table_with_the_bytes_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import evals.run.answers as answers

    real, calls = answers.generate, []

    def greedy(*arguments: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == 2:  # the first is the warm-up
            raise MemoryError("tried to allocate 2147483648 bytes")
        return real(*arguments, **options)

    monkeypatch.setattr(answers, "generate", greedy)
    job(tmp_path, "method=local", "task.depths=[0]", "task.repeats=2")
    (found,) = read_runs(tmp_path)
    assert found.status == "OOM in 1 of 2 samples: MemoryError: tried to allocate 2147483648 bytes"
    calls.clear()
    small = ("method=local", "task.depths=[0]", "task.repeats=1")
    assert job(tmp_path, *small, "objectives=[score]") is None  # a failed trial, not the last one


def test_objectives_are_numbers_of_the_summary(tmp_path: Path) -> None:
    small = ("method=local", "task.depths=[0]", "task.repeats=1")
    one = job(tmp_path, *small, "objectives=[kv_nbytes_mean]")
    both = job(tmp_path, *small, "objectives=[score,kv_nbytes_mean]")
    (done,) = read_runs(tmp_path)
    assert one == done.mean("kv_nbytes_mean")
    assert both == [done.score(), one]
    with pytest.raises(ConfigError, match="objectives='status'"):
        sweep.objective(done.summary, "status")


def test_shards_put_together_equal_the_whole(tmp_path: Path) -> None:
    small = ("method=buzz", "budget=0.25", "task.depths=[0,50,100]", "task.repeats=2")
    run(config(f"output={tmp_path / 'whole'}", *small))
    for shard in ("1/4", "0/4", "3/4"):
        run(config(f"output={tmp_path / 'parts'}", *small, f"task.shard={shard}"))
    (parts,) = read_runs(tmp_path / "parts")
    assert parts.status == "unfinished: without shards 2/4"
    assert not parts.scored

    run(config(f"output={tmp_path / 'parts'}", *small, "task.shard=2/4"))
    (whole,), (parts,) = (read_runs(tmp_path / name) for name in ("whole", "parts"))
    by_id = {record["id"]: record["tokens"] for record in parts.records}
    assert by_id == {record["id"]: record["tokens"] for record in whole.records}
    assert parts.score() == whole.score() and parts.status == "complete"
    assert parts.mean("kv_nbytes_mean") == pytest.approx(whole.mean("kv_nbytes_mean"))
    assert parts.setting == whole.setting


@pytest.mark.parametrize("shard", ["8/8", "1", "a/b", "-1/8", "0/0"])
def test_a_shard_that_does_not_exist_is_refused(tmp_path: Path, shard: str) -> None:
    with pytest.raises(ConfigError, match="task.shard"):
        run(config(f"output={tmp_path}", f"task.shard='{shard}'"))


def test_more_shards_than_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fewer samples than shards"):
        run(config(f"output={tmp_path}", "task.shard=98/99"))


def test_weights_and_biases_gets_group_lengths_and_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = MagicMock()
    wandb.Histogram.side_effect = wandb.Image.side_effect = lambda value: value
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    job(
        tmp_path,
        "method=local",
        "task.depths=[0]",
        "task.repeats=1",
        "logger=wandb",
        "sweep_name=mine",
    )
    assert wandb.init.call_args.kwargs["group"] == "mine"
    assert wandb.init.call_args.kwargs["mode"] == "offline"
    (logged,) = wandb.init.return_value.log.call_args.args
    assert logged["cache length"] == [164, 164, 164]
    assert logged["heatmap"].endswith("heatmap.png") and Path(logged["heatmap"]).is_file()


def test_the_sweep_ends_with_what_became_of_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ("task.depths=[0]", "task.repeats=1")
    job(tmp_path, "method=local", *small)
    job(tmp_path, "method=local", "method.window=0", *small)
    with open(tmp_path / sweep.JOBS, "a") as file:
        line = {"overrides": [*small], "status": "failed", "reason": "OSError: disk"}
        file.write(json.dumps(line) + "\n")
    cfg = config(f"output={tmp_path}")
    with_hydra = DictConfig({"hydra": {"sweep": {"dir": str(tmp_path)}}, **cfg})
    sweep.ResultsCallback().on_multirun_end(with_hydra)
    shown = capsys.readouterr().out
    assert "SKIPPED method=local method.window=0: method.window=0" in shown
    assert "FAILED : OSError: disk" in shown
    assert shown.endswith("1 complete, 1 skipped, 1 failed\n")
    assert sweep.ResultsCallback.failed == 1
    sweep.ResultsCallback.failed = 0
