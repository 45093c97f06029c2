"""Writes the table of docs/methods.md from the methods themselves: python docs/method_table.py

What a method looks at is seen by watching it judge a random layer.
"""

from __future__ import annotations

import inspect
import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

import baselines  # noqa: F401  (registers its methods)
from buzz import POLICIES, Policy
from buzz.entries import Entries
from buzz.layer import EvictionLayer
from buzz.rope import Rope
from evals.report.methods import order

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "methods.md"
GOLDEN = ROOT / "tests" / "golden"
BEGIN, END = "<!-- methods -->", "<!-- /methods -->"
LAYERS, HEADS, PROMPT, BUDGET = 3, 2, 120, 60
ATTENTION = {
    "sum": "attention, summed",
    "mean": "attention, its mean",
    "step": "attention",
}
SEEN = {  # by what it reads of Entries
    "keys": "keys",
    "keys_from_zero": "keys",
    "values": "values",
    "positions": "positions",
    "queries": "last queries",
    "moments": "mean and covariance of queries",
    "output_projection": "output projection",
    "unrotated": "keys before rotation",
}


class Watched:
    """A method while it reads a prompt and decodes a few tokens, under a budget."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.seen: list[str] = []
        torch.manual_seed(0)
        self.module = nn.Module()
        self.module.o_proj = nn.Linear(4 * HEADS, 8, bias=False)
        self.layers = [self.run(index) for index in range(LAYERS)]

    def run(self, index: int) -> EvictionLayer:
        policy = self.policy.for_layer(index, LAYERS)
        layer = EvictionLayer(policy, Rope(None), index, self.module)
        look = layer._look
        layer._look = lambda *args: self.watch(look(*args))
        for new in (PROMPT, 1, 1):
            entries = torch.randn(3, 1, HEADS, new, 4)
            layer.update(*entries[:2])
            layer.keep_queries(entries[2], 0.5)
            assert layer.store is not None
            shape = layer.view(layer.store.positions).shape
            layer.after_attention(torch.rand(shape) if layer.wants_scores else None)
            if layer.awaits_repetition:
                layer.judge(torch.rand(shape))
        return layer

    def watch(self, entries: Entries) -> Any:
        seen = self.seen

        class Watching:
            def __getattr__(self, name: str) -> Any:
                if name in SEEN:
                    seen.append(name)
                return getattr(entries, name)

        return Watching()

    @cached_property
    def needs(self) -> str:
        policy = self.policy
        found = []
        if policy.needs_scores:
            of = {None: "", 1: " of the last query"}.get(policy.observe, " of the last queries")
            found.append(ATTENTION[policy.score_rule] + of + (", fading" * (policy.decay != 1)))
        if policy.needs_repetition:
            found.append("attention of a second pass")
        found += [text for name, text in SEEN.items() if name in self.seen]
        return "; ".join(found) or "nothing"

    @cached_property
    def evicts(self) -> str:
        if self.policy.evicts != "always":
            return {"never": "never", "prompt": "after the prompt"}[self.policy.evicts]
        lengths = self.policy.lengths([PROMPT] + [1] * 4 * PROMPT)
        every = any(later > held for held, later in zip(lengths, lengths[1:], strict=False))
        return "after the prompt, then " + ("once in several tokens" if every else "at every token")

    @cached_property
    def chooses(self) -> str:
        """What has a choice of its own."""
        kept = [layer.view(layer.store.positions)[0] for layer in self.layers if layer.store]
        lengths = len({layer.longest for layer in self.layers}) > 1
        if any(not torch.equal(head, layer[0]) for layer in kept for head in layer):
            choice = "each KV head"
        elif lengths or any(not torch.equal(layer, kept[0]) for layer in kept):
            choice = "each layer"
        else:
            choice = "all alike"
        return choice + ", sizes by layer" * lengths

    @cached_property
    def refuses(self) -> str:
        found = []
        if self.policy.needs_projection:
            found.append("quantised output projections")
        if self.policy.needs_repetition:
            found.append("layers that do not evict, RoPE that changes, log n")
        return "; ".join(found)


def papers(policy: type[Policy]) -> str:
    text = f"{inspect.getmodule(policy).__doc__} {policy.__doc__}"
    found = dict.fromkeys(re.findall(r"arXiv (\d{4}\.\d{5})", text))
    return ", ".join(f"[{number}](https://arxiv.org/abs/{number})" for number in found)


def originals() -> dict[str, str]:
    """By method: the code that it was compared with, at its commit."""
    found = {}
    for name, record in json.loads((GOLDEN / "methods.json").read_text()).items():
        # Beside what it is built on, the file that is called like the method; else the last.
        own = [one for one in record["sources"] if name.replace("_", "") in _letters(one["path"])]
        source = (own or record["sources"])[-1]
        repository, commit, path = source["repository"], source["commit"], source["path"]
        url = f"https://github.com/{repository}/blob/{commit}/{path}"
        found[name] = f"[{repository.partition('/')[2]} {commit[:8]}]({url})"
    traces = json.loads((GOLDEN / "eviction_traces.json").read_text())
    return {case["policy"]: "recorded evictions" for case in traces} | found


def _letters(path: str) -> str:
    return path.rpartition("/")[2].replace("_", "")


def anchors(page: str) -> dict[str, str]:
    """By method: where the page speaks of it."""
    found = {}
    for heading in re.findall(r"^## (.+)$", page, re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found |= {name.strip(): slug for name in heading.split(",")}
    return found


def table(page: str) -> str:
    heads = ["`method=`", "paper", "compared with", "judges by", "evicts", "chooses", "refuses"]
    code, of = originals(), anchors(page)
    lines = [heads, ["---"] * len(heads)]
    for name in order():
        cls = POLICIES[name]
        watched = Watched(cls() if cls.evicts == "never" else cls().fit(BUDGET))
        own = [watched.needs, watched.evicts, watched.chooses, watched.refuses]
        where = f"#{of[name]}" if name in of else f"{name}.md"  # a page of its own
        lines.append([f"[`{name}`]({where})", papers(cls), code.get(name, ""), *own])
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)


def written(page: str) -> str:
    """The page with the table of now."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(page)}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
