"""Whole runs on a tiny random model, for tests of what runs record and how they end."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from rich.table import Table

import evals.run.answers
import evals.run.runner

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


def run_tiny(
    output: Path, *overrides: str, fixed: frozenset[str] = frozenset(), needle: bool = True
) -> Path:
    """Runs the tiny model with some overrides; the run's folder."""
    task = NEEDLE if needle else []
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        cfg = compose("config", [*MODEL, *task, f"output={output}", *overrides])
    return evals.run.runner.run(cfg, fixed)


def read(folder: Path) -> list[dict[str, Any]]:
    """The records of a run, in the order in which they were written."""
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def timeless(folder: Path) -> list[dict[str, Any]]:
    """Them without what differs from one run to the next."""
    return [{key: r[key] for key in r.keys() - TIMES - MADE} for r in read(folder)]


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
    real, asked = evals.run.answers.generate, []
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

    monkeypatch.setattr(evals.run.answers, "generate", generate)
    return asked


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A JSON-lines file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
