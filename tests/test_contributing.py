"""The examples of CONTRIBUTING.md: a method, a task, a column, a claim."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from report_runs import write_row
from runs import MODEL, NEEDLE, ROOT, composed, read

from buzz import POLICIES
from evals.report import views
from evals.report.claims import FAILS, HOLDS, Claim, judge
from evals.report.methods import MORE, STYLES, style_of
from evals.results.frame import load
from evals.run.plan import policy_of
from evals.tasks.base import Task

PAGE = (ROOT / "CONTRIBUTING.md").read_text()
BLOCKS = re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", PAGE, re.S)
WATCH = """
import sys, types, baselines, torch
from evals.launch import command
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
sys.exit(command.cli())
"""


def test_the_example_runs_as_it_stands(tmp_path: Path) -> None:
    for name in ("baselines", "buzz", "configs", "evals", "hydra_plugins"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    files = ["baselines/spread.py", "evals/tasks/repeat.py", "configs/task/repeat.yaml"]
    assert [name for name, _ in BLOCKS] == files
    for name, text in BLOCKS:
        (tmp_path / name).write_text(text)
    repeat = ["task=repeat", "task.samples=3", "task.max_new_tokens=4", "task.words=3"]
    for task in (NEEDLE, repeat):
        method = ["method=spread", "method.window=4", "budget=20"]
        command = [*method, *MODEL, *task, f"output={tmp_path}/runs"]
        done = subprocess.run(
            [sys.executable, "-c", WATCH, f"--config-path={tmp_path}/configs", *command],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path), "HOME": str(tmp_path)},
        )
        assert done.returncode == 0, done.stderr
        assert "spread" in done.stdout
    (file,) = (tmp_path / "runs").glob("needle-*/spread@20,window=4.jsonl")
    assert [record["policy"]["size"] for record in read(file)] == [20] * 3
    (file,) = (tmp_path / "runs").glob("repeat-*/spread@20,window=4.jsonl")
    assert [record["prompt_tokens"] > 20 for record in read(file)] == [True] * 3


def entry(heading: str) -> str:
    """The YAML below a heading."""
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE.split(f"## {heading}\n")[1], re.S)[:1]
    return block


def test_a_column_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = entry("A column is one line")
    assert len(line.splitlines()) == 1
    ((name, how),) = yaml.safe_load(line).items()
    scores = views.SPEC["views"]["scores"]
    assert name not in scores["columns"]
    monkeypatch.setitem(scores, "columns", scores["columns"] | {name: how})
    lengths = iter([5, 9, 7])
    write_row(tmp_path, "full", [1.0] * 3, edit=lambda r: r.update(generated_tokens=next(lengths)))
    table = views.make("scores", load(tmp_path))
    assert table.frame[name].tolist() == [9]


@pytest.mark.parametrize(("found", "expected"), [(1.0, HOLDS), (0.5, FAILS)])
def test_a_claim_is_an_entry(tmp_path: Path, found: float, expected: str) -> None:
    (claim,) = [Claim(**one) for one in yaml.safe_load(entry("A claim is an entry"))]
    write_row(tmp_path, "full", [1.0] * 400, task="needle")
    write_row(tmp_path, "buzz", [found] * 400, task="needle", budget=0.25)
    write_row(tmp_path, "full", [1.0] * 400)
    write_row(tmp_path, "buzz", [0.0] * 400, budget=0.25)  # of another task
    (judged,) = judge(load(tmp_path), [claim])
    assert judged.kind == expected and claim.origin


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_methods_dataclass_is_its_configuration(name: str) -> None:
    defaults = dataclasses.asdict(POLICIES[name]())
    for protocol in ("equal_memory", "original"):
        cfg = composed(f"method={name}", f"protocol={protocol}")
        own = {"heavy": 400, "recent": 160} if (name, protocol) == ("h2o", "original") else {}
        assert cfg.method == {"name": name, **defaults, **own}
        assert policy_of("method", dict(cfg.method)) == POLICIES[name](**own)


def test_a_variant_is_a_yaml_on_top_of_a_method(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    variant = tmp_path / "configs/method/h2o_recent.yaml"
    variant.parent.mkdir()
    variant.write_text("defaults: [h2o]\nrecent: 500\n")
    cfg = composed("method=h2o_recent", configs=tmp_path / "configs")
    assert policy_of("method", dict(cfg.method)) == POLICIES["h2o"](recent=500)


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
