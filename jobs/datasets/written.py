"""Records as a model gets them: tokens, and which of them are learned or scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from actors.text.conversations import Chat
from actors.text.learned import rows_of
from actors.text.tokenizing import Tokens, encode
from orchestrator.data.records import (
    DemonstrationRecord,
    DocumentRecord,
    LabelledRecord,
    Message,
    PromptRecord,
    RankingRecord,
    Reply,
    ScoredRecord,
    Tools,
)


@dataclass(frozen=True, eq=False)
class Written:
    """Tokens of (a part of) a record; `learn` marks those that are learned or scored."""

    title: str
    tokens: Tokens
    learn: npt.NDArray[np.bool_]


def written(chat: Chat, record: Any) -> list[Written]:
    """The parts of a record. Raises DataError if the chat template refuses it."""
    return _WRITERS[type(record)](chat, record)


def _prompt(chat: Chat, record: PromptRecord) -> list[Written]:
    tokens = chat.prompt(record.messages, record.tools)
    return [Written("", tokens, np.zeros(len(tokens), dtype=np.bool_))]


def _demonstration(chat: Chat, record: DemonstrationRecord) -> list[Written]:
    rows, _ = rows_of(chat, record.messages, record.tools)
    return [Written("", row.tokens, row.learn) for row in rows]


def _ranking(chat: Chat, record: RankingRecord) -> list[Written]:
    scores = [f", score {score:g}" for score in record.scores] or [""] * len(record.replies)
    return [
        _reply(chat, f"reply {place}{score}", record.messages, reply, record.tools)
        for place, (reply, score) in enumerate(zip(record.replies, scores, strict=True), 1)
    ]


def _labelled(chat: Chat, record: LabelledRecord) -> list[Written]:
    title = "good" if record.label else "bad"
    return [_reply(chat, title, record.messages, record.reply, record.tools)]


def _scored(chat: Chat, record: ScoredRecord) -> list[Written]:
    return [_reply(chat, f"score {record.score:g}", record.messages, record.reply, record.tools)]


def _document(chat: Chat, record: DocumentRecord) -> list[Written]:
    tokens = np.array(encode([record.text], chat.tokenizer)[0], dtype=np.int32)
    return [Written("", tokens, np.ones(len(tokens), dtype=np.bool_))]


def _reply(chat: Chat, title: str, messages: Sequence[Message], reply: Reply, tools: Tools) -> Written:
    transcript = chat.reply(messages, reply, tools)
    return Written(title, transcript.tokens, transcript.response_mask)


_WRITERS: Mapping[type, Callable[[Chat, Any], list[Written]]] = {
    PromptRecord: _prompt,
    DemonstrationRecord: _demonstration,
    RankingRecord: _ranking,
    LabelledRecord: _labelled,
    ScoredRecord: _scored,
    DocumentRecord: _document,
}
