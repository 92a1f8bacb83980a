"""Helpers of the formats: comparing transcripts, continuing a begun reply, checking prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from orchestrator.data.formats.format import LeftOut
from orchestrator.data.messages import (
    BadRow,
    Fields,
    Messages,
    conversation,
    is_messages,
    is_transcript,
    text_of,
    transcript,
)
from orchestrator.data.records import Message, Reply
from orchestrator.data.values import describe

Ranked = tuple[Messages, tuple[Reply, ...], tuple[float, ...]]
"""A prompt, its replies, best first, and their scores, which may be unknown (see RankingRecord)."""
Scored = tuple[Messages, Reply, float]


TIE = "with equal replies"


NOT_COMPARABLE = "whose transcripts differ in more than the last reply"


_REASONING = ("reasoning_content", "reasoning", "thinking")


def conversations(fields: Fields, key: str) -> tuple[Messages, Messages]:
    """The complete conversations that end with the chosen and the rejected reply."""
    start = conversation(fields[key], key) if fields.get(key) else ()
    return _continued(start, fields["chosen"], "chosen"), _continued(start, fields["rejected"], "rejected")


def pair(chosen: Messages, rejected: Messages, scores: Sequence[float] = ()) -> Ranked:
    """Converts two transcripts that differ in their last reply to a prompt and two replies."""
    if chosen == rejected:
        raise LeftOut(TIE)
    common = num_before_reply(chosen, rejected)
    tails = (chosen[common:], rejected[common:])
    if not common or any(len(tail) != 1 or tail[0].role != "assistant" for tail in tails):
        raise LeftOut(NOT_COMPARABLE)
    messages = waiting(chosen[:common], "chosen")
    return as_ranked(messages, after_begun(messages, [_as_reply(tail[0]) for tail in tails]), scores)


def num_before_reply(chosen: Messages, rejected: Messages) -> int:
    return min(num_common(chosen, rejected), len(chosen) - 1, len(rejected) - 1)


def as_ranked(messages: Messages, replies: Sequence[Reply], scores: Sequence[float] = ()) -> Ranked:
    """A reply that occurs twice keeps its better rank, and the score of that rank."""
    place_of: dict[Reply, int] = {}
    for place, reply in enumerate(replies):
        place_of.setdefault(reply, place)
    if len(place_of) < 2:
        raise LeftOut(TIE)
    return messages, tuple(place_of), tuple(scores[place] for place in place_of.values() if scores)


def after_begun(messages: Messages, replies: Sequence[Reply]) -> Sequence[Reply]:
    """Replies as continuations of a turn that the prompt begins. Removes the beginning from replies that repeat it.

    Raises:
        BadRow: only some replies repeat it, so it is unclear whether the others continue it.
    """
    if messages[-1].role != "assistant":
        return replies
    begun = messages[-1].content
    texts = [reply if isinstance(reply, str) else reply.content for reply in replies]
    repeats = [text.startswith(begun) for text in texts]
    if not any(repeats):
        return replies
    if not all(repeats):
        raise BadRow("the prompt begins the assistant's turn, and only some replies repeat that beginning")
    rest = [text.removeprefix(begun) for text in texts]
    return [
        text if isinstance(reply, str) else replace(reply, content=text)
        for reply, text in zip(replies, rest, strict=True)
    ]


def _continued(start: Messages, value: Any, key: str) -> Messages:
    """The whole conversation: `start` followed by `value`, or `value` if it already contains `start`.

    Turns are compared without white space at their edges, and either may contain system messages.

    Raises:
        BadRow: `value` is a conversation that neither contains nor continues `start`.
    """
    if not is_conversation(value):
        return (*start, _as_message(as_reply(value, key)))
    added = transcript(value, key) if isinstance(value, str) else conversation(value, key)
    if not start or not any(turn.role == "user" for turn in added):
        return start + added
    (system, asked), (other_system, whole) = _without_system(start), _without_system(added)
    size = len(asked)
    if not (_same(asked, whole[:size]) or _same(asked, whole[:-1][-size:])):
        if start[-1].role == "user" or added[0].role != "user":
            raise BadRow(f"{key!r} is a conversation that neither contains nor continues the prompt")
        return start + added
    if system and other_system and not _same(system, other_system):
        raise BadRow(f"{key!r} has a different system message than the prompt")
    return (other_system or system) + whole


def _without_system(messages: Messages) -> tuple[Messages, Messages]:
    count = next((i for i, turn in enumerate(messages) if turn.role != "system"), len(messages))
    return messages[:count], messages[count:]


def _same(left: Messages, right: Messages) -> bool:
    return len(left) == len(right) == num_common(left, right)


def num_common(left: Messages, right: Messages) -> int:
    """The number of leading turns in which two conversations agree, except for white space at the edges."""
    number = 0
    while number < min(len(left), len(right)) and _trimmed(left[number]) == _trimmed(right[number]):
        number += 1
    return number


def _trimmed(message: Message) -> Message:
    return replace(message, content=message.content.strip(), extra=None)


def hh_transcripts(fields: Fields) -> tuple[Messages, Messages]:
    return whole_transcript(fields, "chosen"), whole_transcript(fields, "rejected")


def whole_transcript(fields: Fields, key: str) -> Messages:
    """A text `\\n\\nHuman: ...\\n\\nAssistant: ...`, or a whole conversation as a list of messages."""
    value = fields.get(key)
    return conversation(value, key) if is_messages(value) else transcript(text_of(fields, key), key)


def with_reply(messages: Messages, value: Any, key: str) -> Messages:
    """The conversation with its reply: text, a message, the turns after the prompt, or the whole conversation."""
    whole = _continued(messages, value, key)
    if not messages or messages[-1].role != "assistant" or len(whole) != len(messages) + 1:
        return whole
    (reply,) = after_begun(messages, [as_reply(value, key)])
    rest = _as_message(reply)
    return (*messages[:-1], replace(rest, content=messages[-1].content + rest.content))


def without_last_reply(messages: Messages) -> Messages:
    while messages and messages[-1].role == "assistant":
        messages = messages[:-1]
    if not any(turn.role == "user" for turn in messages):
        raise BadRow("no user message before the assistant's reply")
    return messages


def waiting(messages: Messages, key: str) -> Messages:
    """Checks a prompt. It may end in the assistant's turn, but not with a tool call. Removes empty last turns."""
    while messages and _is_silent(messages[-1]):
        messages = messages[:-1]
    if all(turn.role == "assistant" for turn in messages):
        raise BadRow("no user message before the assistant's reply")
    if messages[-1].tool_calls:
        raise BadRow(f"{key!r} ends with a tool call; add the tool's result, or move the call to the reply")
    if messages[-1].role == messages[-2:][0].role == "assistant":
        raise BadRow(f"{key!r} ends with two consecutive turns of the assistant")
    return messages


def _is_silent(turn: Message) -> bool:
    return turn.role == "assistant" and not turn.content.strip() and not turn.tool_calls


def is_conversation(value: Any) -> bool:
    return is_messages(value) or (isinstance(value, str) and is_transcript(value))


def as_reply(value: Any, key: str) -> Reply:
    """Parses a reply. Empty text is a (bad) reply; a missing one is an error. A list of one message is that message."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, str):
        return value
    if not isinstance(value, dict):
        raise BadRow(f"{key!r} must be text or a list of texts, found {describe(value)}")
    (turn,) = conversation([value], key)
    if turn.role != "assistant":
        raise BadRow(f"{key!r} must be the assistant's, found role {turn.role!r}")
    return _as_reply(turn)


def _as_reply(message: Message) -> Reply:
    """The text of a message that has nothing else, so that it equals the same reply given as text."""
    reasons = message.extra is not None and any(f'"{name}":' in message.extra for name in _REASONING)
    return message if message.tool_calls or reasons else message.content


def _as_message(reply: Reply) -> Message:
    return Message("assistant", reply) if isinstance(reply, str) else reply
