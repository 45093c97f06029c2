"""Pages say what is there: pictures their command, the configuration its files."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path

import pytest

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
    how, what, picture = made.groups()
    if how == "make":
        assert re.search(rf"^{what}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif how == "python -m":
        assert importlib.util.find_spec(what)
    else:
        assert (ROOT / what).is_file()
    if picture:
        assert Path(image).stem == picture and callable(getattr(docs("pictures"), picture))


def parts(page: str) -> list[str]:
    return [part.strip() for part in re.split(r"\n(?=##+ )", page)]


def test_the_configuration_is_of_these_files(docs) -> None:
    """A file that has no part yet gets one by `make docs`."""
    configuration = docs("configuration")
    page = configuration.PAGE.read_text()
    stale = set(parts(page)) - set(parts(configuration.written(page)))
    assert len(parts(page)) > 50 and not stale, "python docs/configuration.py writes it anew"
    shown = {ROOT / path for path in re.findall(r"<!-- configs (\S+) -->", page)}
    files = {path for path in (ROOT / "configs").rglob("*.yaml")}
    assert not {path for path in files if not {path, path.parent} & shown}
