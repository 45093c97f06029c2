"""Setting folders made by hand, for tests of frame and report."""

from __future__ import annotations

import hashlib
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml

from evals.report.claims import CLAIMS, Judged, judge
from evals.results.folder import sha256
from evals.results.frame import load

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
CACHE = {"positions": "cache", "logn_base": None, "logn_clamp": False}
B = 250  # entries of every budget


def write_row(
    root: Path,
    method: str,
    scores: list[float | None],
    *,
    row: str | None = None,
    setting: str = "",
    task: str = "xsum",
    seed: int = 0,
    model: dict[str, Any] | None = None,
    weights: int | None = 6_738_415_616,
    compress: str = "prompt",
    metric: dict[str, Any] | None = None,
    budget: float | int | None = None,
    by: str = "peak",
    held: float = 1.0,
    fixed: list[str] | None = None,
    parameters: dict[str, Any] | None = None,
    cache: dict[str, Any] | None = None,
    kv: float = 1e6,
    allocated: float | None = None,
    kls: list[float | None] | None = None,
    prompt: int = 1000,
    speed: float | None = 10.0,
    batch_size: int = 1,
    process: str | None = "only",
    cpu: str = "a CPU",
    loaded: bool = False,
    groups: list[str] | str = "",
    units: list[str] | None = None,
    meta: list[dict[str, Any]] | None = None,
    blocks: bool = False,
    status: dict[int, str] | None = None,
    prediction: str = "an answer",
    edit: Any = None,
    **task_settings: Any,
) -> Path:
    """Adds a method's file to a setting's folder, which it makes if it is not there.

    Args:
        scores: of the samples 0, 1, ...; None: no record.
        kv, allocated: bytes of a sample, held and allocated.
        held: entries at the peak over the budget's, which are B; on average it is 0.8 of that.
        speed: tokens a second of the timed samples, which all are; None: none is.
        blocks: of texts that are read, whose scores are losses.
        weights: the model's parameters; None: not recorded.
        status: of the samples that did not run.
        edit: called with each record before it is written.

    Returns:
        The file.
    """
    told = {"task": task, "seed": seed, "model": model or LLAMA, "compress": compress}
    about = json.dumps([told, task_settings], sort_keys=True, default=str)
    digest = hashlib.sha256(about.encode()).hexdigest()[:6]
    folder = root / (setting or f"{task}-{(model or LLAMA)['name']}-{digest}")
    folder.mkdir(parents=True, exist_ok=True)
    headline = HEADLINES[task]
    facts = {"headline": headline, "statistic": "mean", "higher_is_better": True}
    facts |= {"grouped_by": "depth" if task == "needle" else "group"} | (metric or {})
    target = TARGETS.get(task, "x")
    settings = {
        "version": 3,
        "task": {"_target_": target, "name": task, "shard": None, **task_settings},
        "task_version": 1,
        "model": model or LLAMA,
        "seed": seed,
        "compress": compress,
        "compress_chunk": 64,
        "metric": facts,
    }
    (folder / "setting.yaml").write_text(yaml.safe_dump(settings))
    asked = {str(i): f"sample {i}" for i in range(len(scores))}
    path = folder / "prompts.json"
    known = json.loads(path.read_text())["samples"] if path.exists() else {}
    path.write_text(json.dumps({"samples": known | asked, "of": len(asked), "data": "d"}))
    environment = {"device": "cpu", "cpu": cpu, "threads": 2, "git_revision": "abc"}
    if weights is not None:
        environment["model_parameters"] = weights
    path = folder / "environments.json"
    environments = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(environments | {cpu: environment}))
    if parameters is None:
        parameters = BUZZ if method.startswith("buzz") else {}
    budgeted = budget is not None and method != "full"
    name = "full" if method == "full" else row or (method + (f"@{budget}" if budgeted else ""))
    file = folder / f"{name}.jsonl"
    with open(file, "a") as lines:
        for i, score in enumerate(scores):
            if score is None:
                continue
            tokens = [1, 2, i]
            record = {
                "format": 3,
                "row": name,
                "label": method,
                "method": method,
                "parameters": parameters,
                "fixed": fixed or [],
                "cache": cache or CACHE,
                "budget": budget if budgeted else None,
                "budget_by": by if budgeted else None,
                "id": str(i),
                "group": groups if isinstance(groups, str) else groups[i],
                "unit": units[i] if units else "",
                "meta": meta[i] if meta else {"length": 512, "depth": 50},
                "references": ["expected"],
                "prompt_sha256": f"hash {seed} {i}",
                "sample_sha256": f"sample {i}",
                "prompt_tokens": prompt,
                "batch_size": batch_size,
                "environment": cpu,
                "status": (status or {}).get(i, "ok"),
            }
            if record["status"] == "ok":
                record |= {
                    "scores": {headline: score, "rouge2": score / 2},
                    "prediction": prediction,
                    "tokens": tokens,
                    "generated_tokens": 8,
                    "stop_reason": "eos",
                    "kv_nbytes_mean": kv,
                    "kv_nbytes_peak": kv,
                    "allocated_nbytes": kv if allocated is None else allocated,
                    "budget_entries": B if budgeted else None,
                    "kv_entries_peak": B * held,
                    "kv_entries_mean": 0.8 * B * held,
                    "evictions": 3,
                }
                if blocks:
                    record |= {"blocks": [score, score + 1], "generated_tokens": 0}
                    record["scores"] = {headline: math.exp(score + 0.5)}
                if kls and kls[i] is not None:
                    record |= {"kl_to_full": kls[i], "kl_median": kls[i], "top1_to_full": 0.5}
                    record |= {"reference_sha256": sha256(tokens)}
                if speed is not None:
                    record |= {
                        "timed": True,
                        "loaded": loaded,
                        "ttft_s": 1.0,
                        "decode_tokens_per_s": speed + i % 3,
                        "itl_p50_ms": None if blocks else 1000 / speed + i % 3,
                        "memory_peak_nbytes": 5e8,
                    }
            else:
                record |= {"error": "no room"}
            if process is not None:
                record["process"] = process
            if edit:
                edit(record)
            lines.write(json.dumps(record) + "\n")
    return file


def judged(root: Path, start: str) -> list[Judged]:
    """What the runs of a folder say of the claim whose statement begins so."""
    return judge(load(root), [one for one in CLAIMS if one.statement.startswith(start)])


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
