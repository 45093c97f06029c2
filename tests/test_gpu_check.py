"""The check of a card, as far as it goes without one."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationMixin

from buzz import probe
from scripts import gpu_check


def test_without_a_card_only_the_interpreters_part_counts(monkeypatch, capsys, tmp_path) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_check, "kernel_tests", lambda interpreted: asked.append(interpreted))
    assert gpu_check.main(["--out", str(tmp_path)]) == 0 and asked == [True]
    assert "no CUDA device" in capsys.readouterr().out and not list(tmp_path.iterdir())

    def broken(interpreted: bool) -> None:
        raise gpu_check.Failed("a kernel")

    monkeypatch.setattr(gpu_check, "kernel_tests", broken)
    assert gpu_check.main(["--out", str(tmp_path)]) == 1


def test_a_step_that_fails_fails_no_other(monkeypatch, tmp_path: Path) -> None:
    def passes() -> dict[str, int]:
        """1. this"""
        return {"ms": 3}

    def fails() -> dict[str, int]:
        """2. that"""
        gpu_check.expect(False, "too slow")
        return {}

    def left_out() -> dict[str, int]:
        """3. what needs more"""
        raise gpu_check.LeftOut("needs 36 GB")

    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check.torch.cuda, "get_device_name", lambda: "A Card 80GB")
    monkeypatch.setattr(gpu_check.torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(gpu_check, "STEPS", (passes, fails, left_out))
    assert gpu_check.main(["--out", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "a-card-80gb-check.json").read_text())
    assert [step["result"] for step in found["steps"]] == ["passed", "failed", "left out"]
    monkeypatch.setattr(gpu_check, "STEPS", (passes, left_out))
    assert gpu_check.main(["--out", str(tmp_path)]) == 0


def test_there_are_fifteen_steps_in_their_order() -> None:
    numbers = [int((step.__doc__ or "0").split(".")[0]) for step in gpu_check.STEPS]
    assert numbers == list(range(1, 16))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted")
def test_every_line_runs_on_a_card_that_is_not_there(monkeypatch, tmp_path: Path) -> None:
    """Numbers are made up and judged by nobody: it is typing errors that must not cost a card."""
    pytest.importorskip("triton")
    import fake_card

    if not fake_card.available():
        pytest.skip("no C++ compiler")
    read = gpu_check.read_and_decode
    asked: list[list[str]] = []

    def start(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        compile(command[2], "code", "exec") if command[1] == "-c" else None
        return subprocess.CompletedProcess(command, 0, "64 passed in 3s\n1.5\n", "")

    def generate(
        model: Any, ids: torch.Tensor, *, max_new_tokens: int, min_new_tokens: int,
        do_sample: bool, pad_token_id: int, **cache: Any,
    ) -> torch.Tensor:  # fmt: skip
        """As that of transformers, which ends when numbers say so."""
        for tokens in (ids, *[ids[:, :1]] * max_new_tokens):
            model(tokens, **cache)
        return ids

    def findings(model: Any, decoder: Any, kinds: list[Any]) -> probe.Findings:
        """What a probe finds of a Llama, whose numbers are none here."""
        return probe.Findings([probe.Turning(decoder.rotary_emb) for _ in kinds], None)

    monkeypatch.setattr(probe, "findings", findings)
    monkeypatch.setattr(GenerationMixin, "generate", generate)
    for name, value in {
        "METHODS": ("h2o",),
        "LLAMA_7B": gpu_check.TINY,
        "TOKENS": 3,
        "STEADY": 4,
        "CACHES": 2,
        "expect": lambda holds, what: None,
        "timed": lambda run: 1.0 + (run() is None),
        "read_and_decode": lambda model, cache, prompt, new, chunk=0: read(
            model, cache, 700, 2, chunk and 350
        ),
    }.items():
        monkeypatch.setattr(gpu_check, name, value)
    monkeypatch.setattr(gpu_check.subprocess, "run", start)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    cuda = {"max_memory_allocated": 1, "mem_get_info": (80e9, 80e9), "is_available": True}
    names = "synchronize", "empty_cache", "reset_peak_memory_stats", "set_sync_debug_mode"
    for name, answer in {**dict.fromkeys(names), **cuda}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    gpu_check.bandwidth.cache_clear()
    with fake_card.card(answers=True) as noted:
        gpu_check.main(["--out", str(tmp_path)])
        gpu_check.bandwidth.cache_clear()
    (file,) = tmp_path.iterdir()
    steps = json.loads(file.read_text())["steps"]
    assert {step["step"]: step.get("reason") for step in steps} == {
        step.__doc__: None for step in gpu_check.STEPS
    }
    launched = {name for name, _ in noted.launches}
    assert {"_received_kernel", "_decode_kernel", "_move_kernel", "_append_kernel"} <= launched
    assert len(asked) == 3  # the kernels' tests, and attention with cuDNN and without


@pytest.mark.gpu
def test_on_a_card_the_quick_steps_pass() -> None:
    with torch.no_grad():
        for step in (gpu_check.flash_paths, gpu_check.same_tokens, gpu_check.no_waiting):
            step()
