"""Answers in the form in which VQA compares them: as its official evaluation normalises text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

ARTICLES = {"a", "an", "the"}
NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
    "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
MARKS = ';/[]"{}()=+\\_-><@`,?!'
PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")
COMMA_IN_NUMBER = re.compile(r"(\d)(\,)(\d)")
FULL_WIDTH = str.maketrans("，。？！：；（）“”‘’、", ",.?!:;()\"\"'',")
HAN = re.compile("[\u3400-\u9fff]")
# Words whose apostrophe may be missing; with two, either may.
CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's i'd've i'm i've isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't
not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    spelling: word
    for word in CONTRACTED.split()
    for spelling in {word.replace("'", ""), word.replace("'", "", 1), word[::-1].replace("'", "", 1)[::-1]} - {word}
}


@lru_cache(4096)  # the same few answers to most questions
def normalise(text: str) -> str:
    """A text as VQA compares it: lower case, digits, no articles, no marks, contractions with their apostrophes.

    Of Chinese answers the marks, the spaces and the last full stop go.

    Unlike the official code, it keeps a text of which nothing would stay: the answer `A`, or a mark. That code also
    normalises only where annotators differ; here all answers are.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    if HAN.search(text):
        text = text.translate(FULL_WIDTH).strip(" .,!?;:")
        return "".join(text.lower().split())
    return _digits_and_articles(_punctuation(text)) or text.lower()


def _punctuation(text: str) -> str:
    """A mark between words is a space, any other nothing: so is a comma in a number, and a point behind a word."""
    result = text
    for mark in MARKS:
        between = f"{mark} " in text or f" {mark}" in text or COMMA_IN_NUMBER.search(text) is not None
        result = result.replace(mark, "" if between else " ")
    return PERIOD.sub("", result)


def _digits_and_articles(text: str) -> str:
    plain = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in plain if word not in ARTICLES) or " ".join(plain)


def soft_score(answer: str, truths: Sequence[str]) -> float:
    """VQA's accuracy, 0 … 1: the mean, over all annotators but one, of min(1, a third of those who answered so).

    Of fewer than four annotators a third would not reach 1: there a match with any counts whole.
    """
    plain, given = [normalise(truth) for truth in truths], normalise(answer)
    if len(plain) < 4:
        return float(given in plain)
    count = plain.count(given)
    return (count * min(1.0, (count - 1) / 3) + (len(plain) - count) * min(1.0, count / 3)) / len(plain)


def is_exact(answer: str, truths: Sequence[str]) -> bool:
    """Whether an answer equals the most frequent true one, both normalised; the first of several such."""
    plain = [normalise(truth) for truth in truths]
    return bool(plain) and normalise(answer) == most_frequent(plain)


def usual_truth(truths: Sequence[str]) -> str:
    """The first true answer that equals the most frequent one, all normalised."""
    frequent = most_frequent([normalise(truth) for truth in truths])
    return next(truth for truth in truths if normalise(truth) == frequent)


def most_frequent(answers: Sequence[str]) -> str:
    """The most frequent of some answers; the first of several such."""
    return Counter(answers).most_common(1)[0][0]
