"""Conversations and replies for shapes that hold text alone. What they can't hold is left out, with the reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jobs.services.labelling.shapes.judged import Judged
from orchestrator.data.formats.format import Format, LeftOut
from orchestrator.data.messages import BadRow, Fields

UNKNOWN = "unknown"
_TEXT = {"role", "content"}


def conversation(judged: Judged) -> Sequence[dict[str, str]]:
    """The prompt as {role, content}. Raises LeftOut: it has tools, calls or other fields."""
    messages: Sequence[dict[str, str]] = judged.item.messages
    if judged.item.tools or any(set(message) != _TEXT for message in messages):
        raise LeftOut("with more than text in the prompt")
    return messages


def exchange(judged: Judged) -> Sequence[dict[str, str]]:
    """As `conversation`, of a user and an assistant who take turns. Raises LeftOut also for other prompts."""
    messages = conversation(judged)
    expected = ["user", "assistant"] * (len(messages) // 2) + ["user"]
    if [message["role"] for message in messages] != expected:
        raise LeftOut("with a system message, a begun reply, or one speaker twice in a row")
    return messages


def replies(judged: Judged) -> list[str]:
    """Raises LeftOut: one of them has more than text."""
    return [_text(reply) for reply in judged.replies()]


def model_of(judged: Judged, index: int) -> str:
    """The model that gave a reply, or its run, stage and version of the weights."""
    source, of = judged.item.replies[index]["source"], judged.item.source
    if "model" in source:
        return str(source["model"])
    parts = [str(of[key]) for key in ("run", "stage") if of.get(key)]
    version = f"@{source['version']}" if "version" in source else ""
    return f"{'/'.join(parts)}{version}" if parts else UNKNOWN


def require_kept(form: Format[Any], row: Fields, messages: Sequence[dict[str, str]], texts: Sequence[str]) -> None:
    """Raises LeftOut: a reader would find other texts in this row, except for white space at their edges."""
    try:
        found = next(iter(form.parse(row)))
    except (BadRow, LeftOut) as reason:
        found = LeftOut(str(reason))
    if isinstance(found, LeftOut):
        raise LeftOut("which readers of this shape refuse")
    read, answers = found[0], [found[1]] if isinstance(found[1], str) else list(found[1])
    before = [(message["role"], message["content"].strip()) for message in messages]
    same = [(message.role, message.content.strip()) for message in read] == before
    if not same or [answer.strip() for answer in answers] != [text.strip() for text in texts]:
        raise LeftOut("whose text looks like a turn of this shape")


def _text(reply: Any) -> str:
    if isinstance(reply, str):
        return reply
    if set(reply) != _TEXT:
        raise LeftOut("with more than text in a reply")
    return str(reply["content"])
