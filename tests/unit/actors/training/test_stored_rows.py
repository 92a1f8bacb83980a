"""Rows on disk give what the same rows give in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from actors.learning.packing import TokenRows
from actors.training.stored_rows import StoredRows, writing_rows
from orchestrator.errors import StorageError

CPU = torch.device("cpu")
NUM_ROWS = 23


def table() -> pa.Table:
    draw = np.random.default_rng(3)
    prompts = [draw.integers(1, 99, size=draw.integers(0, 6)).tolist() for _ in range(NUM_ROWS)]
    responses = [draw.integers(1, 99, size=draw.integers(1, 9)).tolist() for _ in range(NUM_ROWS)]
    learn = [[True, *(draw.random(len(response) - 1) < 0.6)] for response in responses]
    tokens, marks = pa.list_(pa.int32()), pa.list_(pa.bool_())
    return pa.table(
        {
            "prompt_tokens": pa.array(prompts, tokens),
            "response_tokens": pa.array(responses, tokens),
            "learn": pa.array(learn, marks),
        }
    )


def write(folder: Path, rows: pa.Table, *ends: int) -> str:
    with writing_rows(folder) as writer:
        for start, end in zip((0, *ends), (*ends, rows.num_rows), strict=True):
            writer.append(rows.slice(start, end - start))
    assert writer.num_rows == rows.num_rows
    assert writer.num_learned == sum(map(sum, rows["learn"].to_pylist()))
    return writer.digest


def test_stored_rows_are_those_of_the_table(tmp_path: Path) -> None:
    write(tmp_path, table(), 0, 5, 6, 20)
    stored, expected = StoredRows(tmp_path), TokenRows.of_table(table(), learned_only=True)
    assert stored.num_rows == NUM_ROWS and stored.lengths == expected.lengths
    assert stored.learned_lengths.tolist() == expected.learned_lengths.tolist()
    for chosen in ([3], [22, 0, 7], list(range(NUM_ROWS)), []):
        one, other = stored.pack(chosen, CPU), expected.pack(chosen, CPU)
        assert one.rows == other.rows
        for name in ("input_ids_BT", "state_index_N", "targets_N", "last_index_B", "lengths_B"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_the_digest_follows_the_rows_and_not_how_they_were_appended(tmp_path: Path) -> None:
    whole = write(tmp_path, table())
    assert write(tmp_path, table(), 4, 9) == whole
    assert write(tmp_path, table().slice(1)) != whole
    marks = [[True] * len(row) for row in table()["learn"].to_pylist()]
    others = table().set_column(2, "learn", pa.array(marks, pa.list_(pa.bool_())))
    assert write(tmp_path, others) != whole


def test_no_rows_are_rows_too(tmp_path: Path) -> None:
    write(tmp_path, table().slice(0, 0))
    assert StoredRows(tmp_path).num_rows == 0 and StoredRows(tmp_path).lengths == []


def test_a_reader_keeps_the_rows_that_it_opened(tmp_path: Path) -> None:
    write(tmp_path, table())
    opened, before = StoredRows(tmp_path), TokenRows.of_table(table(), learned_only=True)
    write(tmp_path, table().slice(5))
    assert torch.equal(opened.pack([1], CPU).input_ids_BT, before.pack([1], CPU).input_ids_BT)


def test_an_unfinished_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), writing_rows(tmp_path) as writer:
        writer.append(table())
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with pytest.raises(StorageError, match="ends can't be read"):
        StoredRows(tmp_path)
