"""Continues a sampled conversation in tokens. What was sampled is never tokenised again:

    prompt | turn 1, sampled | rest of its closing, turn of the environment, header of turn 2 | turn 2, sampled | ...

The third part is what the template writes between the two replies. It is tokenised behind the closing, which is how a
tokenizer would see it in the whole text. Where the template writes the conversation so far differently (some leave out
earlier thoughts), nothing can follow: the next turn begins a new segment, with the whole conversation as its prompt.
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
_EACH = "is a prompt of its own, and costs its tokens again"


class Conversation:
    """A conversation up to a turn of the policy.

    Args:
        messages: up to that turn.

    Raises:
        DataError: the template refuses it.
    """

    def __init__(self, chat: Chat, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> None:
        self._chat, self.messages, self.tools = chat, tuple(messages), tuple(tools)
        self._text = chat.prompt_text(messages, tools)

    @property
    def prompt(self) -> Tokens:
        """The conversation so far, tokenised as a whole: the prompt of a segment's first turn."""
        return self._chat.tokens_of(self._text)

    def continued(self, turn: Tokens, answers: Sequence[Message]) -> tuple[Conversation, Tokens | None]:
        """The conversation up to the next turn, and the tokens between the sampled turn and that one. None: the
        template writes the conversation so far differently, or the tokenizer joins the reply's end with what follows,
        so that the next turn would not follow what was sampled.

        Args:
            turn: the policy's turn, with the end token if it has one.
            answers: what was said after it.

        Raises:
            DataError: the template refuses the conversation.
        """
        chat, reply = self._chat, self._said(turn)
        following = Conversation(chat, (*self.answered(turn), *answers), self.tools)
        closing = chat.text(chat.closing)
        rest = _after(_after(_after(following._text, self._text), reply.strip(), spaced=True), closing, spaced=True)
        if rest is None:
            return following, None
        written = chat.tokens_of(closing + rest)
        if not np.array_equal(written[: len(chat.closing)], chat.closing):
            return following, None
        return following, np.concatenate([self._missing(turn), written[len(chat.closing) :]])

    def answered(self, turn: Tokens) -> tuple[Message, ...]:
        """The conversation with the policy's turn as text."""
        return _with_reply(self.messages, self._said(turn))

    def _said(self, turn: Tokens) -> str:
        return self._chat.text(self._chat.body(turn))

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
        DataError: the template refuses conversations of several turns, or does not write the environment's turns.
    """
    first, reply, answer, _ = _TRIED
    forms = {"without thoughts": "", "with thoughts (<think>)": _BEGINS + _THOUGHT}
    if chat.prompt_text([Message("user", first)]).rstrip().endswith(_BEGINS.rstrip()):
        forms = {"that end the thought which the prompt begins": _THOUGHT}
    works = [name for name, before in forms.items() if _continues(chat, role, before)]
    turn = chat.tokens_of(next(iter(forms.values())) + reply)
    following, _ = Conversation(chat, [Message("user", first)]).continued(turn, [Message(role, answer)])
    written = chat.text(following.prompt)
    if answer not in written:
        raise DataError(
            f"the chat template of {chat.template.name} does not write a turn of role {role!r} (environment.role). Set "
            "the other role, or model.chat_template=FILE."
        )
    if first not in written or reply not in written:
        raise DataError(
            f"the chat template of {chat.template.name} leaves out earlier turns, so the policy would not see what was "
            "said before. Set model.chat_template=FILE."
        )
    if len(works) == len(forms):
        return ""
    template = f"the chat template of {chat.template.name}"
    if not works:
        return f"{template} writes earlier turns differently later on, so every turn {_EACH}. {_WAY_OUT}"
    return (
        f"{template} repeats only turns {works[0]} as they were sampled: after another one, the next turn {_EACH}. "
        f"{_WAY_OUT}"
    )


def _continues(chat: Chat, role: str, before: str) -> bool:
    """Whether two replies that begin with `before` can follow each other."""
    first, reply, answer, second = _TRIED
    conversation = Conversation(chat, [Message("user", first)])
    for text in (reply, second):
        turn = chat.closed(chat.tokens_of(before + text))
        conversation, written = conversation.continued(turn, [Message(role, answer)])
        if written is None:
            return False
    return True


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
