"""Which tokens caches hold: a figure, a figure for a paper, and a page with text and a slider."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch

from buzz import Constrained, Policy
from buzz.policy import parameters
from evals.report.figures import plt
from evals.report.methods import style_of
from evals.report.page import templates

EVICTED, SINK, HISTORY, WINDOW = range(4)
SHADES = {  # color and name of each kind; colorblind readers can tell them apart
    SINK: ("#D55E00", "sink"),
    HISTORY: ("#08519C", "history: chosen"),
    WINDOW: ("#9ECAE1", "window: recent, not thinned yet"),
    EVICTED: ("#FFFFFF", "evicted"),
}
POSITION, DASHED = "token position (dashed: the prompt's end)", (0, (4, 3))
# A paper's figure: its width in inches (a column); the number of tokens that a printer can tell
# apart across it; the shades of a layer's share of heads, from none to all.
COLUMN, ACROSS = 3.3, 330
BLUES = ("#FFFFFF", "#C6DBEF", "#6BAED6", "#2171B5", "#08306B")


@dataclass(frozen=True)
class Kept:
    """What one method's cache held after each step. Step 0 is the prompt; each token is a step.

    Attributes:
        policy: the method.
        kinds: uint8 [layers * kv_heads, tokens seen], layer by layer: EVICTED, SINK, HISTORY or
            WINDOW at the end.
        dropped: uint16 of the same shape: 1 + the step in which the token was dropped; 0: it is
            held at the end.
        layers: indices of the layers that evict.
        ids: token ids of prompt and answer. The cache has not seen the last one.
        prompt_tokens: number of the prompt's tokens.
        entries: mean number of entries per head at the end.
        nbytes: bytes of keys, values and recurrent states in all layers.
        full_nbytes: the bytes that a full cache would hold.
        evictions: number of steps that evicted.
    """

    policy: Policy
    kinds: np.ndarray
    dropped: np.ndarray
    layers: list[int]
    ids: list[int]
    prompt_tokens: int
    entries: float
    nbytes: int
    full_nbytes: int
    evictions: int

    @property
    def kv_heads(self) -> int:
        """KV heads of a layer."""
        return len(self.kinds) // len(self.layers)

    @property
    def share(self) -> np.ndarray:
        """The share of heads that kept each token: float64 [tokens seen]."""
        return (self.kinds != EVICTED).mean(axis=0)

    @property
    def parameters(self) -> str:
        """Those of the method, and what constrains it."""
        own = parameters(self.policy)
        if isinstance(self.policy, Constrained):
            own = own.pop("method") | {name: own[name] for name in ("granularity", "heads")}
        return ", ".join(f"{name}={value}" for name, value in own.items())

    @property
    def described(self) -> str:
        """What is held at the end, in words."""
        evictions = f"{self.evictions} eviction{'' if self.evictions == 1 else 's'}"
        policy, under = self.policy, ""
        if isinstance(policy, Constrained):
            under = f", granularity={policy.granularity} heads={policy.heads}"
        return (
            f"{self.entries:g} of {self.kinds.shape[1]} entries, {self.nbytes / 1e6:.1f} MB of KV,"
            f" {self.nbytes / self.full_nbytes:.2f} of full, {evictions}{under}"
        )


def draw(kept: Sequence[Kept], path: Path) -> None:
    """Draws a panel per method: tokens across, layers and their heads down."""
    palette = np.array([to_rgb(SHADES[kind][0]) for kind in range(4)])
    height = 2 if len(kept) <= 8 else 1.3  # of many methods each gets less
    with plt.rc_context({"font.size": 10, "axes.linewidth": 0.6}):
        figure = plt.figure(figsize=(12, 1 + height * len(kept)), layout="constrained")
        figure.get_layout_engine().set(h_pad=0.03, hspace=0)
        grid = figure.add_gridspec(2 * len(kept), 1, height_ratios=[1, 8] * len(kept))
        width = max(method.kinds.shape[1] for method in kept)
        for number, method in enumerate(kept):
            rows, tokens = method.kinds.shape
            strip = figure.add_subplot(grid[2 * number])
            panel = figure.add_subplot(grid[2 * number + 1])
            shades: dict[str, Any] = {"cmap": "Greys", "vmin": 0, "vmax": 1, "aspect": "auto"}
            strip.imshow(method.share[None], **shades, extent=(0, tokens, 0, 1))
            strip.set_yticks([0.5], ["share"], fontsize=8)
            strip.set_xticks([])
            strip.set_title(f"{method.policy.name}: {method.described}", loc="left", fontsize=10)
            panel.imshow(palette[method.kinds], extent=(0, tokens, rows, 0), aspect="auto")
            shown = range(0, len(method.layers), max(1, len(method.layers) // 5))
            names = [f"layer {method.layers[i]}" for i in shown]
            panel.set_yticks([i * method.kv_heads for i in shown], names)
            panel.axvline(method.prompt_tokens, color="black", lw=0.8, ls=DASHED)
            for axis in (strip, panel):
                axis.set_xlim(0, width)
                axis.tick_params(length=2)
            if number < len(kept) - 1:
                panel.set_xticklabels([])
        panel.set_xlabel(
            f"{POSITION}; one line per KV head, {kept[0].kv_heads} per layer; share: of heads that"
            " kept the token"
        )
        _legend(figure, SHADES.values(), 0.6)
        figure.savefig(path, dpi=200)
        plt.close(figure)


def draw_for_paper(kept: Sequence[Kept], paths: Sequence[Path]) -> None:
    """Draws a figure of vectors, a column wide: a panel per method, tokens across, layers down.

    Shades say which share of a layer's heads holds a token.
    """
    # Type 42: text stays text, as publishers ask.
    style = {"font.size": 7, "axes.linewidth": 0.5, "pdf.fonttype": 42, "svg.fonttype": "none"}
    with plt.rc_context(style):
        size = (COLUMN, 0.55 + 0.62 * len(kept))
        figure, axes = plt.subplots(
            len(kept), 1, figsize=size, sharex=True, squeeze=False, layout="constrained"
        )
        figure.get_layout_engine().set(h_pad=0.02, w_pad=0.02, hspace=0)
        for axis, method in zip(axes[:, 0], kept, strict=True):
            _layers(axis, method)
        axes[-1, 0].set_xlabel(POSITION, labelpad=1)
        figure.supylabel("layer", fontsize=7)
        look = {"title_fontsize": 7, "fontsize": 6.5, "handlelength": 1, "columnspacing": 1}
        look |= {"handletextpad": 0.4, "borderpad": 0}
        look |= {"title": "heads of the layer that hold the token"}
        _legend(
            figure, zip(BLUES, ("0", "1–25", "26–50", "51–75", "76–100%"), strict=True), 0.4, **look
        )
        for path in paths:
            figure.savefig(path)
        plt.close(figure)


def _legend(figure: Any, shades: Iterable[tuple[str, str]], line: float, **look: Any) -> None:
    handles = [
        Patch(facecolor=color, edgecolor="#808080", lw=line, label=name) for color, name in shades
    ]
    where = {"loc": "outside upper center", "ncols": len(handles), "frameon": False}
    figure.legend(handles=handles, **where, **look)


def _layers(axis: Any, kept: Kept) -> None:
    """Draws each run of equal shades as one rectangle, which is sharp at any size."""
    tokens, layers = kept.kinds.shape[1], len(kept.layers)
    held = (kept.kinds != EVICTED).reshape(layers, -1, tokens).mean(axis=1)
    edges = np.unique(np.linspace(0, tokens, min(ACROSS, tokens) + 1).astype(int))
    shares = np.add.reduceat(held, edges[:-1], axis=1) / np.diff(edges)
    levels = np.ceil(4 * shares - 1e-9).astype(int)
    found: dict[int, list[list[tuple[float, float]]]] = {}
    for row, line in enumerate(levels):
        ends = [0, *(np.flatnonzero(np.diff(line)) + 1), len(line)]
        for first, end in zip(ends, ends[1:], strict=False):
            left, right = edges[first], edges[end]
            box = [(left, row), (right, row), (right, row + 1), (left, row + 1)]
            found.setdefault(int(line[first]), []).append(box)
    for level, boxes in found.items():
        if level:  # 0, held by no head, is the paper's white
            axis.add_collection(PolyCollection(boxes, facecolor=BLUES[level], edgecolor="none"))
    axis.axvline(kept.prompt_tokens, color="#D55E00", lw=0.7, ls=DASHED)
    axis.set(xlim=(0, tokens), ylim=(layers, 0))
    axis.set_yticks([0.5, layers - 0.5], [str(kept.layers[0]), str(kept.layers[-1])], fontsize=6)
    axis.tick_params(length=1.5, width=0.5, pad=1.5)
    title = f"{style_of(kept.policy.name).label}: {kept.entries:g} of {tokens} entries"
    axis.set_title(title, loc="left", fontsize=7, pad=2)


Pieces = list[tuple[str, int]]  # texts, each with its number of tokens


def page(kept: Sequence[Kept], prompt: Pieces, answers: Sequence[Pieces], model: str) -> str:
    """Renders the HTML page. It loads nothing, and the model's text is escaped.

    Args:
        prompt: the text that all methods read.
        answers: each method's own text.
    """
    steps = kept[0].kinds.shape[1] - kept[0].prompt_tokens
    # Deflated bytes: one per value, or two if there are more than 254 steps.
    wide = steps + 1 > 255
    methods = []
    for one, answer in zip(kept, answers, strict=True):
        packed = zlib.compress(one.dropped.astype("<u2" if wide else "u1").tobytes())
        dropped = base64.b64encode(packed).decode()
        methods.append({"name": one.policy.name, "answer": _apart(answer), "dropped": dropped})
    data = {
        "layers": kept[0].layers,
        "heads": kept[0].kv_heads,
        "prompt": _apart(prompt),
        "promptTokens": kept[0].prompt_tokens,
        "steps": steps,
        "wide": wide,
        "methods": methods,
    }
    return templates().get_template("kept.html").render(kept=kept, model=model, data=data)


def _apart(pieces: Pieces) -> dict[str, Any]:
    """The texts, and the sizes other than 1 by place, which take less room than pairs."""
    texts, sizes = zip(*pieces, strict=True)
    return {"texts": texts, "several": {str(i): size for i, size in enumerate(sizes) if size != 1}}
