"""LongBench (arXiv 2308.14508), its 21 data sets by the benchmark's own rules.

Prompts, answer lengths and metrics are read from lm-eval's task definitions (`pip install -e
'.[longbench]'`). Where these differ from https://github.com/THUDM/LongBench (pred.py, eval.py,
config/dataset2prompt.json), the benchmark's rules are restored here. The runner truncates from the
middle, as the benchmark does (:func:`evals.tasks.encoding.encode`).
"""

from __future__ import annotations

import logging
import re
import statistics
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from pydantic import PositiveInt
from transformers import PreTrainedTokenizerBase

from buzz.errors import ConfigError
from evals.results.record import Record
from evals.tasks.base import Sample, Task, after, means_by
from evals.tasks.data import are_texts, load_hub, read_jsonl
from evals.tasks.definitions import LmEval, render

LM_EVAL = LmEval("longbench", task="longbench", extra="longbench")

NO_CHAT = {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
CLASSES = {"trec", "lsht"}  # their metric takes all classes
ANSWERS = {"passage_retrieval_en": r"Paragraph \d+", "passage_retrieval_zh": r"段落\d+"}
FIRST_LINE = {"trec", "triviaqa", "samsum", "lsht"}
STOP = {"samsum": ("\n",)}
# White space at the end of the benchmark's prompts that lm-eval's lack.
ENDING = {"lcc": "\n", "repobench-p": "\n", "passage_count": " ", "passage_retrieval_en": " "}
BLANK_LINE_BEFORE_QUESTION = {"triviaqa", "samsum"}

CATEGORIES = {
    "single_doc_qa": ("narrativeqa", "qasper", "multifieldqa_en", "multifieldqa_zh"),
    "multi_doc_qa": ("hotpotqa", "2wikimqa", "musique", "dureader"),
    "summarization": ("gov_report", "qmsum", "multi_news", "vcsum"),
    "few_shot": ("trec", "triviaqa", "samsum", "lsht"),
    "synthetic": ("passage_count", "passage_retrieval_en", "passage_retrieval_zh"),
    "code": ("lcc", "repobench-p"),
}
CHINESE = {"multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh"}
# LongBench-E's buckets: upper bounds in words (in Chinese, characters).
BUCKETS = {"0-4k": 4000, "4-8k": 8000, "8k+": float("inf")}


@dataclass(frozen=True)
class Dataset:
    """One data set of the benchmark.

    Attributes:
        template: Jinja source of the prompt, over `context` and `question`.
        max_new_tokens: the benchmark's answer length.
        metric: 0..1 of a prediction, one answer and `all_classes`.
        hub: path, configuration and split of lm-eval's mirror.
    """

    template: str
    max_new_tokens: int
    metric: Callable[..., float]
    hub: tuple[str, str, str]


def averages(means: dict[str, float]) -> dict[str, dict[str, float]]:
    """By category and by language, from the scores of data sets.

    As in the benchmark's tables, English and Chinese are means of their categories' means, and code
    is a category of both. `overall` is the plain mean over data sets.
    """

    def by_category(names: set[str]) -> dict[str, float]:
        return {
            category: statistics.fmean(means[name] for name in names.intersection(members))
            for category, members in CATEGORIES.items()
            if names.intersection(members)
        }

    names, code = set(means), set(means).intersection(CATEGORIES["code"])
    english, chinese = names - CHINESE - code, names & CHINESE
    languages = {
        "English": by_category(english | code) if english else {},
        "Chinese": by_category(chinese | code) if chinese else {},
        "code": by_category(code),
    }
    average = {name: statistics.fmean(found.values()) for name, found in languages.items() if found}
    average["overall"] = statistics.fmean(means.values())
    return {"category": by_category(names), "average": average}


@dataclass(kw_only=True)
class LongBench(Task):
    """Score: the data set's own metric, 0..100. Groups: data sets.

    Attributes:
        data_dir: folder of `<subset>.jsonl` in LongBench's schema, of LongBench-E
            `<subset>_e.jsonl`; None: lm-eval's hub mirror.
        extended: run LongBench-E, whose 13 data sets spread evenly over lengths.
        subsets: data sets to run; None for all, or for all that `data_dir` has.
        hub_revision: of the mirror; None: its main branch.
        samples: at most so many of each data set.
        max_new_tokens: None for the benchmark's own.
    """

    headline: ClassVar[str] = "score"
    grouped_by: ClassVar[str] = "data set"

    data_dir: str | None = None
    extended: bool = False
    subsets: Sequence[str] | None = None
    hub_revision: str | None = None
    max_new_tokens: PositiveInt | None = None
    _rows: dict[str, list[dict[str, Any]]] = field(init=False, repr=False, default_factory=dict)

    def prepare(self) -> None:
        known = dataset_names(self.extended)
        if self.data_dir is not None and not Path(self.data_dir).is_dir():
            raise ConfigError("task.data_dir", self.data_dir, "no such folder")
        subsets = self.subsets
        if subsets is None:
            subsets = [n for n in known if self.data_dir is None or self._file(n).is_file()]
        for name in subsets:
            if name not in known:
                raise ConfigError("task.subsets", name, f"choose among {', '.join(known)}")
        if not subsets:
            remedy = "no data set to run; name some, or a folder of <subset>.jsonl as task.data_dir"
            raise ConfigError("task.subsets", self.subsets, remedy)
        self._rows = {name: self._read(name) for name in subsets}

    def _file(self, name: str) -> Path:
        return Path(self.data_dir or "") / f"{name}{'_e' * self.extended}.jsonl"

    def _read(self, name: str) -> list[dict[str, Any]]:
        if self.data_dir is None:
            path, config, split = load_dataset(name).hub
            source = (path, config + "_e" * self.extended, split)
            rows = load_hub(*source, "task.data_dir", self.hub_revision)
        else:
            rows = read_jsonl(self._file(name), "task.data_dir", ("context", "answers"))
        for number, row in enumerate(rows, start=1):
            if problem := self._problem(name, row):
                raise ConfigError("task.data_dir", f"{name}, sample {number}", problem)
        return rows

    def _problem(self, name: str, row: dict[str, Any]) -> str | None:
        """What is wrong with a sample, if anything is."""
        # LongBench says `input`, lm-eval's mirror `question`.
        if not are_texts([row["context"], row.get("input", row.get("question"))]):
            return "`context` and `input` must be texts"
        if not are_texts(row["answers"]):
            return "`answers` must be a list of texts"
        if name in CLASSES and not are_texts(row.get("all_classes")):
            return "`all_classes` must be a list of texts"
        if not all(re.search(ANSWERS.get(name, ""), answer) for answer in row["answers"]):
            return f"`answers` must be like {ANSWERS[name]}"
        if self.extended and type(row.get("length")) is not int:
            return "`length` must be a number of words"
        return None

    def load(self, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
        return [
            self._sample(name, number, row)
            for name, rows in self._rows.items()
            for number, row in enumerate(rows[: self.samples])
        ]

    def _sample(self, name: str, number: int, row: dict[str, Any]) -> Sample:
        dataset, prompt = load_dataset(name), prompt_of(name, row)
        return Sample(
            id=f"{name}-{number}",
            prompt=prompt,
            references=tuple(row["answers"]),
            group=name,
            question=after(row["context"], prompt),
            meta={key: row.get(key) for key in ("_id", "all_classes", "length")},
            max_new_tokens=dataset.max_new_tokens,
            chat_template=name not in NO_CHAT,
            stop=STOP.get(name, ()),
        )

    def score(self, sample: Sample, record: Record) -> dict[str, float]:
        given = record["prediction"], sample.references, sample.meta["all_classes"]
        return {"score": score(sample.group, *given)}

    def breakdown(self, records: Sequence[Record]) -> dict[str, dict[str, float]]:
        """Averages over data sets; for LongBench-E also by length, as the benchmark does."""
        result = averages(_dataset_means(records))
        if not self.extended:
            return result
        buckets = {
            bucket: _dataset_means(r for r in records if bucket_of(r["meta"]["length"]) == bucket)
            for bucket in BUCKETS
        }
        result["length"] = {b: statistics.fmean(m.values()) for b, m in buckets.items() if m}
        return result | {f"data set at {bucket}": means for bucket, means in buckets.items()}


def bucket_of(words: int) -> str:
    """The length bucket of LongBench-E for a sample of so many words."""
    return next(bucket for bucket, bound in BUCKETS.items() if words < bound)


def _dataset_means(records: Iterable[Record]) -> dict[str, float]:
    return means_by(lambda record: record["group"], records, "score")


def prompt_of(name: str, row: dict[str, Any]) -> str:
    """The benchmark's prompt for one sample, before truncation and chat template."""
    question = row["input"] if "input" in row else row["question"]
    template = load_dataset(name).template
    return render(template, context=row["context"], question=question, input=question)


def score(
    name: str, prediction: str, answers: Sequence[str], all_classes: Sequence[str] | None = None
) -> float:
    """The benchmark's score of one prediction, 0..100: the best over the answers."""
    metric = load_dataset(name).metric
    if name in FIRST_LINE:
        prediction = prediction.lstrip("\n").split("\n")[0]
    return 100 * max(metric(prediction, answer, all_classes=all_classes) for answer in answers)


def _code_similarity(prediction: str, answer: str, all_classes: Sequence[str] | None) -> float:
    """Of the first line that is neither comment nor fence, even if it is blank.

    lm-eval's metric skips blank lines, the benchmark's does not.
    """
    lines = prediction.lstrip("\n").split("\n")
    code = (line for line in lines if not any(mark in line for mark in ("`", "#", "//")))
    return _metrics().fuzz.ratio(next(code, ""), answer) / 100


def dataset_names(extended: bool = False) -> list[str]:
    """The data sets of LongBench, or of LongBench-E (without their ``_e``)."""
    stems = sorted(path.stem for path in LM_EVAL.path.glob("[!_]*.yaml"))
    if extended:
        return [stem.removesuffix("_e") for stem in stems if stem.endswith("_e")]
    return [stem for stem in stems if not stem.endswith("_e")]


@cache
def load_dataset(name: str) -> Dataset:
    """A data set by lm-eval's definition, with the benchmark's rules restored.

    Raises:
        ConfigError: lm-eval, or what its metrics need, is not installed.
    """
    definition = LM_EVAL.read(f"{name}.yaml")
    template = definition["doc_to_text"]
    if name in BLANK_LINE_BEFORE_QUESTION:
        template = template.replace("{{context}}\n{{question}}", "{{context}}\n\n{{question}}")
    if not template.endswith(ending := ENDING.get(name, "")):
        template += ending
    # The benchmark's own function behind lm-eval's wrapper, which strips predictions first:
    # `metrics.get_qa_f1_with_score` (in older releases `get_qa_f1_score`) wraps `qa_f1_score`.
    wrapper = definition["process_results"]
    metric = re.sub(r".*\.get_|_with_score$|_score$", "", wrapper) + "_score"
    own = _code_similarity if metric == "code_sim_score" else getattr(_metrics(), metric)
    return Dataset(
        template=template,
        max_new_tokens=definition["generation_kwargs"]["max_gen_toks"],
        metric=own,
        hub=(definition["dataset_path"], definition["dataset_name"], definition["test_split"]),
    )


@cache
def _metrics() -> ModuleType:
    jieba = logging.getLogger("jieba")
    jieba.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on the speed of string matching
        module = LM_EVAL.module("metrics")
    jieba.setLevel(logging.WARNING)  # it sets its own level on import
    return module
