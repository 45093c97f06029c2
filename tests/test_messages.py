"""Hydra's own errors are one line that names the choices, with exit status 2."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from runs import MODEL, NEEDLE, ROOT, read

import evals.run.runner
from evals.results.environment import package_version
from evals.run import checkpoints


@pytest.mark.parametrize(
    "given, parts",
    [
        ("method=h20", ["method=h20", "did you mean h2o?", "choose one of a2sf, buzz,"]),
        ("model=random", ["model=random", "choose one of gemma3_270m, hf"]),
        ("+experiment=foo", ["experiment=foo", "choose one of bench, demo, fidelity"]),
        ("method.windw=1", ["method.windw=1", "did you mean window?", "compact, history,"]),
        ("method=h2o method.window=1", ["method.window=1", "choose one of heavy, name, recent"]),
        ("+method.x=1", ["method.x=1: no such setting", "choose one of compact, history,"]),
        ("method=full +method.x=1", ["method.x=1: no such setting; there is none"]),
        ("method=h2o method.name=h20", ["method.name='h20'", "choose one of buzz,"]),
        ("task.nosuch=1", ["task.nosuch=1", "chat_template, depths"]),
        ("budgt=0.25", ["budgt=0.25", "did you mean budget?"]),
        ("sweep=pareto", ["sweep=pareto", "did you mean +sweep?"]),
        ("nosuch.foo=1", ["nosuch.foo=1", "there is no nosuch", "budget, budget_by"]),
        ("method", ["method", "write NAME=VALUE"]),
        ("task.lengths=[512", ["task.lengths=[512", "quote lists"]),
        ("output=${nosuch}", ["nosuch"]),
        ("-m method=buzz,h20", ["method=h20", "did you mean h2o?"]),
        ("-m method=buzz method.windw=1,2", ["method.windw=1", "did you mean window?"]),
        ("method=buzz,h2o", ["method=buzz,h2o", "write -m method=buzz,h2o"]),
        ("budget=0.1,0.5", ["write -m budget=0.1,0.5", "one list write 'budget=[0.1,0.5]'"]),
        ("+launcher=nosuch", ["launcher=nosuch", "choose one of joblib"]),
        ("+model.hiden_size=32", ["model.hiden_size=32", "no such setting", "dtype"]),
        ("+budgets=0.5", ["budgets=0.5", "no such setting", "budget, budget_by"]),
        ("+cache.base=2", ["cache.base=2", "no such setting"]),
        ("+method.windw=2", ["method.windw=2", "no such setting", "threshold, window"]),
        ("+task.length=2", ["task.length=2", "no such setting", "lengths, "]),
        ("+nothing.token=2", ["nothing={'token': 2}: no such setting", "budget, budget_by,"]),
        ("cache.logn_clamp=true", ["cache.logn_clamp=True", "logn_base"]),
        ("task.needles=3", ["task.needles=3", "task.variant=multikey"]),
        ("compress_chunk=64", ["compress_chunk=64", "compress=stream"]),
        ("compress=context compress_chunk=64", ["compress_chunk=64", "compress=stream"]),
        ("budget_by=mean", ["budget_by='mean'", "give budget"]),
        ("method=snapkv compress=stream", ["method.name='snapkv'", "write compress=context"]),
    ],
)
def test_one_line(main, capsys, given, parts) -> None:
    assert main(*given.split(" ")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line


def test_hydra_in_full_when_asked(main, monkeypatch) -> None:
    from hydra.errors import MissingConfigException

    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(MissingConfigException):
        main("method=h20")


@pytest.mark.parametrize(
    ("given", "package"),
    [
        ("+launcher=joblib", "hydra-joblib-launcher"),
        ("+launcher=ray", "hydra-ray-launcher"),
        ("+sweep=optuna", "hydra-optuna-sweeper"),
    ],
)
def test_an_extra_that_is_missing_is_named(main, capsys, given: str, package: str) -> None:
    if package_version(package):
        pytest.skip("it is installed")
    assert main(given, "method=full", "-m") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"pip install -e '.[{given.partition('=')[2]}]'" in line


@pytest.mark.parametrize("name", ["daté", "a (1)", "lr=0.1", "it's", 'so "said"', "a,b", "{x}"])
def test_what_must_be_quoted_can_be_copied_from_the_message(main, capsys, name: str) -> None:
    assert main("task=xsum", f"task.data_file=data/{name}.jsonl") == 2
    (line,) = capsys.readouterr().err.splitlines()
    (given,) = shlex.split(line.rpartition("write ")[2])
    assert OverridesParser.create().parse_override(given).value() == f"data/{name}.jsonl"


def test_a_path_may_start_at_home(main, capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main("task=xsum", "task.data_file=~/nosuch.jsonl") == 2
    assert f"task.data_file='{tmp_path}/nosuch.jsonl'" in capsys.readouterr().err
    assert main("output=~/runs", "method=nosuch") == 2
    assert main(*MODEL, *NEEDLE, "output=~/runs", "method=full", "budget=full") == 2
    assert (tmp_path / "runs").is_dir() and not Path("~").exists()


def test_a_device_that_is_not_there(main, capsys) -> None:
    if torch.cuda.is_available():
        pytest.skip("it is there")
    assert main(*MODEL, *NEEDLE, "device=cuda") == 2
    assert "device='cuda': there is no CUDA device" in capsys.readouterr().err


def test_single_values_stand_for_lists(main) -> None:
    task = ["task.depths=50", "task.repeats=1", "task.max_new_tokens=2"]
    for lengths in ("300", "[300]"):
        assert main(*MODEL, "method=full", f"task.lengths={lengths}", *task) == 0
    (file,) = main.runs.glob("needle-*/full.jsonl")  # the same run
    assert [record["id"] for record in read(file)] == ["300-50-0"]


@pytest.mark.parametrize(("budget", "remark"), [("25", True), ("0.25", False), ("120", False)])
def test_entries_that_look_like_percent(main, capsys, budget: str, remark: bool) -> None:
    assert main(*MODEL, *NEEDLE, "method=streaming_llm", f"budget={budget}") == 0
    said = capsys.readouterr().err
    assert ("budget=0.25 is 25 % of it" in said) == remark
    assert ("budget=25 is 25 entries" in said) == remark


def test_a_model_that_cannot_be_had_is_named_once(main, capsys, monkeypatch) -> None:
    asked = []

    def unreachable(name: str, **options: object) -> None:
        asked.append(name)
        raise OSError("no route to the hub")

    monkeypatch.setattr(checkpoints.AutoConfig, "from_pretrained", unreachable)
    jobs = "method=full,h2o,tova", "task.repeats=1,2"
    assert main("-m", "model=hf", "model.name_or_path=some/model", *jobs) == 1
    said = capsys.readouterr().out.splitlines()
    named = [line for line in said if "some/model" in line]
    assert len(named) == 1 and "and 5 more" in named[0] and "no route" in named[0]
    assert len(asked) == 1


def test_a_failed_sample_shows_its_traceback_when_asked(main, capsys, monkeypatch) -> None:
    def broken(*args: object, **options: object) -> None:
        raise ZeroDivisionError("here it broke")

    monkeypatch.setattr(evals.run.runner, "generate", broken)
    assert main(*MODEL, *NEEDLE, "method=h2o") == 1
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    assert main(*MODEL, *NEEDLE, "method=tova") == 1
    said = capsys.readouterr().err
    assert "Traceback" in said and "in broken" in said


def test_a_process_that_no_run_started_knows_the_methods() -> None:
    """As workers of launchers, which may import no more than what they unpickle."""
    code = """
from hydra import compose, initialize_config_dir
from evals.launch import messages
with initialize_config_dir(str(messages.CONFIGS), version_base=None):
    print(compose("config", ["method=tova"]).method)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "{'name': 'tova', 'size': 512}\n", done.stderr
