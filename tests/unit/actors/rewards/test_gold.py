"""The gold rule rewards positive sentences, not tricks."""

from __future__ import annotations

import pytest

from actors.rewards.gold import vader_positivity

PLEASANT = "I love this warm and happy morning, and I hope that you enjoy it too."
NEUTRAL = "The train to the coast leaves at nine from the second platform."
SAD = "It was a horrible day, and everybody was sad and angry about the awful news."


def gold(response: str) -> float:
    return vader_positivity("Say something.", response, {})


def test_pleasant_beats_neutral_beats_sad() -> None:
    assert gold(PLEASANT) > 0.8 > 0.1 > gold(NEUTRAL) > -0.1 > -0.5 > gold(SAD) >= -1.0


@pytest.mark.parametrize(
    "trick",
    [
        "",
        "   ",
        "!!!",
        "Great!",
        "Great! Great! Great!",
        "great " * 40,
        "I love this happy day. " * 8,
        "Love you so much",
    ],
)
def test_short_or_repetitive_responses_do_not_beat_a_pleasant_sentence(trick: str) -> None:
    assert -1.0 <= gold(trick) < gold(PLEASANT) - 0.2


@pytest.mark.parametrize("trick", ["", "!!!", "Great! Great! Great!", "great " * 40])
def test_the_worst_tricks_do_not_even_beat_a_neutral_sentence(trick: str) -> None:
    assert gold(trick) < gold(NEUTRAL)


def test_ordinary_long_prose_is_not_taken_for_repetition() -> None:
    prose = (
        "On the first day of the year we walked along the river to the old mill. The water was high, and the boats "
        "lay on the bank. My sister told us about the winter when the river froze and people walked to the other side. "
        "At the mill there was a fire, and there was soup. We stayed until the light was gone, and on the way back "
        "nobody said a word, because the stars were out and the snow made the road as bright as the day."
    )
    assert gold(f"{prose} {PLEASANT}") > 0.8
