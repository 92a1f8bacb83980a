"""Demonstrations of a config: streamed, split, and written as rows of tokens; for sft, and for PPO-ptx."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from actors.text.conversations import Chat
from actors.text.learned import Rows
from jobs.prepare import Prepared, find_data, policy_chat
from jobs.stages.sample import sample_sizes, sampled
from jobs.stages.stage import RowSizes, Say, row_sizes
from jobs.stages.work.data import sampling
from jobs.stages.work.data.sampling import Sampled, path_of, sample_file
from jobs.stages.work.data.storing import Stored, store
from orchestrator.config.config import Config
from orchestrator.data.kinds import DEMONSTRATIONS, DOCUMENTS
from orchestrator.data.mixtures import MixedStream, stream_of
from orchestrator.data.records import DemonstrationRecord, DocumentRecord
from orchestrator.data.streams import Stream
from orchestrator.errors import DataError

Demonstration = DemonstrationRecord | DocumentRecord
Demonstrations = Stream[Any] | MixedStream[Any]


def stream(config: Config, made: Path | None = None) -> Demonstrations:
    """Those of demonstrations.path, otherwise those that an earlier stage made.

    Raises:
        DataError: now or during reading: the file can't be read, or a row is bad.
    """
    section = config.demonstrations
    path = path_of(section.path, made, section="demonstrations", what="conversations")
    if section.are_texts:
        return stream_of(DOCUMENTS, path, section.format, section.limit)
    return stream_of(DEMONSTRATIONS, path, section.format, section.limit)


def marked(config: Config, records: Demonstrations) -> Iterator[tuple[Demonstration, bool]]:
    """See sampling.marked."""
    return sampling.marked(records, config.demonstrations.held_out, section="demonstrations")


def sample(config: Config, *, is_held_out: bool = False) -> Sampled[Demonstration]:
    """Of the records to train on, or of those held out. Raises DataError."""
    found, section = stream(config), config.demonstrations
    assert section.path is not None, "else stream raises"
    records = (record for record, mark in marked(config, found) if mark == is_held_out)
    return sample_file(find_data(section.path), (section, is_held_out), records, found.report)


def sizes(config: Config, prepared: Prepared) -> RowSizes:
    """Of the file, or of the samples that will be selected, as many as may be. Raises DataError."""
    if config.demonstrations.path is None:
        prompts, select = sampled(config, prepared), config.select
        each = config.sample.samples_per_prompt * select.share if select.keep == "top" else 1
        return sample_sizes(config, prompts, num_rows=math.ceil(len(prompts) * each))
    found = sample(config)
    rows = rows_of(config, prepared.chat, found.some).rows
    num_rows = round(len(rows) * found.num_records / len(found.some))
    measured = [(len(row.tokens), int(row.learn.sum())) for row in rows]
    return row_sizes(measured, num_rows=num_rows, num_records=num_rows)


def rows_of(config: Config, chat: Chat, records: Sequence[Demonstration]) -> Rows:
    """Raises DataError: the chat template refuses a record, or no reply fits."""
    tokens = DemonstrationTokens(config, chat)
    for record in records:
        tokens.add(record)
    _require_rows(config, len(records), len(tokens))
    return tokens.rows


@dataclass
class DemonstrationTokens:
    """Rows of demonstrations (storing.py). `rows` counts what did not fit."""

    config: Config
    chat: Chat
    rows: Rows = field(default_factory=Rows)
    added: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.rows.rows)

    def add(self, record: Demonstration) -> None:
        """Raises DataError: the chat template refuses the record."""
        max_length = self.config.sft.max_length
        try:
            if isinstance(record, DocumentRecord):
                self.rows.add_text(record.text, self.chat.tokenizer, max_length=max_length)
            else:
                self.rows.add(self.chat, record.messages, record.tools, max_length=max_length)
        except DataError as error:
            raise DataError(f"demonstration {record.id!r}: {error}") from error

    def take(self) -> pa.Table:
        table = self.rows.table()
        self.rows.rows.clear()
        return table


StoredDemonstrations = Stored[DemonstrationTokens]


async def store_demonstrations(
    config: Config, chat: Chat, records: Demonstrations, folder: Path, say: Say
) -> tuple[StoredDemonstrations, StoredDemonstrations]:
    """Writes the rows to train on, and those held out.

    Raises:
        DataError: reading, a record that the chat template refuses, or no reply fits.
        StorageError: writing.
    """
    tokens = DemonstrationTokens(config, chat), DemonstrationTokens(config, chat)
    parts = await store(marked(config, records), tokens, folder, say, what="demonstrations")
    for part in parts:
        _require_rows(config, part.num_records, part.writer.num_rows)
    return parts


def _require_rows(config: Config, num_records: int, num_rows: int) -> None:
    if num_records and not num_rows:
        raise DataError(
            f"of {num_records} demonstrations no reply begins within sft.max_length={config.sft.max_length} tokens: "
            "raise it (and model.max_length with it), or give shorter conversations."
        )


def mixed_in(config: Config) -> pa.Table | None:
    """The rows that reinforcement learning mixes in. None: ptx.coefficient is 0. Raises DataError."""
    if not config.ptx.coefficient:
        return None
    train = [record for record, is_held_out in marked(config, stream(config)) if not is_held_out]
    return rows_of(config, policy_chat(config), train).table()
