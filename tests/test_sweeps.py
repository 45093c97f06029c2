"""Sweeps: every config composes, jobs that cannot run stop no others, shards make a whole."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from omegaconf import DictConfig
from runs import ROOT, composed, run

import evals.launch.sweep as sweep
from buzz.errors import ConfigError
from evals.results.frame import NOT_RUN, load
from hydra_plugins.one_pass import OnePassSweeper

CONFIGS = ROOT / "configs"
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
    return composed(*TINY, *overrides)


def job(folder: Path, *overrides: str) -> sweep.Objectives:
    folder.mkdir(exist_ok=True)
    return sweep.run_sweep_job(config(f"output={folder}", *overrides), list(overrides), folder)


def rows(folder: Path, name: str) -> Any:
    """What is there of a row."""
    frame = load(folder)
    return frame[frame.row == name]


def installed(group: str, name: str) -> bool:
    Plugins.instance()  # registers what is installed
    from hydra.core.config_store import ConfigStore

    return f"{name}.yaml" in ConfigStore.instance().list(group)


def test_the_demo_is_a_sweep_whose_scores_are_drawn(tmp_path: Path, capsys) -> None:
    cfg = composed("+experiment=demo", return_hydra_config=True)
    assert cfg.hydra.mode.name == "MULTIRUN" and cfg.hydra.sweeper.params.budget == "0.1,0.25,0.5"
    assert cfg.task.tasks == ["needle", "pydoc"] and cfg.task.settings.needle.repeats == 2
    assert cfg.hydra.callbacks.results.picture == "results/figures/demo.png"
    with_hydra = DictConfig({"hydra": {"sweep": {"dir": str(tmp_path)}}, "output": str(tmp_path)})
    callback = sweep.ResultsCallback(picture=str(tmp_path / "figures/demo.png"))
    job(tmp_path, "method=local", "task.depths=[0,100]", "task.repeats=1")
    callback.on_multirun_end(with_hydra)
    assert (tmp_path / "figures/demo.png").is_file()
    assert "picture: " in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted((CONFIGS / "sweep").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_sweep_composes_and_names_itself(path: Path) -> None:
    if path.stem in ("optuna", "pareto") and not installed("hydra/sweeper", "optuna"):
        pytest.skip("hydra-optuna-sweeper is not installed")
    cfg = composed(f"+sweep={path.stem}", return_hydra_config=True)
    assert cfg.sweep_name == path.stem
    assert cfg.hydra.mode.name == "MULTIRUN"
    for name in cfg.hydra.sweeper.params:
        group, _, field = name.partition(".")
        assert group in cfg and (not field or field in cfg[group])


@pytest.mark.parametrize("group", ["sweep", "experiment"])
def test_the_page_names_every_file(group: str) -> None:
    page = (ROOT / "docs/sweeps.md").read_text()
    table = page.split(f"\n| `+{group}=` |", 1)[1].split("\n\n", 1)[0]
    first = [line.split("|")[1] for line in table.splitlines()[2:]]
    named = re.findall(r"`(\w+)`", " ".join(first))
    assert sorted(named) == sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


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
    cfg = composed(f"+launcher={launcher}", return_hydra_config=True)
    assert cfg.hydra.runtime.choices["hydra/launcher"] == plugin


def test_a_combination_that_cannot_be_served_is_skipped_with_its_reason(tmp_path: Path) -> None:
    assert job(tmp_path, "method.threshold=9999") is None
    (line,) = sweep.read_jobs(tmp_path)
    assert line["status"] == "skipped"
    assert "method.threshold=9999" in line["reason"]
    assert line["overrides"] == ["method.threshold=9999"]


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (RuntimeError("the disk is on fire\nand more"), "failed", "the disk is on fire"),
        (MemoryError("tried to allocate 2147483648 bytes"), "oom", None),
    ],
)
def test_a_job_whose_samples_all_fail_is_a_failed_trial_and_runs_when_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, status: str, told: str | None
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    small = ("method=local", "task.depths=[0]", "task.repeats=2")
    with monkeypatch.context() as patch:
        patch.setattr("evals.run.runner.generate", broken)
        assert job(tmp_path, *small, "objectives=[score]") is None
    found = rows(tmp_path, "local")
    assert set(found.status) == {status}
    if told is None:
        assert set(found.asked_nbytes) == {2147483648}
        return
    (line,) = sweep.read_jobs(tmp_path)
    reason = f"all 2 samples failed, the first with RuntimeError: {told}"
    assert (line["status"], line["reason"]) == ("failed", reason)
    job(tmp_path, *small)
    assert list(rows(tmp_path, "local").status) == ["ok", "ok"]


def test_objectives_are_numbers_of_the_summary(tmp_path: Path) -> None:
    small = ("method=local", "task.depths=[0]", "task.repeats=1")
    one = job(tmp_path, *small, "objectives=[kv_nbytes_mean]")
    both = job(tmp_path, *small, "objectives=[score,kv_nbytes_mean]")
    done = rows(tmp_path, "local")
    assert one == done.kv_nbytes_mean.mean() and both == [done.score.mean(), one]
    with pytest.raises(ConfigError, match="objectives='status'"):
        sweep.objective({"score": 1.0}, "status")


def test_shards_put_together_equal_the_whole(tmp_path: Path) -> None:
    small = ("method=buzz", "budget=0.25", "task.depths=[0,50,100]", "task.repeats=2")
    run(config(f"output={tmp_path / 'whole'}", *small))
    for shard in ("1/4", "0/4", "3/4"):
        run(config(f"output={tmp_path / 'parts'}", *small, f"task.shard={shard}"))
    name = "buzz@0.25"
    run(config(f"output={tmp_path / 'parts'}", *small, "task.shard=2/4"))
    whole, parts = (rows(tmp_path / of, name).set_index("id") for of in ("whole", "parts"))
    assert parts.tokens.to_dict() == whole.tokens.to_dict() and len(parts) == 6
    assert NOT_RUN not in set(parts.status) and parts.score.mean() == whole.score.mean()
    folders = [next((tmp_path / of).glob("needle-*")).name for of in ("whole", "parts")]
    assert folders[0] == folders[1]


def test_weights_and_biases_gets_group_and_lengths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = MagicMock()
    wandb.Histogram.side_effect = lambda value: value
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


def test_rows_of_one_setting_are_one_job() -> None:
    """And what makes another setting makes another job; values with quotes and commas survive."""
    parser = OverridesParser.create()
    asked = ["method=h2o,buzz", "budget=0.1,0.25", "seed=0,1", "task=needle"]
    asked += ["cache={positions: cache},{positions: 'true'}"]
    (jobs,) = OnePassSweeper.split_arguments(parser.parse_overrides(asked), None)
    assert len(jobs) == 2 and [job[:2] for job in jobs] == [
        ["seed=0", "task=needle"],
        ["seed=1", "task=needle"],
    ]
    rows = parser.parse_override(jobs[0][2]).value()
    assert len(rows) == 8 and rows[0][:2] == ["method=h2o", "budget=0.1"]
    (single,) = OnePassSweeper.split_arguments(parser.parse_overrides(["method=h2o"]), None)
    assert single == [["method=h2o"]]


def test_a_sweep_shares_a_pass_and_equals_its_methods_alone(tmp_path: Path) -> None:
    small = ("task.depths=[0,100]", "task.repeats=1", "task.max_new_tokens=12")
    each = [[f"method={name}", f"budget={size}"] for name in ("h2o", "tova") for size in (60, 0.25)]
    rows = "rows=" + json.dumps(each).replace('"', "'")
    for of, jobs in (("one", [[rows]]), ("alone", each)):
        for own in jobs:
            job(tmp_path / of, *TINY, f"output={tmp_path / of}", *small, *own, "kl=true")
    one, alone = (load(tmp_path / of).set_index(["row", "id"]) for of in ("one", "alone"))
    assert set(one.index) == set(alone.index) and len(one) == 10
    for name in ("tokens", "trace", "scores", "evictions"):
        assert one[name].to_dict() == alone[name].to_dict(), name
    others = one.drop(index="full").index
    known = [frame.loc[others, "kl_to_full"].tolist() for frame in (one, alone)]
    assert known[0] == pytest.approx(known[1], abs=1e-5) and max(known[0]) > 1e-4
    assert set(one.loc["h2o@60", "rows"]) == {5} and one.timed.all()
