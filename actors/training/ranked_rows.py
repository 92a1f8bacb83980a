"""Ranked replies in tokens, and how a batch of them is cut into micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import pyarrow as pa

from actors.learning.distributed import Group
from actors.learning.packing import TokenRows
from actors.text.conversations import Chat, Transcript
from orchestrator.data.records import Message, RankingRecord
from orchestrator.errors import DataError
from orchestrator.planning.balance import plan_minibatches

_COLUMNS = ("quality", "group")
_INT_LISTS = pa.list_(pa.int32())


@dataclass(frozen=True, eq=False)
class RankedRows:
    """Tokens of all replies; record i owns the rows first_row[i] to first_row[i + 1]."""

    table: pa.Table
    first_row: Sequence[int]
    num_truncated: int

    @cached_property
    def rows(self) -> TokenRows:
        return TokenRows(self.table, _COLUMNS)

    @cached_property
    def lengths(self) -> list[int]:
        return self.rows.lengths

    @property
    def num_records(self) -> int:
        return len(self.first_row) - 1

    def rows_of(self, record: int) -> range:
        return range(self.first_row[record], self.first_row[record + 1])

    def num_tokens(self, records: Sequence[int]) -> int:
        return sum(self.lengths[row] for record in records for row in self.rows_of(record))

    def micro_batches(self, records: Sequence[int], group: Group, micro_batch_tokens: int) -> list[tuple[int, ...]]:
        """Rows of this rank's micro-batches of one batch: the replies of a record stay together, whatever the budget.

        Every rank gets as many micro-batches; an empty one keeps it in step.
        """
        # Counting every record as wide as the widest keeps rows times longest row within the budget for mixed K.
        most_replies = max(len(self.rows_of(record)) for record in records)
        costs = [most_replies * max(self.lengths[row] for row in self.rows_of(record)) for record in records]
        (ranks,) = plan_minibatches(
            costs, num_minibatches=1, num_ranks=group.world_size, micro_batch_tokens=micro_batch_tokens, seed=0
        )
        return [tuple(row for i in micro for row in self.rows_of(records[i])) for micro in ranks[group.rank]]


def ranked_rows(records: Sequence[RankingRecord], chat: Chat, *, max_length: int) -> RankedRows:
    """Tokenises all transcripts; those longer than `max_length` lose tokens at their start and are counted.

    Raises:
        DataError: the chat template refuses a conversation.
    """
    prompts, responses, qualities, groups, first_row = [], [], [], [], [0]
    num_truncated = 0
    for number, record in enumerate(records):
        for place, whole in enumerate(_transcripts(record, chat)):
            # A response token needs one token before it, from whose state it is scored.
            kept = whole.last(max_length)
            if not len(kept.prompt_tokens):
                kept = replace(kept, prompt_tokens=kept.response_tokens[:1], response_tokens=kept.response_tokens[1:])
            num_truncated += len(kept) < len(whole)
            prompts.append(kept.prompt_tokens)
            responses.append(kept.response_tokens)
            qualities.append(float(-place))
            groups.append(float(number))
        first_row.append(len(prompts))
    table = pa.table(
        {
            "prompt_tokens": pa.array(prompts, _INT_LISTS),
            "response_tokens": pa.array(responses, _INT_LISTS),
            "quality": pa.array(qualities, pa.float32()),
            "group": pa.array(groups, pa.float32()),
        }
    )
    return RankedRows(table, first_row, num_truncated)


def _transcripts(record: RankingRecord, chat: Chat) -> list[Transcript]:
    """Raises DataError where replies differ in nothing that the template writes: one can't be better than the other."""
    found = [chat.reply(record.messages, reply, record.tools) for reply in record.replies]
    distinct = {tuple(transcript.response_tokens) for transcript in found}
    if len(distinct) < len(found) and any(isinstance(reply, Message) for reply in record.replies):
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
