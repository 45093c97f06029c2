"""The check of a card, as far as it goes without one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

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


def test_there_are_twelve_steps_in_their_order() -> None:
    numbers = [int((step.__doc__ or "0").split(".")[0]) for step in gpu_check.STEPS]
    assert numbers == list(range(1, 13))


@pytest.mark.gpu
def test_on_a_card_the_quick_steps_pass() -> None:
    with torch.no_grad():
        for step in (gpu_check.flash_paths, gpu_check.same_tokens, gpu_check.no_waiting):
            step()
