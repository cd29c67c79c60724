"""CIDEr-D of captions (Vedantam et al., 2015), as COCO's evaluation computes it.

A caption is compared with the references of its image by its n-grams of 1 to 4 words. An n-gram counts by how rare it
is among the references of all images; a clipped count and a penalty for another length keep repetition from paying.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

LONGEST = 4  # words of an n-gram
SIGMA = 6.0  # words by which lengths may differ before it costs much
SCALE = 10.0
# The marks that COCO's tokenizer drops; Chinese is cut into characters.
WORD = re.compile(r"[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+(?:['’\-.][^\W_\u3400-\u9fff]+)*")

Vector = list[dict[tuple[str, ...], float]]  # of each length of n-gram


def words_of(text: str) -> list[str]:
    """The words of a caption in lower case, without marks; of Chinese the characters."""
    return WORD.findall(text.lower())


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """The CIDEr-D of each caption, with the references of its image; the metric is the mean. 0 … 10."""
    counts = [[_count(words_of(text)) for text in texts] for texts in references]
    documents: Counter[tuple[str, ...]] = Counter()
    for texts in counts:
        documents.update({gram for grams in texts for gram in grams})
    log_images = math.log(max(len(references), 1))
    scores = []
    for caption, texts in zip(captions, counts, strict=True):
        own, norms, length = _vector(_count(words_of(caption)), documents, log_images)
        total = 0.0
        for grams in texts:
            other, other_norms, other_length = _vector(grams, documents, log_images)
            penalty = math.exp(-((length - other_length) ** 2) / (2 * SIGMA**2))
            for number in range(LONGEST):
                product = sum(
                    min(weight, other[number].get(gram, 0.0)) * other[number].get(gram, 0.0)
                    for gram, weight in own[number].items()
                )
                if norms[number] and other_norms[number]:
                    product /= norms[number] * other_norms[number]
                total += product * penalty
        scores.append(SCALE * total / LONGEST / max(len(texts), 1))
    return scores


def _count(text: Sequence[str]) -> Counter[tuple[str, ...]]:
    return Counter(
        tuple(text[begin : begin + size]) for size in range(1, LONGEST + 1) for begin in range(len(text) - size + 1)
    )


def _vector(
    counts: Counter[tuple[str, ...]], documents: Counter[tuple[str, ...]], log_images: float
) -> tuple[Vector, list[float], int]:
    """Of each length of n-gram: weights and their norm; and the number of pairs of words, COCO's length."""
    vector: Vector = [{} for _ in range(LONGEST)]
    for gram, count in counts.items():
        vector[len(gram) - 1][gram] = count * (log_images - math.log(max(1, documents[gram])))
    norms = [math.sqrt(sum(weight**2 for weight in weights.values())) for weights in vector]
    return vector, norms, sum(count for gram, count in counts.items() if len(gram) == 2)
