"""Parses messages, tool calls and tools from the JSON of a row. Content that is not text raises BadRow.

Accepts, in addition to {role, content}: content as a list of text parts (joined by line breaks, as in vLLM's server);
`tool_calls` with or without the outer {"type", "function"}, arguments as an object or as JSON text; OpenAI's older
`function_call`, role "function" and `functions`. Other fields of a message are kept for the chat template.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Mapping
from typing import Any

from orchestrator.data.records import ROLES, Message, ToolCall, Tools, json_text
from orchestrator.data.values import describe, field_names

Fields = Mapping[str, Any]
Messages = tuple[Message, ...]

LARGEST_NUMBER = 1e9
"""Of scores and margins: sums of their squares and differences are finite in fp32."""

_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}
_MEDIA = ("image", "images", "image_url", "audio", "audios", "video", "videos")
_KNOWN = frozenset({"role", "content", "tool_calls", "function_call", "name", "tool_call_id"})


class BadRow(Exception):
    """The row does not fit its format; the message gives the reason."""


def conversation(value: Any, key: str) -> Messages:
    """Text (one user message, or a transcript up to the assistant's reply) or a list of messages."""
    if isinstance(value, str):
        if not value.strip():
            raise BadRow(f"{key!r} is empty")
        return transcript(value, key) if _is_open_transcript(value) else (Message("user", value),)
    if not is_messages(value):
        raise BadRow(f"{key!r} must be text or a list of {{role, content}}, found {describe(value)}")
    return tuple(message(item, f"{key}[{index}]") for index, item in enumerate(value))


def is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def message(item: Fields, where: str) -> Message:
    role = "tool" if item.get("role") == "function" else item.get("role")
    if role not in ROLES:
        raise BadRow(f"{where}: role must be one of {', '.join(ROLES)}, found {reprlib.repr(role)}")
    refuse_media(item, where)
    calls = _tool_calls(item, where)
    if calls and role != "assistant":
        raise BadRow(f"{where}: only the assistant can call tools, found tool_calls of role {role!r}")
    content = _content(item.get("content"), where, may_lack=bool(calls))
    if role == "user" and not content.strip():
        raise BadRow(f"{where}: the user's content is empty")
    extra = {name: value for name, value in item.items() if name not in _KNOWN and value is not None}
    return Message(
        role,
        content,
        calls,
        _optional_text(item, "name", where),
        _optional_text(item, "tool_call_id", where),
        _json(extra, where) if extra else None,
    )


def refuse_media(fields: Fields, where: str) -> None:
    """Raises BadRow if fields hold images, sound or video: only text is supported."""
    found = next((name for name in _MEDIA if fields.get(name)), None)
    if found is not None:
        raise BadRow(f"{where} contains {found!r}, which a text model can't read; remove the row or the field")


def tools_of(fields: Fields) -> Tools:
    """The row's `tools` (or OpenAI's older `functions`): a list, or the JSON text of one."""
    key = next((name for name in ("tools", "functions") if fields.get(name)), None)
    if key is None:
        return ()
    found = _from_text(fields[key], key) if isinstance(fields[key], str) else fields[key]
    if not isinstance(found, list):
        raise BadRow(f"{key!r} must be a list of tools, found {describe(found)}")
    return tuple(_tool(item, f"{key}[{index}]") for index, item in enumerate(found))


def transcript(text: str, key: str) -> Messages:
    """Parses `\\n\\nHuman: ...\\n\\nAssistant: ...`.

    Adjacent turns of one speaker become one message, because chat templates require alternating speakers. An empty last
    turn of the assistant is the start of the reply.
    """
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


def is_transcript(text: str) -> bool:
    """Whether a text is a complete transcript in the published format, which begins with a blank line."""
    return text.startswith("\n\nHuman:") and "\n\nAssistant:" in text


def _is_open_transcript(text: str) -> bool:
    return is_transcript(text) and text.rstrip().endswith("\n\nAssistant:")


def _content(value: Any, where: str, *, may_lack: bool) -> str:
    if value is None and may_lack:
        return ""
    if isinstance(value, list):
        return "\n".join(_part(part, f"{where}.content[{index}]") for index, part in enumerate(value))
    if not isinstance(value, str):
        raise BadRow(f"{where}: content must be text, found {describe(value)}")
    return value


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise BadRow(f"{where}: a part must be text, found {describe(part)}")
    refuse_media(part, where)
    if part.get("type", "text") not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
        raise BadRow(f"{where} is a part of type {part.get('type')!r}, which a text model can't read")
    return str(part["text"])


def _tool_calls(item: Fields, where: str) -> tuple[ToolCall, ...]:
    calls, old = item.get("tool_calls"), item.get("function_call")
    if isinstance(calls, str):
        calls = _from_text(calls, f"{where}.tool_calls")
    if calls and old:
        raise BadRow(f"{where} contains both tool_calls and function_call; keep one of them")
    found = calls or ([old] if old else [])
    if not isinstance(found, list):
        raise BadRow(f"{where}: tool_calls must be a list, found {describe(found)}")
    return tuple(_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(found))


def _call(call: Any, where: str) -> ToolCall:
    function = call.get("function", call) if isinstance(call, dict) else call
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name:
        raise BadRow(f"{where} must be {{function: {{name, arguments}}}}, found {describe(call)} without a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _from_text(arguments, f"{where}: arguments") if arguments.strip() else {}
    if arguments is not None and not isinstance(arguments, dict):
        raise BadRow(f"{where}: arguments must be an object or its JSON text, found {describe(arguments)}")
    return ToolCall(name, _json(arguments or {}, where), _optional_text(call, "id", where))


def _tool(tool: Any, where: str) -> Fields:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow(f"{where} must be {{type, function: {{name, ...}}}}, found {describe(tool)} without a name")
    whole = tool if "function" in tool else {"type": "function", "function": tool}
    return dict(json.loads(_json(whole, where)))


def _optional_text(item: Fields, key: str, where: str) -> str | None:
    value = item.get(key)
    if value is not None and not isinstance(value, str):
        raise BadRow(f"{where}: {key!r} must be text, found {describe(value)}")
    return value


def _from_text(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise BadRow(f"{where} is text but not JSON: {text[:40]!r}") from None


def _json(value: Any, where: str) -> str:
    try:
        return json_text(value)
    except (ValueError, RecursionError, TypeError):
        raise BadRow(f"{where} contains values that are not JSON (NaN, infinity, too deep nesting)") from None


def required(fields: Fields, key: str) -> Any:
    if key not in fields:
        raise BadRow(f"field {key!r} is missing; the fields are: {field_names(fields)}")
    return fields[key]


def text_of(fields: Fields, key: str) -> str:
    value = required(fields, key)
    if not isinstance(value, str):
        raise BadRow(f"{key!r} must be text, found {describe(value)}")
    if not value.strip():
        raise BadRow(f"{key!r} is empty")
    return value


def number_of(fields: Fields, key: str, where: str) -> float | None:
    """A number of at most LARGEST_NUMBER; None if the field is null or missing."""
    value = fields.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow(f"{where}: {key!r} must be a number or null, found {describe(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise BadRow(f"{where}: {key!r} must be finite, found {number}")
    if abs(number) > LARGEST_NUMBER:
        raise BadRow(
            f"{where}: {key!r} must lie between {-LARGEST_NUMBER:g} and {LARGEST_NUMBER:g}, found {number:g}: a loss "
            "that squares it would become infinite"
        )
    return number
