"""Demonstrations are written as tokens while they are read."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.learning.packing import TokenRows
from actors.text.conversations import Chat, chat_of
from actors.text.learned import Row
from actors.training.stored_rows import StoredRows
from jobs.stages.work.data import sampling, storing
from jobs.stages.work.data.demonstrations import (
    StoredDemonstrations,
    marked,
    rows_of,
    sample,
    store_demonstrations,
    stream,
)
from orchestrator.config.config import Config
from orchestrator.data.kinds import DEMONSTRATIONS
from orchestrator.data.records import DemonstrationRecord
from orchestrator.data.streams import Stream
from orchestrator.errors import DataError
from tests.tiny import tiny_tokenizer

NUM_RECORDS = 60


@pytest.fixture(scope="module")
def chat() -> Chat:
    return chat_of(tiny_tokenizer())


def config_of(folder: Path, num_records: int = NUM_RECORDS, **keys: object) -> Config:
    path = folder / "talks.jsonl"
    talks = [{"prompt": f"number {n}?", "response": f"{n} " * (n % 5 + 1)} for n in range(num_records)]
    path.write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    return Config.model_validate({"demonstrations": {"path": str(path), **keys}, "sft": {"max_length": 64}})


def stored(config: Config, chat: Chat, folder: Path) -> tuple[StoredDemonstrations, StoredDemonstrations]:
    return asyncio.run(store_demonstrations(config, chat, stream(config), folder, lambda text: None))


@pytest.mark.parametrize("held_out", [None, 0, 13])
@pytest.mark.parametrize("appended", [1, 7, 1024])
def test_the_stored_rows_are_those_of_the_records(
    chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held_out: int | None, appended: int
) -> None:
    monkeypatch.setattr(storing, "APPENDED_ROWS", appended)
    config = config_of(tmp_path, held_out=held_out)
    found = stored(config, chat, tmp_path)
    assert sum(part.num_records for part in found) == NUM_RECORDS
    assert held_out is None or found[1].num_records == held_out
    for part, is_held_out in zip(found, (False, True), strict=True):
        records = [record for record, mark in marked(config, stream(config)) if mark == is_held_out]
        expected = TokenRows.of_table(rows_of(config, chat, records).table(), learned_only=True)
        rows = StoredRows(part.folder)
        assert rows.lengths == expected.lengths and part.num_records == len(records)
        assert rows.learned_lengths.tolist() == expected.learned_lengths.tolist()


def test_few_records_and_rows_are_held_at_a_time(chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storing, "APPENDED_ROWS", 8)
    held: list[int] = []

    def num_held() -> int:
        gc.collect()
        return sum(type(found) in (DemonstrationRecord, Row) for found in gc.get_objects())

    class Counting(Stream[DemonstrationRecord]):
        def __iter__(self) -> Iterator[DemonstrationRecord]:
            for number, record in enumerate(super().__iter__()):
                if number % 50 == 49:
                    held.append(num_held())
                yield record

    config = config_of(tmp_path, 300, held_out=5)
    records = Counting(DEMONSTRATIONS, str(config.demonstrations.path))
    before = num_held()
    train, _ = asyncio.run(store_demonstrations(config, chat, records, tmp_path, lambda text: None))
    assert train.writer.num_rows == 295
    assert len(held) == 6 and max(held) - before < 30, "5 wait to be held out, 8 rows to be written"


def test_bad_rows_are_told_before_that_none_is_left(chat: Chat, tmp_path: Path) -> None:
    config = config_of(tmp_path, 3, held_out=3)
    with pytest.raises(DataError, match=r"all 3 demonstrations are held out.*demonstrations\.held_out"):
        stored(config, chat, tmp_path)
    with Path(str(config.demonstrations.path)).open("a") as file:
        file.write('{"prompt": 4}\n')
    with pytest.raises(DataError, match="1 bad row"):
        stored(config, chat, tmp_path)
    assert not any((tmp_path / "train").iterdir())


def test_a_sample_stands_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "MEASURED", 10)
    config = config_of(tmp_path, held_out=5)
    found = sample(config)
    assert len(found.some) == 10 and found.num_records == NUM_RECORDS - 5 and found.report.num_records == NUM_RECORDS
    held_out = sample(config, is_held_out=True)
    assert len(held_out.some) == held_out.num_records == 5


def test_a_file_is_sampled_once_unless_it_changes(tmp_path: Path) -> None:
    found = sample(config_of(tmp_path))
    assert sample(Config.model_validate({"demonstrations": {"path": str(tmp_path / "talks.jsonl")}})) is found
    assert sample(config_of(tmp_path, NUM_RECORDS + 1)).report.num_records == NUM_RECORDS + 1
    assert sample(config_of(tmp_path, NUM_RECORDS + 1, held_out=3)).num_records == NUM_RECORDS - 2
