"""Votes of Chatbot Arena: two conversations that differ in the last reply, and which of them won."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence

from orchestrator.data.formats.format import LeftOut
from orchestrator.data.formats.transcripts import Ranked, pair
from orchestrator.data.messages import BadRow, Fields, conversation, required

FIRST, SECOND, TIED, BOTH_BAD = "model_a", "model_b", "tie", "tie (bothbad)"
"""Values of `winner`."""
CONVERSATIONS = ("conversation_a", "conversation_b")


def arena_pair(fields: Fields) -> Sequence[Ranked]:
    """{conversation_a, conversation_b, winner}; ties have no pair."""
    winner = required(fields, "winner")
    if winner in (TIED, BOTH_BAD):
        raise LeftOut("votes for a tie")
    if winner not in (FIRST, SECOND):
        raise BadRow(f"'winner' must be one of {FIRST}, {SECOND}, {TIED}, {BOTH_BAD}, found {reprlib.repr(winner)}")
    first, second = (conversation(required(fields, key), key) for key in CONVERSATIONS)
    return [pair(first, second) if winner == FIRST else pair(second, first)]
