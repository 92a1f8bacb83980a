"""Ranked replies in tokens, and how a batch of them is cut into micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import numpy as np
import pyarrow as pa

from actors.learning.distributed import Group
from actors.learning.packing import TokenRows
from actors.text.conversations import Chat, Transcript
from actors.text.tokenizing import Tokens
from orchestrator.data.records import LabelledRecord, Message, RankingRecord, Reply, ScoredRecord
from orchestrator.errors import DataError
from orchestrator.planning.balance import plan_minibatches

JudgedRecord = RankingRecord | LabelledRecord | ScoredRecord
Value = TypeVar("Value")

_COLUMNS = ("quality", "strength", "group", "reference", "reply")
_INT_LISTS = pa.list_(pa.int32())


@dataclass(frozen=True, eq=False)
class RankedRows:
    """Tokens of all replies; record i owns the rows first_row[i] to first_row[i + 1].

    `shares_prompts`: the prompt of a record is computed once for its replies where that is less work (sharing.py).
    """

    table: pa.Table
    first_row: Sequence[int]
    num_truncated: int
    shares_prompts: bool = False

    @cached_property
    def rows(self) -> TokenRows:
        names = self.table.column_names
        return TokenRows.of_table(
            self.table,
            [name for name in _COLUMNS if name in names],
            learned_only="learn" in names,
            shares_prompts=self.shares_prompts,
        )

    @cached_property
    def lengths(self) -> list[int]:
        return self.rows.lengths

    @property
    def num_records(self) -> int:
        return len(self.first_row) - 1

    def rows_of(self, record: int) -> range:
        return range(self.first_row[record], self.first_row[record + 1])

    def by_record(self, values: Sequence[Value]) -> list[list[Value]]:
        """Values of all rows, of every record together."""
        return [[values[row] for row in self.rows_of(record)] for record in range(self.num_records)]

    def num_tokens(self, records: Sequence[int]) -> int:
        return sum(self.lengths[row] for record in records for row in self.rows_of(record))

    def of_rows(self, rows: Sequence[int]) -> RankedRows:
        """Only these rows, each as a record of its own."""
        return RankedRows(self.table.take(rows), range(len(rows) + 1), 0)

    def with_reference(self, logprobs: Sequence[float]) -> RankedRows:
        """With the log-prob of every row under the reference, which a preference loss compares with."""
        return replace(self, table=self.table.append_column("reference", pa.array(logprobs, pa.float32())))

    def with_prompts_learned(self) -> RankedRows:
        """With the prompt of every record's best reply among its learned tokens, except for the first token, before
        which there is nothing. The column `reply` marks the learned tokens of replies."""
        table, best = self.table, set(self.first_row)
        prompts, responses = (table[name].to_pylist() for name in ("prompt_tokens", "response_tokens"))
        replies = [[0.0] * (len(p) - 1) + [1.0] * len(r) for p, r in zip(prompts, responses, strict=True)]
        learned = [[row in best or mark > 0 for mark in marks] for row, marks in enumerate(replies)]
        columns = {
            "prompt_tokens": pa.array([prompt[:1] for prompt in prompts], _INT_LISTS),
            "response_tokens": pa.array([p[1:] + r for p, r in zip(prompts, responses, strict=True)], _INT_LISTS),
            "learn": pa.array(learned, pa.list_(pa.bool_())),
            "reply": pa.array(replies, pa.list_(pa.float32())),
        }
        kept = {name: table[name] for name in table.column_names if name not in columns}
        return replace(self, table=pa.table({**columns, **kept}))

    def micro_batches(self, records: Sequence[int], group: Group, micro_batch_tokens: int) -> list[tuple[int, ...]]:
        """Rows of this rank's micro-batches of one batch: the replies of a record stay together, whatever the budget.

        Every rank gets as many micro-batches; an empty one keeps it in step.
        """
        # Counting every record as wide as the widest keeps lines times longest line within the budget for mixed K.
        lines = [self.rows.lines(self.rows_of(record)) for record in records]
        most_lines = max(map(len, lines))
        costs = [most_lines * max(self.rows.line_length(line) for line in found) for found in lines]
        (ranks,) = plan_minibatches(
            costs, num_minibatches=1, num_ranks=group.world_size, micro_batch_tokens=micro_batch_tokens, seed=0
        )
        return [tuple(row for i in micro for row in self.rows_of(records[i])) for micro in ranks[group.rank]]


def ranked_rows(records: Sequence[JudgedRecord], chat: Chat, *, max_length: int) -> RankedRows:
    """Tokenises all transcripts; those longer than `max_length` lose tokens at their start and are counted.

    Raises:
        DataError: the chat template refuses a conversation.
    """
    prompts, responses, groups, first_row = [], [], [], [0]
    qualities: list[float] = []
    strengths: list[float] = []
    num_truncated = 0
    for number, record in enumerate(records):
        replies, found = judged(record)
        for whole in _transcripts(record, replies, chat):
            kept = _cut(whole, max_length)
            num_truncated += len(kept) < len(whole)
            prompts.append(kept.prompt_tokens)
            responses.append(kept.response_tokens)
            groups.append(float(number))
        qualities += found
        strengths += _strengths(record) or found
        first_row.append(len(prompts))
    return RankedRows(_table(prompts, responses, qualities, strengths, groups), first_row, num_truncated)


def judged(record: JudgedRecord) -> tuple[Sequence[Reply], list[float]]:
    """Replies and their qualities: minus the place in a ranking, 1 or 0 for a label, or the score."""
    if isinstance(record, RankingRecord):
        return record.replies, [float(-place) for place in range(len(record.replies))]
    return (record.reply,), [float(record.label if isinstance(record, LabelledRecord) else record.score)]


def _strengths(record: JudgedRecord) -> tuple[float, ...]:
    """Scores whose differences say how much better a reply is; empty: only the order is known."""
    return record.scores if isinstance(record, RankingRecord) else ()


def mismatched_rows(ranked: RankedRows, pairs: Sequence[tuple[int, int]], *, max_length: int) -> RankedRows:
    """For every pair (i, j), the prompt of record i with the best reply of record j."""
    prompts, responses = (ranked.table[name] for name in ("prompt_tokens", "response_tokens"))
    found = [
        _cut(Transcript(_tokens(prompts[ranked.first_row[i]]), _tokens(responses[ranked.first_row[j]])), max_length)
        for i, j in pairs
    ]
    zeros = [0.0] * len(found)
    tokens = [kept.prompt_tokens for kept in found], [kept.response_tokens for kept in found]
    table = _table(*tokens, zeros, zeros, zeros)
    return RankedRows(table, range(len(found) + 1), 0)


def _cut(whole: Transcript, max_length: int) -> Transcript:
    """Its last `max_length` tokens. The first one is of the prompt: a response token is predicted or scored from the
    state of the token before it."""
    kept = whole.last(max_length)
    if not len(kept.prompt_tokens):
        kept = replace(kept, prompt_tokens=kept.response_tokens[:1], response_tokens=kept.response_tokens[1:])
    return kept


def _table(
    prompts: Sequence[Tokens],
    responses: Sequence[Tokens],
    qualities: Sequence[float],
    strengths: Sequence[float],
    groups: Sequence[float],
) -> pa.Table:
    return pa.table(
        {
            "prompt_tokens": pa.array(prompts, _INT_LISTS),
            "response_tokens": pa.array(responses, _INT_LISTS),
            "quality": pa.array(qualities, pa.float32()),
            "strength": pa.array(strengths, pa.float32()),
            "group": pa.array(groups, pa.float32()),
        }
    )


def _tokens(found: pa.Scalar) -> Tokens:
    return np.asarray(found.as_py(), dtype=np.int32)


def _transcripts(record: JudgedRecord, replies: Sequence[Reply], chat: Chat) -> list[Transcript]:
    """Raises DataError where replies differ in nothing that the template writes: one can't be better than the other."""
    found = [chat.reply(record.messages, reply, record.tools) for reply in replies]
    distinct = {tuple(transcript.response_tokens) for transcript in found}
    if len(distinct) < len(found) and any(isinstance(reply, Message) for reply in replies):
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
