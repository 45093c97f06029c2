"""Whole runs on a tiny random model, for tests of what runs record and how they end."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from rich.table import Table

import evals.run.runner
from buzz import ConfigError
from evals.launch.sweep import run_all
from evals.report.terminal import print_tables
from evals.report.views import summary
from evals.results.frame import load

ROOT = Path(__file__).resolve().parents[1]
LAYERS, KV_HEADS, HEAD_DIM = 2, 2, 16
MODEL = [
    "model=llama_random",
    f"model.hidden_size={4 * HEAD_DIM}",
    "model.intermediate_size=64",
    f"model.num_hidden_layers={LAYERS}",
    "model.num_attention_heads=4",
    f"model.num_key_value_heads={KV_HEADS}",
    "model.max_length=1024",
]
NEEDLE = ["task.lengths=[400]", "task.depths=[0,50,100]", "task.repeats=1", "task.max_new_tokens=8"]
TIMES = {"ttft_s", "decode_tokens_per_s", "itl_p50_ms", "itl_p95_ms", "memory_peak_nbytes"}
MADE = {"process", "load", "loaded"}


def composed(*overrides: str, configs: Path = ROOT / "configs", **options: Any) -> DictConfig:
    """The configuration that a command with these overrides has."""
    with initialize_config_dir(str(configs), version_base=None):
        return compose("config", [*overrides], **options)


def run_tiny(output: Path, *overrides: str, needle: bool = True) -> Path:
    """Runs the tiny model with some overrides; the file of the method's records."""
    task = NEEDLE if needle else []
    return run(composed(*MODEL, *task, f"output={output}", *overrides))


def run(cfg: DictConfig) -> Path:
    """Runs a configuration of one row; the file of the method's records."""
    (row,) = run_all(cfg)
    if row.error:
        raise row.error
    return row.outcome.file


@contextlib.contextmanager
def refused(field: str, says: str = "") -> Iterator[None]:
    """The body is refused in one line that names a field, and says so (a pattern)."""
    with pytest.raises(ConfigError, match=says or None) as caught:
        yield
    assert caught.value.field == field and "\n" not in str(caught.value)


def ready(task: Any) -> Any:
    """A task whose settings were checked and whose files were read."""
    task.check()
    task.prepare()
    return task


def read(file: Path) -> list[dict[str, Any]]:
    """A row's records, of each sample the last, in the order in which they were first written."""
    records = map(json.loads, file.read_text().splitlines())
    return list({record["id"]: record for record in records}.values())


def full_of(file: Path) -> Path:
    """The file of the full cache beside a row's."""
    return file.parent / "full.jsonl"


def summary_of(file: Path) -> dict[str, Any]:
    """What a row comes to."""
    rows = load(file.parent)
    return summary(rows[rows.row == file.stem])


def shown(file: Path) -> str:
    """What the terminal shows of a row's setting."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        print_tables([file.parent])
    return out.getvalue()


def timeless(file: Path) -> list[dict[str, Any]]:
    """A row's records without what differs from one run to the next."""
    return [{key: r[key] for key in r.keys() - TIMES - MADE} for r in read(file)]


def cells(table: Table) -> dict[str, dict[str, str]]:
    """A terminal table's cells by row and column; of columns named alike the second is "NAME 2"."""
    names: list[str] = []
    for column in table.columns:
        name = " ".join(str(column.header).split())
        names.append(f"{name} 2" if name in names else name)
    rows = zip(*(column.cells for column in table.columns), strict=True)
    return {row[0]: dict(zip(names, row, strict=True)) for row in rows}


def stub_generate(monkeypatch: Any, answer: Callable[[str], str]) -> list[str]:
    """Answers prompts by a function of their text; measurements are those of one real answer.

    Returns:
        The prompts that were answered since, warm-ups among them.
    """
    real, asked = evals.run.runner.generate, []
    measured = []

    def generate(
        model: Any, tokenizer: Any, prompts: Sequence[list[int]], *rest: Any, **more: Any
    ) -> list[Any]:
        if not measured:
            measured.extend(real(model, tokenizer, prompts[:1], *rest, **more))
        found = []
        for ids in prompts:
            asked.append(tokenizer.decode(ids))
            text = answer(asked[-1])
            tokens = tokenizer(text)["input_ids"] or [1]
            changes = {"tokens": tokens, "generated_tokens": len(tokens), "text": text}
            found.append(dataclasses.replace(measured[0], prompt_tokens=len(ids), **changes))
        return found

    monkeypatch.setattr(evals.run.runner, "generate", generate)
    return asked


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A JSON-lines file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
