"""What the contracts of import-linter (pyproject.toml, `make lint`) cannot say, and their page."""

from __future__ import annotations

import html
import importlib
import re
import sys
from pathlib import Path

import grimp
import pytest

from buzz import POLICIES

ROOT = Path(__file__).resolve().parents[1]
HELPERS = ("typing_extensions", "packaging")


@pytest.mark.parametrize(
    ("package", "may"),
    [
        # typing_extensions comes with torch, packaging with transformers; triton is torch's where
        # there is one.
        ("buzz", {"buzz", "torch", "transformers", "numpy", "triton", *HELPERS}),
        ("baselines", {"baselines", "buzz", "torch", "typing_extensions"}),
    ],
)
def test_the_library_needs_nothing_but(package: str, may: set[str]) -> None:
    graph = grimp.build_graph(
        "buzz", "baselines", "evals", include_external_packages=True, cache_dir=None
    )
    own = [module for module in graph.modules if module.partition(".")[0] == package]
    assert len(own) > 5
    imported = {
        name.partition(".")[0] for m in own for name in graph.find_modules_directly_imported_by(m)
    }
    assert imported - may - set(sys.stdlib_module_names) == set()


def test_the_picture_and_the_page_are_of_this_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    pictures = importlib.import_module("pictures")
    edges = pictures.imports()
    (drawn,) = re.findall(
        "<dc:description>(.*)</dc:description>", (ROOT / "docs/img/layers.svg").read_text()
    )
    assert html.unescape(drawn) == pictures.as_text(edges), "make docs draws it anew"
    page = (ROOT / "docs/architecture.md").read_text()
    assert edges.keys() == set(re.findall(r"^\| `([\w/]+)`", page, re.MULTILINE))
    for path in re.findall(r"`((?:evals|buzz|scripts|tests)/[\w/]+\.py)`", page):
        assert (ROOT / path).is_file(), path


def test_the_report_names_no_task_and_no_method_but_where_it_says_so() -> None:
    tasks = {path.stem for path in (ROOT / "configs/task").glob("*.yaml")}
    methods = POLICIES.keys() - {"buzz", "full"}
    assert len(tasks) > 5 and len(methods) > 5
    named: dict[str, set[str]] = {}
    for path in (ROOT / "evals/report").glob("*.py"):
        words = set(re.findall(r'"(\w+)"', path.read_text()))
        if found := words & (tasks | methods):
            named[path.name] = found & tasks
    assert named == {"methods.py": set()}  # styles; the rest is views.yaml's and claims.yaml's
