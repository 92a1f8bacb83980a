"""ShareGPT: {conversations: [{from, value}]}, with a system text and tools beside it in some data sets."""

from __future__ import annotations

import reprlib

from orchestrator.data.messages import BadRow, Fields, Messages, is_messages, message, required, text_of
from orchestrator.data.records import Message
from orchestrator.data.values import describe

_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}
_CALL = "function_call"  # its value is the JSON text of a call


def sharegpt_turns(fields: Fields) -> Messages:
    turns = required(fields, "conversations")
    if not is_messages(turns):
        raise BadRow(f"'conversations' must be a list of {{from, value}}, found {describe(turns)}")
    system = (Message("system", text_of(fields, "system")),) if fields.get("system") else ()
    return (*system, *(_turn(turn, f"conversations[{index}]") for index, turn in enumerate(turns)))


def _turn(turn: Fields, where: str) -> Message:
    if "role" in turn:
        return message(turn, where)
    speaker = turn.get("from")
    others = {key: value for key, value in turn.items() if key not in ("from", "value")}
    if speaker == _CALL:
        return message({**others, "role": "assistant", "tool_calls": f"[{turn.get('value')}]"}, where)
    role = _ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise BadRow(f"{where}: 'from' must be one of {', '.join((*_ROLES, _CALL))}, found {reprlib.repr(speaker)}")
    return message({**others, "role": role, "content": turn.get("value")}, where)
