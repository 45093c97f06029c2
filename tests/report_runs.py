"""Run folders made by hand, for tests of the report."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from evals.report.claims import judge
from evals.report.verdicts import Judged
from evals.results.reading import read_runs

BUZZ = {
    "sink": 4,
    "window": 160,
    "stride": 5,
    "threshold": 400,
    "history": "strided",
    "compact": "once",
}
HEADLINES = {
    "xsum": "rougeL",
    "nq10": "best_subspan",
    "needle": "accuracy",
    "longbench": "score",
    "throughput": "answer_tokens",
    "wikitext": "token_perplexity",
}
CONFIGS = Path(__file__).resolve().parents[1] / "configs/task"
TARGETS = {p.stem: yaml.safe_load(p.read_text()).get("_target_") for p in CONFIGS.glob("*.yaml")}
LLAMA = {"name": "llama2_7b_chat", "name_or_path": "meta-llama/Llama-2-7b-chat-hf"}
B = 250  # entries of every budget


def write_run(
    root: Path,
    name: str,
    method: str,
    scores: list[float],
    *,
    task: str = "xsum",
    kv: float = 1e6,
    allocated: float | None = None,
    budget: float | int | None = None,
    by: str | None = "peak",
    held: float = 1.0,
    fixed: list[str] | None = None,
    parameters: dict[str, Any] | None = None,
    cache: dict[str, Any] | None = None,
    prompt: int = 1000,
    speed: float = 10.0,
    batch: int = 1,
    process: str | None = "only",
    loaded: bool = False,
    seed: int = 0,
    group: str = "",
    blocks: bool = False,
    prediction: str = "an answer",
    model: dict[str, Any] | None = None,
    weights: int | None = 6_738_415_616,
    summary: dict[str, Any] | None = None,
    **task_settings: Any,
) -> None:
    """A folder of records.

    Args:
        kv, allocated: bytes of a sample, held and allocated.
        held: entries at the peak over the budget's, which are B; on average it is 0.8 of that.
        process: that measured them; None: not recorded.
        blocks: of texts that are read, whose scores are losses.
        weights: the model's parameters; None: not recorded.
    """
    folder = root / name
    folder.mkdir(parents=True)
    if parameters is None:
        parameters = BUZZ if method.startswith("buzz") else {}
    config = {
        "method": {
            "name": method,
            "_target_": "x",
            **parameters,
        },
        "task": {"_target_": TARGETS.get(task, "x"), "name": task, "shard": None, **task_settings},
        "model": model or LLAMA,
        "cache": cache or {"logn_base": None, "logn_clamp": False},
        "budget": budget,
        "seed": seed,
        "output": str(root),
    }
    if by is not None:
        config["budget_by"] = by
    if fixed is not None:
        config["fixed"] = fixed
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config))
    environment = {"device": "cpu", "cpu": "a CPU", "threads": 2, "git_revision": "abc"}
    if weights is not None:
        environment["model_parameters"] = weights
    (folder / "environment.json").write_text(json.dumps(environment))
    headline = HEADLINES[task]
    budgeted = budget is not None and method != "full"
    with open(folder / "samples.jsonl", "w") as file:
        for i, score in enumerate(scores):
            record = {
                "format": 2,
                "id": str(i),
                "group": group,
                "meta": {"length": 512, "depth": 50},
                "references": ["expected"],
                "prompt_sha256": f"hash {seed} {i}",
                "prompt_tokens": prompt,
                "batch_size": batch,
                "status": "ok",
                "scores": {headline: score, "rouge2": score / 2},
                "prediction": prediction,
                "generated_tokens": 8,
                "ttft_s": 1.0,
                "decode_tokens_per_s": speed + i % 3,
                "itl_p50_ms": 1000 / speed + i % 3,
                "kv_nbytes_mean": kv,
                "kv_nbytes_peak": kv,
                "allocated_nbytes": (kv if allocated is None else allocated) * batch,
                "memory_peak_nbytes": 5e8,
                "budget_by": by if budgeted else None,
                "budget_entries": B if budgeted else None,
                "kv_entries_peak": B * held,
                "kv_entries_mean": 0.8 * B * held,
                "loaded": loaded,
            }
            if process is not None:
                record["process"] = process
            if blocks:
                record |= {"blocks": [score, score + 1], "generated_tokens": 0, "itl_p50_ms": None}
            file.write(json.dumps(record) + "\n")
    facts = {
        "status": "complete",
        "headline": headline,
        "statistic": "mean",
        "higher_is_better": True,
    }
    (folder / "summary.json").write_text(json.dumps(facts if summary is None else summary))


def judged(root: Path, start: str) -> list[Judged]:
    """What the runs of a folder say of the claim whose statement begins so."""
    return [one for one in judge(read_runs(root)) if one.claim.statement.startswith(start)]


def found(root: Path, start: str) -> Judged:
    """The claim's only measurement."""
    (one,) = judged(root, start)
    return one


class Reader(HTMLParser):
    """Collects tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data
