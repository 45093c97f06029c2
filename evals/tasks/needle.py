"""Passkey retrieval: one fact at a known depth of filler text, asked for at the end.

The task of Mohtashami & Jaggi (arXiv 2305.16300), but its filler is drawn by seed from many
sentences: the same few repeated would make most of the cache redundant.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedTokenizerBase

from buzz.errors import ConfigError
from evals.task import Sample, Task, at_least

INTRO = (
    "There is a pass key hidden in the following text. Find it and remember it."
    " You will be asked for it at the end."
)
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? Answer with the five digits of the pass key."

FILLER = (
    "The ferry leaves the harbour every hour and takes an afternoon to cross the bay.",
    "A baker on the corner sells rye bread that is still warm in the morning.",
    "Clouds drifted over the hills and the fields below turned from gold to grey.",
    "The old clock in the station has been a little slow for as long as anyone recalls.",
    "Children were flying kites on the beach while the tide went out.",
    "In autumn the gardener rakes the leaves into tidy heaps along the wall.",
    "The library keeps its maps in wide drawers at the back of the reading room.",
    "A narrow path follows the river through the wood to the mill.",
    "Two painters stood on ladders and argued about the shade of the shutters.",
    "The train was full, so we stood by the window and watched the valley go by.",
    "Rain fell on the tin roof all night and stopped just before dawn.",
    "The museum is closed on Mondays, but its garden stays open.",
    "Sheep grazed on the slope above the village and paid no attention to the road.",
    "My neighbour repairs violins in a workshop that smells of varnish.",
    "The market sells apples, honey and cheese from the farms nearby.",
    "Snow lay on the pass until late in spring and the inn was empty.",
    "A grey cat slept on the warm bonnet of the postman's van.",
    "The bridge was painted green last summer and it already looks worn.",
    "Students gathered under the lime trees to read their letters aloud.",
    "The lamp on the desk flickers whenever the lift starts to move.",
    "Fishermen mend their nets in the shade of the boathouse.",
    "The orchestra rehearsed the slow movement until everyone was tired.",
    "Wild thyme grows between the stones of the terrace.",
    "The teacher drew a circle on the board and asked what they saw.",
    "A light wind moved the curtains and carried in the sound of bells.",
    "The bus turns at the chapel and comes back by the same road.",
    "They built the barn from oak and covered it with slate.",
    "Every evening the lighthouse keeper writes a line in his journal.",
    "The soup needs an hour on a low flame and a pinch of salt.",
    "From the tower one can see the lake and the vineyards beyond it.",
)


@dataclass(kw_only=True)
class Needle(Task):
    """Score: 1 if the passkey appears in the answer, else 0. Groups: depths.

    Attributes:
        lengths: prompt lengths in tokens, chat template not counted; kept to within a sentence.
        depths: where the passkey stands, in percent of the filler.
        repeats: samples per length and depth, each with filler and passkey of its own.
        seed: what they are drawn from.
    """

    headline: ClassVar[str] = "accuracy"

    lengths: Sequence[int] = (1024,)
    depths: Sequence[float] = (0, 25, 50, 75, 100)
    repeats: int = 4
    seed: int = 0

    def check(self) -> None:
        super().check()
        at_least(1, "task.repeats", self.repeats)
        for name in ("lengths", "depths"):
            if not (values := getattr(self, name)) or isinstance(values, str):
                raise ConfigError(f"task.{name}", values, "give a list, e.g. [1024]")
        for length in self.lengths:
            at_least(128, "task.lengths", length)
        for depth in self.depths:
            if not isinstance(depth, int | float) or not 0 <= depth <= 100:
                raise ConfigError("task.depths", depth, "give percentages from 0 to 100")

    def longest_prompt(self) -> int:
        return max(self.lengths)

    def load(self, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
        samples = [
            self._sample(tokenizer, length, depth, repeat)
            for repeat in range(self.repeats)
            for length in self.lengths
            for depth in self.depths
        ]
        return samples[: self.samples]

    def _sample(
        self, tokenizer: PreTrainedTokenizerBase, length: int, depth: float, repeat: int
    ) -> Sample:
        rng = random.Random(f"{self.seed}/{length}/{depth}/{repeat}")
        key = f"{rng.randrange(10_000, 100_000)}"

        def tokens(text: str) -> int:
            return len(tokenizer(text, add_special_tokens=False)["input_ids"])

        room = length - tokens(f"{INTRO}\n\n{NEEDLE.format(key=key)}\n\n{QUESTION}")
        filler = []
        while room >= 0:
            for sentence in rng.sample(FILLER, len(FILLER)):
                room -= tokens(f" {sentence}")
                if room < 0:
                    break
                filler.append(sentence)
        filler.insert(round(depth / 100 * len(filler)), NEEDLE.format(key=key))
        return Sample(
            id=f"{length}-{depth:g}-{repeat}",
            prompt=f"{INTRO}\n\n{' '.join(filler)}\n\n{QUESTION}",
            references=(key,),
            group=f"{depth:g}%",
            meta={"length": length, "depth": depth},
        )

    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        return {"accuracy": float(sample.references[0] in prediction)}
