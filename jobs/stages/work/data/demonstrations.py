"""Demonstrations of a config: streamed, split, and written as rows of tokens; for sft, and for PPO-ptx."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import pyarrow as pa

from actors.text.conversations import Chat
from actors.text.learned import Rows
from actors.training.stored_rows import RowsWriter, writing_rows
from jobs.prepare import Prepared, find_data, policy_chat
from jobs.stages.sample import sample_sizes, sampled
from jobs.stages.stage import RowSizes, Say, row_sizes
from orchestrator.algorithms.ranking import thinned
from orchestrator.config.config import Config
from orchestrator.data.kinds import DEMONSTRATIONS, DOCUMENTS
from orchestrator.data.mixtures import MixedStream, stream_of
from orchestrator.data.records import DemonstrationRecord, DocumentRecord, ReadReport
from orchestrator.data.streams import Stream
from orchestrator.errors import DataError
from orchestrator.prompts import marked_held_out
from orchestrator.run.storage import writing

MEASURED = 200  # records whose length stands for that of all
APPENDED_ROWS = 1024  # are held before they are written
SAID_S = 30.0  # between two lines about a long file
Demonstration = DemonstrationRecord | DocumentRecord
Demonstrations = Stream[Any] | MixedStream[Any]


def stream(config: Config, made: Path | None = None) -> Demonstrations:
    """Those of demonstrations.path, otherwise those that an earlier stage made.

    Raises:
        DataError: now or during reading: the file can't be read, or a row is bad.
    """
    section = config.demonstrations
    path = made if section.path is None else find_data(section.path)
    if path is None:
        raise DataError("demonstrations.path is null: give a file of conversations.")
    if section.are_texts:
        return stream_of(DOCUMENTS, path, section.format, section.limit)
    return stream_of(DEMONSTRATIONS, path, section.format, section.limit)


def marked(config: Config, records: Demonstrations) -> Iterator[tuple[Demonstration, bool]]:
    """Every record, and whether demonstrations.held_out holds it out.

    Raises:
        DataError: reading, bad rows at its end, or none is left to train on.
    """

    def read() -> Iterator[Demonstration]:
        yield from records
        records.report()

    return marked_held_out(read(), config.demonstrations.held_out, section="demonstrations")


def sample(config: Config, *, is_held_out: bool = False) -> tuple[Sequence[Demonstration], int, ReadReport]:
    """Of the records to train on, or of those held out: at most MEASURED, evenly spaced; and the number of all.

    Raises DataError.
    """
    found = stream(config)
    num_records = 0

    def counted() -> Iterator[Demonstration]:
        nonlocal num_records
        for record, mark in marked(config, found):
            if mark == is_held_out:
                num_records += 1
                yield record

    some = thinned(counted(), MEASURED)
    return some, num_records, found.report()


def sizes(config: Config, prepared: Prepared) -> RowSizes:
    """Of the file, or of the samples that will be selected, as many as may be. Raises DataError."""
    if config.demonstrations.path is None:
        prompts, select = sampled(config, prepared), config.select
        each = config.sample.samples_per_prompt * select.share if select.keep == "top" else 1
        return sample_sizes(config, prompts, num_rows=math.ceil(len(prompts) * each))
    some, num_records, _ = sample(config)
    rows = rows_of(config, prepared.chat, some).rows
    num_rows = round(len(rows) * num_records / len(some))
    measured = [(len(row.tokens), int(row.learn.sum())) for row in rows]
    return row_sizes(measured, num_rows=num_rows, num_records=num_rows)


def rows_of(config: Config, chat: Chat, records: Sequence[Demonstration]) -> Rows:
    """Raises DataError: the chat template refuses a record, or no reply fits."""
    rows = Rows()
    for record in records:
        _add(rows, config, chat, record)
    _require_rows(config, len(records), len(rows.rows))
    return rows


@dataclass
class Stored:
    """Demonstrations as rows of tokens in a folder (stored_rows.py). `rows` counts what did not fit."""

    folder: Path
    writer: RowsWriter
    num_records: int = 0
    rows: Rows = field(default_factory=Rows)

    def append(self) -> None:
        self.writer.append(self.rows.table())
        self.rows.rows.clear()


async def store(config: Config, chat: Chat, records: Demonstrations, folder: Path, say: Say) -> tuple[Stored, Stored]:
    """Writes the rows to train on, and those held out, while the records are read: memory holds few of them.

    Raises:
        DataError: reading, a record that the chat template refuses, or no reply fits.
        StorageError: writing.
    """
    said = monotonic()
    with ExitStack() as stack:
        parts = []
        for name in ("train", "held_out"):
            with writing(folder / name):
                (folder / name).mkdir(parents=True, exist_ok=True)
            parts.append(Stored(folder / name, stack.enter_context(writing_rows(folder / name))))
        for record, is_held_out in marked(config, records):
            part = parts[is_held_out]
            part.num_records += 1
            _add(part.rows, config, chat, record)
            if len(part.rows.rows) >= APPENDED_ROWS:
                part.append()
                await asyncio.sleep(0)  # a stop is noticed here
                if monotonic() - said > SAID_S:
                    said = monotonic()
                    say(f"demonstrations: {sum(part.num_records for part in parts):,} written as tokens ...")
        for part in parts:
            part.append()
            _require_rows(config, part.num_records, part.writer.num_rows)
    train, held_out = parts
    return train, held_out


def _add(rows: Rows, config: Config, chat: Chat, record: Demonstration) -> None:
    try:
        if isinstance(record, DocumentRecord):
            rows.add_text(record.text, chat.tokenizer, max_length=config.sft.max_length)
        else:
            rows.add(chat, record.messages, record.tools, max_length=config.sft.max_length)
    except DataError as error:
        raise DataError(f"demonstration {record.id!r}: {error}") from error


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
