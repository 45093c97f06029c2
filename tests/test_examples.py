"""What pages and the notebook show runs as it stands there, offline, and evicts."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
import pytest
from runs import run_tiny

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models/SmolLM2-135M-Instruct.Q4_1/config.json"

needs_model = pytest.mark.skipif(
    not MODEL.exists(), reason="the embedded model is not there: make setup"
)


def execute(code: str) -> tuple[dict[str, Any], str]:
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as told:
        exec(compile(code, "example", "exec"), names)
    return names, told.getvalue()


def notebook(name: str) -> str:
    """Its code, as one program."""
    cells = json.loads((ROOT / "examples" / name).read_text())["cells"]
    assert not any(cell.get("outputs") for cell in cells), "clear the outputs before a commit"
    return "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")


@needs_model
@pytest.mark.parametrize("page", ["README.md", "docs/cache.md"])
def test_own_code(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    (block,) = (one for one in blocks if "from_pretrained" in one)
    names, told = execute(block)
    cache, tokens = names["cache"], names["output"].shape[1]
    assert cache.evictions[0] > 0 and cache.lengths[0] < tokens / 2
    assert str(cache.lengths[0]) in told


@needs_model
def test_the_notebook_of_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every method evicts, and holds at most a quarter of the prompt."""
    matplotlib.use("Agg")
    monkeypatch.chdir(ROOT / "examples")
    names, told = execute(notebook("quickstart.ipynb"))
    assert len(told.splitlines()) == 4
    for cache in names["caches"].values():
        assert cache.evictions[0] > 0 and cache.lengths[0] <= round(names["prompt"] / 4)
    figure = names["figure"]
    assert [axis.get_ylabel() for axis in figure.axes] == ["StreamingLLM", "H2O", "BUZZ"]
    matplotlib.pyplot.close(figure)


def test_the_notebook_of_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """It plots the numbers that are committed."""
    matplotlib.use("Agg")
    monkeypatch.chdir(ROOT / "examples")
    names, _ = execute(notebook("results.ipynb"))
    known = pd.read_csv(ROOT / "results/embedded/fidelity.csv")
    known = known[known.task == "nq10"].set_index(["method", "budget"])
    shown = names["table"]
    assert len(shown) == 12
    (axis,) = names["figure"].axes
    for line in axis.get_lines():
        for budget, value in zip(*line.get_data(), strict=True):
            one = known.loc[line.get_label(), budget]
            assert value == pytest.approx(one.kl, rel=1e-4)
            drawn = shown.loc[(line.get_label(), budget)]
            assert [drawn.low, drawn.high] == pytest.approx([one.kl_low, one.kl_high], rel=1e-4)
    matplotlib.pyplot.close(names["figure"])


def test_the_readme_groups_records_with_pandas(tmp_path: Path) -> None:
    """Of runs that are there."""
    run_tiny(tmp_path, "method=h2o", "budget=0.25", "kl=true")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (block,) = (one for one in blocks if "import load" in one)
    *before, last = block.replace("results/runs", str(tmp_path)).strip().splitlines()
    names, _ = execute("\n".join([*before, f"shown = {last}"]))
    shown = names["shown"]
    assert shown.index.tolist() == [("needle", "full"), ("needle", "h2o@0.25")]
    h2o, full = shown.loc["needle", "h2o@0.25"], shown.loc["needle", "full"]
    assert 0 < h2o.kv_nbytes_mean < 0.3 * full.kv_nbytes_mean and h2o.kl_to_full > 0
