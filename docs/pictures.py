"""Draws the pictures of docs/img from the code itself: python docs/pictures.py [NAME...]

Methods from the policies, the layers from the import statements.
"""

from __future__ import annotations

import sys
from pathlib import Path

import grimp
import matplotlib
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from baselines import FullPolicy, H2OPolicy, SnapKVPolicy, StreamingLLMPolicy
from buzz import Budget, BuzzPolicy

IMAGES = Path(__file__).parent / "img"
SINK, OLD, NEW, WINDOW, GONE = "#D55E00", "#08519C", "#56B4E9", "#9ECAE1", "#FFFFFF"
POLICY = BuzzPolicy(sink=2, window=6, stride=4, threshold=16)
SAMPLED, HELD = 6, 2 + 6 + 12 + 6  # sink, old, new, window


def row(axes: Axes, y: float, colors: list[str]) -> None:
    for place, color in enumerate(colors):
        axes.add_patch(Rectangle((place, y), 0.92, 0.92, facecolor=color, edgecolor="#444444"))


def beehive() -> None:
    """One eviction: what stands where before and after it."""
    torch.manual_seed(3)
    scores = torch.rand(1, 1, HELD) * 0.9 + 0.1
    index = POLICY.select(HELD, SAMPLED, scores)[0, 0].tolist()
    kept = index + list(range(HELD - POLICY.window, HELD))
    colors = [SINK] * 2 + [OLD] * SAMPLED + [NEW] * 12 + [WINDOW] * 6

    figure, axes = plt.subplots(figsize=(9.2, 4.2))
    for place in range(8, 20):
        height = float(scores[0, 0, place])
        best = place in kept
        bar = Rectangle((place + 0.2, 5.05), 0.5, height, facecolor=NEW if best else "#CCCCCC")
        axes.add_patch(bar)
    row(axes, 4, colors)
    row(axes, 0, [colors[place] for place in kept])
    for place, origin in enumerate(kept):
        axes.plot([origin + 0.46, place + 0.46], [4, 0.92], color=colors[origin], linewidth=0.9)
    for start, size in [(2, 2), (4, 2), (6, 2), (8, 4), (12, 4), (16, 4)]:
        axes.plot([start, start, start + size - 0.08, start + size - 0.08], [3.8, 3.65, 3.65, 3.8],
                  color="#444444", linewidth=1)  # fmt: skip
    labels = {
        1: "sink",
        5: f"old history:\none of {POLICY.old_stride}",
        14: f"new history:\nbest score of {POLICY.stride}",
        23: "window",
    }
    for x, text in labels.items():
        axes.text(x, 6.2, text, ha="center")
    axes.text(-0.4, 4.46, "before", ha="right", va="center")
    axes.text(-0.4, 0.46, "after", ha="right", va="center")
    after = sum(kept[i] < HELD - POLICY.window for i in range(2, len(kept)))
    axes.text(2 + after / 2, -0.6, "old history of the next eviction", ha="center", fontsize=9)
    axes.set(xlim=(-3, HELD + 0.2), ylim=(-1, 7.2))
    axes.axis("off")
    save(figure, "beehive")


def lengths() -> None:
    """Entries held while 1,200 tokens follow a prompt of 1,000."""
    policies = {
        "full": (FullPolicy(), "#000000"),
        "snapkv": (SnapKVPolicy(capacity=250), "#CC79A7"),
        "buzz": (Budget(250).policy(BuzzPolicy(), 1000)[0], SINK),
        "h2o": (H2OPolicy(heavy=125, recent=125), "#009E73"),
        "streaming_llm": (StreamingLLMPolicy(window=246), "#0072B2"),
    }
    figure, axes = plt.subplots(figsize=(7.5, 3.6))
    for name, (policy, color) in policies.items():
        dashed = (0, (4, 3)) if name == "streaming_llm" else "-"
        held = policy.lengths([1000] + [1] * 1200)
        axes.plot(held, label=name, color=color, linestyle=dashed, linewidth=1.4)
    axes.set(xlabel="new tokens", ylabel="entries held", xlim=(0, 1200), ylim=(0, 1450))
    axes.legend(frameon=False, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1))
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, "lengths")


def positions() -> None:
    """The same kept tokens, by true position and by cache position."""
    kept = [0, 1, 6, 9, 13, 18, 19, 20, 21]
    colors = [SINK] * 2 + [OLD] * 3 + [WINDOW] * 4
    figure, axes = plt.subplots(figsize=(8, 2.6))
    row(axes, 2, [GONE] * 22)
    shift = 22 - len(kept)
    for place, (origin, color) in enumerate(zip(kept, colors, strict=True)):
        for x, y, text in [(origin, 2, origin), (place + shift, 0, place + shift)]:
            axes.add_patch(Rectangle((x, y), 0.92, 0.92, facecolor=color, edgecolor="#444444"))
            white = color in (SINK, OLD)
            axes.text(x + 0.46, y + 0.46, str(text), ha="center", va="center", fontsize=8,
                      color="white" if white else "black")  # fmt: skip
        axes.plot([origin + 0.46, place + shift + 0.46], [2, 0.92], color="#888888", linewidth=0.8)
    axes.add_patch(Rectangle((22, 2), 0.92, 0.92, facecolor="none", edgecolor="#444444"))
    axes.add_patch(Rectangle((22, 0), 0.92, 0.92, facecolor="none", edgecolor="#444444"))
    for y in (2, 0):
        axes.text(22.46, y + 0.46, "22", ha="center", va="center", fontsize=8)
    axes.text(-0.4, 2.46, "token", ha="right", va="center")
    axes.text(-0.4, 0.46, "attended at", ha="right", va="center")
    axes.text(22.46, 3.2, "next", ha="center", fontsize=9)
    axes.set(xlim=(-4, 23.2), ylim=(-0.3, 3.7))
    axes.axis("off")
    save(figure, "positions")


def imports() -> dict[str, set[str]]:
    """Which folders each folder of the code imports, from its import statements."""
    graph = grimp.build_graph("buzz", "baselines", "evals", cache_dir=None)
    found: dict[str, set[str]] = {}
    for module in sorted(graph.modules - {"evals"}):
        own = folder(module)
        others = {folder(one) for one in graph.find_modules_directly_imported_by(module)}
        found.setdefault(own, set()).update(others - {own, "evals"})
    return found


def folder(module: str) -> str:
    """evals.run.plan -> evals/run; the other packages are one folder each."""
    parts = module.split(".")
    return "/".join(parts[:2]) if parts[0] == "evals" else parts[0]


def as_text(edges: dict[str, set[str]]) -> str:
    return "; ".join(f"{one} -> {', '.join(sorted(edges[one])) or 'nothing'}" for one in edges)


def layers() -> None:
    """The folders, each above all that it imports; what follows from other arrows has none."""
    edges = imports()

    def height(name: str) -> int:
        return 1 + max(map(height, edges[name]), default=-1)

    def reached(name: str) -> set[str]:
        return edges[name].union(*map(reached, edges[name]))

    rows: dict[int, list[str]] = {}
    for name in edges:
        rows.setdefault(height(name), []).append(name)
    places = {
        name: (3 * (i - (len(row) - 1) / 2), 1.3 * y)
        for y, row in rows.items()
        for i, name in enumerate(row)
    }
    figure, axes = plt.subplots(figsize=(6.4, 1.0 * len(rows)))
    for name, (x, y) in places.items():
        box = {"boxstyle": "round,pad=0.5", "facecolor": "#F4F4F4", "edgecolor": "#444444"}
        axes.text(x, y, name, ha="center", va="center", bbox=box, zorder=2)
        for other in sorted(edges[name] - set().union(*map(reached, edges[name]))):
            # One that passes a row goes around it.
            bent = 0 if height(name) - height(other) == 1 else 0.5 if x < 0 else -0.5
            arrow = {"arrowstyle": "-|>", "color": "#7FA8C9", "shrinkA": 14, "shrinkB": 16}
            arrow["connectionstyle"] = f"arc3,rad={bent}"
            axes.annotate("", places[other], (x, y), arrowprops=arrow, zorder=1)
    axes.set(xlim=(-5, 5), ylim=(-0.7, 1.3 * (len(rows) - 1) + 0.7))
    axes.axis("off")
    save(figure, "layers", as_text(edges))


def save(figure: plt.Figure, name: str, description: str | None = None) -> None:
    metadata = {"Date": None, "Description": description}
    figure.savefig(IMAGES / f"{name}.svg", bbox_inches="tight", metadata=metadata)
    plt.close(figure)


if __name__ == "__main__":
    matplotlib.rcParams.update({"svg.hashsalt": "buzz", "font.size": 10})
    IMAGES.mkdir(exist_ok=True)
    for picture in sys.argv[1:] or ("beehive", "lengths", "positions", "layers"):
        globals()[picture]()
