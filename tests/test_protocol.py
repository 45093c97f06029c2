"""`protocol=original` against the code of the BUZZ paper, by what that made of made-up samples.

`golden/original_protocol.json` has the samples, which were written for it, and beside them what the
functions and expressions at `source` of `repository` at `commit` made of them when they were run:
SHA-256 of prompts and of token rows, scores, and answers as its decoding loop writes them (with the
`clean_up_tokenization` of transformers 4.33.0, which it pins).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

import datasets
import pytest
import yaml
from omegaconf import OmegaConf
from runs import MODEL, ROOT, composed, read, ready, shown, summary_of, write_lines
from tokenizers.processors import TemplateProcessing

from buzz import ConfigError
from evals.run.models import byte_tokenizer
from evals.run.plan import Plan
from evals.run.read import fed_and_scored
from evals.tasks.base import Sample, Task
from evals.tasks.build import check
from evals.tasks.data import load_hub
from evals.tasks.nq10 import NQ10
from evals.tasks.summarization import Summarization
from evals.tasks.text import as_buzz_writes, package_rouge, self_bleu
from evals.tasks.types import template
from evals.tasks.wikitext import Wikitext

GOLDEN = json.loads((Path(__file__).parent / "golden/original_protocol.json").read_text())
TOKENIZER = byte_tokenizer()
ROOM = ["protocol=original", *MODEL, "model.max_length=4096"]  # for its 1,001 new tokens


def under_protocol(*overrides: str) -> dict[str, Any]:
    return OmegaConf.to_container(composed("protocol=original", *overrides), resolve=True)


def original(task: str, file: Path, *overrides: str) -> Task:
    """The task as a command with `protocol=original` gets it, checked."""
    return Plan.of(composed(*ROOM, f"task={task}", f"task.data_file={file}", *overrides)).task


def sha256(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return hashlib.sha256(text.encode()).hexdigest()


def bos_tokenizer() -> Any:
    """One token a byte, and one that begins every text, as Llama's tokenizer has it."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    return tokenizer


# --- prompts, token rows and scores ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "made"),
    [
        ("xsum", "summaries"),
        ("cnn_dailymail", "summaries"),
        ("self_bleu", "self_bleu_prompts"),
        ("nq10", "questions"),
    ],
)
def test_prompts_are_the_originals(tmp_path: Path, task: str, made: str) -> None:
    golden = GOLDEN[made]
    rows = golden.get("rows") or [{"article": a, "summary": "s"} for a in golden["articles"]]
    samples = original(task, write_lines(tmp_path / "data.jsonl", rows)).load(TOKENIZER)
    assert [sha256(sample.prompt) for sample in samples] == golden["sha256"]
    assert len(samples) == 3


def test_lines_of_wikitext_are_read_as_the_original_reads_them(tmp_path, monkeypatch) -> None:
    golden = GOLDEN["wikitext"]
    file = tmp_path / "text"
    file.write_text("".join(row or " \n" for row in golden["rows"]), encoding="utf-8")
    task = original("wikitext", file, f"task.rows={golden['read']}")
    (sample,) = task.load(bos_tokenizer())
    fed, scored = fed_and_scored(sample.ids, sample.starts)
    assert (sha256(fed), sha256(scored)) == (golden["fed_sha256"], golden["scored_sha256"])
    assert len(fed) == len(scored) == golden["tokens"]
    rows = [{"text": row} for row in golden["rows"]]  # of the hub
    monkeypatch.setattr("evals.tasks.wikitext.load_hub", lambda *source: rows)
    (same,) = ready(Wikitext(name="w", rows=golden["read"])).load(bos_tokenizer())
    assert same.ids == sample.ids and same.starts == sample.starts
    words = sum(len(row.split()) for row in golden["rows"][: golden["read"]])
    assert sample.meta == {"words": words, "rows": golden["read"]}


def test_answers_are_written_and_scored_as_in_the_original() -> None:
    for case in GOLDEN["answers"]["cases"]:
        assert as_buzz_writes(case["decoded"]) == case["written"]
        expected = {name: 100 * case[name] for name in case if name.startswith("pkg_")}
        sample = Sample("0", "", (case["reference"],))
        found = Summarization(name="s", hub="none").score(sample, {"prediction": case["decoded"]})
        assert {name: found[name] for name in expected} == pytest.approx(expected)
    # The blank at the end is a sentence to the package: it costs precision.
    reference = "The bees of the mill have moved."
    scores = [
        package_rouge(reference, text)["pkg_rouge1"]
        for text in ("The bees have moved.", as_buzz_writes("The bees have moved."))
    ]
    assert scores == pytest.approx([800 / 11, 200 / 3])


def test_self_bleu_is_the_originals() -> None:
    for text, score in GOLDEN["self_bleu"]["cases"]:
        assert self_bleu(text) == pytest.approx(score)


def test_self_bleu_of_what_a_failing_model_writes() -> None:
    assert self_bleu("") == self_bleu("no full stop at all") == 0
    assert self_bleu("." * 1000) == 0
    assert self_bleu("Bees dance in the dark." * 300) == pytest.approx(300 / 301)


def test_strict_match_is_the_originals(tmp_path: Path) -> None:
    for answer, first, match in GOLDEN["strict_match"]["cases"]:
        sample = Sample("0", "", (first, "another"))
        assert NQ10(name="n").score(sample, {"prediction": answer})["strict_match"] == match


# --- the configuration ----------------------------------------------------------------------------

BUZZ = {"sink": 4, "window": 160, "stride": 5, "threshold": 400, "compact": "once"}
METHODS = {
    "streaming_llm": {"sink": 4, "window": 160},
    "local": {"window": 164},
    "h2o": {"heavy": 400, "recent": 160, "scoring": "sum"},
    "buzz": BUZZ | {"history": "strided"},
    "buzz_strided": BUZZ,
    "buzz_fast": BUZZ | {"history": "strided"},
}
ANSWERS = {
    "samples": 40,
    "max_new_tokens": GOLDEN["answers"]["most_tokens"],
    "chat_template": False,
    "batch_size": 1,
}
SUMMARIES = ANSWERS | {"headline": "pkg_rougeL", "words": 50, "split": "validation"}
TASKS = {
    "xsum": SUMMARIES | {"hub": "EdinburghNLP/xsum"},
    "cnn_dailymail": SUMMARIES | {"hub": "abisee/cnn_dailymail", "hub_config": "2.0.0"},
    "self_bleu": SUMMARIES | {"headline": "self_bleu", "words": 150, "hub_config": "2.0.0"},
    "nq10": ANSWERS | {"headline": "strict_match", "gold_at": [4]},
    "wikitext": {"rows": 40, "tokens": None, "chunk": 1, "samples": 1, "split": "validation"},
}


@pytest.mark.parametrize("method", METHODS)
def test_sizes_of_the_original(method: str) -> None:
    found = under_protocol(f"method={method}")
    assert found["method"].items() >= METHODS[method].items()
    assert found["budget"] is None and found["protocol"] == {"name": "original", "budgets": False}


@pytest.mark.parametrize("task", TASKS)
def test_task_settings_of_the_original(task: str) -> None:
    assert under_protocol(f"task={task}")["task"].items() >= TASKS[task].items()
    assert (
        under_protocol("task=suite")["task"]["settings"][task]
        == under_protocol(f"task={task}")["task"]
    )


def test_ones_own_settings_win_over_the_protocol() -> None:
    found = under_protocol(
        *("method=h2o", "method.heavy=7", "task=xsum", "task.words=9"),
        *("model=llama2_7b_chat", "model.dtype=bfloat16"),
    )
    assert found["method"]["heavy"] == 7 and found["method"]["recent"] == 160
    assert found["task"]["words"] == 9 and found["task"]["headline"] == "pkg_rougeL"
    assert found["model"]["dtype"] == "bfloat16"


@pytest.mark.parametrize("model", ["llama2_7b_chat", "llama2_7b"])
def test_the_originals_models_run_in_half_precision(model: str) -> None:
    assert under_protocol(f"model={model}")["model"]["dtype"] == "float16"


@pytest.mark.parametrize("override", ["task=needle", "model=smollm2", "model=hf"])
def test_what_has_no_counterpart_stays_as_it_is(override: str) -> None:
    group = override.partition("=")[0]
    own = OmegaConf.to_container(composed(override), resolve=True)[group]
    assert under_protocol(override)[group] == own


def test_the_documented_commands_run_the_original() -> None:
    page = (ROOT / "docs/reproduce.md").read_text(encoding="utf-8")
    section = page.split("## 1. As the original ran it")[1].split("```sh")[1].split("```")[0]
    tasks = set()
    for command in section.strip().splitlines():
        start, *overrides = command.replace("method=$M", "method=h2o").split(" -m ")
        assert start == "python run.py"
        found = under_protocol(*overrides[0].split())
        assert found["protocol"]["name"] == "original" and found["method"]["heavy"] == 400
        assert found["model"]["name_or_path"] == "meta-llama/Llama-2-7b-chat-hf"
        name = found["task"]["name"]
        assert found["task"].items() >= TASKS[name].items()
        tasks.add(name)
    assert tasks == TASKS.keys()


def test_the_default_protocol_has_its_own_sizes_and_prompts() -> None:
    config = composed("method=h2o", "task=nq10")
    assert (config.method.heavy, config.method.recent) == (280, 280)
    assert config.task.headline == "best_subspan" and "{instruction}" in config.task.prompt
    assert config.task.prompt == NQ10.prompt and config.task.document == NQ10.document
    for name in ("xsum", "cnn_dailymail", "self_bleu"):
        task = yaml.safe_load((ROOT / f"configs/task/{name}.yaml").read_text())
        assert task["prompt"] == Summarization.prompt


# --- what is refused ------------------------------------------------------------------------------


def test_a_template_is_filled_once() -> None:
    kind = Annotated[str, template(["a"])]
    check("t", "{{literal}} {a}", kind)
    assert "{{literal}} {a}".format(a="{b}") == "{literal} {b}"
    with pytest.raises(ConfigError, match="must have {a}"):
        check("t", "{a.__class__}", kind)


# --- reading lines with one cache -----------------------------------------------------------------


def test_a_run_over_lines(main, tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_text("".join(f" Line {i} of bees . \n" for i in range(9)), encoding="utf-8")
    setting = [*ROOM, "task=wikitext", "task.rows=6"]
    assert main(*setting, "method=buzz", f"task.data_file={file}", "method.window=20") == 0
    (file,) = main.runs.glob("wikitext-*/buzz*.jsonl")
    (record,) = read(file)
    size = len(" Line 0 of bees . \n")
    assert record["prompt_tokens"] == 6 * size and record["meta"]["rows"] == 6
    assert record["kv_entries_peak"] <= 4 + 20 + 400
    assert f"-{6 * (size - 1)}" in shown(file) and summary_of(file)["score"] > 1


def test_too_few_lines_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a b\n\n\nc d")
    with pytest.raises(ConfigError, match="task.rows=3: they hold too little text"):
        original("wikitext", tmp_path / "text", "task.rows=3").load(TOKENIZER)


def test_a_run_for_self_bleu_is_better_when_lower(main, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "data.jsonl", [{"article": "Bees.", "highlights": "Bees."}] * 2)
    setting = [*ROOM, "task=self_bleu", f"task.data_file={file}"]
    assert main(*setting, "task.max_new_tokens=5", "method=streaming_llm") == 0
    (file,) = main.runs.glob("self_bleu-*/streaming_llm*.jsonl")
    metric = yaml.safe_load((file.parent / "setting.yaml").read_text())["metric"]
    assert metric["headline"] == "self_bleu" and metric["higher_is_better"] is False
    assert all(0 <= record["scores"]["self_bleu"] <= 1 for record in read(file))
    assert "pkg_rougeL" in read(file)[0]["scores"]


# --- the hub --------------------------------------------------------------------------------------


def test_every_data_set_of_the_hub_is_pinned() -> None:
    """Commits that hold Parquet files: `datasets` runs no scripts."""
    for name in ("xsum", "cnn_dailymail", "self_bleu", "wikitext"):
        for protocol in ("original", "equal_memory"):
            task = under_protocol(f"task={name}", f"protocol={protocol}")["task"]
            assert len(task["hub_revision"]) == 40, name


def test_a_revision_with_a_script_is_a_clear_error(monkeypatch) -> None:
    def load_dataset(*name: str, **options: str) -> None:
        raise RuntimeError("Dataset scripts are no longer supported, but found x.py")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ConfigError, match=r"h \(revision main\) could not be loaded .*x.py"):
        load_hub("h", None, "test", "task.data_file")
