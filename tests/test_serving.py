"""Tables and figure of pages and agreeing heads, from samples whose numbers are known."""

from __future__ import annotations

import pandas as pd
import pytest

from evals.report.serving import CONSTRAINTS, FREE, constrained, draw, tables
from evals.results.frame import load

SUFFIXES = {"": 0.0, ",granularity=page16,heads=layer": 0.25, ",granularity=page64,heads=all": 0.75}
BY_MAX = ",granularity=page16,page_score=max,heads=layer"


@pytest.fixture
def rows(tmp_path) -> pd.DataFrame:
    lines = []
    for i in range(4):
        for method, kl in {"h2o": 1.0, "tova": 2.0}.items():
            told = {"prompt_tokens": 100, "answer": "a", "budget": 0.25, "budget_by": "peak"}
            told |= {
                "entries_mean": 25,
                "entries_peak": 25,
                "evictions": 1,
                "kl_median": 0,
                "top1": 1,
            }
            for suffix, more in SUFFIXES.items():
                more = more if method == "h2o" else -more
                line = told | {"sample": str(i), "method": method + suffix, "full_score": 0}
                lines.append(line | {"task": "news", "kl": kl + i / 8 + more})
                found = 100 * (i < 2) if method == "h2o" else 100
                more = {"score": found, "full_score": 100}
                lines.append(line | {"task": "niah_single_1 at 1024"} | more)
        lines.append(lines[0] | {"sample": str(i), "method": "h2o" + BY_MAX, "kl": 0.75 + i / 8})
    # A prompt that one row alone answered is in no mean.
    lines.append(lines[0] | {"sample": "alone", "kl": 99})
    pd.DataFrame(lines).to_csv(tmp_path / "samples.csv.gz", index=False)
    return load(tmp_path)


def test_numbers(rows, tmp_path) -> None:
    kl, cost, by_max, passkeys = (table.frame.set_index("method") for table in tables(rows))
    assert kl.loc["h2o", FREE] == pytest.approx(1.1875)
    assert kl.loc["tova", "page 16, layer"] == pytest.approx(1.9375)
    assert kl.loc["h2o", "held"] == 1
    assert kl.loc["h2o"].isna().sum() == len(CONSTRAINTS) - len(SUFFIXES)  # not measured: blank
    assert kl.loc["order (Spearman)", "page 64, all"] == pytest.approx(-1)
    assert cost.loc["h2o", ["page 64, all", "page 64, all low"]].tolist() == pytest.approx(
        [0.75, 0.75]
    )
    assert cost.loc["tova", "page 64, all"] == pytest.approx(-0.75)
    assert by_max.loc["h2o", "page 16, layer, max"] == pytest.approx(-0.5)
    assert passkeys[FREE].to_dict() == {"h2o": 50, "tova": 100, "full": 100}
    assert draw(rows, tmp_path)[0].stat().st_size


def test_nothing_is_constrained(rows) -> None:
    assert constrained(rows[~rows.label.str.contains(",")]).empty
