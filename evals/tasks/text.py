"""Metrics of texts that more than one task needs."""

from __future__ import annotations

import re
import string
import sys
from collections import Counter
from functools import cache

from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge import Rouge
from rouge_score.rouge_scorer import RougeScorer


@cache
def _scorer() -> RougeScorer:
    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


def rouge(reference: str, prediction: str) -> dict[str, float]:
    """ROUGE-1, -2 and -L F-measure, 0..100, by rouge-score with Porter stemming."""
    scores = _scorer().score(reference, prediction)
    return {name: 100 * score.fmeasure for name, score in scores.items()}


def package_rouge(reference: str, prediction: str) -> dict[str, float]:
    """ROUGE-1, -2 and -L F-measure, 0..100, by the package `rouge`, as LongBench and BUZZ use it.

    Nothing is stemmed, repeated n-grams count once, and sentences end at full stops. A text without
    a word scores 0. Names begin with ``pkg_``.
    """
    names = {"pkg_rouge1": "rouge-1", "pkg_rouge2": "rouge-2", "pkg_rougeL": "rouge-l"}
    limit = sys.getrecursionlimit()
    # The package walks the words of two sentences by recursion.
    sys.setrecursionlimit(limit + len(reference) + len(prediction))
    try:
        (scores,) = Rouge().get_scores([prediction], [reference])
    except ValueError:  # an empty text
        return dict.fromkeys(names, 0.0)
    finally:
        sys.setrecursionlimit(limit)
    return {ours: 100 * scores[theirs]["f"] for ours, theirs in names.items()}


def as_buzz_writes(text: str) -> str:
    """An answer as the code of the BUZZ paper writes it before it is scored.

    Its decoding takes out blanks before punctuation and contracted verbs, in this order, white
    space around the answer goes, and its writer leaves a blank at the end, which the package
    `rouge` takes for a further, empty sentence. An empty answer stays empty.
    """
    for spaced in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(spaced, spaced.strip())
    return f"{text.strip()} " if text.strip() else ""


def self_bleu(text: str) -> float:
    """How far the sentences of a text repeat each other, 0..1: their mean BLEU against the others.

    As the code of the BUZZ paper has it: BLEU of 1- to 3-grams with equal weights, smoothed by
    method 1 of Chen and Cherry (2014); sentences end at full stops, so after a last one follows an
    empty sentence, which scores 0. So does a text without a full stop, which has no others.
    """
    counts = Counter(tuple(sentence.split()) for sentence in text.split("."))
    weights, smooth = (1 / 3, 1 / 3, 1 / 3), SmoothingFunction().method1
    total = 0.0
    for sentence, times in counts.items():
        # To BLEU it is the same how often a reference is there.
        others = [other for other in counts if other != sentence or times > 1]
        if others:
            total += times * sentence_bleu(others, sentence, weights, smooth)
    return total / counts.total()


def normalized(text: str) -> str:
    """SQuAD's normal form: lower case, without punctuation, articles and extra white space."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def word_f1(answer: str, prediction: str) -> float:
    """F1 over the words of the normal forms, 0..1."""
    expected, found = normalized(answer).split(), normalized(prediction).split()
    common = (Counter(expected) & Counter(found)).total()
    return 2 * common / (len(expected) + len(found)) if common else 0.0
