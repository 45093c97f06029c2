"""Pages that are made while the site is built: the configuration, and the result tables.

A line `<!-- configs FOLDER -->` becomes a table of each YAML file there, its comments the
descriptions (a file that sets others' settings is shown as it is); `<!-- tables FOLDER -->` becomes
the Markdown and CSV tables there.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
GLOBAL = "@package _global_"  # what such a file begins with
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


def tables(folder: Path) -> str:
    """Every table of a folder, under the name of its file."""
    parts = []
    for file in sorted(folder.glob("*")) if folder.is_dir() else []:
        if file.suffix == ".md":
            parts.append("#" + file.read_text(encoding="utf-8"))  # its title, a level lower
        elif file.suffix == ".csv" and not file.with_suffix(".md").exists():
            title = file.stem.replace("_", " ")
            parts.append(f"### {title}\n\n{csv_table(file)}")
    return "\n\n".join(parts) or "There are none yet."


def csv_table(file: Path) -> str:
    """`same` is the cell above's; a single source is named below the table, several in a column."""
    with open(file, encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    for above, row in zip(rows, rows[1:], strict=False):
        row.update((key, above[key]) for key, value in row.items() if value == "same")
    sources = {row["source"] for row in rows}
    header = [key for key in rows[0] if key != "source" or len(sources) > 1]
    lines = [header, ["---"] * len(header), *([row[key] for key in header] for row in rows)]
    cells = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    table = "\n".join(f"| {' | '.join(line)} |" for line in cells)
    return table if len(sources) > 1 else f"{table}\n\nSource: {sources.pop()}."
