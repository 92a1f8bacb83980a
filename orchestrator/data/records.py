"""The canonical records, which readers make and stages and roles use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
_NO_META: Mapping[str, Any] = {}  # shared: a file may hold millions of records


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call of the assistant. `arguments` is the JSON text of an object, by default `{}`."""

    name: str
    arguments: str = "{}"
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Args:
        role: one of ROLES.
        content: text; empty if the assistant only calls tools.
        tool_calls: calls of the assistant, in order.
        name: name of the speaker, or of the tool whose result this is.
        tool_call_id: the call that this tool message answers.
        extra: JSON text of the message's other fields (`reasoning_content`, ...), for the chat template.
    """

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    tool_call_id: str | None = None
    extra: str | None = None


Reply = str | Message  # text, or an assistant's message if the reply has more than text
Tools = tuple[Mapping[str, Any], ...]  # JSON schemas of a conversation's tools


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """A conversation up to the assistant's reply.

    Args:
        id: given in the data, or `content_id(messages)`.
        messages: at least one. If the last one is the assistant's, it is the beginning of the reply, which the response
            continues.
        text: the last user message, for display.
        meta: the record's other fields (JSON values), for rule rewards.
        tools: the conversation's tools.
    """

    id: str
    messages: tuple[Message, ...]
    text: str
    meta: Mapping[str, Any] = field(default_factory=lambda: _NO_META)
    tools: Tools = ()


@dataclass(frozen=True, slots=True)
class RankingRecord:
    """K >= 2 distinct replies to one conversation, best first. Several records may share an id (one prompt).

    If the last message is the assistant's, every reply continues it.

    `scores`: one per reply, never rising. Their differences say how much better a reply is. Empty: only the order is
    known.
    """

    id: str
    messages: tuple[Message, ...]
    replies: tuple[Reply, ...]
    tools: Tools = ()
    scores: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class DemonstrationRecord:
    """A whole conversation that ends with a reply of the assistant. All turns of the assistant are learned.

    Several records may share an id (paths of one tree, instances of one instruction): they belong to the same side of a
    split.
    """

    id: str
    messages: tuple[Message, ...]
    tools: Tools = ()


@dataclass(frozen=True, slots=True)
class DocumentRecord:
    """A text to learn as a whole."""

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class LabelledRecord:
    """A reply that was found good (`label`) or bad. If the last message is the assistant's, the reply continues it."""

    id: str
    messages: tuple[Message, ...]
    reply: Reply
    label: bool
    tools: Tools = ()


@dataclass(frozen=True, slots=True)
class ScoredRecord:
    """A reply and its score; 0 is a score. If the last message is the assistant's, the reply continues it."""

    id: str
    messages: tuple[Message, ...]
    reply: Reply
    score: float
    tools: Tools = ()


@dataclass(frozen=True)
class ReadReport:
    """A reader's report: rows read, records kept, and counts of rows (or replies) left out, by reason."""

    path: str
    format: str
    num_rows: int
    num_records: int
    left_out: Mapping[str, int]

    def summary(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.left_out.items()))
        left_out = f"; left out: {reasons}" if reasons else ""
        return f"{self.path} ({self.format}): {self.num_records} records from {self.num_rows} rows{left_out}"


def is_begun(messages: Sequence[Message]) -> bool:
    """Whether the conversation ends in the assistant's turn, which the reply continues."""
    return messages[-1].role == "assistant"


def message_dict(message: Message) -> dict[str, Any]:
    """A message in the form of chat templates and JSON files; arguments of calls are objects."""
    found: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        found["tool_calls"] = [_call_dict(call) for call in message.tool_calls]
    if message.name is not None:
        found["name"] = message.name
    if message.tool_call_id is not None:
        found["tool_call_id"] = message.tool_call_id
    return found if message.extra is None else {**json.loads(message.extra), **found}


def message_dicts(messages: Iterable[Message]) -> list[dict[str, Any]]:
    return [message_dict(message) for message in messages]


def message_from_dict(found: Mapping[str, Any]) -> Message:
    """The inverse of `message_dict`."""
    calls = tuple(
        ToolCall(call["function"]["name"], json_text(call["function"]["arguments"]), call.get("id"))
        for call in found.get("tool_calls", ())
    )
    known = ("role", "content", "tool_calls", "name", "tool_call_id")
    extra = {key: value for key, value in found.items() if key not in known}
    return Message(
        found["role"],
        found["content"],
        calls,
        found.get("name"),
        found.get("tool_call_id"),
        json_text(extra) if extra else None,
    )


def messages_from_dicts(found: Iterable[Mapping[str, Any]]) -> tuple[Message, ...]:
    return tuple(message_from_dict(item) for item in found)


def json_text(value: Any) -> str:
    """JSON text of a value, with its order of keys. Raises ValueError for NaN and infinity."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def reply_json(reply: Reply) -> Any:
    """A reply as a JSON value."""
    return reply if isinstance(reply, str) else message_dict(reply)


def last_user_text(messages: Sequence[Message]) -> str:
    for message in reversed(messages):
        if message.role == "user":
            return message.content
    return messages[-1].content


def content_digest(*parts: Any) -> bytes:
    """sha256 of JSON values, independent of key order and of the platform."""
    text = json.dumps(parts, ensure_ascii=True, separators=(",", ":"), sort_keys=True)
    return hashlib.sha256(text.encode("ascii")).digest()


def identity_of(messages: Iterable[Message], tools: Tools = ()) -> list[Any]:
    """JSON values that are equal if and only if two conversations are equal."""
    turns = [_turn_identity(message) for message in messages]
    return [*turns, {"tools": list(tools)}] if tools else turns


def content_id(messages: Iterable[Message], tools: Tools = ()) -> str:
    """16 hexadecimal digits of the sha256 of the messages (and tools, if there are any)."""
    return id_of(content_digest(identity_of(messages, tools)))


def id_of(digest: bytes) -> str:
    return digest.hex()[:16]


def _turn_identity(message: Message) -> list[Any]:
    others = (
        [[call.name, call.arguments, call.id] for call in message.tool_calls],
        message.name,
        message.tool_call_id,
        message.extra,
    )
    return [message.role, message.content, *(others if any(others) else ())]


def _call_dict(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": json.loads(call.arguments)}
    return {"type": "function", **({} if call.id is None else {"id": call.id}), "function": function}
