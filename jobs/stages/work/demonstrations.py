"""Demonstrations of a config: read, split, and written as rows of tokens; for sft, and for PPO-ptx."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from actors.text.conversations import Chat
from actors.text.learned import Rows
from jobs.prepare import find_data, policy_chat
from jobs.stages.stage import RowSizes, row_sizes
from orchestrator.algorithms.ranking import spread
from orchestrator.config.config import Config
from orchestrator.data.readers import read_demonstrations, read_documents
from orchestrator.data.records import DemonstrationRecord, DocumentRecord, ReadReport
from orchestrator.errors import DataError
from orchestrator.prompts import split

MEASURED = 200  # records whose length stands for that of all
Demonstration = DemonstrationRecord | DocumentRecord


def read(config: Config, made: Path | None = None) -> tuple[Sequence[Demonstration], ReadReport]:
    """Those of demonstrations.path, otherwise those that an earlier stage made.

    Raises:
        DataError: the file can't be read, or a row is bad.
    """
    section = config.demonstrations
    path = made if section.path is None else find_data(section.path)
    if path is None:
        raise DataError("demonstrations.path is null: give a file of conversations.")
    if section.are_texts:
        return read_documents(path, section.format, section.limit)
    return read_demonstrations(path, section.format, section.limit)


def parts_of(
    config: Config, records: Sequence[Demonstration]
) -> tuple[Sequence[Demonstration], Sequence[Demonstration]]:
    """(to train on, held out), as demonstrations.held_out says. Raises DataError: nothing is left to train on."""
    count = config.demonstrations.held_out
    if count is None:
        parts = split(records, held_out_fraction=0.1, reward_model_fraction=0.0, salt="demonstrations")
        train, held_out = parts.train, parts.held_out
    else:
        start = max(len(records) - count, 0)
        train, held_out = tuple(records[:start]), tuple(records[start:])
    if not train:
        raise DataError(
            f"of {len(records)} demonstrations {len(held_out)} are held out, so none is left to train on. Give more "
            "demonstrations or lower demonstrations.held_out."
        )
    return train, held_out


def sizes(config: Config, chat: Chat) -> RowSizes:
    """Raises DataError."""
    train, _ = parts_of(config, read(config)[0])
    some = spread(train, MEASURED)
    rows = rows_of(config, chat, some).rows
    num_rows = round(len(rows) * len(train) / len(some))
    measured = [(len(row.tokens), int(row.learn.sum())) for row in rows]
    return row_sizes(measured, num_rows=num_rows, num_records=num_rows)


def rows_of(config: Config, chat: Chat, records: Sequence[Demonstration]) -> Rows:
    rows = Rows()
    for record in records:
        try:
            if isinstance(record, DocumentRecord):
                rows.add_text(record.text, chat.tokenizer, max_length=config.sft.max_length)
            else:
                rows.add(chat, record.messages, record.tools, max_length=config.sft.max_length)
        except DataError as error:
            raise DataError(f"demonstration {record.id!r}: {error}") from error
    if records and not rows.rows:
        raise DataError(
            f"of {len(records)} demonstrations no reply begins within sft.max_length={config.sft.max_length} tokens: "
            "raise it (and model.max_length with it), or give shorter conversations."
        )
    return rows


def mixed_in(config: Config) -> pa.Table | None:
    """The rows that reinforcement learning mixes in. None: ptx.coefficient is 0. Raises DataError."""
    if not config.ptx.coefficient:
        return None
    train, _ = parts_of(config, read(config)[0])
    return rows_of(config, policy_chat(config), train).table()
