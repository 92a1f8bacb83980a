"""Chat-completion calls of agents: what is read from a request, and what is answered. Needs only the standard library.

The step decides how tokens are sampled, so a request's temperature, top_p, seed and the like change nothing. What would
change the meaning of an answer and can't be given (several choices, stop texts, log-probs, forced formats) is refused.
A stream has the whole answer in its first event.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

MODEL = "policy"

_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_ROLES = ("system", "developer", "user", "assistant", "tool")
_REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "n": ((1,), "a call has one answer: call with n=1"),
    "stop": (([], ""), "a turn ends where the policy ends it: call without stop"),
    "logprobs": ((False, 0), "log-probs stay with the trainer: call without logprobs"),
    "response_format": (({"type": "text"},), "the policy writes text: call without response_format"),
    "modalities": ((["text"],), "the policy writes text: call without modalities"),
    "functions": (([],), "functions are given as tools"),
    "tool_choice": (("auto", "none"), "the policy decides whether it calls a tool: tool_choice may be auto or none"),
}


class RefusedCallError(ValueError):
    """A call that is not answered. The text says why and the way out."""

    def __init__(self, code: str, text: str, parameter: str | None = None) -> None:
        super().__init__(text)
        self.code, self.parameter = code, parameter


def call_of(body: Any) -> dict[str, Any]:
    """What matters of a request: messages and tools in the form of chat templates, max_tokens (None: not limited).

    Raises:
        RefusedCallError
    """
    if not isinstance(body, Mapping):
        raise RefusedCallError("invalid_request", "the request is no JSON object")
    if body.get("model") != MODEL:
        raise RefusedCallError(
            "model_not_found", f"there is no model {str(body.get('model'))[:80]!r}; the policy is {MODEL!r}", "model"
        )
    for name, (allowed, reason) in _REFUSED.items():
        if body.get(name) is not None and body[name] not in allowed:
            raise RefusedCallError("unsupported_value", f"{name}={str(body[name])[:80]}: {reason}", name)
    if not isinstance(body.get("stream_options") or {}, Mapping):
        raise RefusedCallError("invalid_value", "stream_options must be an object", "stream_options")
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RefusedCallError("invalid_messages", "messages must be a list of at least one message", "messages")
    read = [_message(message, f"messages[{place}]") for place, message in enumerate(messages)]
    if read[-1]["role"] == "assistant":
        text = "the last message is the assistant's: it can't be continued"
        raise RefusedCallError("invalid_messages", text, "messages")
    tools = _tools(body.get("tools")) if body.get("tool_choice") != "none" else []
    return {"messages": read, "tools": tools, "max_tokens": _most(body)}


def reply(text: str, *, has_tools: bool, number: int, is_cut: bool, tokens: tuple[int, int]) -> dict[str, Any]:
    """What an agent is told of a turn of the policy.

    Args:
        text: of the turn, without its end.
        has_tools: calls of tools in it are given as `tool_calls`.
        number: of the turn, for the ids of its calls.
        tokens: numbers of tokens of the prompt and of the turn.
    """
    calls, rest = _tool_calls(text, number) if has_tools and not is_cut else ([], text)
    message: dict[str, Any] = {"role": "assistant", "content": rest}
    if calls:
        message["tool_calls"] = calls
    reason = "length" if is_cut else "tool_calls" if calls else "stop"
    return {"message": message, "finish_reason": reason, "tokens": list(tokens)}


def refusal(code: str, text: str) -> dict[str, Any]:
    """What an agent is told instead of a turn."""
    return {"refused": {"code": code, "message": text}}


def completion(told: Mapping[str, Any], number: int) -> dict[str, Any]:
    """The body of a response: `told` is a `reply`. Nothing in it depends on time."""
    message = dict(told["message"])
    if "tool_calls" in message:
        message["content"] = message["content"] or None
        message["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
            for call in message["tool_calls"]
        ]
    before, after = told["tokens"]
    return {
        "id": f"chatcmpl-{number}",
        "object": "chat.completion",
        "created": 0,
        "model": MODEL,
        "choices": [{"index": 0, "message": message, "finish_reason": told["finish_reason"], "logprobs": None}],
        "usage": {"prompt_tokens": before, "completion_tokens": after, "total_tokens": before + after},
    }


def streamed(whole: Mapping[str, Any], *, with_usage: bool) -> str:
    """A `completion` as the events of a stream."""
    (choice,) = whole["choices"]
    calls = choice["message"].get("tool_calls", [])
    delta = {**choice["message"], **({"tool_calls": [{"index": i, **c} for i, c in enumerate(calls)]} if calls else {})}
    head = {**{key: whole[key] for key in ("id", "created", "model")}, "object": "chat.completion.chunk"}
    chunks: list[dict[str, Any]] = [
        {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]},
        {**head, "choices": [{"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]}]},
    ]
    if with_usage:
        chunks.append({**head, "choices": [], "usage": whole["usage"]})
    return "".join(f"data: {text}\n\n" for text in [*map(json.dumps, chunks), "[DONE]"])


def error(code: str, text: str, parameter: str | None = None) -> dict[str, Any]:
    """The body of a response of an error."""
    return {"error": {"message": text, "type": "invalid_request_error", "param": parameter, "code": code}}


def parsed(text: str | bytes) -> Any:
    """The JSON value of a text. Raises ValueError, also for NaN, infinity and lone surrogates."""
    try:
        tree = json.loads(text, parse_constant=_no_number)
        json.dumps(tree, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return tree


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _most(body: Mapping[str, Any]) -> int | None:
    named = [body[name] for name in ("max_completion_tokens", "max_tokens") if body.get(name) is not None]
    for most in named:
        if not isinstance(most, int) or isinstance(most, bool) or most < 1:
            raise RefusedCallError("invalid_value", f"max_tokens={str(most)[:80]} is no positive number", "max_tokens")
    return min(named, default=None)


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping) or message.get("role") not in _ROLES:
        raise RefusedCallError("invalid_messages", f"{where} has no role of {', '.join(_ROLES)}", where)
    role = "system" if message["role"] == "developer" else message["role"]
    found: dict[str, Any] = {"role": role, "content": _text(message.get("content"), where)}
    if message.get("tool_calls"):
        found["tool_calls"] = [_written_call(call, where) for call in message["tool_calls"]]
    for name in ("name", "tool_call_id"):
        if isinstance(message.get(name), str):
            found[name] = message[name]
    return found


def _text(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        return "".join(str(part.get("text", "")) for part in content)
    raise RefusedCallError("invalid_messages", f"{where}: its content must be text, or parts of text", where)


def _written_call(call: Any, where: str) -> dict[str, Any]:
    try:
        function = call["function"]
        arguments = function.get("arguments") or "{}"
        tree = parsed(arguments) if isinstance(arguments, str) else arguments
        if not isinstance(tree, dict) or not isinstance(function["name"], str):
            raise TypeError
        given = {} if call.get("id") is None else {"id": str(call["id"])}
        return {"type": "function", **given, "function": {"name": function["name"], "arguments": tree}}
    except (TypeError, KeyError, ValueError, AttributeError):
        text = f"{where}: a call of a tool needs function.name and function.arguments, the JSON text of an object"
        raise RefusedCallError("invalid_messages", text, where) from None


def _tools(tools: Any) -> Sequence[Mapping[str, Any]]:
    found = tools or []
    try:
        if all(isinstance(tool["function"]["name"], str) for tool in found):
            return list(found)
    except (TypeError, KeyError):
        pass
    raise RefusedCallError("invalid_tools", "every tool needs function.name, and its schema", "tools")


def _tool_calls(text: str, number: int) -> tuple[list[dict[str, Any]], str]:
    """(calls in the form <tool_call>{"name": ..., "arguments": {...}}</tool_call>, the text around them). Text in which
    a call can't be read stays text."""
    calls: list[dict[str, Any]] = []
    for place, found in enumerate(_CALL.finditer(text)):
        try:
            tree = parsed(found[1])
            name, arguments = tree["name"], tree.get("arguments", {})
        except (ValueError, TypeError, KeyError, AttributeError):
            return [], text
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return [], text
        calls.append(
            {"type": "function", "id": f"call_{number}_{place}", "function": {"name": name, "arguments": arguments}}
        )
    return calls, _CALL.sub("", text).strip() if calls else text
