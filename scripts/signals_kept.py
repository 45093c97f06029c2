"""What each of honeycomb's signals keeps of a prompt, by kind of token.

    python scripts/signals_kept.py task=ruler 'task.subtasks=[niah_single_1]' \
        'task.lengths=[1024]' task.samples=6 seed=5

For attention x value, for KeyDiff, and for both together: the share of what is kept that is the
first tokens, digits of the answer, other digits, punctuation, capitalised words or anything else;
of the answer's digits how many are kept, and in how many heads all of them, in the later layers.
The window is left out: it stays in any case.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

import baselines  # noqa: F401  (registers its methods)
from buzz import Budget, EvictionCache, HoneycombPolicy
from buzz.entries import Entries
from evals.run.models import load_model
from evals.run.plan import Plan
from evals.run.prompts import load_prompts

KINDS = ("first 4", "answer's digits", "other digits", "punctuation", "capitalised", "others")
EARLY = 4 / 15  # of the layers, which have small budgets (`layers=late`)


@dataclass(frozen=True, kw_only=True)
class Watched(HoneycombPolicy):
    """Honeycomb that leaves what each signal, and both, would keep in :attr:`seen`."""

    seen = []  # noqa: RUF012  (no field: of all layers)

    def score(self, entries: Entries) -> Tensor:
        before = entries.cache_length - self.window
        kept = {"both": super().score(entries)[0, :, :before].topk(self.keep).indices}
        for name, share in (("value", self.value), ("keydiff", self.keydiff)):
            signal = self._signal(name, entries)[0, :, :before]
            kept[name] = signal.topk(int(share * self.keep)).indices
        self.seen.append((entries.layer, before, kept))
        return super().score(entries)


def kinds(pieces: Sequence[str], answers: Sequence[str]) -> Tensor:
    """The index into :data:`KINDS` of each token."""
    text, found = "".join(pieces), []
    spans = [match.span() for answer in answers for match in re.finditer(re.escape(answer), text)]
    end = 0
    for i, piece in enumerate(pieces):
        start, end = end, end + len(piece)
        word = piece.strip()
        tests = (
            i < 4,
            any(a < end and start < b for a, b in spans),
            re.search(r"\d", word),
            not re.search(r"\w", word),
            word[:1].isupper(),
        )
        found.append(next((kind for kind, test in enumerate(tests) if test), len(tests)))
    return torch.tensor(found)


@torch.inference_mode()
def main(arguments: Sequence[str]) -> int:
    configs = str(Path(__file__).resolve().parents[1] / "configs")
    with initialize_config_dir(configs, version_base=None):
        plan = Plan.of(compose("config", ["method=full", *arguments]))
    model, tokenizer = load_model(plan.config["model"], plan.config["device"])
    shares, recall = defaultdict(list), defaultdict(list)
    for prompt in load_prompts(plan, tokenizer).prompts:
        answers = [str(one) for one in prompt.sample.references if str(one).isdigit()]
        code = kinds([tokenizer.decode([token]) for token in prompt.ids], answers)
        policy, _ = Budget(0.25).policy(Watched(), len(prompt.ids))
        Watched.seen.clear()
        cache = EvictionCache(model, policy)
        model(torch.tensor([prompt.ids]), past_key_values=cache, logits_to_keep=1)
        for layer, before, kept in Watched.seen:
            there = torch.bincount(code[:before], minlength=len(KINDS)).double()
            shares["the prompt"].append(there / before)
            for name, entries in kept.items():
                counts = torch.stack(
                    [torch.bincount(one, minlength=len(KINDS)) for one in code[entries]]
                )
                shares[name].append((counts / entries.shape[1]).mean(0))
                if there[1] and layer >= EARLY * model.config.num_hidden_layers:
                    own = counts[:, 1] / there[1]
                    recall[name].append((float(own.mean()), float((own == 1).double().mean())))
    lines = {name: torch.stack(all_of).double().mean(0).tolist() for name, all_of in shares.items()}
    print((100 * pd.DataFrame(lines, index=KINDS).T).round(1).to_string())
    for name, pairs in recall.items():
        kept, whole = (100 * sum(values) / len(pairs) for values in zip(*pairs, strict=True))
        print(f"{name}: {kept:.0f} % of the answer's digits, all of them in {whole:.1f} % of heads")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
