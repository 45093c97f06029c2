"""Pages say what is there: pictures their command, settings their files, tables their numbers."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from pathlib import Path

import pandas as pd
import pytest

from buzz import POLICIES

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PICTURE = re.compile(r"^!\[[^\]]+\]\(([^)]+)\)\n\n(.*)$", re.MULTILINE)
PICTURES = [(page, *found) for page in PAGES for found in PICTURE.findall(page.read_text())]


@pytest.fixture
def docs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    return importlib.import_module


def test_every_image_is_looked_at() -> None:
    assert len(PICTURES) == sum(page.read_text().count("![") for page in PAGES) > 10


@pytest.mark.parametrize(("page", "image", "below"), PICTURES, ids=lambda value: str(value)[-40:])
def test_below_a_picture_stands_the_command_that_makes_it(
    page: Path, image: str, below: str, docs
) -> None:
    assert (page.parent / image).is_file()
    made = re.match(r"\*Made by `(make|python(?: -m)?) (\S+?)(?: (\w+))?`.*\*$", below)
    assert made, f"{page.name}: below {image} must stand: *Made by `COMMAND`.*"
    how, what, word = made.groups()
    if how == "make":
        assert re.search(rf"^{what}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif how == "python -m":
        module = importlib.import_module(f"{what}.__main__" if word else what)
        assert not word or f'"{word}"' in inspect.getsource(module)
    else:
        assert (ROOT / what).is_file()
    if what == "docs/pictures.py":
        assert Path(image).stem == word and callable(getattr(docs("pictures"), word))


def parts(page: str) -> list[str]:
    return [part.strip() for part in re.split(r"\n(?=##+ )", page)]


def test_the_configuration_is_of_these_files(docs) -> None:
    """A file that has no part yet gets one by `make docs`."""
    configuration = docs("configuration")
    page = configuration.PAGE.read_text()
    stale = set(parts(page)) - set(parts(configuration.written(page)))
    assert len(parts(page)) > 50 and not stale, "python docs/configuration.py writes it anew"
    shown = {ROOT / path for path in re.findall(r"<!-- configs (\S+) -->", page)}
    files = {path for path in (ROOT / "configs").rglob("*.yaml") if "hydra" not in path.parts}
    assert not {path for path in files if not {path, path.parent} & shown}


def test_docstrings_say_what_each_parameter_of_a_method_is(docs) -> None:
    configuration = docs("configuration")
    for name, method in POLICIES.items():
        fields = {field.name for field in dataclasses.fields(method)}
        assert fields <= configuration.meanings(method).keys(), name
    # A method's own words come before those of the method that it builds on.
    own, built_on = (configuration.meanings(POLICIES[name])["heavy"] for name in ("vatp", "h2o"))
    assert own != built_on and "sink" in own


def test_the_readme_shows_the_committed_results() -> None:
    """Cell by cell."""
    summary = pd.read_csv(ROOT / "results/embedded/fidelity.csv")
    summary = summary[summary.budget == 0.25].set_index(["method", "task"])
    lines = (ROOT / "README.md").read_text().splitlines()
    rows = [
        [c.strip() for c in line.strip("|").split("|")] for line in lines if line.startswith("| `")
    ]
    rows = [row for row in rows if len(row) == 6]
    assert len(rows) > 10
    for name, *cells, held, evictions in rows:
        own = summary.loc[name.strip("`")]
        for task, cell in zip(("nq10", "xsum", "multi_news"), cells, strict=True):
            one = own.loc[task]
            assert cell == f"{one.kl:.2f} [{one.kl_low:.2f}, {one.kl_high:.2f}]"
        three = own.loc[["nq10", "xsum", "multi_news"]]
        assert held == f"{three.held_over_budget.mean():.2f}"
        assert evictions == f"{three.evictions.mean():.0f}"


def test_the_page_on_honeycomb_shows_what_was_measured() -> None:
    """Cell by cell: differences to H2O, and evictions as a part of H2O's."""
    summary = pd.read_csv(ROOT / "results/embedded/honeycomb_check/fidelity.csv")
    summary = summary.set_index(["method", "task", "budget"])
    columns = [(task, budget) for task in ("nq10", "xsum", "multi_news") for budget in (0.1, 0.25)]
    page = (ROOT / "docs/honeycomb.md").read_text().split("## The other half, looked at once")[1]
    rows = [line for line in page.splitlines() if line.startswith("| ")][2:]
    shown = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if row[2] != "-"]
    method = ""
    for name, *cells in shown:
        method = name.split("`")[1] if "`" in name else method
        for cell, (task, budget) in zip(cells, columns, strict=True):
            own, rival = summary.loc[method, task, budget], summary.loc["h2o", task, budget]
            if "`" in name:
                ends = [own[f"kl_less_h2o{end}"] for end in ("", "_low", "_high")]
                told = [float(number) for number in re.findall(r"[-+]?\d\.\d{3}", cell)]
                assert told == pytest.approx(ends, abs=6e-4), name  # both are rounded
                assert cell.startswith("**") == (ends[2] < 0)
            else:
                assert cell == f"{own.evictions / rival.evictions:.0%}".replace("%", " %"), method
    assert len(shown) == 8
