"""Demonstrations of a config: read, split, and written as rows of tokens; for sft, and for PPO-ptx."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from actors.text.conversations import Chat
from actors.text.learned import Rows
from jobs.prepare import Prepared, find_data, policy_chat
from jobs.stages.sample import sample_sizes, sampled
from jobs.stages.stage import RowSizes, row_sizes
from orchestrator.algorithms.ranking import spread
from orchestrator.config.config import Config
from orchestrator.data.readers import read_demonstrations, read_documents
from orchestrator.data.records import DemonstrationRecord, DocumentRecord, ReadReport
from orchestrator.errors import DataError
from orchestrator.prompts import split_held_out

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
    return split_held_out(records, config.demonstrations.held_out, section="demonstrations")


def sizes(config: Config, prepared: Prepared) -> RowSizes:
    """Of the file, or of the samples that will be selected, as many as may be. Raises DataError."""
    if config.demonstrations.path is None:
        prompts, select = sampled(config, prepared), config.select
        each = config.sample.samples_per_prompt * select.share if select.keep == "top" else 1
        return sample_sizes(config, prompts, num_rows=math.ceil(len(prompts) * each))
    train, _ = parts_of(config, read(config)[0])
    some = spread(train, MEASURED)
    rows = rows_of(config, prepared.chat, some).rows
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
