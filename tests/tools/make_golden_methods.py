"""Which tokens the originals of the eviction methods keep, by running their own code.

    python tests/tools/make_golden_methods.py FOLDER [--out PREFIX] [METHOD ...]

FOLDER holds clones of the repositories below, each as `OWNER+NAME`, with their history. Nothing of
them is in this file: named classes and functions are read at a fixed commit and executed as they
stand, inside a decoder whose attention is the original's. That decoder runs a tiny Llama of random
weights on random tokens, all of them from numpy's frozen `RandomState`, so that a seed is all there
is to store. Entries stay at their true positions, as in the originals.

Writes PREFIX.npz, one uint8 array per method, and PREFIX.json: what was run (repository, commit,
file, names), on which model, and the cases {length, prompt_seed, budget, ...} in the array's order.
A case is [layers, heads, length + steps]: the step after which a token is no longer held, 0 for the
prompt's, s for the s-th decoded token's, 255 for never. Equal scores at a cut are settled for the
earliest entry, which `topk` leaves open; prompts are chosen so that no other cut is close.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import json
import logging
import math
import subprocess
import sys
import tempfile
import typing
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv, rotate_half

PREFIX = Path(__file__).resolve().parents[1] / "golden/methods"

COMMITS = {
    "Dirac-Notation/A2SF": "00a617fa96fdae7cd9ed7c43b179dd45b43e01e5",
    "FFY0/DefensiveKV": "9251b95e7e282a6c18dd98ef6318dd489e639a58",
    "FMInference/H2O": "ac75c2a8a9e76832b2a4139b9363373b56336bfb",
    "FasterDecoding/SnapKV": "e216ddc84c5bd210378cbdbbba12ba02102aa640",
    "NVIDIA/kvpress": "8bb29b9c3078452a86d692f29123fa6c793e2b05",
    "WeianMao/triattention": "c3744ee6a50522a1559a577f85aef2b165a344f2",
    "Zefan-Cai/KVCache-Factory": "c97f9d706d63d1b56e980f8b81b2a924c21162b3",
    "Zefan-Cai/R-KV": "d15c9767e67c2bd9807128fecc35223fa2484a69",
    "guozhiyu/vatp": "39ea686c9e5d038d9ffbea883218bfdbc9c28807",
    "schwartz-lab-NLP/TOVA": "9c7d09bfff64cfc92cfb5f9d7e138cb04866e5a7",
}
# The last version of A2SF that follows its paper: it decays by the age of a query, while decoding
# too. Later ones count sentences (2025-05-15), and then evict after the prompt alone (2026-04-07).
A2SF_OF_THE_PAPER = "b2f12442529f2cf067a7560095c2e23e820e5499"

VOCAB = 512
LAYERS = 4  # of which three parts are no whole number of entries: PyramidKV rounds
HEADS = {"gqa": 2, "mha": 4}  # KV heads, for 4 query heads
WEIGHT_SEED = 14
LENGTHS = (40, 64, 97, 128, 160, 200)
BUDGETS = (16, 24, 32)
STEPS = 32  # decoded tokens, where the original evicts while decoding
EVERY = 16  # and where it does so once in so many
ALIGNED = (49, 65, 97, 129, 161, 193)  # one more than a multiple: the prompt's cut begins a period
SMALLEST_GAP = 5e-5  # of the scores at a cut, relative: far above float32's rounding
STAYS = 255


# --- the model and its prompts ------------------------------------------------------------------


def model_of(kind: str) -> LlamaForCausalLM:
    """The tiny Llama, ``gqa`` (2 KV heads for 4 query heads) or ``mha``: float32, eval."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=HEADS[kind],
        max_position_embeddings=512,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).float().eval()
    random = np.random.RandomState(WEIGHT_SEED)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if name.endswith("norm.weight"):
                weight.fill_(1)
            else:
                weight.copy_(torch.from_numpy(0.2 * random.standard_normal(weight.shape)))
    model.generation_config.eos_token_id = None
    return model


def tokens_of(length: int, seed: int) -> Tensor:
    """Token ids, int64 [length + STEPS]: a prompt, and what is decoded after it.

    None comes twice: the first layer's keys and values of equal tokens would score alike.
    """
    order = np.random.RandomState(seed).permutation(VOCAB)
    return torch.from_numpy(order[: length + STEPS]).long()


def recorded(name: str, prefix: Path = PREFIX) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """The cases of one method: parameters, and its array [layers, kv_heads, length + steps]."""
    record = json.loads(prefix.with_suffix(".json").read_text())[name]
    numbers = np.load(prefix.with_suffix(".npz"))[name]
    for case in record["cases"]:
        shape = (LAYERS, HEADS[record["model"]], case["length"] + record["steps"])
        left, numbers = np.split(numbers, [math.prod(shape)])
        yield {**record["parameters"], **case}, left.reshape(shape)


def held_after(left: np.ndarray, length: int, step: int) -> np.ndarray:
    """Which tokens are held after a step: bool [layers, kv_heads, length + step].

    Args:
        left: one case, uint8 [layers, kv_heads, length + steps].
        length: tokens of its prompt.
        step: 0 is the prompt.
    """
    return left[..., : length + step] > step


# --- the originals' code ------------------------------------------------------------------------


class Repositories:
    """Reads definitions out of clones, at the commits above.

    Attributes:
        used: what :meth:`pick` has read since it was last emptied.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.used: list[dict[str, Any]] = []

    def text(self, repository: str, path: str, commit: str) -> str:
        clone = self.folder / repository.replace("/", "+")
        show = ["git", "-C", str(clone), "show", f"{commit}:{path}"]
        shown = subprocess.run(show, capture_output=True, text=True)
        if shown.returncode:
            raise SystemExit(f"error: {repository}: {shown.stderr.strip()}")
        return shown.stdout

    def pick(self, repository: str, path: str, *names: str, commit: str = "", **given: Any) -> Any:
        """Execute the definitions called `names` of one file, as they stand.

        Args:
            given: what else the file imports.

        Returns:
            The definition, or a namespace with them if there are several names.
        """
        commit = commit or COMMITS[repository]
        tree = ast.parse(self.text(repository, path, commit))
        kinds = (ast.ClassDef, ast.FunctionDef)
        wanted = [node for node in tree.body if isinstance(node, kinds) and node.name in names]
        if missing := set(names) - {node.name for node in wanted}:
            raise SystemExit(f"error: {repository}: {path} defines no {', '.join(missing)}")
        source = {"repository": repository, "commit": commit, "path": path, "names": list(names)}
        if source not in self.used:
            self.used.append(source)
        space = {**vars(typing), **USUAL, **given, "__name__": __name__}
        flags = annotations.compiler_flag  # types are named that nobody imports here
        exec(compile(ast.Module(wanted, []), path, "exec", flags, dont_inherit=True), space)
        found = {name: space[name] for name in names}
        return SimpleNamespace(**found) if len(found) > 1 else found[names[0]]

    def beside(self, repository: str, path: str, *names: str, **given: Any) -> dict[str, Any]:
        """Definitions by name, for a file that imports them."""
        found = self.pick(repository, path, *names, **given)
        return vars(found) if len(names) > 1 else {names[0]: found}


SILENT = logging.getLogger("originals")
SILENT.disabled = True

# What their files import, unless `pick` is given it.
USUAL = {
    "F": functional,
    "contextmanager": contextlib.contextmanager,
    "dataclass": dataclass,
    "defaultdict": defaultdict,
    "logger": SILENT,
    "math": math,
    "nn": nn,
    "repeat_kv": repeat_kv,
    "rotate_half": rotate_half,
    "torch": torch,
}


@contextlib.contextmanager
def watched_cuts(gaps: list[float], ties: bool = False) -> Iterator[None]:
    """`topk` that prefers the first of equals, and notes how close each cut is.

    A gap is relative: between the last value kept and the first dropped or, where equals are
    expected, the nearest other value.
    """
    method, function, ranking = Tensor.topk, torch.topk, Tensor.argsort

    def topk(
        values: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
    ) -> Any:
        ordered, index = values.sort(dim=dim, descending=largest, stable=True)
        if 0 < k < values.shape[dim]:
            for row in ordered.movedim(dim, -1).reshape(-1, values.shape[dim]).double():
                last, others = row[k - 1], row[k:]
                if ties and last == others[0]:
                    others = row[row != last]
                scale = torch.maximum(last.abs(), others.abs())
                gaps.append(float(((others - last).abs() / scale).min()))
        return torch.return_types.topk((ordered.narrow(dim, 0, k), index.narrow(dim, 0, k)))

    def argsort(values: Tensor, dim: int = -1, descending: bool = False, **how: Any) -> Tensor:
        if values.is_floating_point():
            ordered = values.sort(dim=dim).values.movedim(dim, -1).double()
            gaps.append(float((ordered.diff(dim=-1) / ordered[..., 1:].abs()).min()))
        return ranking(values, dim=dim, descending=descending, **how)

    Tensor.topk, torch.topk, Tensor.argsort = topk, topk, argsort
    try:
        yield
    finally:
        Tensor.topk, torch.topk, Tensor.argsort = method, function, ranking


# --- a decoder whose attention is an original's -------------------------------------------------


@dataclass
class Step:
    """One layer's part of a forward pass: what an original may look at.

    Attributes:
        index: the layer.
        module: its attention module.
        hidden: [1, new, hidden], what the attention block is given.
        rope: cos and sin of the new tokens' positions, [1, new, head_dim] each.
        queries: rotated, [1, heads, new, head_dim].
        keys, values: with the new ones, [1, kv_heads, held + new, head_dim].
        weights: attention, float32 [1, heads, new, held + new].
        positions: int64 [1, new].
        prompt: whether this is the prompt.
    """

    index: int
    module: Any
    hidden: Tensor
    rope: tuple[Tensor, Tensor]
    queries: Tensor
    keys: Tensor
    values: Tensor
    weights: Tensor
    positions: Tensor
    prompt: bool

    @property
    def new(self) -> int:
        return self.queries.shape[2]


class Original:
    """Attends, and lets an original evict. By itself it evicts nothing.

    Args:
        length: tokens of the prompt.
        budget: entries to keep of it.
    """

    def __init__(
        self, repositories: Repositories, model: LlamaForCausalLM, length: int, budget: int
    ) -> None:
        self.pick, self.beside = repositories.pick, repositories.beside
        self.model = model
        self.config = model.config
        self.length, self.budget = length, budget
        # kvpress counts what it keeps as int(length * (1 - ratio)).
        self.ratio = 1 - (budget + 0.5) / length
        self.groups = self.config.num_attention_heads // self.config.num_key_value_heads
        self.keys: list[Any] = [None] * LAYERS
        self.values: list[Any] = [None] * LAYERS
        self.history: list[Any] = [None] * LAYERS

    def evict(self, step: Step) -> tuple[Tensor, Tensor]:
        """Keys and values that stay, [1, kv_heads, kept, head_dim] each."""
        return step.keys, step.values

    def after_prompt(self, tokens: Tensor) -> None:
        """Called once the prompt `tokens` [length] has been read."""

    def attend(self, index: int, module: Any, hidden: Tensor, positions: Tensor) -> Tensor:
        """The output of a layer's attention block, [1, new, hidden]."""
        shape = (*hidden.shape[:2], -1, module.head_dim)
        queries, keys, values = (
            project(hidden).view(shape).transpose(1, 2)
            for project in (module.q_proj, module.k_proj, module.v_proj)
        )
        rope = self.model.model.rotary_emb(hidden, positions)
        queries, keys = apply_rotary_pos_emb(queries, keys, *rope)
        self.history[index] = _append(self.history[index], keys)
        prompt = self.keys[index] is None
        keys, values = _append(self.keys[index], keys), _append(self.values[index], values)
        logits = queries @ repeat_kv(keys, self.groups).transpose(2, 3) / math.sqrt(module.head_dim)
        weights = (logits + _causal(logits)).softmax(-1)
        output = weights @ repeat_kv(values, self.groups)
        step = Step(index, module, hidden, rope, queries, keys, values, weights, positions, prompt)
        self.keys[index], self.values[index] = self.evict(step)
        return module.o_proj(output.transpose(1, 2).flatten(2))

    def read(self, tokens: Tensor, start: int) -> Tensor:
        """Run `tokens` [new] at the positions from `start` on through the model: logits."""
        decoder = self.model.model
        positions = torch.arange(start, start + len(tokens))[None]
        state = decoder.embed_tokens(tokens[None])
        for index, layer in enumerate(decoder.layers):
            hidden = layer.input_layernorm(state)
            state = state + self.attend(index, layer.self_attn, hidden, positions)
            state = state + layer.mlp(layer.post_attention_layernorm(state))
        return self.model.lm_head(decoder.norm(state))

    def kept(self, index: int) -> Tensor:
        """Which tokens a layer still holds, bool [kv_heads, tokens seen]: by their very keys."""
        return _places(self.keys[index], self.history[index]).any(1)


def _append(older: Tensor | None, newer: Tensor) -> Tensor:
    return newer if older is None else torch.cat([older, newer], dim=2)


def _causal(logits: Tensor) -> Tensor:
    """0 where a query sees an entry and the lowest number elsewhere, of the logits' shape."""
    new, held = logits.shape[-2:]
    return torch.full_like(logits, torch.finfo(logits.dtype).min).triu(held - new + 1)


def _gather(step: Step, index: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of the entries at `index` [1, kv_heads, kept]."""
    index = index[..., None].expand(-1, -1, -1, step.keys.shape[-1])
    return step.keys.gather(2, index), step.values.gather(2, index)


def _places(held: Tensor, history: Tensor) -> Tensor:
    """Where each held key comes from: bool [kv_heads, held, tokens seen], one in every row."""
    places = (held[0, :, :, None] == history[0, :, None]).all(-1)
    assert (places.sum(-1) == 1).all(), "a key was changed, or two tokens have the same"
    return places


def _in_time(history: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Held keys and values in the order in which they came."""
    order = _places(keys, history).int().argmax(-1).argsort(-1)[None, ..., None].expand_as(keys)
    return keys.gather(2, order), values.gather(2, order)


def follow(original: Original, tokens: Tensor, steps: int) -> np.ndarray:
    """The step after which each token left, uint8 [layers, kv_heads, length + steps].

    Args:
        tokens: int64 [length + steps or more].
        steps: tokens to decode.
    """
    length = original.length
    left = None
    with torch.no_grad():
        for step in range(steps + 1):
            start, end = (0, length) if step == 0 else (length + step - 1, length + step)
            original.read(tokens[start:end], start)
            if step == 0:
                original.after_prompt(tokens[:length])
            kept = torch.stack([original.kept(index) for index in range(LAYERS)])
            if left is None:
                left = torch.full((*kept.shape[:2], length + steps), STAYS, dtype=torch.uint8)
            seen = left[..., :end]
            assert not (kept & (seen < STAYS)).any(), "a token that had left is back"
            seen[~kept & (seen == STAYS)] = step
    assert left is not None
    return left.numpy()


# --- accumulated attention ----------------------------------------------------------------------


class H2O(Original):
    """FMInference/H2O's dropping path with true positions (its other one is "streaming")."""

    def __init__(self, *args: Any, heavy: int, recent: int) -> None:
        super().__init__(*args)
        path = "h2o_hf/utils_real_drop/modify_llama.py"
        cache = self.pick("FMInference/H2O", path, "H2OKVCache_LayerWise")
        with contextlib.redirect_stdout(io.StringIO()):  # it says hello
            self.caches = [cache(heavy, recent, 2, 2) for _ in range(LAYERS)]

    def evict(self, step: Step) -> tuple[Tensor, Tensor]:
        return self.caches[step.index]((step.keys, step.values), step.weights.clone())


class VATP(Original):
    """guozhiyu/vatp, its form for H2O: a whole attention module, which masks what it evicts."""

    def __init__(self, *args: Any, heavy: int, recent: int, sink: int) -> None:
        super().__init__(*args)
        repository = "guozhiyu/vatp"
        names = ("LlamaRotaryEmbedding", "rotate_half", "apply_rotary_pos_emb")
        rotary = self.beside(repository, "utils_hh/modeling_llama.py", *names)
        path, name = "utils_hh/modify_llama.py", "LlamaAttention_heavy_hitter"
        module = self.pick(repository, path, name, **rotary)
        config = SimpleNamespace(
            hidden_size=self.config.hidden_size,
            num_attention_heads=self.config.num_attention_heads,
            max_position_embeddings=self.config.max_position_embeddings,
            rope_scaling=None,
            heavy_ratio=(heavy + 0.5) / self.length,  # of the prompt, rounded down
            recent_ratio=(recent + 0.5) / self.length,
            applyval=True,
            h2o=True,
            sink_len=sink,
        )
        self.modules = [module(index, config) for index in range(LAYERS)]
        for module, layer in zip(self.modules, self.model.model.layers, strict=True):
            module.load_state_dict(layer.self_attn.state_dict())
        self.past: list[Any] = [None] * LAYERS

    def attend(self, index: int, module: Any, hidden: Tensor, positions: Tensor) -> Tensor:
        seen = int(positions[0, -1]) + 1
        mask = _causal(torch.empty(1, 1, hidden.shape[1], seen))
        output, _, self.past[index] = self.modules[index](
            hidden, mask, positions, past_key_value=self.past[index], use_cache=True
        )
        return output

    def kept(self, index: int) -> Tensor:
        # The mask is for the next query, whose own entry is its last column.
        return self.modules[index].attention_masks_next[0, :, 0, :-1] > 0


class A2SF(Original):
    """Dirac-Notation/A2SF as in its paper: decayed by a query's age, while decoding too."""

    def __init__(self, *args: Any, select: int, recent: int, forgetting: float) -> None:
        super().__init__(*args)
        path, name = "utils_real_drop/kv_llama.py", "LlamaKVCache"
        cache = self.pick("Dirac-Notation/A2SF", path, name, commit=A2SF_OF_THE_PAPER)
        shares = (recent / self.budget, select / self.budget)
        config = SimpleNamespace(
            use_compression=True,
            total_budget=self.budget,
            compression_ratio=[shares] * LAYERS,
            forgetting_factors=[forgetting] * LAYERS,
        )
        self.caches = [cache() for _ in range(LAYERS)]
        for index, one in enumerate(self.caches):
            one.init_cache(config, index)
            assert (one.select_budget, one.recent_budget) == (select, recent)

    def evict(self, step: Step) -> tuple[Tensor, Tensor]:
        cache = self.caches[step.index]
        cache.cat(step.keys[:, :, -step.new :], step.values[:, :, -step.new :])
        cache.update(step.weights)
        return cache.key_data, cache.value_data


class GroupedA2SF(Original):
    """Dirac-Notation/A2SF today: after the prompt alone, heads in groups."""

    def __init__(self, *args: Any, recent: int, forgetting: float) -> None:
        super().__init__(*args)
        repository, folder = "Dirac-Notation/A2SF", "utils_real_drop"
        base = self.beside(repository, f"{folder}/policies/base.py", "CompressionPolicy")
        policy = self.pick(repository, f"{folder}/policies/a2sf.py", "A2SFPolicy", **base)
        sizes = self.config.num_key_value_heads, self.budget, forgetting, recent
        self.policies = [policy(*sizes) for _ in range(LAYERS)]
        self.run = self.pick(repository, f"{folder}/attention.py", "compressed_attention")

    def evict(self, step: Step) -> tuple[Tensor, Tensor]:
        _, index = self.run(
            step.queries,
            repeat_kv(step.keys, self.groups),
            repeat_kv(step.values, self.groups),
            policy=self.policies[step.index],
            attn_mask=None,
            head_dim=step.module.head_dim,
        )
        return _gather(step, index)


class TOVA(Original):
    """schwartz-lab-NLP/TOVA."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        path = "src/tova_cache.py"
        cache = self.pick("schwartz-lab-NLP/TOVA", path, "TOVACache", DynamicCache=object)
        self.cache = cache(self.budget)
        self.cache.key_cache, self.cache.value_cache = {}, {}

    def evict(self, step: Step) -> tuple[Tensor, Tensor]:
        cache, index = self.cache, step.index
        cache.key_cache[index], cache.value_cache[index] = step.keys, step.values
        cache.reduce(index, step.weights)
        return cache.key_cache[index], cache.value_cache[index]


# --- the attention of the last queries ----------------------------------------------------------


class SnapKV(Original):
    """FasterDecoding/SnapKV: once, after the prompt."""

    repository = "FasterDecoding/SnapKV"
    path = "snapkv/monkeypatch/snapkv_utils.py"
    name = "SnapKVCluster"
    helpers: tuple[str, ...] = ()

    def __init__(self, *args: Any, **parameters: Any) -> None:
        super().__init__(*args)
        names, given = (*self.helpers, self.name), {"_KVCACHE_FACTORY_DEBUG": False}
        cluster = self.beside(self.repository, self.path, *names, **given)[self.name]
        self.clusters = [
            cluster(max_capacity_prompt=self.budget, **parameters, **self.of_layer(index))
            for index in range(LAYERS)
        ]

    def of_layer(self, index: int) -> dict[str, int]:
        return {}

    def evict(self, step: Step) -> tuple[Tensor, Tensor]:
        if not step.prompt:
            return step.keys, step.values
        update = self.clusters[step.index].update_kv
        return update(step.keys, step.queries, step.values, None, self.groups)


class GroupedSnapKV(SnapKV):
    """Zefan-Cai/KVCache-Factory's, in its layout of one cache for a group of query heads."""

    repository = "Zefan-Cai/KVCache-Factory"
    path = "pyramidkv/pyramidkv_utils.py"
    helpers = (
        "_debug_print",
        "repeat_kv",
        "_gqa_groups",
        "_reduce_group_scores",
        "_grouped_window_attn_cache",
        "_select_topk_kv",
    )


class PyramidKV(GroupedSnapKV):
    """Zefan-Cai/KVCache-Factory, by PyramidKV's authors."""

    name = "PyramidKVCluster"

    def of_layer(self, index: int) -> dict[str, int]:
        return {"num_hidden_layers": LAYERS, "layer_idx": index}


class GroupedH2O(GroupedSnapKV):
    """Zefan-Cai/KVCache-Factory's H2O: once, after the prompt."""

    name = "H2OKVCluster"


class RKV(Original):
    """Zefan-Cai/R-KV: after the prompt and then once in `every` tokens, with its schedule.

    Args:
        name: the method, defined in `path`: R-KV itself, or what it is compared with.
        temporal: put what it keeps back in order of time. Its own order is that of falling scores,
            so that all evictions but the first pool, and compare, neighbours in that order.
    """

    def __init__(
        self, *args: Any, path: str, name: str, every: int, temporal: bool, **parameters: Any
    ) -> None:
        super().__init__(*args)
        names = ("compute_attention_scores", "cal_similarity")
        tools = self.beside("Zefan-Cai/R-KV", "rkv/utils.py", *names)
        method = self.pick("Zefan-Cai/R-KV", path, name, **tools)
        self.methods = [method(budget=self.budget, **parameters) for _ in range(LAYERS)]
        self.every, self.temporal, self.window = every, temporal, parameters["window_size"]
        self.queries: list[Any] = [None] * LAYERS

    def evict(self, step: Step) -> tuple[Tensor, Tensor]:
        queries = _append(self.queries[step.index], step.queries)[:, :, -self.window :]
        self.queries[step.index] = queries
        before = int(step.positions[0, 0])  # whether it evicts was settled by the token before
        if not step.prompt and before % self.every:
            return step.keys, step.values
        kept = self.methods[step.index].update_kv(step.keys, queries, step.values)
        return _in_time(self.history[step.index], *kept) if self.temporal else kept


# --- presses ------------------------------------------------------------------------------------

PRESSES = "kvpress/presses"
NO_TYPE: tuple[type, ...] = ()  # nothing is an instance of it


class Press(Original):
    """NVIDIA/kvpress: a press, called as its own hook on the attention modules calls it.

    Args:
        press: its name, and those of what its file imports, each with its file; the last is it.
        scorer: parameters of a SnapKVPress that it wraps.
        every: also evict once in so many decoded tokens, down to the budget.
    """

    def __init__(
        self,
        *args: Any,
        press: dict[str, str],
        scorer: dict[str, Any] | None = None,
        every: int = 0,
        **parameters: Any,
    ) -> None:
        super().__init__(*args)
        for layer in self.model.model.layers:
            layer.self_attn.rotary_emb = self.model.model.rotary_emb
        name = list(press)[-1]
        if scorer is not None:
            press = {"SnapKVPress": "snapkv_press", **press}
        if every:
            press = press | {"DecodingPress": "decoding_press"}
            press |= {"PrefillDecodingPress": "prefill_decoding_press"}
        made = self.presses({"BasePress": "base_press", "ScorerPress": "scorer_press", **press})
        if scorer is None:
            self.press = made[name](compression_ratio=self.ratio, **parameters)
        else:
            wrapped = made["SnapKVPress"](compression_ratio=self.ratio, **scorer)
            self.press = made[name](press=wrapped, **parameters)
        if every:
            decoding = made["DecodingPress"](made[name](**parameters), every, self.budget)
            self.press = made["PrefillDecodingPress"](self.press, decoding)

    def presses(self, files: dict[str, str]) -> dict[str, Any]:
        """The classes by name; each file imports from those before it."""
        models = ("Phi3Attention", "Qwen3Attention", "Gemma3Attention")
        absent = (*models, "QuantizedCache", "AdaKVPress", "ExpectedAttentionPress")
        given: dict[str, Any] = {name: NO_TYPE for name in absent}
        prerope = ("get_prerope_query_states", "get_prerope_key_states")
        names = (*prerope, "extract_keys_and_values")
        given |= self.beside("NVIDIA/kvpress", "kvpress/utils.py", *names, **given)
        for name, file in files.items():
            names = ("is_prefilling", name) if file == "base_press" else (name,)
            given |= self.beside("NVIDIA/kvpress", f"{PRESSES}/{file}.py", *names, **given)
        return given

    def evict(self, step: Step) -> tuple[Tensor, Tensor]:
        return _hooked(self.press, step)


def _hooked(press: Any, step: Step) -> tuple[Tensor, Tensor]:
    """Keys and values that a press leaves in the cache which it finds."""
    layer = SimpleNamespace(keys=step.keys, values=step.values)
    given = {
        "hidden_states": step.hidden,
        "past_key_values": SimpleNamespace(layers={step.index: layer}),
        "cache_position": step.positions[0],
        "position_embeddings": step.rope,
    }
    attentions = step.weights if type(press).__name__ == "ObservedAttentionPress" else None
    press.forward_hook(step.module, [], given, [None, attentions])
    return layer.keys, layer.values


class LagKV(Press):
    """NVIDIA/kvpress's LagKV, but that what is kept stays in order of time, as its parts are."""

    def evict(self, step: Step) -> tuple[Tensor, Tensor]:
        return _in_time(self.history[step.index], *super().evict(step))


class Compactor(Press):
    """NVIDIA/kvpress's Compactor, whose sketches are drawn from a seed by layer."""

    def evict(self, step: Step) -> tuple[Tensor, Tensor]:
        torch.manual_seed(step.index)
        return super().evict(step)


class DefensiveKV(Original):
    """FFY0/DefensiveKV. Its heads share a layer's budget; here each keeps its own best.

    Its Triton kernel needs CUDA: the plain version beside it, which it can call instead, stands in.
    """

    def __init__(self, *args: Any, **parameters: Any) -> None:
        super().__init__(*args)
        repository = "FFY0/DefensiveKV"
        path, name = f"{PRESSES}/efficient_ada_scorer_press.py", "EfficientAdaScorerPress"
        given = self.beside(repository, path, name, BasePress=object)
        given |= {"Qwen3MoeAttention": NO_TYPE, "Qwen3Attention": NO_TYPE}
        path, name = f"{PRESSES}/efficient_defensivekv_press.py", "EfficientDefensiveKVPress"
        press = self.pick(repository, path, name, **given)
        self.press = press(compression_ratio=self.ratio, **parameters)
        self.press.vwl1norm_triton = self.press.vwl1norm

    def evict(self, step: Step) -> tuple[Tensor, Tensor]:
        _, heads, held, head_dim = step.keys.shape
        metadata = SimpleNamespace(bsz=1, num_key_value_heads=heads, head_lens=[held] * heads)
        flat = (step.keys.reshape(-1, head_dim), step.values.reshape(-1, head_dim))
        given = {"metadata": metadata, "position_embeddings": step.rope}
        scores = self.press.score(step.module, step.hidden, *flat, None, given)
        return _gather(step, scores.view(1, heads, held).topk(self.budget).indices)


class KVzip(Press):
    """NVIDIA/kvpress's KVzip. Its heads share a layer's budget; here each keeps its own best.

    Args:
        chunk: tokens repeated at a time (2,048 there).
        first, later: token ids of the instructions to repeat the first chunk and a later one.
        suffix: token ids between instruction and chunk.
    """

    dtype, device = torch.float32, "cpu"  # as the "model" that the press runs

    def __init__(
        self, *args: Any, chunk: int, first: list[int], later: list[int], suffix: list[int]
    ) -> None:
        super().__init__(*args, press={"KVzipPress": "kvzip_press"}, layerwise=True)
        self.press.prepare = partial(self.press.prepare, chunk_size=chunk)
        self.press.compress_post = lambda model: None  # would mask the least of all heads together
        self.press._suffix_ids = torch.tensor([suffix])
        self.instructions = torch.tensor([first]), torch.tensor([later])

    def evict(self, step: Step) -> tuple[Tensor, Tensor]:
        return (step.keys, step.values) if step.prompt else _hooked(self.press, step)

    def after_prompt(self, tokens: Tensor) -> None:
        self.press._context_ids = tokens[None]
        self.press._perform_kvzip_compression(self, self)
        for index in range(LAYERS):
            self.history[index] = self.history[index][:, :, : self.length]
            kept = self.press.score_val[index].topk(self.budget).indices
            held = SimpleNamespace(keys=self.keys[index], values=self.values[index])
            self.keys[index], self.values[index] = _gather(held, kept)

    def __call__(self, input_ids: Tensor, **_: Any) -> None:
        """As the press's model: read a chunk again, behind the prompt."""
        self.read(input_ids[0], self.length)

    def encode(self, text: str, **_: Any) -> Tensor:
        """As the press's tokenizer: only the later instruction speaks of a part."""
        return self.instructions["part" in text]


# --- calibrated ---------------------------------------------------------------------------------


class TriAttention(Original):
    """WeianMao/triattention: queries measured on a text, as its script does, but in float32.

    After the prompt, and then whenever `every` more are held; it moves what its object chooses.

    Args:
        text: token ids that queries are measured on.
        farthest: of the distances that scores are averaged over.
    """

    def __init__(self, *args: Any, every: int, text: list[int], farthest: int) -> None:
        super().__init__(*args)
        repository, path = "WeianMao/triattention", "triattention/methods/pruning_utils.py"
        auto = SimpleNamespace(from_pretrained=lambda *_, **__: self.config)
        names = ("rotate_half", "invert_rope", "to_complex_pairs", "HeadFrequencyStats")
        names += ("build_geometric_offsets", "compute_frequency_scaling", "determine_rope_style")
        names += ("compute_frequency_statistics_from_means", "score_keys_for_round")
        names += ("load_head_frequency_stats",)
        tools = self.beside(repository, path, *names)
        path = "triattention/common/stats_utils.py"
        tools |= self.beside(repository, path, "_require", "validate_stats_metadata")
        rotary = self.model.model.rotary_emb
        given = {**tools, "AutoConfig": auto, "build_rotary": lambda *_, **__: rotary}
        names = ("TriAttentionConfig", "TriAttention")
        method = self.pick(repository, "triattention/methods/triattention.py", *names, **given)
        with tempfile.TemporaryDirectory() as folder:
            self.every, statistics = every, Path(folder) / "statistics"
            self.measure(repository, auto, text, statistics)
            config = method.TriAttentionConfig(
                statistics, Path(folder), torch.device("cpu"), torch.float32, self.budget,
                offset_max_length=farthest, normalize_scores=True, count_prompt_tokens=True,
                allow_prefill_compression=True, per_layer_perhead_pruning=True,
            )  # fmt: skip
            self.method = method.TriAttention(config)

    def measure(self, repository: str, config: Any, text: list[int], to: Path) -> None:
        """Run its script on this model, whose numbers it would have in bfloat16."""
        in_float32 = SimpleNamespace(**{**vars(torch), "bfloat16": torch.float32})
        tokenizer = SimpleNamespace(encode=lambda *_, **__: torch.tensor([text]))
        names = ("_determine_rope_style", "_rotate_half", "_invert_rope", "_to_complex_pairs")
        script = self.pick(
            repository, "scripts/calibrate.py", *names, "_find_attention_layers", "calibrate",
            torch=in_float32, AutoConfig=config, Path=Path, sys=sys,
            AutoTokenizer=SimpleNamespace(from_pretrained=lambda *_, **__: tokenizer),
            AutoModelForCausalLM=SimpleNamespace(from_pretrained=lambda *_, **__: self.model),
        )  # fmt: skip
        with contextlib.redirect_stderr(io.StringIO()):
            script.calibrate("", __file__, str(to), device="cpu")

    def read(self, tokens: Tensor, start: int) -> Tensor:
        logits = super().read(tokens, start)
        method, fresh = self.method, range(start, start + len(tokens))
        method.absolute_position = fresh.stop
        own = method.cache_positions_per_layer_perhead or {}
        for places in (method.cache_positions, *own.values()):
            places.extend(fresh)
        if start == 0 or self.keys[0].shape[2] == self.budget + self.every:
            index = method.compute_keep_indices(tuple(zip(self.keys, self.values, strict=True)))
            own = own or {place: list(fresh) for place in np.ndindex(*index.shape[:2])}
            method.cache_positions_per_layer_perhead = {
                place: [own[place][kept] for kept in index[place].tolist()] for place in own
            }
            method.cache_positions = list(method.cache_positions_per_layer_perhead[0, 0])
            for layer, chosen in enumerate(index):
                held = SimpleNamespace(keys=self.keys[layer], values=self.values[layer])
                self.keys[layer], self.values[layer] = _gather(held, chosen[None])
        return logits


# --- methods and cases --------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """What to run.

    Attributes:
        original: the class above that runs it.
        model: ``gqa`` or ``mha``.
        parameters: the original's, for a budget.
        steps: decoded tokens.
        lengths: of the prompts.
        ties: whether neighbours can have equal scores, because they share a maximum.
        note: what differs from the original, or is chosen among what it offers.
    """

    original: type[Original]
    model: str
    parameters: Callable[[int], dict[str, Any]] = lambda budget: {}
    steps: int = 0
    lengths: tuple[int, ...] = LENGTHS
    ties: bool = False
    note: str = ""


def _half(budget: int) -> dict[str, int]:
    return {"heavy": budget // 2, "recent": budget - budget // 2}


def _rkv(path: str, name: str, temporal: bool) -> Callable[[int], dict[str, Any]]:
    fixed = {"path": f"rkv/compression/{path}", "name": name, "every": EVERY, "temporal": temporal}
    own = {"mix_lambda": 0.07, "retain_ratio": 0.1, "retain_direction": "last"}
    window = {"window_size": 8, "kernel_size": 7}
    return lambda budget: {**fixed, **window, **(own if name == "R1KV" else {})}


def _press(name: str, file: str, **parameters: Any) -> Method:
    """A press on the grouped model; decoding too where it evicts once in so many tokens."""
    steps, bare = STEPS * ("every" in parameters), name in ("ObservedAttentionPress", "RandomPress")
    given = {"press": {name: file}, **parameters}
    return Method(Press, "gqa", lambda budget: given, steps, note="protects nothing" * bare)


AVERAGE = {"window_size": 8, "kernel_size": 5, "pooling": "avgpool"}
MAXIMUM = {"window_size": 8, "kernel_size": 7, "pooling": "maxpool"}
GROUPED = {**AVERAGE, "gqa_score_agg": "mean"}
SCORER = {"window_size": 8, "kernel_size": 5}
REPEATED = {"chunk": 64, "first": [5, 6, 7], "later": [5, 6, 8, 9], "suffix": [10, 11]}
PARTS = {
    "press": {"LagKVPress": "lagkv_press"},
    "every": EVERY,
    "n_sink": 3,
    "lag_size": 6,
}
SKETCHED = {
    "press": {
        "NonCausalAttnPress": "non_causal_attention_press",
        "LeverageScorePress": "leverage_press",
        "CompactorPress": "compactor_press",
    },
    "chunk_size": 25,
    "sketch_dimension": 8,
}
MEASURED = {"every": EVERY, "text": list(range(20, 420, 5)), "farthest": 256}
UNIFORM = "the best of each KV head, where the original ranks a layer's heads together"
IN_ORDER = "what is kept is put back in order of time; the original's order is of falling scores"

METHODS = {
    "h2o": Method(H2O, "mha", _half, STEPS),
    "h2o_grouped": Method(
        GroupedH2O, "gqa", lambda budget: {"window_size": budget // 2, "gqa_score_agg": "sum"}
    ),
    "h2o_mean": _press("ObservedAttentionPress", "observed_attention_press"),
    "vatp": Method(VATP, "mha", lambda budget: {**_half(budget), "sink": 3}, STEPS),
    "a2sf": Method(
        A2SF,
        "mha",
        lambda budget: {"select": budget // 2, "recent": budget // 2, "forgetting": 0.9},
        STEPS,
    ),
    "a2sf_grouped": Method(
        GroupedA2SF, "gqa", lambda budget: {"recent": budget // 2, "forgetting": 0.95}
    ),
    "tova": Method(TOVA, "gqa", steps=STEPS),
    "snapkv": Method(SnapKV, "mha", lambda budget: AVERAGE),
    "snapkv_max": Method(SnapKV, "mha", lambda budget: MAXIMUM, ties=True),
    "snapkv_grouped": Method(GroupedSnapKV, "gqa", lambda budget: GROUPED),
    "snapkv_every": Method(
        RKV, "gqa", _rkv("snapkv.py", "SnapKV", True), STEPS, ALIGNED, True, IN_ORDER
    ),
    "snapkv_every_unsorted": Method(
        RKV, "gqa", _rkv("snapkv.py", "SnapKV", False), STEPS, ALIGNED, True
    ),
    "pyramid_kv": Method(PyramidKV, "gqa", lambda budget: GROUPED),
    "pyramid_kv_max": Method(PyramidKV, "mha", lambda budget: {**MAXIMUM, "beta": 5}, ties=True),
    "r_kv": Method(RKV, "gqa", _rkv("r1_kv.py", "R1KV", True), STEPS, ALIGNED, note=IN_ORDER),
    "r_kv_unsorted": Method(RKV, "gqa", _rkv("r1_kv.py", "R1KV", False), STEPS, ALIGNED),
    "random": _press("RandomPress", "random_press", seed=1),
    "knorm": _press("KnormPress", "knorm_press", every=EVERY),
    "keydiff": _press("KeyDiffPress", "keydiff_press", every=EVERY),
    "expected_attention": _press("ExpectedAttentionPress", "expected_attention_press"),
    "lag_kv": Method(LagKV, "gqa", lambda budget: PARTS, STEPS, ties=True, note=IN_ORDER),
    "compactor": Method(Compactor, "gqa", lambda budget: SKETCHED),
    "triattention": Method(TriAttention, "gqa", lambda budget: MEASURED, STEPS),
    "critical_kv": _press("CriticalKVPress", "criticalkv_press", scorer=SCORER),
    "chunk_kv": _press("ChunkKVPress", "chunkkv_press", scorer=SCORER, chunk_length=11),
    "defensive_kv": Method(DefensiveKV, "gqa", lambda budget: SCORER, note=UNIFORM),
    "kvzip": Method(KVzip, "gqa", lambda budget: REPEATED, note=UNIFORM),
}


def make(name: str, repositories: Repositories) -> tuple[dict[str, Any], np.ndarray]:
    """Run a method's cases: their description, and all their arrays in a row."""
    method = METHODS[name]
    model = model_of(method.model)
    repositories.used = []
    cases, arrays, smallest = [], [], math.inf
    for length in method.lengths:
        for budget in BUDGETS:
            parameters = method.parameters(budget)
            for seed in range(length, length + 1000):  # another prompt for each length
                original = method.original(repositories, model, length, budget, **parameters)
                gaps: list[float] = []
                with watched_cuts(gaps, method.ties):
                    left = follow(original, tokens_of(length, seed), method.steps)
                if min(gaps, default=1) >= SMALLEST_GAP:
                    break
            else:
                raise SystemExit(f"error: {name}: no clear prompt of {length} for {budget}")
            smallest = min(smallest, *gaps) if gaps else smallest
            cases.append({"length": length, "prompt_seed": seed, "budget": budget, **parameters})
            arrays.append(left.ravel())
    same = {key: value for key, value in cases[0].items() if all(c[key] == value for c in cases)}
    record = {
        "sources": repositories.used,
        "model": method.model,
        "steps": method.steps,
        "note": method.note,
        "smallest_gap": float(f"{smallest:.1e}"),
        "parameters": same,
        "cases": [{k: v for k, v in case.items() if k not in same} for case in cases],
    }
    return record, np.concatenate(arrays)


def check_decoder() -> None:
    """The decoder above computes what the model does."""
    for kind in HEADS:
        model, tokens = model_of(kind), tokens_of(50, 0)
        with torch.no_grad():
            expected = model(tokens[None]).logits
            original = Original(SimpleNamespace(pick=None, beside=None), model, 50, 50)
            chunks = [original.read(part, start) for part, start in
                      ((tokens[:50], 0), (tokens[50:51], 50), (tokens[51:], 51))]  # fmt: skip
        torch.testing.assert_close(torch.cat(chunks, 1), expected, atol=1e-4, rtol=1e-4)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="clones of the originals' repositories")
    parser.add_argument("methods", nargs="*", metavar="METHOD", help="default: all")
    parser.add_argument("--out", type=Path, default=PREFIX)
    arguments = parser.parse_intermixed_args()
    if unknown := set(arguments.methods) - set(METHODS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose of {', '.join(METHODS)}")
    check_decoder()
    facts, numbers = arguments.out.with_suffix(".json"), arguments.out.with_suffix(".npz")
    made = json.loads(facts.read_text()) if facts.exists() else {}
    arrays = dict(np.load(numbers)) if numbers.exists() else {}
    repositories = Repositories(arguments.folder)
    for name in arguments.methods or METHODS:
        made[name], arrays[name] = make(name, repositories)
        made[name]["torch"] = torch.__version__
        print(f"{name:22} {len(made[name]['cases'])} cases, gap {made[name]['smallest_gap']:.0e}")
        in_order = [name for name in METHODS if name in made]
        lines = [f"{json.dumps(name)}: {json.dumps(made[name])}" for name in in_order]
        facts.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        np.savez_compressed(numbers, **{name: arrays[name] for name in in_order})
    print(f"{numbers}: {numbers.stat().st_size:,} bytes, {facts}: {facts.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
