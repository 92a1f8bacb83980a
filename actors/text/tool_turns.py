"""Turns with tool calls, checked against the template: a template without tool support silently omits them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from orchestrator.errors import DataError

Turn = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]]
Render = Callable[[Sequence[Turn], Tools], str]

_MARK = "577215664"  # digits come through any filter of a template
_WAY_OUT = "Set model.chat_template=FILE to one that is made for tools, or leave such conversations out."


def as_written(render: Render, turns: Sequence[Turn], tools: Tools, name: str) -> Sequence[Turn]:
    """The turns in a form in which the template writes all of their calls, results and tools.

    Templates expect the arguments of a call as an object, as in transformers, or as its JSON text. Rendering a copy in
    which names, arguments and results are marks shows which.

    Args:
        name: the template, for messages.

    Raises:
        DataError: the template leaves something out, or supports neither form.
    """
    if not tools and not any(turn.get("tool_calls") or turn["role"] == "tool" for turn in turns):
        return turns
    problem: DataError | None = None
    for form in (_as_object, json.dumps):
        try:
            return _in_form(form, render, turns, tools, name)
        except DataError as error:
            problem = problem or error
    assert problem is not None
    raise problem


def _in_form(
    form: Callable[[Any], Any], render: Render, turns: Sequence[Turn], tools: Tools, name: str
) -> Sequence[Turn]:
    names = list(dict.fromkeys(_names(turns, tools)))
    marks = {tool: f"{_MARK}{index:03}" for index, tool in enumerate(names)}
    copies = [_marked_turn(turn, index, marks, form) for index, turn in enumerate(turns)]
    text = render(copies, [_marked_tool(tool, marks) for tool in tools])
    missing = next((what for mark, what in _expected(turns, marks) if mark not in text), None)
    if missing is not None:
        raise DataError(
            f"the chat template of {name} writes nothing of {missing}: it is not made for tools. {_WAY_OUT}"
        )
    if f"{{'{_MARK}" in text:
        raise DataError(f"the chat template of {name} writes arguments of calls as Python, not as JSON. {_WAY_OUT}")
    return [_with_calls(turn, form, lambda call: call) for turn in turns]


def _expected(turns: Sequence[Turn], marks: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """(mark, its meaning) of everything that the text must contain."""
    for tool, mark in marks.items():
        yield mark, f"the tool {tool!r}"
    for index, turn in enumerate(turns):
        if turn["role"] == "tool":
            yield _place(index), f"the result of a tool ({str(turn['content'])[:40]!r})"
        for number, call in enumerate(turn.get("tool_calls", ())):
            if call["function"]["arguments"]:
                yield f"{_place(index)}{number}", f"the arguments of a call of {call['function']['name']!r}"


def _marked_turn(turn: Turn, index: int, marks: Mapping[str, str], form: Callable[[Any], Any]) -> Turn:
    def marked(call: Mapping[str, Any], number: int) -> Mapping[str, Any]:
        function = call["function"]
        arguments = {f"{_MARK}a": f"{_place(index)}{number}"} if function["arguments"] else {}
        return {**call, "function": {**function, "name": marks[function["name"]], "arguments": arguments}}

    numbers = iter(range(len(turn.get("tool_calls", ()))))
    found = dict(_with_calls(turn, form, lambda call: marked(call, next(numbers))))
    if turn["role"] == "tool":
        found["content"] = _place(index)
    if turn.get("name") in marks:
        found["name"] = marks[turn["name"]]
    return found


def _with_calls(
    turn: Turn, form: Callable[[Any], Any], change: Callable[[Mapping[str, Any]], Mapping[str, Any]]
) -> Turn:
    if not turn.get("tool_calls"):
        return turn
    calls = [change(call) for call in turn["tool_calls"]]
    return {
        **turn,
        "tool_calls": [
            {**call, "function": {**call["function"], "arguments": form(call["function"]["arguments"])}}
            for call in calls
        ],
    }


def _marked_tool(tool: Mapping[str, Any], marks: Mapping[str, str]) -> Mapping[str, Any]:
    return {**tool, "function": {**tool["function"], "name": marks[tool["function"]["name"]]}}


def _names(turns: Sequence[Turn], tools: Tools) -> Iterator[str]:
    for tool in tools:
        yield tool["function"]["name"]
    for turn in turns:
        for call in turn.get("tool_calls", ()):
            yield call["function"]["name"]


def _place(index: int) -> str:
    return f"{_MARK}9{index:04}"


def _as_object(arguments: Any) -> Any:
    return arguments
