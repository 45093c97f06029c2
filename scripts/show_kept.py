"""Which tokens of one prompt each method keeps: a picture, and a page with the text itself.

    python scripts/show_kept.py --text FILE --methods full,streaming_llm,h2o,buzz --budget 0.25

Every method continues the same prompt by the same number of tokens at the same budget. What its
cache holds then is drawn to OUT.png, layer by layer and KV head by KV head, and written to
OUT.html, where each token is shaded by the share of all heads that kept it. (BUZZ's cache grows and
shrinks: its budget is the most that it holds, and this is one moment.) Without --text or --prompt
the page on the `with` statement of Python's manual is taken.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import get_args

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import baselines  # noqa: F401  (registers its methods)
from buzz import CACHE_ARGUMENT, POLICIES, Budget, ConfigError, EvictionCache, Policy
from buzz.policy import BudgetBy
from evals.run.models import NAMED, load_model, named_config
from evals.tasks.encoding import encode

EVICTED, SINK, HISTORY, WINDOW = range(4)
SHADES = {  # kind -> its color and its name; shades that colorblind readers tell apart as well
    SINK: ("#D55E00", "sink"),
    HISTORY: ("#08519C", "history: chosen"),
    WINDOW: ("#9ECAE1", "window: recent, not thinned yet"),
    EVICTED: ("#FFFFFF", "evicted"),
}


@dataclass(frozen=True)
class Kept:
    """What one method's cache holds at the end.

    Attributes:
        policy: the method.
        kinds: uint8 [layers * kv_heads, tokens seen], layer by layer: EVICTED, SINK, HISTORY or
            WINDOW.
        kv_heads: per layer.
        ids: token ids of prompt and answer; the last was never fed back, so the cache has not seen
            it.
        prompt_tokens: how many of them are the prompt's.
        entries: held per head, on average over the layers.
        nbytes: of their keys and values.
        full_nbytes: of those of all tokens seen.
        evictions: steps that evicted.
    """

    policy: Policy
    kinds: np.ndarray
    kv_heads: int
    ids: list[int]
    prompt_tokens: int
    entries: float
    nbytes: int
    full_nbytes: int
    evictions: int

    @property
    def share(self) -> np.ndarray:
        """Share of heads that kept each token, float64 [tokens seen]."""
        return (self.kinds != EVICTED).mean(axis=0)

    @property
    def parameters(self) -> str:
        own = (field.name for field in dataclasses.fields(POLICIES[self.policy.name]))
        return ", ".join(f"{name}={getattr(self.policy, name)}" for name in own)

    @property
    def described(self) -> str:
        """How much is held, in words."""
        evictions = f"{self.evictions} eviction{'' if self.evictions == 1 else 's'}"
        return (
            f"{self.entries:g} of {self.kinds.shape[1]} entries, {self.nbytes / 1e6:.1f} MB of KV,"
            f" {self.nbytes / self.full_nbytes:.2f} of full, {evictions}"
        )


@torch.inference_mode()
def keep(
    model: PreTrainedModel,
    ids: list[int],
    policy: Policy,
    new_tokens: int,
    positions: str = "cache",
) -> Kept:
    """Continue a prompt by `new_tokens`, greedily, and look into the cache.

    Args:
        ids: the prompt's token ids.
        new_tokens: never fewer, so that methods are compared at the same length.
        positions: of kept entries, as in :class:`buzz.EvictionCache`.
    """
    cache = EvictionCache(model, policy, positions=positions)
    output = model.generate(
        torch.tensor([ids], device=model.device),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64, device=model.device),
        **{CACHE_ARGUMENT: cache},
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
    )
    seen = cache.get_seq_length()
    kinds = []
    for index, layer in enumerate(cache.layers):
        if layer in cache.evicting:
            positions = cache.kept_positions(index)[0].cpu().numpy()
            # What an eviction has judged, and spared; the rest waits its turn, or always stays.
            judged = layer.groups[0].cut - layer.policy.protected
            kind = np.where(positions < judged, HISTORY, WINDOW)
            kind[:, : getattr(policy, "sink", 0)] = SINK
            own = np.zeros((len(positions), seen), dtype=np.uint8)
            np.put_along_axis(own, positions, kind.astype(np.uint8), axis=1)
            kinds.append(own)
    return Kept(
        policy=policy,
        kinds=np.concatenate(kinds),
        kv_heads=len(kinds[0]),
        ids=output[0].tolist(),
        prompt_tokens=len(ids),
        entries=statistics.fmean(cache.lengths),
        nbytes=cache.nbytes(),
        full_nbytes=seen * cache.entry_nbytes,
        evictions=cache.evictions[0],
    )


def draw(kept: Sequence[Kept], path: Path) -> None:
    """One panel per method: tokens across, layers and their heads down."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch

    plt.rcParams.update({"font.size": 10, "axes.linewidth": 0.6})
    palette = np.array([to_rgb(SHADES[kind][0]) for kind in range(4)])
    height = 2 if len(kept) <= 8 else 1.3  # of many methods each gets less
    figure = plt.figure(figsize=(12, 1 + height * len(kept)), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.03, hspace=0)
    grid = figure.add_gridspec(2 * len(kept), 1, height_ratios=[1, 8] * len(kept))
    width = max(method.kinds.shape[1] for method in kept)
    for number, method in enumerate(kept):
        rows, tokens = method.kinds.shape
        strip = figure.add_subplot(grid[2 * number])
        panel = figure.add_subplot(grid[2 * number + 1])
        strip.imshow(
            method.share[None],
            cmap="Greys",
            vmin=0,
            vmax=1,
            extent=(0, tokens, 0, 1),
            aspect="auto",
        )
        strip.set_yticks([0.5], ["share"], fontsize=8)
        strip.set_xticks([])
        strip.set_title(f"{method.policy.name}: {method.described}", loc="left", fontsize=10)
        panel.imshow(palette[method.kinds], extent=(0, tokens, rows, 0), aspect="auto")
        layers = rows // method.kv_heads
        shown = range(0, layers, max(1, layers // 5))
        panel.set_yticks([i * method.kv_heads for i in shown], [f"layer {i}" for i in shown])
        panel.axvline(method.prompt_tokens, color="black", lw=0.8, ls=(0, (4, 3)))
        for axis in (strip, panel):
            axis.set_xlim(0, width)
            axis.tick_params(length=2)
        if number < len(kept) - 1:
            panel.set_xticklabels([])
    panel.set_xlabel(
        "token position (dashed: the prompt's end); one line per KV head, "
        f"{kept[0].kv_heads} per layer; share: of heads that kept the token"
    )
    handles = [
        Patch(facecolor=color, edgecolor="#808080", lw=0.6, label=name)
        for color, name in SHADES.values()
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=200)
    plt.close(figure)


def pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> Iterator[tuple[str, slice]]:
    """The text of each token, where necessary of a few that make one character only together."""
    before = start = 0  # the token that decoding begins with, for spaces to come out; the piece's
    for end in range(1, len(ids) + 1):
        known = tokenizer.decode(ids[before:start], clean_up_tokenization_spaces=False)
        text = tokenizer.decode(ids[before:end], clean_up_tokenization_spaces=False)
        # A character has at most 4 bytes; a longer wait would be for one that is no character.
        if text.endswith("\ufffd") and end - start < 4 and end < len(ids):
            continue
        yield text[len(known) :], slice(start, end)
        before, start = start, end


Span = tuple[str, int, str]  # text, shade from 0 to 10, hint


def page(kept: Sequence[Kept], tokenizer: PreTrainedTokenizerBase, model: str) -> str:
    """The whole HTML page; it loads nothing, and what comes from the model is escaped."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True
    )
    return templates.get_template("show_kept.html").render(
        kept=kept,
        model=model,
        answer=len(kept[0].ids) - kept[0].prompt_tokens,
        spans=lambda method: _parts(method, tokenizer),
    )


def _parts(kept: Kept, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, list[Span]]]:
    """The prompt's and the answer's tokens."""
    heads, tokens = kept.kinds.shape
    share = np.append(kept.share, 0)  # the last token of the answer was never fed back

    def spans(first: int, ids: list[int]) -> list[Span]:
        marked = []
        for text, where in pieces(tokenizer, ids):
            part = share[first + where.start : first + where.stop].mean()
            hint = f"token {first + where.start}: held by {part * heads:.0f} of {heads} heads"
            if first + where.start == tokens:
                hint = f"token {tokens}: the last, not in the cache yet"
            marked.append((text, int(np.ceil(10 * part)), hint))
        return marked

    size = kept.prompt_tokens
    return [("Prompt", spans(0, kept.ids[:size])), ("Generated", spans(size, kept.ids[size:]))]


def read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("text", path, f"give a UTF-8 text file ({error})") from error


def show(args: argparse.Namespace) -> None:
    """
    Raises:
        ConfigError: something in `args` cannot be served.
    """
    names = args.methods.split(",")
    for name in names:
        if name not in POLICIES:
            raise ConfigError("methods", name, f"choose from {', '.join(POLICIES)}")
    budget = Budget(args.budget if args.budget % 1 else int(args.budget), args.budget_by)
    if args.new_tokens < 1:
        raise ConfigError("new-tokens", args.new_tokens, "give a whole number of at least 1")
    text = args.prompt if args.prompt is not None else topics["with"].strip()
    text = read_text(args.text) if args.text else text
    if not text.strip():
        raise ConfigError("text", text, "there is nothing in it")
    if args.model not in NAMED:
        raise ConfigError("model", args.model, f"choose one of {', '.join(NAMED)}")
    settings = named_config(args.model)
    room = settings["max_length"] - args.new_tokens
    if room < 1:
        raise ConfigError("new-tokens", args.new_tokens, "leaves no room for a prompt")

    model, tokenizer = load_model(settings)
    ids, cut = encode(tokenizer, text, chat=False, limit=room)
    if cut:
        print(f"{cut} tokens were cut from the middle of the prompt", file=sys.stderr)
    policies = [
        budget.policy(POLICIES[name]().for_tokenizer(tokenizer), len(ids))[0] for name in names
    ]
    kept = []
    for policy in policies:
        kept.append(keep(model, ids, policy, args.new_tokens, args.positions))
        print(f"{policy.name:>14}  {kept[-1].described}")
    picture, document = Path(f"{args.out}.png"), Path(f"{args.out}.html")
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw(kept, picture)
    document.write_text(page(kept, tokenizer, settings["name"]), encoding="utf-8")
    print(f"picture: {picture}   page: {document}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", metavar="FILE", help="file that holds the prompt")
    source.add_argument("--prompt", help="the prompt itself")
    parser.add_argument("--model", default="smollm2", help="a name in configs/model")
    parser.add_argument("--methods", default="full,streaming_llm,h2o,buzz", help="comma-separated")
    parser.add_argument(
        "--budget", type=float, default=0.25, help="fraction of the prompt, or entries"
    )
    parser.add_argument("--budget-by", choices=get_args(BudgetBy), default="peak")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens to generate")
    parser.add_argument(
        "--positions", default="cache", help="of kept entries: in the cache, or true ones"
    )
    parser.add_argument("--out", default="results/figures/kept", help="files without .png, .html")
    try:
        show(parser.parse_args(arguments))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
