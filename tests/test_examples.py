"""What pages and the notebook show runs as it stands there, offline, and evicts."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import matplotlib
import pytest

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models/SmolLM2-135M-Instruct.Q4_1/config.json"

pytestmark = pytest.mark.skipif(
    not MODEL.exists(), reason="the embedded model is not there: make setup"
)


def execute(code: str) -> tuple[dict[str, Any], str]:
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as told:
        exec(compile(code, "example", "exec"), names)
    return names, told.getvalue()


@pytest.mark.parametrize("page", ["README.md", "docs/cache.md"])
def test_own_code(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    (block,) = (one for one in blocks if "from_pretrained" in one)
    names, told = execute(block)
    cache, tokens = names["cache"], names["output"].shape[1]
    assert cache.evictions[0] > 0 and cache.lengths[0] < tokens / 2
    assert str(cache.lengths[0]) in told


def test_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every method evicts, and holds at most a quarter of the prompt."""
    matplotlib.use("Agg")
    monkeypatch.chdir(ROOT / "examples")
    cells = json.loads((ROOT / "examples/quickstart.ipynb").read_text())["cells"]
    assert not any(cell.get("outputs") for cell in cells), "clear the outputs before a commit"
    names, told = execute(
        "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    )
    assert len(told.splitlines()) == 4
    for cache in names["caches"].values():
        assert cache.evictions[0] > 0 and cache.lengths[0] <= round(names["prompt"] / 4)
    figure = names["figure"]
    assert [axis.get_ylabel() for axis in figure.axes] == ["StreamingLLM", "H2O", "BUZZ"]
    matplotlib.pyplot.close(figure)
