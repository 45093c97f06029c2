"""Metrics of texts that several tasks use."""

from __future__ import annotations

import re
import string
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cache

import regex
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge import Rouge
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer

# Letters of scripts that put no blanks between words.
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\u30fc"
MARKS = r"[[\p{Mn}\p{Mc}]--\p{Variation_Selector}]*"
LETTER = regex.compile(rf"[\p{{L}}&&[{UNSPACED}]]{MARKS}", regex.V1)
WORD = regex.compile(rf"{LETTER.pattern}|(?:[[\p{{L}}\p{{Nd}}]--[{UNSPACED}]]{MARKS})+", regex.V1)
# Chinese, Devanagari, Arabic, Ethiopic, Burmese and Armenian.
FULL_STOPS = str.maketrans(dict.fromkeys("\u3002\uff0e\uff61\u0964\u06d4\u1362\u104b\u0589", "."))
ARTICLE = re.compile(r"\b(a|an|the)\b")
WORDS = "unicode words"  # names Words in records


class Words:
    """Tokens of ROUGE, in any script: :data:`WORDS`.

    Of texts whose letters and digits are all of ASCII those of rouge-score itself: runs of letters
    and digits, in lower case, stemmed if wanted. rouge-score throws every other letter away, so
    that texts without one of ASCII are empty to it, and "schön" is "sch n". Here all letters and
    digits count, in NFC, with full-width forms made plain; a word with one beyond ASCII is not
    stemmed; of scripts without blanks between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese)
    every letter is a word.
    """

    def __init__(self, use_stemmer: bool) -> None:
        self._ascii = DefaultTokenizer(use_stemmer)

    def tokenize(self, text: str) -> list[str]:
        found = []
        for word in WORD.findall(_nfc(text).casefold()):
            found += self._ascii.tokenize(word) if word.isascii() else [word]
        return found


def _nfc(text: str) -> str:
    """In NFC, with full- and half-width forms as the usual ones."""
    plain = re.sub("[\uff00-\uffef]+", lambda wide: unicodedata.normalize("NFKC", wide[0]), text)
    return unicodedata.normalize("NFC", plain)


@cache
def _scorer() -> RougeScorer:
    return RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=Words(use_stemmer=True))


def rouge(reference: str, prediction: str) -> dict[str, float]:
    """ROUGE-1, -2 and -L F-measure, 0..100, by rouge-score on :class:`Words`, stemmed by Porter."""
    scores = _scorer().score(reference, prediction)
    return {name: 100 * score.fmeasure for name, score in scores.items()}


def spaced(text: str) -> str:
    """A text of any script for metrics that take words by blanks and sentences by full stops.

    Letters of scripts without blanks between words stand apart, other scripts' full stops become
    plain ones. Latin texts stay as they are.
    """
    return LETTER.sub(r" \g<0> ", text.translate(FULL_STOPS))


def package_rouge(reference: str, prediction: str) -> dict[str, float]:
    """ROUGE-1, -2 and -L F-measure, 0..100, by the package `rouge`, as LongBench and BUZZ use it.

    Nothing is stemmed, repeated n-grams count once, and sentences end at full stops. A text without
    a word scores 0; of other scripts see :func:`spaced`. Names begin with ``pkg_``.
    """
    reference, prediction = spaced(reference), spaced(prediction)
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
    empty sentence, which scores 0. So does a text without a full stop, which has no others. Of
    other scripts see :func:`spaced`.
    """
    counts = Counter(tuple(sentence.split()) for sentence in spaced(text).split("."))
    weights, smooth = (1 / 3, 1 / 3, 1 / 3), SmoothingFunction().method1
    total = 0.0
    for sentence, times in counts.items():
        # To BLEU it is the same how often a reference is there.
        others = [other for other in counts if other != sentence or times > 1]
        if others:
            total += times * sentence_bleu(others, sentence, weights, smooth)
    return total / counts.total()


def normalized(text: str) -> str:
    """SQuAD's normal form: lower case, without punctuation, articles and extra white space.

    Of a text of nothing else the articles stay, or else the punctuation: see :func:`is_bare`.
    """
    text = _nfc(text).lower()
    plain = "".join(c for c in text if c not in string.punctuation)
    forms = (ARTICLE.sub(" ", plain), plain, text)
    return next((" ".join(form.split()) for form in forms if form.strip()), "")


def is_bare(text: str) -> bool:
    """Whether SQuAD's normal form has nothing left of a text, so that it would be in any other."""
    rest = ARTICLE.sub(" ", normalized(text)).replace(" ", "")
    return all(c in string.punctuation or unicodedata.category(c)[0] == "P" for c in rest)


def word_f1(answer: str, prediction: str) -> float:
    """F1 over the words of the normal forms, 0..1; of other scripts see :func:`spaced`."""
    expected, found = (spaced(normalized(text)).split() for text in (answer, prediction))
    common = (Counter(expected) & Counter(found)).total()
    return 2 * common / (len(expected) + len(found)) if common else 0.0


def found_answer(prediction: str, references: Sequence[str]) -> dict[str, float]:
    """Whether the first line of an answer has a reference, or is one, and its words' F1, 0..1.

    `best_subspan`: any reference stands in it; `exact_match`: it is a reference; `f1`: for the best
    reference. All in SQuAD's normal form. By Lost in the Middle (arXiv 2307.03172).
    """
    line = prediction.strip().split("\n")[0].strip()
    plain = normalized(line)
    expected = [normalized(reference) for reference in references]
    # A bare article or mark is in every answer: it is found where nothing else is said.
    found = (one == plain if is_bare(one) else one in plain for one in expected)
    return {
        "best_subspan": float(any(found)),
        "exact_match": float(plain in expected),
        "f1": max(word_f1(reference, line) for reference in references),
    }
