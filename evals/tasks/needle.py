"""Passkey retrieval: facts at known depths of filler text, asked for at the end.

The task of Mohtashami & Jaggi (arXiv 2305.16300). Its filler repeats a few sentences, which makes
most of the cache redundant; here it is drawn from many, by seed. The variants with several keys, or
several values of one key, are RULER's (arXiv 2404.06654).
"""

from __future__ import annotations

import random
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt
from transformers import PreTrainedTokenizerBase

from buzz.errors import ConfigError
from evals.results.record import Record
from evals.tasks.base import Sample, means_by
from evals.tasks.questions import QuestionsTask
from evals.tasks.types import SPREADS, Grid, Percent

INTRO = (
    "There is a pass key hidden in the following text. Find it and remember it."
    " You will be asked for it at the end."
)
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? Answer with the five digits of the pass key."

ONCE = "The pass key is {key}."
DIGIT = "The {place} digit of the pass key is {digit}."
PLACES = ("first", "second", "third", "fourth", "fifth")

MANY_INTRO = (
    "There are pass keys hidden in the following text. Find them and remember them."
    " You will be asked about them at the end."
)
MANY_NEEDLE = "A pass key of {town} is {key}. Remember it. {key} is a pass key of {town}."
ONE_OF_MANY = "What is the pass key of {town}? Answer with the five digits of that pass key."
ALL_OF_MANY = "What are the {count} pass keys of {town}? Answer with the five digits of each."
TOWNS = ("Arbon", "Brugg", "Cham", "Davos", "Ems", "Flims", "Gossau", "Horgen", "Ilanz", "Kloten")

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
class Needle(QuestionsTask):
    """Score: the share of the passkeys asked for that appear in the answer. Groups: depths.

    With several questions on a text of the variant ``multikey``, each asks for another of its keys.

    Attributes:
        variant: ``single``: one passkey; ``multikey``: passkeys of several towns, one of which is
            asked for, the others at depths of their own; ``multivalue``: several passkeys of one
            town, all asked for, the first at the depth and the others anywhere.
        needles: passkeys in the text, for the variants with several.
        lengths: prompt lengths in tokens, without chat template, at most a sentence shorter.
        depths: where the (first) passkey asked for stands, in percent of the filler.
        spread: how far apart the five digits of a single passkey stand. None: a number, in a
            sentence that has it twice. ``cell``: a number, once. ``neighbours``: each digit in a
            sentence of its own, side by side. ``prompt``: these sentences spread evenly over the
            filler, the first at the depth.
        repeats: samples per length and depth, each with filler and passkey of its own.
        seed: what they are drawn from.
    """

    headline: ClassVar[str] = "accuracy"
    grouped_by: ClassVar[str] = "depth"
    scores_version: ClassVar[int] = 2  # a passkey within a longer number does not count

    variant: Literal["single", "multikey", "multivalue"] = "single"
    needles: Annotated[int, Field(ge=2, le=len(TOWNS))] = 4
    lengths: Grid[Annotated[int, Field(ge=128)]] = (1024,)
    depths: Grid[Percent] = (0, 25, 50, 75, 100)
    spread: Literal[SPREADS] | None = None
    repeats: PositiveInt = 4
    seed: int = 0

    def check(self) -> None:
        super().check()
        if self.spread is not None and self.variant != "single":
            remedy = "applies to a single passkey; write task.variant=single"
            raise ConfigError("task.spread", self.spread, remedy)
        if self.variant == "single" and self.needles != type(self).needles:
            remedy = "applies to several passkeys; write task.variant=multikey or multivalue"
            raise ConfigError("task.needles", self.needles, remedy)
        if self.questions > (self.needles if self.variant == "multikey" else 1):
            remedy = "task.variant=multikey has up to task.needles of them, other variants one"
            raise ConfigError("task.questions", self.questions, remedy)

    def longest_prompt(self) -> int:
        return max(self.lengths)

    def load(self, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
        cells = [
            (length, depth, repeat)
            for repeat in range(self.repeats)
            for length in self.lengths
            for depth in self.depths
        ]
        return [
            sample for cell in cells[: self.samples] for sample in self._samples(tokenizer, *cell)
        ]

    def _samples(
        self, tokenizer: PreTrainedTokenizerBase, length: int, depth: float, repeat: int
    ) -> list[Sample]:
        """The questions on one text."""
        rng = random.Random(f"{self.seed}/{length}/{depth}/{repeat}")
        intro, needles, questions = self._needles(rng)

        def tokens(text: str) -> int:
            return len(tokenizer(text, add_special_tokens=False)["input_ids"])

        longest = max((question for question, _ in questions), key=tokens)
        frame = "\n\n".join([intro, needles[0], longest])
        room = length - tokens(frame) - sum(tokens(f" {needle}") for needle in needles[1:])
        if room < 0:
            raise ConfigError("task.lengths", length, f"too short for {len(needles)} passkeys")
        sizes = {sentence: tokens(f" {sentence}") for sentence in FILLER}
        filler = []
        while room >= 0:
            for sentence in rng.sample(FILLER, len(FILLER)):
                room -= sizes[sentence]
                if room < 0:
                    break
                filler.append(sentence)
        places = [round(depth / 100 * len(filler))]
        if self.spread is None:
            places += [rng.randint(0, len(filler)) for _ in needles[1:]]
        else:
            rest, gaps = len(filler) - places[0], len(needles)
            apart = self.spread == "prompt"
            places += [places[0] + apart * round(rest * i / gaps) for i in range(1, gaps)]
        # From the last place to the first, so that no insertion moves another place.
        pairs = sorted(zip(places, needles, strict=True), reverse=True)
        if self.spread is not None:  # digits at one place stay in order
            pairs.sort(key=lambda pair: (pair[0], needles.index(pair[1])), reverse=True)
        for place, needle in pairs:
            filler.insert(place, needle)
        name = f"{length}-{depth:g}-{repeat}"
        samples = [
            Sample(
                id=name,
                prompt=f"{intro}\n\n{' '.join(filler)}\n\n{question}",
                references=tuple(asked),
                group=f"{depth:g}%",
                question=question,
                meta={"length": length, "depth": depth},
            )
            for question, asked in questions
        ]
        return self.together(name, samples)

    def _needles(self, rng: random.Random) -> tuple[str, list[str], list[tuple[str, list[str]]]]:
        """Introduction, needles (that of the depth first), questions with their passkeys."""
        if self.variant == "single":
            key = f"{rng.randrange(10_000, 100_000)}"
            if self.spread is None:
                return INTRO, [NEEDLE.format(key=key)], [(QUESTION, [key])]
            if self.spread == "cell":
                return INTRO, [ONCE.format(key=key)], [(QUESTION, [key])]
            digits = [
                DIGIT.format(place=place, digit=digit)
                for place, digit in zip(PLACES, key, strict=True)
            ]
            return INTRO, digits, [(QUESTION, [key])]
        keys = [f"{key}" for key in rng.sample(range(10_000, 100_000), self.needles)]
        towns = rng.sample(TOWNS, self.needles)
        if self.variant == "multivalue":
            questions = [(ALL_OF_MANY.format(count=self.needles, town=towns[0]), keys)]
            towns = [towns[0]] * self.needles
        else:
            both = list(zip(towns, keys, strict=True))[: self.questions]
            questions = [(ONE_OF_MANY.format(town=town), [key]) for town, key in both]
        pairs = zip(towns, keys, strict=True)
        needles = [MANY_NEEDLE.format(town=town, key=key) for town, key in pairs]
        return MANY_INTRO, needles, questions

    def score(self, sample: Sample, record: Record) -> dict[str, float]:
        said = record["prediction"]
        if self.spread is not None:  # the answer, too, may be digit by digit
            said = re.sub(r"(?<=\d)[\s,]+(?=\d)", "", said)
        found = (re.search(rf"(?<!\d){key}(?!\d)", said) for key in sample.references)
        return {"accuracy": statistics.fmean(one is not None for one in found)}

    def breakdown(self, records: Sequence[Record]) -> dict[str, dict[str, float]]:
        """By length, and by length and depth, where there are several lengths."""
        if len(self.lengths) == 1:
            return self.by_question(records)
        means = means_by(lambda r: (r["meta"]["length"], r["meta"]["depth"]), records, "accuracy")
        cells = dict(sorted(means.items()))
        lengths = {
            f"{length}": statistics.fmean(value for (n, _), value in cells.items() if n == length)
            for length in dict.fromkeys(n for n, _ in cells)
        }
        named = {f"{n} at {depth:g}%": value for (n, depth), value in cells.items()}
        return {"length": lengths, "length and depth": named} | self.by_question(records)
