"""Hostile input: a ConfigError of one line, or a result that can be used; never anything else."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from runs import composed
from tiny import checkpoint, tiny

import baselines  # noqa: F401  (registers its policies)
from buzz import POLICIES, Budget, ConfigError
from evals.run.generate import generate
from evals.run.models import byte_tokenizer, load_model
from evals.run.plan import Plan
from evals.tasks.base import Task
from evals.tasks.data import read_jsonl, read_text
from evals.tasks.encoding import encode
from evals.tasks.nq10 import NQ10
from evals.tasks.qa import QA
from evals.tasks.summarization import Summarization

TOKENIZER = byte_tokenizer()
HUGE, LONG = 10**30, "x" * 100_000
ANYTHING = st.sampled_from(
    [
        *(None, True, False, -HUGE, -1, 0, 1, 2, 3, 5, 64, 1024, 1025, HUGE),
        *(0.0, 0.25, 0.5, 1.0, 1.5, -1.0, math.nan, math.inf, -math.inf, 1e308),
        *("", "0", "7", "no", "auto", "sum", "../..", "\0", "é\u2028", "[1]", "日本", " ", LONG),
        *([], [1], [0.5], ["a"], [[1]], [None], [-1], [400], [HUGE], [True], {}, {"a": 1}, [{}]),
    ]
).map(copy.deepcopy)


def fuzz(examples: int) -> settings:
    """So many cases, the same ones in every run; with --slow ten times as many, and others."""
    alike = settings.default.derandomize
    return settings(
        max_examples=examples if alike else 10 * examples,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@contextmanager
def refused_or_right() -> Iterator[None]:
    """The body checks that what is not refused is right."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except ConfigError as error:
            assert "\n" not in str(error) and error.field and error.remedy


# --- methods --------------------------------------------------------------------------------------


@fuzz(1000)
@given(st.sampled_from(sorted(POLICIES)), st.data())
def test_parameters_and_budgets(name, data) -> None:
    fields = [field.name for field in dataclasses.fields(POLICIES[name])]
    number = st.integers(1, 60)
    values = {field: data.draw(number | ANYTHING) for field in fields if data.draw(st.booleans())}
    with refused_or_right():
        policy = POLICIES[name](**values)
        for field, default in dataclasses.asdict(POLICIES[name]()).items():
            assert type(getattr(policy, field)) is type(default)
        steps = [200, 1, 1, 17, 1]
        seen = 0
        for new, held in zip(steps, policy.lengths(steps), strict=True):
            seen += new
            assert 0 < held <= seen
        budget = Budget(
            data.draw(st.integers(-3, 300)), data.draw(st.sampled_from(["peak", "mean"]))
        )
        fixed = data.draw(st.frozensets(st.sampled_from([*fields, "none"])))
        fitted, _ = budget.policy(policy, data.draw(st.integers(1, 900)), fixed)
        for field in set(fields) & fixed:
            assert getattr(fitted, field) == getattr(policy, field)


# --- configurations -------------------------------------------------------------------------------

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_length": 1024,
}


@pytest.fixture(scope="module")
def configurations(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Valid ones: every method, and every task that needs no package beyond the required ones."""
    folder = tmp_path_factory.mktemp("fuzz")
    files = {name: folder / f"{name}.jsonl" for name in ROWS}
    for name, file in files.items():
        file.write_text(json.dumps(ROWS[name]))
    (folder / "text").write_text("word " * 900)
    model = ["model=llama_random", *(f"model.{key}={value}" for key, value in SMALL.items())]
    tasks = {
        "needle": ["task.lengths=[400]"],
        "pydoc": [],
        "xsum": [f"task.data_file={files['xsum']}"],
        "nq10": [f"task.data_file={files['nq10']}"],
        "wikitext": [f"task.data_file={folder}/text", "task.tokens=500"],
    }
    found = []
    for number, method in enumerate(sorted(POLICIES)):
        for budget in ("null", "0.25", "300"):
            task = list(tasks)[number % len(tasks)] if budget == "null" else "needle"
            chosen = [f"method={method}", f"task={task}", *tasks[task], f"budget={budget}"]
            cfg = composed(*model, *chosen, f"output={folder}/runs")
            found.append(OmegaConf.to_container(cfg, resolve=True))
    return found


def leaves(node: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of all settings, whole groups among them."""
    for key, value in node.items():
        if key != "_target_":
            yield (*above, key)
            if isinstance(value, dict):
                yield from leaves(value, (*above, key))


def at(node: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        node = node.get(key) if isinstance(node, dict) else None
    return node


@fuzz(400)
@given(st.data())
def test_configurations(configurations, data) -> None:
    original = configurations[data.draw(st.integers(0, len(configurations) - 1))]
    config = copy.deepcopy(original)
    for _ in range(data.draw(st.sampled_from([1, 1, 1, 2, 3]))):
        path = data.draw(st.sampled_from(sorted(leaves(config))))
        node = at(config, path[:-1])
        if data.draw(st.integers(0, 9)) == 0:
            del node[path[-1]]
        else:
            node[path[-1]] = data.draw(ANYTHING)
    with refused_or_right():
        plan = Plan.of(OmegaConf.create(config))
        assert plan.folder.parent == Path(config["output"])
        for path in leaves(config):
            before, value = at(original, path), at(config, path)
            if isinstance(before, bool | str):  # `no` is true, and 5 is no name
                named_true = path == ("cache", "positions") and value is True
                assert type(value) is type(before) or named_true, path


# --- data files -----------------------------------------------------------------------------------

DOCUMENT = {"title": "t", "text": "a b"}
ROWS: dict[str, dict[str, Any]] = {
    "xsum": {"document": "A long text.", "summary": "Short.", "id": "1"},
    "nq10": {"question": "q", "answers": ["a"], "gold_index": 0, "ctxs": [DOCUMENT, DOCUMENT]},
    "qa": {"context": "a b", "question": "q", "answers": ["a"]},
    "qasper": {"input": "q", "context": "a b", "answers": ["a"], "all_classes": None, "length": 3},
    "trec": {"input": "q", "context": "c", "answers": ["a"], "all_classes": ["a"], "length": 3},
    "lcc": {"input": "", "context": "c", "answers": ["a"], "all_classes": None, "length": 3},
}
INSIDE = ANYTHING | st.sampled_from(["\ud800", [DOCUMENT], ["title"], {"title": ["t"]}]).map(
    copy.deepcopy
)
WHOLE = [
    *(b"[]", b"1", b"null", b"NaN", b"\0", b"   ", b"\xff\xfe", b"{}", b'"x'),
    *(b"[" * 100_000, b'{"a":' * 50_000, b'{"document":' + b"1" * 5000 + b"}"),
    *(b'{"document":1e999}', b'\xef\xbb\xbf{"document":"a","summary":"b"}'),
]


@st.composite
def lines(draw: st.DrawFn, row: dict[str, Any]) -> bytes:
    """A line of a file: a valid one, with wrong values, cut, with a wrong byte, or no object."""
    row = copy.deepcopy(row)
    for _ in range(draw(st.sampled_from([0, 1, 1, 2]))):
        key = draw(st.sampled_from(sorted(row))) if row else "a"
        place = draw(st.integers(0, 3))
        if place == 0:
            row.pop(key, None)
        elif place == 1 and isinstance(row.get(key), list) and row[key]:
            row[key][-1] = draw(INSIDE)
        else:
            row[key] = draw(INSIDE)
    line = json.dumps(row, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    damage = draw(st.integers(0, 20))
    if damage == 0:
        return line[: draw(st.integers(0, len(line)))]
    if damage == 1:
        place = draw(st.integers(0, len(line) - 1))
        return line[:place] + draw(st.binary(min_size=1, max_size=2)) + line[place + 1 :]
    return draw(st.sampled_from(WHOLE)) if damage == 2 else line


def task_of(name: str, file: Path) -> Task:
    if name == "xsum":
        return Summarization(name=name, hub="none", data_file=str(file))
    if name in ("nq10", "qa"):
        return {"nq10": NQ10, "qa": QA}[name](name=name, data_file=str(file))
    longbench = pytest.importorskip("evals.tasks.longbench")
    return longbench.LongBench(name="longbench", data_dir=str(file.parent), subsets=[name])


@pytest.mark.parametrize("name", ROWS)
@fuzz(300)
@given(st.data())
def test_rows_of_tasks(name, tmp_path, data) -> None:
    if name not in ("xsum", "nq10", "qa"):
        pytest.importorskip("lm_eval")
        pytest.importorskip("jieba")
    file = tmp_path / f"{name}.jsonl"
    count = data.draw(st.sampled_from([0, 1, 1, 1, 2, 3]))
    file.write_bytes(b"\n".join(data.draw(lines(ROWS[name])) for _ in range(count)))
    prediction = data.draw(st.sampled_from(["", "a", "x\nb", "\0", "3 \u2028"]))
    with refused_or_right():
        task = task_of(name, file)
        task.check()
        task.prepare()
        for sample in task.load(TOKENIZER):
            sample.prompt.encode()
            assert sample.references and all(isinstance(text, str) for text in sample.references)
            json.dumps(sample.meta, allow_nan=False)
            scores = task.score(sample, {"prediction": prediction})
            assert task.headline in scores and all(map(math.isfinite, scores.values()))


@fuzz(500)
@given(st.binary(max_size=200) | st.text(max_size=60).map(lambda text: text.encode("utf-8")))
def test_bytes_as_data(tmp_path, content) -> None:
    file = tmp_path / "data"
    file.write_bytes(content)
    with refused_or_right():
        assert all(isinstance(row, dict) for row in read_jsonl(file, "task.data_file"))
    with refused_or_right():
        assert read_text(file, "task.data_file").encode() is not None


# --- prompts --------------------------------------------------------------------------------------

PROMPTS = st.text(st.characters(), max_size=40) | st.sampled_from(  # with lone surrogates
    ["", " ", "<bos>", "<eos><eos>", "<pad>" * 99, "a", "🐝", "\ud800"]
)


@fuzz(1000)
@given(PROMPTS, st.integers(1, 60))
def test_prompts_are_cut_to_their_limit(text, limit) -> None:
    with refused_or_right():
        ids, truncated = encode(TOKENIZER, text, False, limit)
        assert 0 < len(ids) <= limit and truncated >= 0
        assert truncated or TOKENIZER.decode(ids) == text


@pytest.mark.parametrize("text", [LONG, "é " * 50_000, "<eos>" * 20_000], ids=["x", "é", "eos"])
def test_prompts_longer_than_any_limit_are_cut_to_it(text) -> None:
    for limit in (1, 2, 7, 100, 2000):
        with refused_or_right():
            ids, truncated = encode(TOKENIZER, text, False, limit)
            assert 0 < len(ids) <= limit and truncated > 0


@fuzz(40)
@given(
    st.sampled_from(sorted(POLICIES)),
    st.lists(st.lists(st.integers(0, 96), min_size=1, max_size=40), min_size=1, max_size=3),
)
def test_any_token_ids_can_be_continued(name, prompts) -> None:
    """One token, only padding tokens, only special tokens, in batches."""
    with refused_or_right():
        policy = POLICIES[name]().fit(24)
        for answer in generate(tiny("llama"), TOKENIZER, prompts, policy, 4):
            assert 1 <= answer.generated_tokens <= 4
            assert len(answer.lengths) == answer.generated_tokens


# --- weights --------------------------------------------------------------------------------------


def load_from(folder: Path, **options: Any) -> None:
    cfg = {"name_or_path": str(folder), "max_length": 128, "dtype": "float32"}
    model, _ = load_model({**cfg, "attn_implementation": "sdpa", **options}, "cpu")
    assert all(weight.isfinite().all() for weight in model.parameters())


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def gguf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest Llama, complete as far as its header and metadata go."""
    folder = tmp_path_factory.mktemp("gguf")
    file = folder / "m.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(8)
    writer.add_head_count(2)
    writer.add_tensor("token_embd.weight", np.ones((4, 8), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


@pytest.mark.parametrize(
    ("kind", "name"),
    [("weights", name) for name in ("model.safetensors", "config.json", "tokenizer.json")]
    + [("gguf_folder", "m.gguf")],
)
@fuzz(30)
@given(data=st.data())
def test_truncated_checkpoints(request, kind, name, data) -> None:
    folder: Path = request.getfixturevalue(kind)
    file, before = folder / name, sorted(folder.iterdir())
    whole = file.read_bytes()
    end = data.draw(st.integers(0, len(whole.rstrip()) - 1))
    file.write_bytes(whole[:end])
    try:
        with refused_or_right():
            load_from(folder, **({"gguf_file": name} if kind == "gguf_folder" else {}))
            pytest.fail(f"{name} was loaded, cut after {end} of {len(whole)} bytes")
    finally:
        file.write_bytes(whole)
    assert sorted(folder.iterdir()) == before
