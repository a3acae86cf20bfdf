"""Scores of one text against others, simple enough to need no download: ROUGE-L and BLEU-1."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from ..errors import DataError

RECALL_WEIGHT = 1.2  # beta of the usual ROUGE-L for captions


def words(text: str) -> list[str]:
    """Lower-case words and numbers of a text, without punctuation."""
    return re.findall(r"[\w']+", text.lower())


def rouge_l(texts: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """ROUGE-L of each text: F of the longest common subsequence of words, in `[0, 1]`.

    Precision and recall are each the best over the references, and recall weighs 1.2, as is usual for captions.

    Args:
        texts: one for each prompt or image.
        references: for each of them one text or more.

    Raises:
        DataError: for another number of references, or none for a text.

    Examples:
        >>> from hf_earlyexit.generation.metrics import rouge_l
        >>> rouge_l(["a dog runs"], [["a dog runs"]])
        [1.0]
    """
    return [_rouge_l(words(text), references_of) for text, references_of in _paired(texts, references)]


def bleu_1(texts: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """BLEU-1 of each text by itself: clipped share of its words, times the brevity penalty, in `[0, 1]`.

    Args, Raises: as in `rouge_l`. The BLEU-1 of papers counts words over all texts first; this is for comparing texts
    one by one.
    """
    return [_bleu_1(words(text), references_of) for text, references_of in _paired(texts, references)]


def _paired(texts: Sequence[str], references: Sequence[Sequence[str]]) -> list[tuple[str, list[list[str]]]]:
    if len(texts) != len(references):
        raise DataError(
            f"{len(texts)} texts and references of {len(references)}; expected references for each.",
            field="references",
        )
    for row, references_of in enumerate(references):
        if isinstance(references_of, str) or not len(references_of):
            raise DataError(f"references of text {row} are {references_of!r}; expected a list of texts.", field="references")
    return [(text, [words(one) for one in references_of]) for text, references_of in zip(texts, references, strict=True)]


def _rouge_l(text: list[str], references: list[list[str]]) -> float:
    common = [_common_length(text, reference) for reference in references]
    precision = max(common) / max(len(text), 1)
    recall = max(length / max(len(reference), 1) for length, reference in zip(common, references, strict=True))
    if precision == 0 or recall == 0:
        return float(any(text == reference for reference in references))  # two empty texts are equal
    weight = RECALL_WEIGHT**2
    return (1 + weight) * precision * recall / (recall + weight * precision)


def _common_length(first: list[str], second: list[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        before = 0
        for place, other in enumerate(second, 1):
            before, row[place] = row[place], before + 1 if word == other else max(row[place], row[place - 1])
    return row[-1]


def _bleu_1(text: list[str], references: list[list[str]]) -> float:
    if not text:
        return float([] in references)
    allowed = Counter[str]()
    for reference in references:
        allowed |= Counter(reference)
    matched = (Counter(text) & allowed).total()
    closest = min((abs(len(reference) - len(text)), len(reference)) for reference in references)[1]
    return min(1.0, math.exp(1 - closest / len(text))) * matched / len(text)
