"""The canonical records. Readers make them, stages and roles work with them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; `role` is one of ROLES."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """A conversation that waits for the assistant.

    Args:
        id: given in the data, or `content_id(messages)`.
        messages: at least one; the last one is not the assistant's.
        text: the last user message, for people to read.
        meta: the record's other fields (JSON values), for rule rewards.
    """

    id: str
    messages: tuple[Message, ...]
    text: str
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RankingRecord:
    """K >= 2 distinct replies to one conversation, best first. Several records may share an id (one prompt)."""

    id: str
    messages: tuple[Message, ...]
    replies: tuple[str, ...]


@dataclass(frozen=True)
class ReadReport:
    """What a reader saw: rows read, records kept, and why rows (or replies) were left out, with counts."""

    path: str
    format: str
    num_rows: int
    num_records: int
    left_out: Mapping[str, int]

    def summary(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.left_out.items()))
        left_out = f"; left out: {reasons}" if reasons else ""
        return f"{self.path} ({self.format}): {self.num_records} records from {self.num_rows} rows{left_out}"


def message_dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Messages as chat templates and JSON files want them."""
    return [{"role": message.role, "content": message.content} for message in messages]


def last_user_text(messages: Sequence[Message]) -> str:
    for message in reversed(messages):
        if message.role == "user":
            return message.content
    return messages[-1].content


def content_digest(*parts: Any) -> bytes:
    """sha256 of JSON values, independent of key order and of the platform."""
    text = json.dumps(parts, ensure_ascii=True, separators=(",", ":"), sort_keys=True)
    return hashlib.sha256(text.encode("ascii")).digest()


def content_id(messages: Sequence[Message]) -> str:
    """16 hexadecimal digits of the sha256 of the messages."""
    return content_digest([[message.role, message.content] for message in messages]).hex()[:16]
