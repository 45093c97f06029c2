"""The manual-page task: which pages, and what its score rewards."""

from __future__ import annotations

import pytest

from buzz.errors import ConfigError
from evals.run.models import byte_tokenizer
from evals.tasks.pydoc import QUESTION, Pydoc

BOUNDS = {"shortest": 500, "longest": 2000}  # one token per byte


def load(**fields: object) -> list:
    return Pydoc(name="pydoc", **(BOUNDS | fields)).load(byte_tokenizer())


def test_pages_are_within_bounds_and_end_with_the_question():
    samples = load()
    assert len(samples) > 5 and len({s.id for s in samples}) == len(samples)
    for sample in samples:
        (page,) = sample.references
        assert 500 <= len(page.encode()) <= 2000
        assert sample.prompt.endswith(QUESTION) and page.strip() in sample.prompt


def test_seed_decides_which_pages_are_drawn():
    draws = [[s.id for s in load(samples=5, seed=seed)] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2] and len(draws[0]) == 5


def test_score_is_the_share_of_the_summary_that_stands_in_the_page():
    task, sample = Pydoc(name="pydoc"), load(samples=1)[0]
    words = sample.references[0].split()
    assert task.score(sample, {"prediction": " ".join(words[10:30])})["rouge2"] == 1
    assert task.score(sample, {"prediction": "zebras juggle pomegranates"})["rouge2"] == 0
    mixed = task.score(
        sample, {"prediction": " ".join(words[10:20]) + " zebras juggle pomegranates quietly"}
    )
    assert 0 < mixed["rouge2"] < 1


@pytest.mark.parametrize("bounds", [{"shortest": 0}, {"shortest": 900, "longest": 800}])
def test_bad_bounds_are_refused(bounds: dict):
    with pytest.raises(ConfigError, match="task\\."):
        Pydoc(name="pydoc", **bounds).check()


def test_bounds_without_a_page_are_refused():
    with pytest.raises(ConfigError, match="task.longest"):
        load(shortest=1, longest=2)
