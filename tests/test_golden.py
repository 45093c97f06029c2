"""The originals' outputs: what they kept, and the logits they computed from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tools import replay_traces, verify_logits

GOLDEN = Path(__file__).parent / "golden"


def run(monkeypatch: pytest.MonkeyPatch, script: object, prefix: Path) -> int:
    monkeypatch.setattr("sys.argv", ["script", str(prefix)])
    return script.main()


@pytest.mark.filterwarnings("ignore:method.stride")
def test_every_recorded_eviction_is_reproduced(monkeypatch, capsys) -> None:
    assert run(monkeypatch, replay_traces, GOLDEN / "eviction_traces") == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert set(rows) == {"buzz", "buzz_strided", "h2o", "streaming_llm"}
    assert all(row.endswith(" 0 mismatches") for row in rows.values())


def test_a_wrong_recording_is_noticed(monkeypatch, capsys, tmp_path) -> None:
    cases = json.loads((GOLDEN / "eviction_traces.json").read_text())
    case = next(case for case in cases if case["policy"] == "h2o")
    arrays = dict(np.load(GOLDEN / "eviction_traces.npz"))
    arrays[f"{case['case']}/0/kept"] = arrays[f"{case['case']}/0/kept"] + 1
    (tmp_path / "t.json").write_text(json.dumps([case]))
    np.savez(tmp_path / "t.npz", **arrays)
    assert run(monkeypatch, replay_traces, tmp_path / "t") == 1
    assert "1 mismatches" in capsys.readouterr().out


def test_every_recorded_run_decodes_the_same(monkeypatch, capsys) -> None:
    assert run(monkeypatch, verify_logits, GOLDEN / "tiny_llama") == 0
    assert capsys.readouterr().out.count(" ok") == 7


def test_wrong_logits_are_noticed(monkeypatch, capsys, tmp_path) -> None:
    for path in GOLDEN.glob("tiny_llama*"):
        shutil.copy(path, tmp_path)
    arrays = dict(np.load(tmp_path / "tiny_llama.npz"))
    arrays["h2o/logits"] = arrays["h2o/logits"] + 0.01
    np.savez(tmp_path / "tiny_llama.npz", **arrays)
    assert run(monkeypatch, verify_logits, tmp_path / "tiny_llama") == 1
    assert capsys.readouterr().out.count("FAILED") == 1


def test_a_missing_recording_is_a_clear_error(monkeypatch, capsys) -> None:
    assert run(monkeypatch, replay_traces, GOLDEN / "nothing") == 2
    assert "cannot read the recording" in capsys.readouterr().err
