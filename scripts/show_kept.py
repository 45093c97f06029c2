"""Which tokens of one prompt each method keeps: a picture, and a page with the text itself.

    python scripts/show_kept.py --text FILE --methods full,streaming_llm,h2o,buzz --budget 0.25
    python scripts/show_kept.py --text FILE --paper    # also OUT.pdf and OUT.svg, a column wide
    python scripts/show_kept.py --text FILE --granularity page:16 --heads layer

Every method continues the same prompt by the same number of tokens at the same budget. What its
cache holds then is drawn to OUT.png, layer by layer and KV head by KV head. OUT.html has the text
and a slider: which tokens were held after each step, in all layers and heads or in one, and which
were dropped in that step. (BUZZ's cache grows and shrinks: its budget is the most that it holds.)
Without --text or --prompt the page on the `with` statement of Python's manual is taken.
"""

# ruff: noqa: E402
from __future__ import annotations

import os

# Steps of one token are short. If another process uses a core, threads that spin while they wait
# take nine times as long as the computation. This must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, get_args

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import baselines  # noqa: F401  (registers its methods)
from buzz import (
    CACHE_ARGUMENT,
    POLICIES,
    Budget,
    ConfigError,
    Constrained,
    EvictionCache,
    ForkedCache,
    Policy,
)
from buzz.granularity import Heads, PageScore, constrained
from buzz.policy import BudgetBy
from evals.report.kept import HISTORY, SINK, WINDOW, Kept, Pieces, draw, draw_for_paper, page
from evals.run.models import NAMED, complete_model, load_model, named_config
from evals.tasks.data import read_text
from evals.tasks.encoding import encode


@torch.inference_mode()
def keep(
    model: PreTrainedModel,
    ids: list[int],
    policies: Sequence[Policy],
    new_tokens: int,
    positions: str = "cache",
) -> list[Kept]:
    """Continues a prompt greedily, and looks into each method's cache at every step.

    If all layers of the model evict, the prompt is read once for all methods.

    Args:
        ids: the prompt's token ids.
        new_tokens: exactly so many, so that methods are compared at the same length.
        positions: of kept entries, as in :class:`buzz.EvictionCache`.
    """
    first = EvictionCache(model, policies[0], positions=positions)
    if len(policies) > 1 and len(first.evicting) == len(first.layers):
        forked = ForkedCache(model, policies, positions=positions)
        return _follow(model, ids, forked, forked.forks, new_tokens)
    others = (EvictionCache(model, policy, positions=positions) for policy in policies[1:])
    return [_follow(model, ids, cache, [cache], new_tokens)[0] for cache in (first, *others)]


def _follow(
    model: PreTrainedModel,
    ids: list[int],
    cache: EvictionCache,
    forks: Sequence[EvictionCache],
    new_tokens: int,
) -> list[Kept]:
    """Decodes all forks as rows of `cache`."""
    end = getattr(model.generation_config, "eos_token_id", None)
    ends = [] if end is None else [end] if isinstance(end, int) else list(end)
    dropped: list[dict[int, np.ndarray]] = [{} for _ in forks]
    answers: list[torch.Tensor] = []
    given: dict[str, Any] = {CACHE_ARGUMENT: cache}
    tokens = torch.tensor([ids], device=model.device)
    for step in range(new_tokens):
        logits = model(tokens, **given, logits_to_keep=1).logits[:, -1]
        for fork, own in zip(forks, dropped, strict=True):
            _note_dropped(fork, own, step, len(ids) + new_tokens - 1)
        logits[:, ends] = -torch.inf
        answers.append(logits.argmax(-1).expand(len(forks)))
        tokens = answers[-1][:, None]
    written = torch.stack(answers, dim=1).tolist()
    return [_kept(*one, ids) for one in zip(forks, dropped, written, strict=True)]


def _note_dropped(
    cache: EvictionCache, dropped: dict[int, np.ndarray], step: int, tokens: int
) -> None:
    """For each layer that evicts, writes step + 1 for tokens that are no longer held."""
    for index, layer in enumerate(cache.layers):
        if layer in cache.evicting:
            positions = cache.kept_positions(index)[0].cpu().numpy()
            missing = np.ones((len(positions), cache.get_seq_length()), dtype=bool)
            np.put_along_axis(missing, positions, False, axis=1)
            known = dropped.setdefault(index, np.zeros((len(positions), tokens), dtype=np.uint16))
            own = known[:, : missing.shape[1]]
            own[missing & (own == 0)] = step + 1


def _kept(
    cache: EvictionCache, dropped: dict[int, np.ndarray], answer: list[int], ids: list[int]
) -> Kept:
    seen, policy = cache.get_seq_length(), cache.policy
    sized = policy.pages or policy.method if isinstance(policy, Constrained) else policy
    sink = getattr(sized, "sink", 0) * policy.page
    kinds = []
    for index in dropped:
        layer: Any = cache.layers[index]
        positions = cache.kept_positions(index)[0].cpu().numpy()
        # History was kept by an eviction; the window always stays, or came after the last eviction.
        judged = layer.groups[0].cut - layer.policy.num_recent
        kind = np.where(positions < judged, HISTORY, WINDOW)
        kind[:, :sink] = SINK
        own = np.zeros((len(positions), seen), dtype=np.uint8)
        np.put_along_axis(own, positions, kind.astype(np.uint8), axis=1)
        kinds.append(own)
    return Kept(
        policy=policy,
        kinds=np.concatenate(kinds),
        dropped=np.concatenate(list(dropped.values())),
        layers=list(dropped),
        ids=ids + answer,
        prompt_tokens=len(ids),
        entries=statistics.fmean(layer.longest for layer in cache.evicting),
        nbytes=cache.nbytes(),
        full_nbytes=seen * cache.entry_nbytes + cache.window_nbytes(seen),
        evictions=cache.evictions[0],
    )


def pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> Pieces:
    """The text of each token, or of a few tokens that make one character together."""
    found = []
    before = start = 0  # first tokens of the piece before, whose end shows spaces, and of the piece
    for end in range(1, len(ids) + 1):
        known = tokenizer.decode(ids[before:start], clean_up_tokenization_spaces=False)
        text = tokenizer.decode(ids[before:end], clean_up_tokenization_spaces=False)
        # A character has at most 4 bytes: more tokens make no character either.
        if text.endswith("\ufffd") and end - start < 4 and end < len(ids):
            continue
        found.append((text[len(known) :], end - start))
        before, start = start, end
    return found


def method_of(name: str) -> Policy:
    """A method with its defaults, as in run.py.

    Raises:
        ConfigError: there is no such method.
    """
    if name not in POLICIES:
        raise ConfigError("methods", name, f"choose from {', '.join(POLICIES)}")
    return POLICIES[name]()


def model_settings(name: str) -> dict[str, Any]:
    """The model config of a name in configs/model, or of a folder that holds a model.

    Raises:
        ConfigError: it is neither.
    """
    folder = Path(name).expanduser()
    if name in NAMED and name != "hf":
        return named_config(name)
    if not (folder / "config.json").is_file():
        named = ", ".join(known for known in NAMED if known != "hf")
        raise ConfigError("model", name, f"give a folder that holds a model, or one of {named}")
    settings = {**named_config("hf"), "name": folder.resolve().name, "name_or_path": name}
    complete_model(settings)
    return settings


def show(args: argparse.Namespace) -> None:
    """Draws what the command line asks for.

    Raises:
        ConfigError: an argument cannot be served.
    """
    constraints = args.granularity, args.page_score, args.heads
    methods = [constrained(method_of(name), *constraints) for name in args.methods.split(",")]
    budget = Budget(args.budget if args.budget % 1 else int(args.budget), args.budget_by)
    if args.new_tokens < 1:
        raise ConfigError("new-tokens", args.new_tokens, "give a whole number of at least 1")
    text = args.prompt if args.prompt is not None else topics["with"].strip()
    text = read_text(args.text, "text") if args.text else text
    if not text.strip():
        raise ConfigError("text", text, "there is nothing in it")
    settings = model_settings(args.model)
    room = settings["max_length"] - args.new_tokens
    if room < 1:
        raise ConfigError("new-tokens", args.new_tokens, "leaves no room for a prompt")

    model, tokenizer = load_model(settings)
    ids, cut = encode(tokenizer, text, chat=False, limit=room)
    if cut:
        print(f"{cut} tokens were cut from the middle of the prompt", file=sys.stderr)
    fitted = [budget.policy(method.for_tokenizer(tokenizer), len(ids))[0] for method in methods]
    kept = keep(model, ids, fitted, args.new_tokens, args.positions)
    for one in kept:
        print(f"{one.policy.name:>14}  {one.described}")
    picture, document = Path(f"{args.out}.png"), Path(f"{args.out}.html")
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw(kept, picture)
    answers = [pieces(tokenizer, one.ids[len(ids) :]) for one in kept]
    whole = page(kept, pieces(tokenizer, ids), answers, settings["name"])
    document.write_text(whole, encoding="utf-8")
    print(f"picture: {picture}   page: {document}")
    if args.paper:
        paths = [Path(f"{args.out}.{ending}") for ending in ("pdf", "svg")]
        draw_for_paper(kept, paths)
        print(f"for a paper: {' '.join(map(str, paths))}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", metavar="FILE", help="file that holds the prompt")
    source.add_argument("--prompt", help="the prompt itself")
    parser.add_argument("--model", default="smollm2", help="a name in configs/model, or a folder")
    parser.add_argument("--methods", default="full,streaming_llm,h2o,buzz", help="comma-separated")
    parser.add_argument(
        "--budget", type=float, default=0.25, help="fraction of the prompt, or entries"
    )
    parser.add_argument("--budget-by", choices=get_args(BudgetBy), default="peak")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens to generate")
    parser.add_argument(
        "--positions", default="cache", help="of kept entries: in the cache, or true ones"
    )
    parser.add_argument("--granularity", default="token", help="what leaves: token, or page:16")
    parser.add_argument("--page-score", choices=get_args(PageScore), default="mean")
    parser.add_argument(
        "--heads", choices=get_args(Heads), default="each", help="which heads keep the same tokens"
    )
    parser.add_argument("--paper", action="store_true", help="also a PDF and an SVG, a column wide")
    parser.add_argument("--out", default="results/figures/kept", help="files without .png, .html")
    try:
        show(parser.parse_args(arguments))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
