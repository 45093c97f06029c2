"""Perplexity of a long text that is read with one cache."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate
from typing import ClassVar

from transformers import PreTrainedTokenizerBase

from buzz.errors import ConfigError
from evals.data import load_hub, read_text
from evals.records import Record
from evals.task import Sample, StreamTask


@dataclass(kw_only=True)
class Wikitext(StreamTask):
    """Scores: token and word perplexity; lower is better.

    Words are what white space separates; a text's word perplexity is exp(its loss in nats / its
    words), so it does not depend on the tokenizer. Of several texts, which are of one length, the
    perplexity is the geometric mean of theirs.

    Attributes:
        samples: the text is cut into consecutive pieces of `tokens`, each with a cache of its own;
            so many of them are read.
        data_file: any text file; None: the hub's raw Wikitext, its lines as they are.
        hub, hub_config, split: the data set on the hub.
    """

    headline: ClassVar[str] = "token_perplexity"
    statistic: ClassVar[str] = "exp"
    higher_is_better: ClassVar[bool] = False

    samples: int | None = 1
    data_file: str | None = None
    hub: str = "Salesforce/wikitext"
    hub_config: str | None = "wikitext-2-raw-v1"
    split: str = "test"
    _text: str = field(init=False, repr=False, default="")

    def check(self) -> None:
        super().check()
        if self.data_file is not None:
            self._text = read_text(self.data_file, "task.data_file")
        else:
            rows = load_hub(self.hub, self.hub_config, self.split, "task.data_file")
            self._text = "".join(row["text"] for row in rows)

    def load(self, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
        start = tokenizer("")["input_ids"]  # the token that begins a text, if there is one
        ids = tokenizer(self._text, add_special_tokens=False)["input_ids"]
        size = (self.tokens or len(start) + len(ids)) - len(start)
        pieces = [ids[i : i + size] for i in range(0, len(ids), size)]
        if len(start) + len(pieces[0]) <= self.blocks:
            raise ConfigError("task.data_file", self.data_file, "the text is too short")
        if len(pieces) > 1 and len(pieces[-1]) < size:
            pieces.pop()
        return [
            self._sample(tokenizer, number, start, piece)
            for number, piece in enumerate(pieces[: self.samples])
        ]

    def _sample(
        self, tokenizer: PreTrainedTokenizerBase, number: int, start: list[int], piece: list[int]
    ) -> Sample:
        scored = piece if start else piece[1:]  # nothing predicts a text's first token
        return Sample(
            id=str(number),
            prompt="",
            references=(),
            meta={"words": len(tokenizer.decode(scored).split())},
            ids=(*start, *piece),
        )

    def score_losses(self, sample: Sample, losses: Sequence[float]) -> dict[str, float]:
        scores = {"token_perplexity": math.exp(statistics.fmean(losses))}
        # A text of a few "words", as in Chinese, has none that a float could hold.
        with suppress(OverflowError):
            per_word = math.fsum(losses) / max(1, sample.meta["words"])
            scores["word_perplexity"] = math.exp(per_word)
        return scores

    def breakdown(self, records: Sequence[Record]) -> dict[str, dict[str, float]]:
        """Loss in nats per token over position, and the perplexities."""
        shortest = min(record["prompt_tokens"] for record in records) - 1
        whole, rest = divmod(shortest, self.blocks)
        ends = list(accumulate([whole + 1] * rest + [whole] * (self.blocks - rest)))
        blocks = (record["blocks"] for record in records)
        curve = [statistics.fmean(losses) for losses in zip(*blocks, strict=True)]
        spans = zip([0, *ends], ends, curve, strict=False)
        metrics = {
            name: [record["scores"][name] for record in records if name in record["scores"]]
            for name in ("token_perplexity", "word_perplexity")
        }
        return {
            "metric": {n: statistics.geometric_mean(v) for n, v in metrics.items() if v},
            "position (nats)": {f"{first + 1}-{end}": loss for first, end, loss in spans},
        }
