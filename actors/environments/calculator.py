"""A calculator for arithmetic problems, such as GSM8K (Cobbe 2021). The policy may call it in two forms:

    <calc>3 * (4 + 5)</calc>
    <tool_call>{"name": "calculator", "arguments": {"expression": "3 * (4 + 5)"}}</tool_call>

A turn with calls and without a marked answer is answered with their results. Any other turn is the final answer.
"""

from __future__ import annotations

import ast
import json
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

from actors.environments.contract import Step, Task
from actors.rewards.rules import exact_answer, formatted_answer

_CALL = re.compile(r"<calc>(?P<plain>.*?)</calc>|<tool_call>(?P<tool>.*?)</tool_call>", re.DOTALL)
_MARKED = re.compile(r"####|<answer>")
# A percent sign binds tighter than any operator, as only Python's brackets do; brackets themselves are no arithmetic.
_WRITTEN = str.maketrans({"×": "*", "÷": "/", "−": "-", "^": "**", "$": "", ",": "", "%": "[100]", "[": "?", "]": "?"})
_MOST_CALLS = 8
_LONGEST = 200  # characters of an expression
_MOST_BITS = 256
_OPERATORS: Mapping[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


class Calculator:
    """Reward parts of the final answer: `answer`, 1 if its final number is that of meta["answer"], and `format`, 0.1
    if the turn ends with its only marked answer (actors.rewards.rules:formatted_answer).

    Args:
        call_reward: part `call`, once per episode, for the first call that has a result: helps a policy that never
            calls. 0: no such part.
    """

    def __init__(self, call_reward: float = 0.0) -> None:
        self._call_reward = call_reward
        self._meta: Mapping[str, Any] = {}
        self._has_called = False

    def reset(self, prompt: Task) -> None:
        self._meta = prompt.meta

    def step(self, action: str) -> Step:
        calls = list(_expressions(action))[:_MOST_CALLS]
        if not calls or _MARKED.search(action):
            form = formatted_answer("", action, self._meta)["format"]
            answer = exact_answer("", action, self._meta)
            return "", self._parts(answer=answer, format=form), True, {}
        answers = [_answered(call) for call in calls]
        is_first = not self._has_called and any(has_result for _, has_result in answers)
        self._has_called = self._has_called or is_first
        reward = self._parts(call=self._call_reward * is_first)
        return "\n".join(text for text, _ in answers), reward, False, {"calls": calls}

    def _parts(self, *, answer: float = 0.0, format: float = 0.0, call: float = 0.0) -> dict[str, float]:
        """Every step has every part, so that their means are over all episodes."""
        parts = {"answer": answer, "format": format}
        return {**parts, "call": call} if self._call_reward else parts


def calculated(expression: str) -> str:
    """`expression = value`, or a text that says why it has none."""
    return _answered(expression)[0]


def _answered(expression: str) -> tuple[str, bool]:
    """(what `calculated` returns, whether there is a value)"""
    shown = expression.strip()
    try:
        if len(shown) > _LONGEST:
            raise ValueError(f"it is longer than {_LONGEST} characters")
        value = _value(ast.parse(shown.translate(_WRITTEN).strip(), mode="eval").body)
    except (ArithmeticError, ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        reason = "it is no arithmetic" if isinstance(error, SyntaxError) else str(error)
        return f"{shown[:_LONGEST]}: no result, {reason}", False
    return f"{shown} = {value:.12g}" if isinstance(value, float) else f"{shown} = {value}", True


def _expressions(action: str) -> Iterator[str]:
    for call in _CALL.finditer(action):
        if call["plain"] is not None:
            yield call["plain"]
            continue
        try:
            tree = json.loads(call["tool"])
            yield str(tree["arguments"]["expression"])
        except (ValueError, TypeError, KeyError, RecursionError):
            yield call["tool"]


def _value(node: ast.AST) -> float | int:
    """The value of an expression of numbers, in which no part is larger than a few hundred bits."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        found = cast("float | int", node.value)
    elif isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        found = _OPERATORS[type(node.op)](_value(node.operand))
    elif isinstance(node, ast.Subscript):
        found = _value(node.value) / 100
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow) and abs(right) > _MOST_BITS:
            raise ValueError("its exponent is too large")
        found = _OPERATORS[type(node.op)](left, right)
    else:
        raise ValueError("it is no arithmetic")
    if isinstance(found, complex) or not math.isfinite(found):
        raise ValueError("it is not a real number")
    if isinstance(found, int) and found.bit_length() > _MOST_BITS:
        raise ValueError("it is too large")
    return int(found) if isinstance(found, float) and found.is_integer() and abs(found) < 2**53 else found
