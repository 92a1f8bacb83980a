"""Ranked replies become rows of tokens: tables with the columns that stored_rows.py appends."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa

from actors.text.conversations import Chat, Transcript
from actors.training.ranked_rows import RankedRows
from orchestrator.data.records import LabelledRecord, Message, RankingRecord, Reply, ScoredRecord
from orchestrator.errors import DataError
from orchestrator.training.ensemble import bootstrap_weights

JudgedRecord = RankingRecord | LabelledRecord | ScoredRecord

ADDED = ("quality", "strength", "record")
"""The columns of every table."""
_TOKENS, _MARKS = pa.list_(pa.int32()), pa.list_(pa.bool_())


@dataclass
class RankedTokens:
    """Rows of the transcripts of records; those longer than `max_length` lose tokens at their start and are counted.

    Args:
        learns_prompts: also the prompt of every record's best reply is learned, see `with_prompts_learned`.
        heads, seed: of a reward model; with several heads, records have weights (ensemble.bootstrap_weights).
    """

    chat: Chat
    max_length: int
    learns_prompts: bool = False
    heads: int = 1
    seed: int = 0
    num_truncated: int = 0
    num_records: int = 0
    _waiting: list[JudgedRecord] = field(default_factory=list)
    _num_replies: int = 0

    def __len__(self) -> int:
        return self._num_replies

    @property
    def added(self) -> Sequence[str]:
        """The columns that are added to those of all rows."""
        return (*ADDED, *["reply"] * self.learns_prompts, *["weights"] * (self.heads > 1))

    def add(self, record: JudgedRecord) -> None:
        self._waiting.append(record)
        self._num_replies += len(judged(record)[0])

    def take(self) -> pa.Table:
        """The rows since the last call. Raises DataError: the chat template refuses a conversation."""
        kept: list[Transcript] = []
        qualities: list[float] = []
        strengths: list[float] = []
        numbers: list[int] = []
        for record, transcripts in zip(self._waiting, _transcripts(self._waiting, self.chat), strict=True):
            for whole in transcripts:
                kept.append(_cut(whole, self.max_length))
                self.num_truncated += len(kept[-1]) < len(whole)
            qualities += judged(record)[1]
            strengths += _strengths(record) or judged(record)[1]
            numbers += [self.num_records] * len(transcripts)
            self.num_records += 1
        table = _table(kept, qualities, strengths, numbers)
        if self.heads > 1:
            ids = [record.id for record in self._waiting for _ in judged(record)[0]]
            weights = bootstrap_weights(ids, self.heads, self.seed)
            table = table.append_column("weights", pa.array(list(weights), pa.list_(pa.float32())))
        self._waiting, self._num_replies = [], 0
        return with_prompts_learned(table) if self.learns_prompts else table


def judged(record: JudgedRecord) -> tuple[Sequence[Reply], list[float]]:
    """Replies and their qualities: minus the place in a ranking, 1 or 0 for a label, or the score."""
    if isinstance(record, RankingRecord):
        return record.replies, [float(-place) for place in range(len(record.replies))]
    return (record.reply,), [float(record.label if isinstance(record, LabelledRecord) else record.score)]


def _strengths(record: JudgedRecord) -> tuple[float, ...]:
    """Scores whose differences say how much better a reply is; empty: only the order is known."""
    return record.scores if isinstance(record, RankingRecord) else ()


def with_prompts_learned(table: pa.Table) -> pa.Table:
    """With the prompt of every record's best reply among its learned tokens, except for the first token, before which
    there is nothing. The column `reply` marks the tokens of replies. The table begins with a record's best reply."""
    is_best = np.diff(table["record"].to_numpy(), prepend=-1) != 0
    prompts, responses = (table[name].to_pylist() for name in ("prompt_tokens", "response_tokens"))
    replies = [[False] * (len(p) - 1) + [True] * len(r) for p, r in zip(prompts, responses, strict=True)]
    learned = [[best or mark for mark in marks] for best, marks in zip(is_best.tolist(), replies, strict=True)]
    columns = {
        "prompt_tokens": pa.array([prompt[:1] for prompt in prompts], _TOKENS),
        "response_tokens": pa.array([p[1:] + r for p, r in zip(prompts, responses, strict=True)], _TOKENS),
        "learn": pa.array(learned, _MARKS),
        "reply": pa.array(replies, _MARKS),
    }
    kept = {name: table[name] for name in table.column_names if name not in columns}
    return pa.table({**columns, **kept})


def mismatched_table(
    ranked: RankedRows, pairs: Iterable[tuple[int, int]], *, max_length: int, first: int = 0
) -> pa.Table:
    """For every pair (i, j), the prompt of record i with the best reply of record j, as records from number `first`."""
    rows, best = ranked.rows, ranked.first_row
    found = [_cut(Transcript(rows.texts(best[i])[0], rows.texts(best[j])[1]), max_length) for i, j in pairs]
    zeros = [0.0] * len(found)
    return _table(found, zeros, zeros, range(first, first + len(found)))


def _cut(whole: Transcript, max_length: int) -> Transcript:
    """Its last `max_length` tokens. The first one is of the prompt: a response token is predicted or scored from the
    state of the token before it."""
    kept = whole.last(max_length)
    if not len(kept.prompt_tokens):
        kept = replace(kept, prompt_tokens=kept.response_tokens[:1], response_tokens=kept.response_tokens[1:])
    return kept


def _table(
    kept: Sequence[Transcript], qualities: Sequence[float], strengths: Sequence[float], records: Sequence[int]
) -> pa.Table:
    return pa.table(
        {
            "prompt_tokens": pa.array([each.prompt_tokens for each in kept], _TOKENS),
            "response_tokens": pa.array([each.response_tokens for each in kept], _TOKENS),
            "learn": pa.array([np.ones(len(each.response_tokens), np.bool_) for each in kept], _MARKS),
            "quality": pa.array(qualities, pa.float32()),
            "strength": pa.array(strengths, pa.float32()),
            "record": pa.array(records, pa.int64()),
        }
    )


def _transcripts(records: Sequence[JudgedRecord], chat: Chat) -> list[list[Transcript]]:
    """Raises DataError where replies differ in nothing that the template writes: one can't be better than the other."""
    found = chat.replies((record.messages, judged(record)[0], record.tools) for record in records)
    for record, transcripts in zip(records, found, strict=True):
        has_messages = any(isinstance(reply, Message) for reply in judged(record)[0])
        if has_messages and len({each.response_tokens.tobytes() for each in transcripts}) < len(transcripts):
            raise DataError(
                f"preference {record.id!r}: the chat template of {chat.template.name} writes two of its replies alike. "
                "Remove the record, or set model.chat_template=FILE to a template that writes what they differ in."
            )
    return found


def padding_token(chat: Chat) -> int:
    """A token that never ends a transcript, to pad with.

    transformers finds the end of a padded sequence by the last token that is not padding; with the closing token as
    padding, as many tokenizers have it, it would take the score of the token before.
    """
    tokenizer, last = chat.tokenizer, int(chat.closing[-1])
    known = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *tokenizer.all_special_ids, 0, 1]
    return next(int(token) for token in known if token is not None and token != last)
