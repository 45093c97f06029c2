"""Perplexity of a long text that is read with one cache."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import ClassVar

from pydantic import PositiveInt
from transformers import PreTrainedTokenizerBase

from buzz.errors import ConfigError
from evals.results.record import Record
from evals.tasks.base import Sample, StreamTask
from evals.tasks.data import load_hub, read_text


@dataclass(kw_only=True)
class Wikitext(StreamTask):
    """Scores: token and word perplexity; lower is better.

    Words are separated by white space. A text's word perplexity is exp(its loss in nats / its
    words), so it does not depend on the tokenizer. The perplexity of several texts, which have one
    length, is their geometric mean.

    Attributes:
        samples: how many consecutive pieces of `tokens` are read, each with a cache of its own.
        rows: the first so many lines, each tokenized by itself (with the token that begins a text,
            if there is one), are read one after another with one cache: a line's first token is not
            predicted, and its last is not fed. This is what the BUZZ paper's code reads. None: the
            lines are one text.
        data_file: any text file; None: the hub's raw Wikitext, its lines as they are.
        hub, hub_config, hub_revision, split: the data set on the hub.
    """

    headline: ClassVar[str] = "token_perplexity"
    statistic: ClassVar[str] = "exp"
    higher_is_better: ClassVar[bool] = False

    samples: PositiveInt | None = 1
    rows: PositiveInt | None = None
    data_file: str | None = None
    hub: str = "Salesforce/wikitext"
    hub_config: str | None = "wikitext-2-raw-v1"
    hub_revision: str | None = None
    split: str = "test"
    _lines: list[str] = field(init=False, repr=False, default_factory=list)

    def check(self) -> None:
        super().check()
        if self.rows is not None:
            if self.tokens is not None:
                remedy = "task.rows are read whole; write null for one of the two"
                raise ConfigError("task.tokens", self.tokens, remedy)
            if self.samples not in (None, 1):
                raise ConfigError("task.samples", self.samples, "task.rows are one sample; write 1")

    def prepare(self) -> None:
        if self.data_file is not None:
            text = read_text(self.data_file, "task.data_file")
            self._lines = list(io.StringIO(text))  # which end at newlines only
        else:
            source = (self.hub, self.hub_config, self.split)
            rows = load_hub(*source, "task.data_file", self.hub_revision)
            self._lines = [row["text"] for row in rows]

    def load(self, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
        if self.rows is not None:
            return [self._sample_of_rows(tokenizer, self._lines[: self.rows])]
        start = tokenizer("")["input_ids"]  # the token that begins a text, if there is one
        ids = tokenizer("".join(self._lines), add_special_tokens=False)["input_ids"]
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

    def _sample_of_rows(self, tokenizer: PreTrainedTokenizerBase, lines: list[str]) -> Sample:
        # The hub has blank lines as empty rows.
        rows = [tokenizer(line if line.strip() else "")["input_ids"] for line in lines]
        rows = [row for row in rows if row]
        if sum(map(len, rows)) - len(rows) < self.blocks:
            raise ConfigError("task.rows", self.rows, "they hold too little text; read more")
        return Sample(
            id="0",
            prompt="",
            references=(),
            meta={
                "words": sum(len(tokenizer.decode(row[1:]).split()) for row in rows),
                "rows": len(rows),
            },
            ids=tuple(chain.from_iterable(rows)),
            starts=tuple(accumulate(map(len, rows[:-1]), initial=0)),
        )

    def score(self, sample: Sample, record: Record) -> dict[str, float]:
        losses = record["losses"]
        scores = {"token_perplexity": math.exp(statistics.fmean(losses))}
        # A text of a few "words", as in Chinese, has none that a float could hold.
        with suppress(OverflowError):
            per_word = math.fsum(losses) / max(1, sample.meta["words"])
            scores["word_perplexity"] = math.exp(per_word)
        return scores

    def breakdown(self, records: Sequence[Record]) -> dict[str, dict[str, float]]:
        """Loss in nats per token over position, and the perplexities."""
        shortest = min(r["prompt_tokens"] - r["meta"].get("rows", 1) for r in records)
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
