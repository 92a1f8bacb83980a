"""One row of one format -> canonical messages and replies. A row that does not fit raises BadRow, which the readers
gather; a row that fits but teaches nothing (chosen equals rejected) raises LeftOut, which they count.

Two tables at the end name the formats; a new one is a function and a line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from orchestrator.data.files import describe, field_names
from orchestrator.data.records import ROLES, Message

Fields = Mapping[str, Any]
Messages = tuple[Message, ...]
Ranked = tuple[Messages, tuple[str, ...]]

_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}
TIE = "with equal replies"
NOT_COMPARABLE = "whose transcripts differ in more than the last reply"


class BadRow(Exception):
    """The row does not fit its format; the message says why."""


class LeftOut(Exception):
    """The row is well formed but carries nothing to learn from; the message is the reason that is counted."""


def _prompt(fields: Fields) -> Messages:
    return _conversation(_required(fields, "prompt"), "prompt")


def _messages(fields: Fields) -> Messages:
    """A conversation; what the assistant said last is not part of the prompt."""
    return without_last_reply(_conversation(_required(fields, "messages"), "messages"))


def _hh_prompt(fields: Fields) -> Messages:
    chosen, rejected = _hh_transcripts(fields)
    return without_last_reply(_common(chosen, rejected))


def _alpaca(fields: Fields) -> Messages:
    instruction, extra = _text(fields, "instruction"), fields.get("input", "")
    if not isinstance(extra, str):
        raise BadRow(f"'input' must be text, found {describe(extra)}")
    return (Message("user", f"{instruction}\n\n{extra}" if extra.strip() else instruction),)


def _question(fields: Fields) -> Messages:
    return (Message("user", _text(fields, "question")),)


def _ranking(fields: Fields) -> Iterable[Ranked]:
    """{prompt | messages, replies: best first}. A reply that comes twice keeps its better place."""
    key = "messages" if "messages" in fields else "prompt"
    replies = tuple(_replies(_required(fields, "replies"), "replies"))
    if len(replies) < 2:
        raise BadRow(f"'replies' must hold at least two replies, best first; found {len(replies)}")
    return [(without_last_reply(_conversation(_required(fields, key), key)), _distinct(replies))]


def _pairwise(fields: Fields) -> Iterable[Ranked]:
    """{prompt | context, chosen, rejected}: texts, lists of texts (each chosen beats each rejected), or messages."""
    key = "context" if "prompt" not in fields and "context" in fields else "prompt"
    chosen, rejected = _required(fields, "chosen"), _required(fields, "rejected")
    if _is_messages(chosen) or _is_messages(rejected):
        start = _conversation(fields[key], key) if fields.get(key) else ()
        return [_pair(_continued(start, chosen, "chosen"), _continued(start, rejected, "rejected"))]
    messages = without_last_reply(_conversation(_required(fields, key), key))
    worse = _replies(rejected, "rejected")
    return [(messages, _distinct((good, bad))) for good in _replies(chosen, "chosen") for bad in worse]


def _hh_pair(fields: Fields) -> Iterable[Ranked]:
    return [_pair(*_hh_transcripts(fields))]


def _pair(chosen: Messages, rejected: Messages) -> Ranked:
    """Two transcripts that differ in their last reply, as a prompt and two replies."""
    if chosen == rejected:
        raise LeftOut(TIE)
    messages = _common(chosen, rejected)
    tails = (chosen[len(messages) :], rejected[len(messages) :])
    if not messages or any(len(tail) != 1 or tail[0].role != "assistant" for tail in tails):
        raise LeftOut(NOT_COMPARABLE)
    return messages, (tails[0][0].content, tails[1][0].content)


def _distinct(replies: Sequence[str]) -> tuple[str, ...]:
    distinct = tuple(dict.fromkeys(replies))
    if len(distinct) < 2:
        raise LeftOut(TIE)
    return distinct


def _common(left: Messages, right: Messages) -> Messages:
    length = 0
    while length < min(len(left), len(right)) and left[length] == right[length]:
        length += 1
    return left[:length]


def _hh_transcripts(fields: Fields) -> tuple[Messages, Messages]:
    return _transcript(fields, "chosen"), _transcript(fields, "rejected")


def _transcript(fields: Fields, key: str) -> Messages:
    """Parses `\\n\\nHuman: ...\\n\\nAssistant: ...`, or takes a whole conversation as a list of messages.

    Neighbouring turns of one speaker become one message, because chat templates want speakers to alternate.
    """
    if _is_messages(fields.get(key)):
        return _conversation(fields[key], key)
    text = _text(fields, key)
    head, *parts = _TURN.split(text if text.startswith("\n\n") else "\n\n" + text.lstrip("\n"))
    if head.strip() or not parts or parts[0] != "Human":
        raise BadRow(f"{key!r} must be a transcript that starts with 'Human:', found {text.strip()[:40]!r}")
    turns: list[Message] = []
    for speaker, words in zip(parts[::2], parts[1::2], strict=True):
        role, content = _HH_ROLES[speaker], words.strip()
        if turns and turns[-1].role == role:
            turns[-1] = Message(role, f"{turns[-1].content}\n\n{content}".strip())
        else:
            turns.append(Message(role, content))
    return tuple(turns)


def without_last_reply(messages: Messages) -> Messages:
    while messages and messages[-1].role == "assistant":
        messages = messages[:-1]
    if not any(message.role == "user" for message in messages):
        raise BadRow("no user message before the assistant's reply")
    return messages


def _conversation(value: Any, key: str) -> Messages:
    """Text (one user message) or a list of {role, content}."""
    if isinstance(value, str):
        if not value.strip():
            raise BadRow(f"{key!r} is empty")
        return (Message("user", value),)
    if not _is_messages(value):
        raise BadRow(f"{key!r} must be text or a list of {{role, content}}, found {describe(value)}")
    return tuple(_message(item, f"{key}[{index}]") for index, item in enumerate(value))


def _message(item: Mapping[str, Any], where: str) -> Message:
    role, content = item.get("role"), item.get("content")
    if role not in ROLES:
        raise BadRow(f"{where}: role must be one of {', '.join(ROLES)}, found {role!r}")
    if not isinstance(content, str):
        raise BadRow(f"{where}: content must be text, found {describe(content)}")
    if role == "user" and not content.strip():
        raise BadRow(f"{where}: the user's content is empty")
    return Message(role, content)


def _continued(start: Messages, value: Any, key: str) -> Messages:
    if isinstance(value, str):
        return (*start, Message("assistant", value))
    continuation = _conversation(value, key)
    return continuation if continuation[: len(start)] == start else start + continuation


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _replies(value: Any, key: str) -> Sequence[str]:
    """Replies; an empty text is a reply (a bad one), a missing one is not."""
    replies = [value] if isinstance(value, str) else value
    if not isinstance(replies, list) or not replies or not all(isinstance(reply, str) for reply in replies):
        raise BadRow(f"{key!r} must be text or a list of texts, found {describe(value)}")
    return replies


def _required(fields: Fields, key: str) -> Any:
    if key not in fields:
        raise BadRow(f"field {key!r} is missing; the fields are: {field_names(fields)}")
    return fields[key]


def _text(fields: Fields, key: str) -> str:
    value = _required(fields, key)
    if not isinstance(value, str):
        raise BadRow(f"{key!r} must be text, found {describe(value)}")
    if not value.strip():
        raise BadRow(f"{key!r} is empty")
    return value


PromptParser = Callable[[Fields], Messages]
RankingParser = Callable[[Fields], Iterable[Ranked]]
FieldSets = Sequence[frozenset[str]]  # a row with all fields of one of these sets is of the format

# format -> (fields that tell it, parser); `auto` takes the first that fits.
PROMPT_FORMATS: Mapping[str, tuple[FieldSets, PromptParser]] = {
    "messages": ([frozenset({"messages"})], _messages),
    "prompt": ([frozenset({"prompt"})], _prompt),
    "hh-rlhf": ([frozenset({"chosen", "rejected"})], _hh_prompt),
    "alpaca": ([frozenset({"instruction"})], _alpaca),
    "question": ([frozenset({"question"})], _question),
}
RANKING_FORMATS: Mapping[str, tuple[FieldSets, RankingParser]] = {
    "ranking": ([frozenset({"replies"})], _ranking),
    "pairwise": ([frozenset({key, "chosen", "rejected"}) for key in ("prompt", "context")], _pairwise),
    "hh-rlhf": ([frozenset({"chosen", "rejected"})], _hh_pair),
}
NOT_META = {
    "messages": frozenset({"id", "messages"}),
    "prompt": frozenset({"id", "prompt"}),
    "hh-rlhf": frozenset({"id", "chosen", "rejected"}),
    "alpaca": frozenset({"id", "instruction", "input"}),
    "question": frozenset({"id", "question"}),
}
