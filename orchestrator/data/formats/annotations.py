"""Helpers for the records of annotation tools, where each project chooses the names of its fields."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Iterator, Sequence

from orchestrator.data.formats.format import LeftOut
from orchestrator.data.formats.transcripts import TIE, Ranked, after_begun, as_ranked, as_reply, waiting
from orchestrator.data.messages import BadRow, Fields, Messages, conversation
from orchestrator.data.records import Reply
from orchestrator.data.values import field_names

PROMPTS = ("messages", "chat", "conversation", "dialogue", "prompt", "instruction", "question", "context", "input")
REPLIES = ("response", "completion", "reply", "answer", "output")
UNRANKED = "records without a ranking"
UNRATED = "records without a rating"
UNWRITTEN = "records without a written reply"


def asked(fields: Fields) -> Messages:
    """The prompt, in the first of the fields PROMPTS that a record has."""
    key = _named(fields, PROMPTS, "prompt")
    return waiting(conversation(fields[key], key), key)


def rated(fields: Fields) -> tuple[Messages, Reply]:
    """The prompt, and the one reply, in the first of the fields REPLIES."""
    messages, key = asked(fields), _named(fields, REPLIES, "reply")
    (reply,) = after_begun(messages, [as_reply(fields[key], key)])
    return messages, reply


def ranked(messages: Messages, placed: Iterable[tuple[float, Reply]]) -> Iterator[Ranked | LeftOut]:
    """A ranking of replies with their places, of which the lowest is the best. One with ties makes a pair of every two
    replies that it orders."""
    ordered = sorted(placed, key=lambda each: each[0])
    replies = after_begun(messages, [reply for _, reply in ordered])
    places = [place for place, _ in ordered]
    if len(set(places)) == len(places):
        yield attempted(messages, replies)
        return
    pairs = [(i, j) for i, j in itertools.combinations(range(len(places)), 2) if places[i] < places[j]]
    yield from (attempted(messages, [replies[i], replies[j]]) for i, j in pairs)
    if not pairs:
        yield LeftOut(TIE)


def compared(
    messages: Messages, first: Reply, second: Reply, preference: float, *, has_strength: bool
) -> Ranked | LeftOut:
    """A pair: below 0 the first reply is better, above 0 the second."""
    if preference == 0:
        return LeftOut(TIE)
    replies = after_begun(messages, [first, second] if preference < 0 else [second, first])
    return attempted(messages, replies, (abs(preference), 0.0) if has_strength else ())


def attempted(messages: Messages, replies: Sequence[Reply], scores: Sequence[float] = ()) -> Ranked | LeftOut:
    """As `as_ranked`; other parts of the record stay if this one has no information."""
    try:
        return as_ranked(messages, replies, scores)
    except LeftOut as reason:
        return reason


def mean(ratings: Sequence[float]) -> float:
    """Of several people. Raises LeftOut: there are none."""
    if not ratings:
        raise LeftOut(UNRATED)
    return statistics.fmean(ratings)


def _named(fields: Fields, names: Sequence[str], what: str) -> str:
    found = next((name for name in names if fields.get(name)), None)
    if found is None:
        raise BadRow(
            f"has no {what}: rename its field to one of {', '.join(names)}; the fields are: {field_names(fields)}"
        )
    return found
