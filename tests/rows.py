"""Rows of tokens of judged replies, as stages store them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from actors.text.conversations import Chat
from actors.training.ranked_rows import RankedRows, stored_rankings
from actors.training.ranked_tokens import ADDED, JudgedRecord, RankedTokens
from actors.training.stored_rows import writing_rows
from jobs.stages.work.data.judged import StoredJudgements
from jobs.stages.work.data.storing import store
from orchestrator.data.records import ReadReport


def ranked_table(
    records: Sequence[JudgedRecord], chat: Chat, *, max_length: int, learns_prompts: bool = False
) -> pa.Table:
    tokens = RankedTokens(chat, max_length, learns_prompts=learns_prompts)
    for record in records:
        tokens.add(record)
    return tokens.take()


def ranked_rows(table: pa.Table, *, shares_prompts: bool = False) -> RankedRows:
    """The rows of a table, through files; they stay open."""
    added = [name for name in (*ADDED, "reply") if name in table.column_names]
    with tempfile.TemporaryDirectory() as folder:
        with writing_rows(Path(folder), *added) as writer:
            writer.append(table)
        of_tokens = [name for name in added if name == "reply"]
        return stored_rankings(Path(folder), shares_prompts=shares_prompts, tokens_added=of_tokens)


async def store_records(
    records: Sequence[JudgedRecord],
    held_out: Sequence[JudgedRecord],
    tokens: tuple[RankedTokens, RankedTokens],
    folder: Path,
) -> StoredJudgements:
    """As `store_judged`, of records in memory."""
    marked = [*((record, False) for record in records), *((record, True) for record in held_out)]
    train, kept = await store(marked, tokens, folder, lambda text: None, what="preferences")
    return StoredJudgements(folder, train, kept, ReadReport("memory", "", len(marked), len(marked), {}))
