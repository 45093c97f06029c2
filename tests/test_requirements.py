"""A transformers that the package does not know is refused as it is imported."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from buzz import requirements

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text()  # tomllib is of Python 3.11


def test_the_range_is_that_of_the_package() -> None:
    (found,) = re.findall(r'^    "(transformers.*)",', PYPROJECT, re.MULTILINE)
    assert Requirement(found).specifier == SpecifierSet(requirements.TRANSFORMERS)


@pytest.mark.parametrize(
    ("installed", "fine"),
    [
        ("5.19.0", False),
        ("5.20.0", True),
        ("5.24.0", True),
        ("5.25.0.dev0", True),
        ("6.0.0.dev0", False),
        ("6.0.0", False),
    ],
)
def test_only_what_lies_in_it_is_taken(installed: str, fine: bool, monkeypatch) -> None:
    monkeypatch.setattr(requirements, "version", lambda name: installed)
    if fine:
        return requirements.check_transformers()
    with pytest.raises(ImportError, match=re.escape(f">=5.20,<6, and {installed} is installed")):
        requirements.check_transformers()


@pytest.mark.parametrize("installed", ["4.57.1", None])
def test_import_ends_in_one_line_before_transformers_is_touched(
    installed: str | None, tmp_path: Path
) -> None:
    """As another release would: a folder that says its version, and breaks whoever imports it."""
    (tmp_path / "transformers.py").write_text("raise AttributeError('of another release')")
    if installed:
        (tmp_path / f"transformers-{installed}.dist-info").mkdir()
        text = f"Metadata-Version: 2.1\nName: transformers\nVersion: {installed}\n"
        (tmp_path / f"transformers-{installed}.dist-info" / "METADATA").write_text(text)
    else:  # found by nobody
        (tmp_path / "sitecustomize.py").write_text(
            "import importlib.metadata as m\nreal = m.version\n"
            "def version(name):\n"
            "    if name == 'transformers': raise m.PackageNotFoundError(name)\n"
            "    return real(name)\n"
            "m.version = version\n"
        )
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import buzz"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert last == (
        f"ImportError: buzz needs transformers >=5.20,<6, and {installed or 'none'} is installed:"
        " pip install 'transformers>=5.20,<6'"
    )
