"""Faults, each put where it would happen: nothing done is lost, and nothing wrong is counted."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from runs import MODEL, NEEDLE, read, shown, summary_of
from tiny import FAMILIES

import evals.run.loggers
import evals.run.runner
from baselines import TOVAPolicy
from buzz import ConfigError, EvictionCache
from evals.results.folder import RunFailed, SettingFolder
from evals.run.faults import asked_nbytes, fault
from evals.run.interrupt import Interrupted, deferred_signals
from evals.run.models import byte_tokenizer, load_model
from evals.tasks.needle import Needle

Act = Callable[["Pass"], None]


class Pass:
    """A forward pass at its first attention layer.

    Attributes:
        method: the cache's, or "several" where methods share the pass.
        prompt, step: of this method, from 0; step 0 reads the prompt. Warm-ups are not counted.
        rows, new: shape of the token ids.
        cache: what it writes to.
    """

    method = ""
    prompt = step = -1
    rows = new = 0
    cache: EvictionCache
    logits: float | torch.Tensor = 1.0  # what they are multiplied by


@pytest.fixture
def during(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Act], None]]:
    """Makes a function run inside the forward passes of a method, or of all but the full cache."""
    passes: dict[str, Pass] = {}
    acts: list[tuple[Act, str | None]] = []
    last = Pass()

    def before_attention(module, args, kwargs) -> None:
        nonlocal last
        cache = next(v for v in kwargs.values() if isinstance(v, EvictionCache))
        method = cache.policy.name if type(cache) is EvictionCache else "several"
        last = now = passes.setdefault(method, Pass())
        now.method, now.cache = method, cache
        now.rows, now.new, _ = kwargs["hidden_states"].shape
        if now.new > 1:
            warm_up = now.new == 32
            now.prompt, now.step = (-1 if warm_up else now.prompt + 1), -1
        now.step += 1
        now.logits = 1.0
        for act, on in acts:
            if now.prompt >= 0 and (method == on if on else method != "full"):
                act(now)

    def load(*arguments):
        model, tokenizer = original(*arguments)
        attention = model.model.layers[0].self_attn
        attention.register_forward_pre_hook(before_attention, with_kwargs=True)
        model.lm_head.register_forward_hook(lambda module, args, out: out * last.logits)
        return model, tokenizer

    original = evals.run.runner.load_model
    monkeypatch.setattr(evals.run.runner, "load_model", load)
    evals.run.runner._loaded.clear()
    yield lambda act, on=None: acts.append((act, on))
    evals.run.runner._loaded.clear()


# --- memory ---------------------------------------------------------------------------------------

ASKED = 2**55  # bytes, which no allocator gives


@pytest.mark.parametrize("step", [0, 3], ids=["prefill", "decode"])
def test_out_of_memory_costs_one_sample_and_gives_its_memory_back(go, during, step) -> None:
    caches, freed = [], []

    def act(now: Pass) -> None:
        if (now.prompt, now.step) == (1, step):
            caches.append(weakref.ref(now.cache))
            torch.empty(ASKED, dtype=torch.uint8)
        if (now.prompt, now.step) == (2, 0):
            freed.append(caches[0]() is None)

    during(act)
    folder = go("method=h2o", "budget=60")
    first, oom, last = read(folder)
    assert (first["status"], oom["status"], last["status"]) == ("ok", "oom", "ok")
    assert freed == [True]
    assert oom["asked_nbytes"] == ASKED and 50e6 < oom["in_use_nbytes"] < 20e9
    assert "scores" not in oom and str(ASKED) in oom["error"]
    assert (summary_of(folder)["n"], summary_of(folder)["oom"]) == (2, 1)
    assert "+1 oom" in shown(folder)
    go("method=h2o", "budget=60")
    assert len(read(folder)) == 3  # it is a result, and no reason to run again


MESSAGES = {
    "CUDA out of memory. Tried to allocate 20.50 GiB. GPU 0 has a total capacity of 79.10 GiB of"
    " which 1.20 GiB is free.": 20.5 * 2**30,
    "Unable to allocate 8.00 MiB for an array with shape (1024, 1024)": 2**23,
    "CUDA error: out of memory": None,
}


@pytest.mark.parametrize("text", MESSAGES)
def test_bytes_asked_for_are_read_from_the_message(text: str) -> None:
    nbytes = MESSAGES[text]
    assert asked_nbytes(RuntimeError(text)) == nbytes
    kind = RuntimeError if nbytes is None else torch.cuda.OutOfMemoryError
    for error in (kind(text), MemoryError(text)):
        assert fault(error, torch.device("cpu"))["status"] == "oom"


def test_a_batch_that_is_too_large_runs_in_halves_with_its_own_budget(go, during) -> None:
    setting = ["method=h2o", "budget=0.25", "task.depths=[0,25,50,75,100]", "task.batch_size=5"]
    whole = {record["id"]: record for record in read(go(*setting))}
    sizes = []

    def act(now: Pass) -> None:
        if now.step == 0:
            sizes.append(now.rows)
        if now.rows > 2:
            torch.empty(ASKED, dtype=torch.uint8)

    during(act)
    records = read(go(*setting, f"output={go.runs}/small"))
    assert sizes == [5, 2, 3, 1, 2]
    assert sorted(record["batch_size"] for record in records) == [1, 2, 2, 2, 2]
    for record in records:
        assert record["tokens"] == whole[record["id"]]["tokens"]
        assert record["budget_entries"] == whole[record["id"]]["budget_entries"]


# --- numbers and samples --------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_make_no_answer(go, during, value: float) -> None:
    def act(now: Pass) -> None:
        if (now.prompt, now.step) == (1, 2):
            now.logits = value

    during(act)
    folder = go("method=buzz", "model.dtype=bfloat16")
    assert [record["status"] for record in read(folder)] == ["ok", "failed", "ok"]
    assert read(folder)[1]["error"] == (
        "NotFinite: the logits were not finite at step 2 (model.dtype=bfloat16)"
    )
    assert "+1 FAILED" in shown(folder)


def test_one_row_of_nan_does_not_fail_its_batch(go, during) -> None:
    setting = ["method=buzz", "task.batch_size=3"]
    longest = max(record["prompt_tokens"] for record in read(go("method=buzz")))

    def act(now: Pass) -> None:
        if now.new == longest:  # the last row is that prompt
            now.logits = torch.ones(now.rows, 1, 1)
            now.logits[-1] = float("nan")

    during(act)
    by_length = sorted(read(go(*setting)), key=lambda record: record["prompt_tokens"])
    assert [record["status"] for record in by_length] == ["ok", "ok", "failed"]


def test_losses_that_are_not_finite_make_no_perplexity(go, during, tmp_path: Path) -> None:
    def act(now: Pass) -> None:
        now.logits = float("nan") if now.prompt == 2 else 1.0

    during(act)
    (tmp_path / "text").write_text("Bees dance to tell each other where flowers are. " * 20)
    text = ["task=wikitext", f"task.data_file={tmp_path}/text", "task.tokens=65", "task.chunk=16"]
    with pytest.raises(RunFailed, match="all 1 samples failed.*loss was not finite at step 33 "):
        go(*text, "method=local", needle=False)


@pytest.mark.parametrize("score", [float("nan"), ZeroDivisionError("no words")])
def test_a_sample_that_fails_is_named_and_runs_again(main, monkeypatch, capsys, score) -> None:
    def broken(self, sample, prediction):
        if not sample.id.startswith("400-50-"):
            return original(self, sample, prediction)
        if isinstance(score, Exception):
            raise score
        return {"accuracy": score}

    original = Needle.score
    monkeypatch.setattr(Needle, "score", broken)
    assert main(*MODEL, *NEEDLE, "method=buzz") == 1
    out, err = capsys.readouterr()
    error = "ZeroDivisionError: no words" if isinstance(score, Exception) else "ArithmeticError"
    assert f"sample 400-50-0 failed under buzz: {error}" in err
    assert "+1 FAILED" in out
    (file,) = main.runs.glob("needle-*/buzz.jsonl")
    assert summary_of(file)["failed"] == 1
    monkeypatch.undo()
    assert main(*MODEL, *NEEDLE, "method=buzz") == 0
    assert len(file.read_text().splitlines()) == 4
    assert summary_of(file)["failed"] == 0 and summary_of(file)["n"] == 3


def test_samples_that_fail_in_a_sweep_decide_its_exit_status(main, monkeypatch, capsys) -> None:
    """A row that fails in a pass takes no other along."""

    def score(self, entries):
        raise RuntimeError("an ill-treated kernel")

    monkeypatch.setattr(TOVAPolicy, "score", score)
    assert main("-m", *MODEL, *NEEDLE, "method=full,tova,h2o", "budget=60") == 1
    out = capsys.readouterr().out
    assert "2 complete, 1 failed" in out
    assert "FAILED method=tova: all 3 samples failed, the first with RuntimeError: an ill" in out
    (file,) = main.runs.glob("needle-*/h2o@60.jsonl")
    assert [record["status"] for record in read(file)] == ["ok"] * 3


# --- signals --------------------------------------------------------------------------------------


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT is heeded, which a process that a shell started with `&` was told to ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt(number: int, times: int = 1) -> Act:
    """Sends signals while the second sample is being answered, once."""
    left = [number] * times

    def act(now: Pass) -> None:
        while (now.prompt, now.step) == (1, 3) and left:
            os.kill(os.getpid(), left.pop())

    return act


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(
    ("number", "times", "kept", "status"),
    [(signal.SIGINT, 1, 2, 130), (signal.SIGTERM, 1, 2, 143), (signal.SIGINT, 2, 1, 130)],
    ids=["SIGINT", "SIGTERM", "SIGINT twice"],
)
def test_a_signal_stops_after_the_sample_in_flight_and_a_second_at_once(
    main, during, capfd, number: int, times: int, kept: int, status: int
) -> None:
    before = signal.getsignal(number)
    during(interrupt(number, times), "full")
    assert main(*MODEL, *NEEDLE, "method=full") == status
    assert signal.getsignal(number) is before
    err = capfd.readouterr().err
    assert "once more stops at once" in err and "the same command goes on from here" in err
    (file,) = main.runs.glob("needle-*/full.jsonl")
    assert [record["status"] for record in read(file)] == ["ok"] * kept
    assert summary_of(file)["not_run"] == 3 - kept
    assert main(*MODEL, *NEEDLE, "method=full") == 0
    assert f"{kept} of 3 samples are there already" in capfd.readouterr().err
    assert len(read(file)) == len(file.read_text().splitlines()) == 3


@pytest.mark.usefixtures("interruptible")
def test_a_signal_ends_a_sweep_too(main, during, monkeypatch) -> None:
    monkeypatch.setattr(evals.run.runner, "PROMPTS", 1)  # of a pass; what is in flight is finished
    during(interrupt(signal.SIGINT))
    assert main("-m", *MODEL, *NEEDLE, "method=full,local,h2o", "budget=60") == 130
    for name in ("full", "local@60", "h2o@60"):
        (file,) = main.runs.glob(f"needle-*/{name}.jsonl")
        assert len(read(file)) == 2


@pytest.mark.usefixtures("interruptible")
def test_a_signal_during_the_last_sample_ends_a_sweep_too(go, during) -> None:
    last = lambda now: now.prompt == 2 and now.step == 1 and os.kill(os.getpid(), signal.SIGINT)  # noqa: E731
    during(last, "full")
    with pytest.raises(Interrupted):
        go("method=full")
    assert len(read(go("method=full"))) == 3


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell has it for `command &`
    try:
        with deferred_signals():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


# --- the disk -------------------------------------------------------------------------------------


@contextmanager
def full_disk(nbytes: int) -> Iterator[None]:
    """Files cannot grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("torn", [False, True])
def test_a_full_disk_loses_nothing_that_was_written(main, monkeypatch, capsys, torn) -> None:
    def append(self, file, record):
        size = file.stat().st_size if file.exists() else 0
        if size:
            with full_disk(size + 200), monkeypatch.context() as patch:
                if torn:  # not even the half line can be taken back
                    patch.setattr("evals.results.folder.os.truncate", refuse)
                return original(self, file, record)
        return original(self, file, record)

    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    original = SettingFolder.append
    with monkeypatch.context() as patch:
        patch.setattr(SettingFolder, "append", append)
        assert main(*MODEL, *NEEDLE, "method=full") == 1
    (file,) = main.runs.glob("needle-*/full.jsonl")
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {file} cannot be written: No space left")
    lines = file.read_bytes().splitlines(keepends=True)
    assert [line.endswith(b"\n") for line in lines] == [True] + [False] * torn
    assert main(*MODEL, *NEEDLE, "method=full") == 0
    assert file.read_bytes().startswith(lines[0])
    assert len(read(file)) == len(file.read_bytes().splitlines()) == 3


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = SettingFolder(tmp_path)
    folder.write("prompts.json", {"of": 1})
    with full_disk(5), pytest.raises(RunFailed, match="prompts.json cannot be written: File too"):
        folder.write("prompts.json", {"of": 2, "much": "more"})
    assert json.loads((tmp_path / "prompts.json").read_text()) == {"of": 1}


# --- what lies elsewhere --------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["init", "init.return_value.log", "init.return_value.finish"])
@pytest.mark.parametrize("hangs", [False, True])
def test_weights_and_biases_never_fails_a_run(go, monkeypatch, call: str, hangs: bool) -> None:
    def fail(*_: object, **__: object) -> None:
        if hangs:
            over.wait(60)
        raise ConnectionError("network unreachable")

    over, wandb = threading.Event(), MagicMock()
    wandb.configure_mock(**{f"{call}.side_effect": fail})
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(evals.run.loggers, "PATIENCE", 0.5)
    reason = "no answer within 0.5 s" if hangs else "network unreachable"
    with pytest.warns(UserWarning, match=f"not logged to Weights & Biases: {reason}"):
        folder = go("method=full", "logger=wandb")
    over.set()
    assert summary_of(folder)["n"] == 3


def test_tensorboard_never_fails_a_run(go, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(evals.run.loggers, "find_spec", lambda name: None)
        patch.setattr(evals.run.runner, "load_model", None)
        with pytest.raises(ConfigError, match="logger='tensorboard': is not installed: pip"):
            go("method=full", "logger=tensorboard")
    monkeypatch.setattr(evals.run.loggers, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.warns(UserWarning, match="not logged to TensorBoard"):
        folder = go("method=full", "logger=tensorboard")
    assert summary_of(folder)["n"] == 3


def unreachable() -> list[Exception]:
    import httpx
    import requests

    return [
        httpx.ConnectError("no route to host"),
        httpx.ReadTimeout(""),
        requests.ConnectionError("no route to host\nand more"),
        OSError("no route to host"),
    ]


@pytest.mark.parametrize("error", unreachable(), ids=lambda error: type(error).__name__)
def test_an_unreachable_hub_is_one_line(go, monkeypatch, error: Exception) -> None:
    import datasets
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    def fail(*_: object, **__: object) -> None:
        raise error

    reason = "no route to host" if str(error) else "ReadTimeout"
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ConfigError, match=rf"task.data_file=None: .*\({reason}\); give a local"):
        go("task=xsum", needle=False)

    # The model's files: none of them, or all but the weights.
    cfg = {"name_or_path": "some/model", "max_length": 512, "dtype": "float32"}
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *a, **k: byte_tokenizer())
    for config in (fail, lambda *a, **k: FAMILIES["llama"]):
        monkeypatch.setattr(AutoConfig, "from_pretrained", config)
        with pytest.raises(ConfigError, match=f"name_or_path='some/model': {reason} .give a local"):
            load_model({**cfg, "attn_implementation": "sdpa"}, "cpu")


# --- the clock ------------------------------------------------------------------------------------


def test_a_clock_that_is_set_back_changes_no_measurement(go, monkeypatch) -> None:
    clock = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    for record in read(go("method=buzz")):
        assert 0 < record["ttft_s"] < 60 and 0 < record["itl_p50_ms"] <= record["itl_p95_ms"]
        assert record["decode_tokens_per_s"] > 0


# --- comparison with the full cache ---------------------------------------------------------------


def test_a_comparison_that_fails_is_named_and_made_again(go, monkeypatch, capsys) -> None:
    """The answers that are there stay, and are not made again."""

    def fails_once(model, tokenizer, prompts, *rest, **options):
        calls.append(options["own"])
        if len(calls) < 6 and any(prompt.sample.id == "400-50-0" for prompt in prompts):
            raise ValueError("no luck")
        return original(model, tokenizer, prompts, *rest, **options)

    calls: list[bool] = []
    original = evals.run.runner.answer_together
    monkeypatch.setattr(evals.run.runner, "answer_together", fails_once)
    setting = ("method=h2o", "budget=60")
    before = read(go(*setting))
    file = go(*setting, "kl=true")
    assert "failed: ValueError: no luck" in capsys.readouterr().err
    assert ["kl_to_full" in record for record in read(file)] == [True, False, True]
    assert read(go(*setting, "kl=true"))[1]["kl_to_full"] > 0
    assert calls == [False] * 6  # all three prompts, one, two, each of these, and the one again
    assert [r["tokens"] for r in read(file)] == [r["tokens"] for r in before]
