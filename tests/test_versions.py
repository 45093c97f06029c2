"""The table of versions in README.md is what was measured, and pyproject.toml claims no more."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from tools import versions

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text()  # tomllib is of Python 3.11


def test_the_table_of_versions_is_what_was_measured() -> None:
    page = versions.PAGE.read_text()
    assert versions.written(page) == page, "make test-versions writes it anew"
    rows = versions.read()
    assert [versions.key(row) for row in rows] == list(versions.CELLS)
    for row in rows:
        fine = (row["failed"], row["example"]) == ("0", "passed")
        assert fine or row["note"], f"{versions.key(row)}: say why"


def test_lower_bounds_are_those_that_were_tested() -> None:
    """The oldest row has the release that each bound names."""
    (oldest,) = (row for row in versions.read() if row["releases"] == "oldest")
    for name in versions.PACKAGES:
        found = re.findall(rf'"{name}(?:\[\w+\])?>=([\d.]+)', PYPROJECT)
        assert found, name
        for bound in found:
            assert oldest[name].startswith(bound), f"{name}>={bound} was tested as {oldest[name]}"


def test_a_python_that_cannot_be_had_is_said_not_to_have_run(monkeypatch) -> None:
    refused = subprocess.CompletedProcess([], 2, "", "no interpreter found")
    monkeypatch.setattr(versions, "uv", lambda *words: refused)
    row = versions.cell("3.13-newest", [])
    assert row["note"] == "not run: no Python 3.13"
    assert "| 3.13 | newest |" in versions.markdown([row]) and row["note"] in versions.markdown(
        [row]
    )
