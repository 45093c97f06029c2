"""What pages get while the site is built: `<!-- tables FOLDER -->` becomes the tables there."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MARK = re.compile(r"^<!-- tables (\S+) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    return MARK.sub(lambda match: tables(ROOT / match[1]), markdown)


def on_config(config: Any) -> Any:
    config.watch += [str(ROOT / "results")]
    return config


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
