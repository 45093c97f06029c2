"""A new method is one file and one YAML: the example of CONTRIBUTING.md, as it stands there."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml
from runs import MODEL, NEEDLE, read

from evals.report.methods import MORE, STYLES, style_of
from evals.tasks.base import Task

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(
    r"```(?:python|yaml)\n# (\S+)\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S
)
WATCH = """
import sys, types, baselines, run, torch
from buzz import POLICIES
from evals.report.methods import order, style_of
assert POLICIES["spread"] is baselines.SpreadPolicy, POLICIES
assert "spread" in order() and style_of("spread").label == "spread"
policy, held = baselines.SpreadPolicy(size=24, window=4), torch.arange(200)
for token in range(200, 1200):
    held = torch.cat([held, held.new_tensor([token])])
    scores = policy.score(types.SimpleNamespace(positions=held[None, None]))
    index = policy.select(len(held), 24, scores)[0, 0]
    held = torch.cat([held[index], held[-4:]])
    gaps = torch.cat([held.new_tensor([-1]), held[:-3], held.new_tensor([token - 3])]).diff()
    assert len(held) == 24 and gaps.max() <= 3 * (token - 3) / 20, held
sys.exit(run.cli())
"""


def test_the_example_runs_as_it_stands(tmp_path: Path) -> None:
    for name in ("baselines", "buzz", "configs", "evals"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "run.py", tmp_path)
    method, task = ["baselines/spread.py", "configs/method/spread.yaml"], "task/repeat.yaml"
    assert [name for name, _ in BLOCKS] == [*method, "evals/tasks/repeat.py", f"configs/{task}"]
    for name, text in BLOCKS:
        (tmp_path / name).write_text(text)
    repeat = ["task=repeat", "task.samples=3", "task.max_new_tokens=4", "task.words=3"]
    for task in (NEEDLE, repeat):
        command = ["method=spread", "budget=20", *MODEL, *task, f"output={tmp_path}/runs"]
        done = subprocess.run(
            [sys.executable, "-c", WATCH, f"--config-path={tmp_path}/configs", *command],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path), "HOME": str(tmp_path)},
        )
        assert done.returncode == 0, done.stderr
        assert "spread" in done.stdout
    (run,) = (tmp_path / "runs").glob("needle-spread-*")
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["method"]["_target_"] == "baselines.SpreadPolicy"
    (run,) = (tmp_path / "runs").glob("repeat-spread-*")
    assert [record["prompt_tokens"] > 20 for record in read(run)] == [True] * 3


def test_what_exists_for_every_task() -> None:
    """Can be set on the command line, which takes only what a YAML has."""
    everywhere = {field.name for field in dataclasses.fields(Task)}
    for file in sorted((ROOT / "configs/task").glob("*.yaml")):
        if file.stem != "suite":
            assert everywhere <= yaml.safe_load(file.read_text()).keys(), file.stem


def test_methods_that_nobody_named_are_drawn_apart() -> None:
    looks = [style[1:] for style in STYLES.values()] + MORE
    assert len(set(looks)) == len(looks)
    assert style_of("unheard_of") == ("unheard_of", *style_of("unheard_of")[1:])
    assert style_of("unheard_of")[1:] in MORE
