"""Converts conversations to rows of tokens with marked replies, for supervised fine-tuning.

Every reply is learned once, after exactly the tokens that an engine would get as its prompt. The marks derive from the
template, which writes each prompt and each answered prompt; no text is searched for markers:

    prompt 1 | reply 1 | rest of prompt 2 | reply 2      one row, while each prompt continues the row
    prompt 1' | reply 1 ... | reply 3                    a separate row, if the template writes earlier turns
                                                         differently (e.g. drops their thoughts)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actors.text.conversations import Chat
from actors.text.tokenizing import Tokens, encode
from orchestrator.data.records import Message, Tools

_TOKENS, _MARKS = pa.list_(pa.int32()), pa.list_(pa.bool_())


@dataclass(eq=False)
class Row:
    """Tokens of one row; `learn` marks replies with their closings. The first token is never marked."""

    tokens: Tokens
    learn: npt.NDArray[np.bool_]

    def continues_to(self, prompt: Tokens) -> bool:
        return np.array_equal(prompt[: len(self.tokens)], self.tokens)

    def first(self, max_length: int) -> Row:
        return Row(self.tokens[:max_length], self.learn[:max_length])


@dataclass
class Rows:
    """Rows of conversations.

    Attributes:
        num_split: records that were split because they exceed the length of a row.
        num_cut: rows that lost tokens at their end.
        num_lost: replies that were cut completely.
    """

    rows: list[Row] = field(default_factory=list)
    num_split: int = 0
    num_cut: int = 0
    num_lost: int = 0

    def add(self, chat: Chat, messages: Sequence[Message], tools: Tools = (), *, max_length: int) -> None:
        """Adds a conversation. If it is longer than `max_length`, it is split before user turns, and its parts keep
        the system message. A single exchange that is longer is cut at its end.

        Raises:
            DataError: the chat template refuses it.
        """
        found, was_split = rows_of(chat, messages, tools, max_length=max_length)
        self.num_split += was_split
        for row in found:
            kept = row.first(max_length)
            self.num_cut += len(kept.tokens) < len(row.tokens)
            if kept.learn.any():
                self.rows.append(kept)
            else:
                self.num_lost += 1

    def add_text(self, text: str, tokenizer: Any, *, max_length: int) -> None:
        """Adds a text of which every token is learned, between BOS (if the tokenizer puts one) and EOS. One that is
        longer than `max_length` becomes several rows; each but the first begins with the last token of the one before
        it, so that every token is learned once."""
        begin = tokenizer("", add_special_tokens=True)["input_ids"][:1]
        begin = begin if begin == [tokenizer.bos_token_id] else []
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        tokens = np.array([*begin, *encode([text], tokenizer)[0], *end], dtype=np.int32)
        self.num_split += len(tokens) > max_length
        for start in range(0, len(tokens) - 1, max_length - 1):
            part = tokens[start : start + max_length]
            self.rows.append(Row(part, np.arange(len(part)) > 0))

    def table(self) -> pa.Table:
        """The columns of TokenRows: a row's prompt ends at the start of its first reply."""
        starts = [int(np.argmax(row.learn)) for row in self.rows]
        parts = list(zip(self.rows, starts, strict=True))
        return pa.table(
            {
                "prompt_tokens": pa.array([row.tokens[:start] for row, start in parts], _TOKENS),
                "response_tokens": pa.array([row.tokens[start:] for row, start in parts], _TOKENS),
                "learn": pa.array([row.learn[start:] for row, start in parts], _MARKS),
            }
        )

    def describe(self, key: str) -> str:
        """A text about what did not fit; empty if everything did. `key` names the limit."""
        counts = {
            "records are longer than {key} and were split": self.num_split,
            "exchanges are longer than {key} and were cut at their end": self.num_cut,
            "replies lie behind that cut and are lost": self.num_lost,
        }
        return ", ".join(f"{count} {words.format(key=key)}" for words, count in counts.items() if count)


def rows_of(
    chat: Chat, messages: Sequence[Message], tools: Tools = (), *, max_length: int | None = None
) -> tuple[list[Row], bool]:
    """The rows of one conversation, and whether it was split. Rows of single exchanges may be longer than `max_length`.

    Raises:
        DataError: the chat template refuses it.
    """
    num_system = next((place for place, turn in enumerate(messages) if turn.role != "system"), len(messages))
    system, turns = tuple(messages[:num_system]), tuple(messages[num_system:])
    rows: list[Row] = []
    start, was_split = 0, False
    for place, turn in enumerate(turns):
        if turn.role != "assistant":
            continue
        prompt, reply = chat.answered((*system, *turns[start:place]), turn, tools)
        begin = _exchange(turns, place)
        if max_length is not None and len(prompt) + len(reply) > max_length and begin > start:
            start, was_split = begin, True
            prompt, reply = chat.answered((*system, *turns[start:place]), turn, tools)
        row = Row(np.concatenate([prompt, reply]), np.arange(len(prompt) + len(reply)) >= len(prompt))
        if rows and rows[-1].continues_to(prompt):
            earlier = rows.pop().learn
            row.learn[: len(earlier)] = earlier
        rows.append(row)
    return rows, was_split


def _exchange(turns: Sequence[Message], place: int) -> int:
    """The start of the exchange that contains this reply: the user's turns before it."""
    begin = place
    while begin and turns[begin].role != "user":
        begin -= 1
    while begin and turns[begin - 1].role == "user":
        begin -= 1
    return begin
