"""The gold rule: simulates the human whose preferences are learned. It labels replies and measures the result; models
never see its score."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

SHORTEST_WORDS = 5
_VARIED_ENOUGH = 0.7  # share of distinct word pairs; ordinary prose of any length exceeds it
_WORD = re.compile(r"[\w']+")


def vader_positivity(prompt: str, response: str, meta: Mapping[str, Any]) -> float:
    """Positivity of a response, in [-1, 1]: the compound score of VADER (Hutto and Gilbert 2014), reduced by up to 2
    for responses that have fewer than SHORTEST_WORDS words or are repetitive.

    Without the penalty for repetition "Great! Great! Great!" would beat every sentence, because VADER sums over words.
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
