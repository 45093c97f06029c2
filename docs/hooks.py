"""Pages that are made while the site is built: the configuration, and the result tables.

A line `<!-- configs FOLDER -->` becomes a table of each YAML file there, its comments the
descriptions; `<!-- tables FOLDER -->` becomes the Markdown and CSV tables there.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
MARK = re.compile(r"^<!-- (configs|tables) (\S+) -->$", re.MULTILINE)
SETTING = re.compile(r"^(?P<indent> *)(?P<key>\w+):(?: (?P<value>[^#]*?))?(?:\s+# (?P<note>.*))?$")


def on_page_markdown(markdown: str, **_: Any) -> str:
    makers = {"configs": configs, "tables": tables}
    return MARK.sub(lambda match: makers[match[1]](ROOT / match[2]), markdown)


def on_config(config: Any) -> Any:
    config.watch += [str(ROOT / "configs"), str(ROOT / "results")]
    return config


def configs(path: Path) -> str:
    """A section for each YAML file of a folder, or for one file."""
    files = [path] if path.is_file() else sorted(path.glob("*.yaml"))
    if not files:
        raise FileNotFoundError(f"{path} holds no configuration")
    return "\n\n".join(section(file) for file in files)


def section(file: Path) -> str:
    text = file.read_text(encoding="utf-8")
    head = re.match(r"(?:#.*\n)*", text)
    lines = [line[1:].strip() for line in head[0].splitlines()] if head else []
    parts = [f"### {file.stem}", " ".join(lines)]
    if rows := list(settings(text)):
        parts.append("\n".join(["| setting | default | |", "| --- | --- | --- |", *rows]))
    return "\n\n".join(part for part in parts if part)


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


def tables(folder: Path) -> str:
    """Every table of a folder, under the name of its file."""
    parts = []
    for file in sorted(folder.glob("*")) if folder.is_dir() else []:
        if file.suffix == ".md":
            parts.append(f"### {file.stem}\n\n{file.read_text(encoding='utf-8')}")
        elif file.suffix == ".csv" and not file.with_suffix(".md").exists():
            parts.append(f"### {file.stem}\n\n{csv_table(file)}")
    return "\n\n".join(parts) or "There are none yet."


def csv_table(file: Path) -> str:
    with open(file, encoding="utf-8", newline="") as stream:
        header, *rows = csv.reader(stream)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines
    )
