"""Continues a sampled conversation in tokens. What was sampled is never tokenised again:

    prompt | turn 1, sampled | rest of its closing, turn of the environment, header of turn 2 | turn 2, sampled | ...

The third part is what the template writes between the two replies. It is tokenised behind the closing, which is how a
tokenizer would see it in the whole text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from actors.text.conversations import Chat
from actors.text.tokenizing import Tokens
from orchestrator.data.records import Message, is_begun
from orchestrator.errors import DataError

_TRIED = ("314159265", "271828182", "141421356", "173205080")  # digits come through any filter of a template
_THOUGHT = "577215664\n</think>\n\n"
_BEGINS = "<think>\n"
_WAY_OUT = "Set model.chat_template=FILE to a template that repeats earlier turns as they were sampled"


class Conversation:
    """One conversation in which turns of the policy are sampled.

    Args:
        messages: up to the policy's first turn.

    Raises:
        DataError: the template refuses it.
    """

    def __init__(self, chat: Chat, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> None:
        self._chat, self._messages, self._tools = chat, tuple(messages), tools
        self._text = chat.prompt_text(messages, tools)

    @property
    def prompt(self) -> Tokens:
        """The conversation as far as it is known as text, for the first turn."""
        return self._chat.tokens_of(self._text)

    def continued(self, turn: Tokens, role: str, text: str) -> Tokens:
        """The tokens between a sampled turn and the next one.

        Args:
            turn: the policy's turn, with the end token if it has one.
            role, text: the environment's answer.

        Raises:
            DataError: the template writes the conversation so far differently, so that the policy's next turn would
                not follow what it has sampled; or it refuses the conversation.
        """
        chat, reply = self._chat, self._chat.text(self._chat.body(turn))
        messages = (*_with_reply(self._messages, reply), Message(role, text))
        whole = chat.prompt_text(messages, self._tools)
        closing = chat.text(chat.closing)
        rest = _after(_after(_after(whole, self._text), reply.strip(), spaced=True), closing, spaced=True)
        if rest is None:
            raise DataError(
                f"the chat template of {chat.template.name} writes an earlier turn differently once the conversation "
                f"continues (some leave out its thoughts, {reply[:40]!r}), so the next turn would not follow what was "
                f"sampled. {_WAY_OUT}, or try environment.role=tool."
            )
        written = chat.tokens_of(closing + rest)
        if not np.array_equal(written[: len(chat.closing)], chat.closing):
            raise DataError(
                f"the tokenizer joins {closing!r}, which ends a reply, with the text after it, {rest[:20]!r}. "
                f"{_WAY_OUT}."
            )
        self._messages, self._text = messages, whole
        return np.concatenate([self._missing(turn), written[len(chat.closing) :]])

    def _missing(self, turn: Tokens) -> Tokens:
        """The part of the closing that the policy did not sample: none, unless it was cut or stopped at another
        token."""
        closing = self._chat.closing
        size = next(
            size for size in range(len(closing), -1, -1) if np.array_equal(turn[len(turn) - size :], closing[:size])
        )
        return closing[size:]


def prove_turns(chat: Chat, role: str) -> str:
    """Continues an invented conversation, whose replies have thoughts or none. Returns a warning, or "".

    Raises:
        DataError: the template can't continue any, or does not write the environment's turns.
    """
    first, reply, answer, _ = _TRIED
    forms = {"without thoughts": "", "with thoughts (<think>)": _BEGINS + _THOUGHT}
    if chat.prompt_text([Message("user", first)]).rstrip().endswith(_BEGINS.rstrip()):
        forms = {"that end the thought which the prompt begins": _THOUGHT}
    problems = {name: _problem(chat, role, before) for name, before in forms.items()}
    works = [name for name, problem in problems.items() if problem is None]
    if not works:
        raise next(problem for problem in problems.values() if problem is not None)
    conversation = Conversation(chat, [Message("user", first)])
    written = chat.text(conversation.continued(chat.tokens_of(forms[works[0]] + reply), role, answer))
    if answer not in written:
        raise DataError(
            f"the chat template of {chat.template.name} does not write a turn of role {role!r} (environment.role). Set "
            "the other role, or model.chat_template=FILE."
        )
    if len(works) == len(forms):
        return ""
    return (
        f"the chat template of {chat.template.name} repeats only turns {works[0]} as they were sampled: samples in "
        "which a turn before the last is different will fail, and count in reward.max_failed_fraction"
    )


def _problem(chat: Chat, role: str, before: str) -> DataError | None:
    """Why two replies that begin with `before` can't follow each other."""
    first, reply, answer, second = _TRIED
    try:
        conversation = Conversation(chat, [Message("user", first)])
        for text in (reply, second):
            conversation.continued(chat.closed(chat.tokens_of(before + text)), role, answer)
    except DataError as error:
        return error
    return None


def _with_reply(messages: Sequence[Message], reply: str) -> tuple[Message, ...]:
    if not is_begun(messages):
        return (*messages, Message("assistant", reply))
    return (*messages[:-1], Message("assistant", messages[-1].content + reply))


def _after(text: str | None, start: str, *, spaced: bool = False) -> str | None:
    """What follows `start`, which may have white space before it if `spaced`. None: the text begins differently."""
    if text is None:
        return None
    text = text.lstrip() if spaced else text
    return text[len(start) :] if text.startswith(start) else None
