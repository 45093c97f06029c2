"""LongBench (arXiv 2308.14508), its 21 data sets by the benchmark's own rules.

Prompts, answer lengths and metrics are read from lm-eval's task definitions (`pip install
buzz-bench[longbench]`). Where those differ from https://github.com/THUDM/LongBench (pred.py,
eval.py, config/dataset2prompt.json), the benchmark's rules are restored here; truncation from the
middle is the runner's (:func:`evals.runner.encode`).
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import yaml
from jinja2 import Environment
from transformers import PreTrainedTokenizerBase

from buzz.errors import ConfigError
from evals.data import load_hub, read_jsonl
from evals.task import Sample, Task

REMEDY = "LongBench needs lm-eval and its metrics: pip install 'buzz-bench[longbench]'"

NO_CHAT = {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
FIRST_LINE = {"trec", "triviaqa", "samsum", "lsht"}
STOP = {"samsum": ("\n",)}
# The white space that lm-eval's prompts lost.
ENDING = {"lcc": "\n", "repobench-p": "\n", "passage_count": " ", "passage_retrieval_en": " "}
BLANK_LINE_BEFORE_QUESTION = {"triviaqa", "samsum"}


@dataclass(frozen=True)
class Dataset:
    """One data set of the benchmark.

    Attributes:
        template: Jinja source of the prompt, over `context` and `question`.
        max_new_tokens: the benchmark's answer length.
        metric: takes a sample's fields and a list of one prediction; 0..1 by metric name.
        hub: path, configuration and split of lm-eval's mirror.
    """

    template: str
    max_new_tokens: int
    metric: Callable[[dict[str, Any], list[str]], dict[str, float]]
    hub: tuple[str, str, str]


@dataclass(kw_only=True)
class LongBench(Task):
    """Score: the data set's own metric, 0..100. Groups: data sets.

    Attributes:
        data_dir: folder of `<subset>.jsonl` in LongBench's schema; None: lm-eval's hub mirror.
        subsets: data sets to run; None for all, or for all that `data_dir` has.
        samples: at most so many of each data set.
        max_new_tokens: None for the benchmark's own.
    """

    headline: ClassVar[str] = "score"
    own_lengths: ClassVar[bool] = True

    data_dir: str | None = None
    subsets: Sequence[str] | None = None
    max_new_tokens: int | None = None
    _rows: dict[str, list[dict[str, Any]]] = field(init=False, repr=False, default_factory=dict)

    def check(self) -> None:
        super().check()
        known = dataset_names()
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
        return Path(self.data_dir or "") / f"{name}.jsonl"

    def _read(self, name: str) -> list[dict[str, Any]]:
        if self.data_dir is None:
            rows = load_hub(*load_dataset(name).hub, field="task.data_dir")
        else:
            rows = read_jsonl(self._file(name), "task.data_dir", ("context", "answers"))
        for number, row in enumerate(rows, start=1):
            # LongBench says `input`, lm-eval's mirror `question`.
            if "question" not in row and "input" not in row:
                raise ConfigError("task.data_dir", f"{name}, sample {number}", "has no `input`")
            if not isinstance(row["answers"], list) or not row["answers"]:
                raise ConfigError(
                    "task.data_dir", f"{name}, sample {number}", "`answers` must be a list of texts"
                )
        return rows

    def load(self, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
        return [
            self._sample(name, number, row)
            for name, rows in self._rows.items()
            for number, row in enumerate(rows[: self.samples])
        ]

    def _sample(self, name: str, number: int, row: dict[str, Any]) -> Sample:
        dataset = load_dataset(name)
        return Sample(
            id=f"{name}-{number}",
            prompt=prompt_of(name, row),
            references=tuple(row["answers"]),
            group=name,
            meta={"_id": row.get("_id"), "all_classes": row.get("all_classes")},
            max_new_tokens=dataset.max_new_tokens,
            chat_template=name not in NO_CHAT,
            stop=STOP.get(name, ()),
        )

    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        classes = sample.meta["all_classes"]
        return {"score": score(sample.group, prediction, sample.references, classes)}


def prompt_of(name: str, row: dict[str, Any]) -> str:
    """The benchmark's prompt for one sample, before truncation and chat template."""
    question = row["input"] if "input" in row else row["question"]
    template = Environment(keep_trailing_newline=True).from_string(load_dataset(name).template)
    return template.render(context=row["context"], question=question, input=question)


def score(
    name: str, prediction: str, answers: Sequence[str], all_classes: Sequence[str] | None = None
) -> float:
    """The benchmark's score of one prediction, 0..100: the best over the answers."""
    if name in FIRST_LINE:
        prediction = prediction.lstrip("\n").split("\n")[0]
    doc = {"answers": list(answers), "all_classes": all_classes}
    # Newer definitions give the same number twice, under the metric's name and as "score".
    return 100 * next(iter(load_dataset(name).metric(doc, [prediction]).values()))


def dataset_names() -> list[str]:
    """The benchmark's data sets, those of LongBench-E not among them."""
    stems = sorted(path.stem for path in _definitions().glob("[!_]*.yaml"))
    return [stem for stem in stems if not stem.endswith("_e")]


@cache
def load_dataset(name: str) -> Dataset:
    """A data set by lm-eval's definition, put right.

    Raises:
        ConfigError: lm-eval, or what its metrics need, is not installed.
    """
    text = (_definitions() / f"{name}.yaml").read_text(encoding="utf-8")
    definition = yaml.load(text, Loader=_Loader)
    template = definition["doc_to_text"]
    if name in BLANK_LINE_BEFORE_QUESTION:
        template = template.replace("{{context}}\n{{question}}", "{{context}}\n\n{{question}}")
    if not template.endswith(ending := ENDING.get(name, "")):
        template += ending
    return Dataset(
        template=template,
        max_new_tokens=definition["generation_kwargs"]["max_gen_toks"],
        metric=getattr(_metrics(), definition["process_results"].rpartition(".")[-1]),
        hub=(definition["dataset_path"], definition["dataset_name"], definition["test_split"]),
    )


class _Loader(yaml.SafeLoader):
    """Reads lm-eval's `!function module.name` as that text."""


_Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def _definitions() -> Path:
    spec = importlib.util.find_spec("lm_eval")  # found without importing all of it
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("task", "longbench", REMEDY)
    return Path(next(iter(spec.submodule_search_locations))) / "tasks" / "longbench"


@cache
def _metrics() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "lm_eval_longbench_metrics", _definitions() / "metrics.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    logging.getLogger("jieba").setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on the speed of string matching
            spec.loader.exec_module(module)
    except ImportError as error:
        raise ConfigError("task", "longbench", REMEDY) from error
    logging.getLogger("jieba").setLevel(logging.WARNING)  # jieba sets its own level on import
    return module
