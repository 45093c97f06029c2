"""The wheel's command, outside the checkout."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from runs import MODEL, NEEDLE, ROOT, read


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, in a folder of its own."""
    if not all(map(find_spec, ("pip", "setuptools"))):
        pytest.skip("pip and setuptools build the wheel")
    folder = tmp_path_factory.mktemp("installed")
    # What setuptools leaves beside its source stays out of the checkout.
    source = folder / "source"
    source.mkdir()
    for name in ("buzz", "baselines", "evals", "configs", "hydra_plugins", "results"):
        (source / name).symlink_to(ROOT / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--no-index", "--target", folder / "site", source], check=True)
    git = ["git", "-C", folder, "-c", "user.name=x", "-c", "user.email=x"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "another project"]):
        subprocess.run([*git, *command], check=True)
    return folder / "site"


def test_the_wheel_runs_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    """With the configurations in it, results in the current folder, and its own modules."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, installed / "bin/buzz-bench", *arguments]
        env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(installed), "HOME": str(tmp_path)}
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)

    for path in (ROOT / "configs").rglob("*.yaml"):
        assert (installed / "evals" / path.relative_to(ROOT)).read_text() == path.read_text()
    for path in (ROOT / "results/paper").glob("*.csv"):
        shipped = installed / "evals/report/published" / path.name
        assert shipped.read_text() == path.read_text()
    done = run("-m", *MODEL, *NEEDLE, "task.depths=[0]", "method=h2o,buzz", "budget=0.25")
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "results/runs").glob("needle-*")
    assert len(read(folder / "h2o@0.25.jsonl")) == len(read(folder / "full.jsonl")) == 1
    assert "buzz@0.25" in done.stdout
    (known,) = json.loads((folder / "environments.json").read_text()).values()
    assert known["git_revision"] is None  # the repository around the package is not its own
    done = run()
    assert done.returncode == 2 and "`make model` sets it up in a checkout, model=hf" in done.stderr
