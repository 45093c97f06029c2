"""Writes the tables of docs/configuration.md from configs/: python docs/configuration.py

What follows a line `<!-- configs FOLDER -->` becomes a table of each YAML file there, its comments
the descriptions; a file that sets others' settings is shown as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "configuration.md"
GLOBAL = "@package _global_"  # what such a file begins with
PLACE = re.compile(r"^(<!-- configs (\S+) -->)\n.*?(<!-- /configs -->)$", re.MULTILINE | re.DOTALL)
SETTING = re.compile(r"^(?P<indent> *)(?P<key>\w+):(?: (?P<value>[^#]*?))?(?:\s+# (?P<note>.*))?$")


def configs(path: Path) -> str:
    """A section for each YAML file of a folder, or for one file."""
    files = [path] if path.is_file() else sorted(path.glob("*.yaml"))
    if not files:
        raise FileNotFoundError(f"{path} holds no configuration")
    return "\n\n".join(filter(None, map(section, files)))


def section(file: Path) -> str:
    """Nothing for a file that has neither comment nor values."""
    text = file.read_text(encoding="utf-8")
    comment, body = re.fullmatch(r"((?:#[^\n]*\n)*)(.*)", text, re.DOTALL).groups()
    lines = [line[2:] for line in comment.splitlines()]
    shown = [f"`{line.strip()}`" if line.startswith("  ") else line for line in lines]
    parts = [" ".join(line for line in shown if line != GLOBAL)]
    if GLOBAL in lines:
        parts.append(f"```yaml\n{body}```")
    elif rows := list(settings(text)):
        parts.append("\n".join(["| setting | default | |", "| --- | --- | --- |", *rows]))
    return "\n\n".join([f"### {file.stem}", *filter(None, parts)]) if any(parts) else ""


def settings(text: str) -> Iterator[str]:
    """A table row for each value; Hydra's own sections are left out."""
    flat = set(dotted(yaml.safe_load(text)))
    above: list[str] = []
    for line in text.splitlines():
        if not (match := SETTING.match(line)):
            continue
        above = [*above[: len(match["indent"]) // 2], match["key"]]
        name = ".".join(above)
        if name in flat and above[0] not in ("defaults", "hydra", "name", "_target_"):
            note = (match["note"] or "").replace("|", "\\|")
            yield f"| `{name}` | `{match['value']}` | {note} |"


def dotted(node: dict[str, Any], above: str = "") -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from dotted(value, f"{above}{key}.")
        else:
            yield f"{above}{key}"


def written(page: str) -> str:
    """The page with the settings of now."""
    return PLACE.sub(lambda match: f"{match[1]}\n\n{configs(ROOT / match[2])}\n\n{match[3]}", page)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
