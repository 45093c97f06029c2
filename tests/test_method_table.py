"""The table of methods in the documentation is of these methods."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from buzz import POLICIES

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    return importlib.import_module("method_table")


def test_the_table_is_of_this_code(module) -> None:
    """A method that has no row yet gets one by `make docs`."""
    page = module.PAGE.read_text()
    rows = page[page.index(module.BEGIN) : page.index(module.END)].splitlines()
    missing = set(rows) - set(module.written(page).splitlines())
    assert len(rows) > 20 and not missing, "python docs/method_table.py writes it anew"


def test_it_says_of_every_method_what_it_looks_at(module) -> None:
    rows = module.table(module.PAGE.read_text()).splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    by_name = {re.match(r"\[`(\w+)`\]", row[0])[1]: row for row in cells}
    assert by_name.keys() == POLICIES.keys()
    assert by_name["vatp"][3] == "attention, summed; values"
    assert by_name["defensive_kv"][3] == "keys; values; last queries; output projection"
    assert by_name["kvzip"][4] == "after the prompt"
    assert by_name["tova"][5] == "each layer" and by_name["local"][5] == "all alike"
    assert by_name["pyramid_kv"][5] == "each KV head, sizes by layer"
