"""Writes the tables of docs/configuration.md: python docs/configuration.py

What follows a line `<!-- configs FOLDER -->` becomes a table of each YAML file there, its comments
the descriptions. A file that sets others' settings is shown as it is, or named if it is long.
`<!-- configs methods -->` is a table of each method's parameters, described by its docstring.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

import baselines  # noqa: F401  (registers its methods)
from buzz import POLICIES, Policy

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "configuration.md"
GLOBAL = "@package _global_"  # what such a file begins with
LONGEST = 25  # lines of such a file that are shown
# What the page says once for all tasks.
EVERY_TASK = {"shard": "null", "batch_size": "1", "chat_template": "true"}
PLACE = re.compile(r"^(<!-- configs (\S+) -->)\n.*?(<!-- /configs -->)$", re.MULTILINE | re.DOTALL)
HEADS = ["| setting | default | |", "| --- | --- | --- |"]
ARGUMENT = re.compile(r"^ {4}(\w[\w, ]*): (.*(?:\n {8}.*)*)", re.MULTILINE)  # of a docstring
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
    if GLOBAL in lines and body.count("\n") > LONGEST:
        parts.append(f"The file: `{file.relative_to(ROOT)}`.")
    elif GLOBAL in lines:
        parts.append(f"```yaml\n{body}```")
    elif rows := list(settings(text, EVERY_TASK if file.parent.name == "task" else {})):
        parts.append("\n".join([*HEADS, *rows]))
    return "\n\n".join([f"### {file.stem}", *filter(None, parts)]) if any(parts) else ""


def settings(text: str, known: dict[str, str]) -> Iterator[str]:
    """A table row for each value; Hydra's own sections and known defaults are left out."""
    flat = set(dotted(yaml.safe_load(text)))
    above: list[str] = []
    for line in text.splitlines():
        if not (match := SETTING.match(line)):
            continue
        above = [*above[: len(match["indent"]) // 2], match["key"]]
        name = ".".join(above)
        if known.get(name) == match["value"]:
            continue
        if name in flat and above[0] not in ("defaults", "hydra", "name", "_target_"):
            note = (match["note"] or "").replace("|", "\\|")
            yield f"| `{name}` | `{match['value']}` | {note} |"


def methods() -> str:
    """A section for each method."""
    return "\n\n".join(parameters(name, POLICIES[name]) for name in sorted(POLICIES))


def parameters(name: str, method: type[Policy]) -> str:
    """A table of the parameters; those of the method that it builds on are named below."""
    summary = inspect.cleandoc(method.__doc__ or "").partition("\n\n")[0]
    parts = [f"### {name}", in_markdown(summary)]
    base = next((own for own in POLICIES.items() if own[1] in method.__mro__[1:]), None)
    rows, shared = table_rows(method), table_rows(base[1]) if base else {}
    if own := [row for field, row in rows.items() if row != shared.get(field)]:
        parts.append("\n".join([*HEADS, *own]))
    if base and (same := [f"`{field}`" for field, row in rows.items() if row == shared.get(field)]):
        parts.append(f"As in [{base[0]}](#{base[0]}): {', '.join(same)}.")
    return "\n\n".join(parts)


def table_rows(method: type[Policy]) -> dict[str, str]:
    notes = meanings(method)
    return {
        field: f"| `{field}` | `{value if isinstance(value, str) else json.dumps(value)}` |"
        f" {notes.get(field, '')} |"
        for field, value in dataclasses.asdict(method()).items()
    }


def meanings(method: type[Policy]) -> dict[str, str]:
    """What docstrings say of the parameters: the method's own, else those of what it builds on."""
    found: dict[str, str] = {}
    for cls in reversed(method.__mro__):
        _, _, arguments = inspect.cleandoc(cls.__doc__ or "").partition("Args:\n")
        for names, text in ARGUMENT.findall(arguments):
            found |= dict.fromkeys(names.split(", "), in_markdown(text).removesuffix("."))
    return found


def in_markdown(text: str) -> str:
    """A paragraph of a docstring on one line."""
    return " ".join(text.split()).replace("``", "`").replace("|", "\\|")


def dotted(node: dict[str, Any], above: str = "") -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from dotted(value, f"{above}{key}.")
        else:
            yield f"{above}{key}"


def written(page: str) -> str:
    """The page with the settings of now."""

    def tables(place: re.Match[str]) -> str:
        made = methods() if place[2] == "methods" else configs(ROOT / place[2])
        return f"{place[1]}\n\n{made}\n\n{place[3]}"

    return PLACE.sub(tables, page)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
