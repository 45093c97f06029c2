"""Safe by default: nothing foreign is executed, nothing escapes the results folder or a page."""

from __future__ import annotations

import ast
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from runs import MODEL, NEEDLE, ROOT
from tiny import checkpoint

import evals.run.runner
from buzz import ConfigError
from evals.run.models import load_model

PACKAGES = ("buzz", "baselines", "evals", "scripts", "tests/tools")
SOURCES = [ROOT / "run.py", *(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))]
# Runs other methods' own code, from clones at named commits: that is what it is for.
SOURCES.remove(ROOT / "tests/tools/make_golden_methods.py")


def dangers(source: str) -> Iterator[str]:
    """What could execute foreign code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            roots = {name.partition(".")[0] for name in names}
            yield from roots & {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if keywords.get("trust_remote_code", "False") != "False":
            yield "trust_remote_code"
        if name == "torch.load" and keywords.get("weights_only") != "True":
            yield name
        if name in ("yaml.load", "yaml.load_all") and not safe(keywords.get("Loader")):
            yield name
        if name in ("yaml.unsafe_load", "yaml.full_load", "eval", "exec", "os.system"):
            yield name
        for option in ("allow_pickle", "shell"):
            if keywords.get(option, "False") != "False":
                yield option


def safe(loader: str | None) -> bool:
    from evals.results import folder
    from evals.tasks import definitions

    known = {"yaml.SafeLoader": yaml.SafeLoader, "_Loader": definitions._Loader}
    found = (known | {"LOADER": folder.LOADER}).get(loader or "", yaml.UnsafeLoader)
    plain, full = yaml.constructor.SafeConstructor, yaml.constructor.FullConstructor
    return issubclass(found, plain) and not issubclass(found, full)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_executes_what_it_reads(path: Path) -> None:
    assert list(dangers(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "line",
    [
        "f(trust_remote_code=True)",
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "import pickle",
        "from dill import load",
        "yaml.load(t)",
        "yaml.load(t, Loader=yaml.FullLoader)",
        "np.load(p, allow_pickle=True)",
        "subprocess.run(c, shell=True)",
        "eval(t)",
    ],
)
def test_dangers_are_recognized(line: str) -> None:
    assert len(list(dangers(line))) == 1


def test_no_configuration_trusts_remote_code() -> None:
    assert not [p for p in (ROOT / "configs").rglob("*.yaml") if "trust_remote" in p.read_text()]


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "checkpoint")


def load(folder: Path) -> None:
    cfg = {"name_or_path": str(folder), "max_length": 64, "dtype": "float32"}
    load_model({**cfg, "attn_implementation": "sdpa"}, "cpu")


def test_a_pickle_among_the_weights_is_not_executed(folder: Path, tmp_path: Path) -> None:
    load(folder)
    (folder / "model.safetensors").unlink()
    mark = tmp_path / "executed"
    torch.save({"lm_head.weight": Touch(mark)}, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="model.name_or_path"):
        load(folder)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Touch(mark)))
    assert mark.exists()  # so it would have been there


def test_code_beside_the_weights_is_not_executed(folder, tmp_path, monkeypatch) -> None:
    mark = tmp_path / "executed"
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")
    monkeypatch.setattr("builtins.input", lambda question: "y")  # nor is the user asked
    with pytest.raises(ConfigError, match="contains custom code"):
        load(folder)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["task.name", "method.name", "model.name"])
@pytest.mark.parametrize("value", ["../../up", "/tmp/away", "a/b", "..\\up", "x" * 300, "", "a\nb"])
def test_names_cannot_lead_out_of_the_results(go, monkeypatch, name: str, value: str) -> None:
    monkeypatch.setattr(evals.run.runner, "load_model", None)
    with pytest.raises(ConfigError, match=name):
        go(f"{name}={json.dumps(value)}")
    assert not go.runs.exists()


@pytest.mark.parametrize(
    "target", ["os.system", "subprocess.Popen", "buzz.BuzzPolicy", "builtins.dict"]
)
def test_only_tasks_are_made_of_the_task_section(go, target: str) -> None:
    with pytest.raises(ConfigError, match=f"task._target_='{target}': is no Task"):
        go(f"task._target_={target}")


def test_no_key_is_written_anywhere(tmp_path: Path, monkeypatch) -> None:
    keys = {"WANDB_API_KEY": "0123456789" * 4, "HF_TOKEN": "hf_" + "9876543210" * 3}
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    small = ["logger=wandb", "logger.mode=offline", "method=local", "task.samples=1"]
    command = [sys.executable, ROOT / "run.py", "-m", *MODEL, *NEEDLE, *small]
    result = subprocess.run([*command, f"output={tmp_path}"], capture_output=True, text=True)
    assert result.returncode == 0 and "not logged" not in result.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    written = [result.stdout.encode(), result.stderr.encode(), *(p.read_bytes() for p in files)]
    for value in keys.values():
        assert not [text for text in written if value.encode() in text]
