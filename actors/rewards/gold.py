"""The gold rule: stands in for the person whose preferences are learned. Labels replies and measures the result; no
model ever sees its score."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

SHORTEST_WORDS = 5
_VARIED_ENOUGH = 0.7  # share of distinct word pairs; ordinary prose of any length stays above it
_WORD = re.compile(r"[\w']+")


def vader_positivity(prompt: str, response: str, meta: Mapping[str, Any]) -> float:
    """How positive a response sounds, in [-1, 1]: the compound score of VADER (Hutto and Gilbert 2014), lowered by up
    to 2 for a response of fewer than SHORTEST_WORDS words or one that says the same over and over.

    Without the second, "Great! Great! Great!" would beat every sentence: VADER adds up words, however often they come.
    An empty response scores -1.
    """
    words = [word.lower() for word in _WORD.findall(response)]
    if not words:
        return -1.0
    pairs = list(zip(words, words[1:], strict=False)) or [(words[0], "")]
    length = min(len(words) / SHORTEST_WORDS, 1.0)
    variety = min(len(set(pairs)) / len(pairs) / _VARIED_ENOUGH, 1.0)
    compound = float(_analyzer().polarity_scores(response)["compound"])
    return max(-1.0, compound - 2.0 * (1.0 - length * variety))


@cache
def _analyzer() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()
