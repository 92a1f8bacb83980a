"""Damaged data files are read correctly or raise an error that names the file and the row."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from orchestrator.data.kinds import KINDS as KINDS_OF_DATA
from orchestrator.data.readers import read_all
from orchestrator.data.records import ROLES, Message, message_dicts, reply_json
from orchestrator.data.streams import Stream
from tests.chaos.fuzzing import Damages, example, fuzz
from tests.chaos.mutations import PLACES, damage, damages, with_value
from tests.unit.orchestrator.data.test_bad_rows import GOOD

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "?"}]
HH = "\n\nHuman: Hi {}\n\nAssistant:"
PROMPTS: dict[str, list[dict[str, Any]]] = {
    "prompt": [{"id": f"p{i}", "prompt": f"Why {i}?", "answer": i, "tests": [{"in": "ä"}]} for i in range(4)],
    "messages": [{"messages": [*TURNS[:2], {"role": "user", "content": f"Why {i}?"}], "score": 0.5} for i in range(4)],
    "hh-rlhf": [{"chosen": f"{HH.format(i)} yes", "rejected": f"{HH.format(i)} no"} for i in range(4)],
    "alpaca": [{"instruction": f"Add {i}", "input": "1", "output": "2"} for i in range(4)],
    "question": [{"question": f"Why {i}?", "answer": "so"} for i in range(4)],
}
RANKINGS: dict[str, list[dict[str, Any]]] = {
    "ranking": [{"id": f"p{i}", "prompt": f"Why {i}?", "replies": ["so", "no", "oh"]} for i in range(4)],
    "pairwise": [{"prompt": f"Why {i}?", "chosen": "so", "rejected": ["no", "oh"]} for i in range(4)],
    "hh-rlhf": PROMPTS["hh-rlhf"],
}


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue())


def _lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _array(rows: list[Any]) -> bytes:
    return json.dumps(rows, indent=1).encode()


def _zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, "zstd", asbytes=True))


# Parquet is decoded in a separate process, which takes a third of a second.
KINDS = st.tuples(
    st.sampled_from((_lines, _lines, _array, _array, _parquet)),
    st.sampled_from((bytes, bytes, gzip.compress, _zstd)),
)


def check_messages(messages: tuple[Message, ...]) -> None:
    assert messages and any(message.role != "assistant" for message in messages)
    assert all(message.role in ROLES and message.content.encode() is not None for message in messages)
    json.dumps(message_dicts(messages), ensure_ascii=False, allow_nan=False).encode()


def read_damaged(test: str, folder: Path, data: bytes, rows: dict[str, list[dict[str, Any]]]) -> None:
    path = folder / "data" / "file"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    with example(test, path.parent, names=path):
        if rows is PROMPTS:
            prompts, report = read_all(KINDS_OF_DATA["prompts"], path)
            assert report.num_records == len(prompts) > 0
            for prompt in prompts:
                check_messages(prompt.messages)
                assert prompt.id.encode() and prompt.text.encode()
                json.dumps(prompt.meta, ensure_ascii=False, allow_nan=False).encode()
        else:
            rankings, report = read_all(KINDS_OF_DATA["preferences"], path)
            assert report.num_records == len(rankings) > 0
            for ranking in rankings:
                check_messages(ranking.messages)
                assert ranking.id.encode() and len(set(ranking.replies)) == len(ranking.replies) >= 2
                json.dumps([reply_json(reply) for reply in ranking.replies], ensure_ascii=False).encode()


@fuzz(1800, format=st.sampled_from(sorted(PROMPTS)), kind=KINDS, mutations=damages())
def test_prompt_files(folder: Path, format: str, kind: Any, mutations: Damages) -> None:
    encode, pack = kind
    read_damaged("test_prompt_files", folder, damage(pack(encode(PROMPTS[format])), mutations), PROMPTS)


@fuzz(1200, format=st.sampled_from(sorted(RANKINGS)), kind=KINDS, mutations=damages())
def test_preference_files(folder: Path, format: str, kind: Any, mutations: Damages) -> None:
    encode, pack = kind
    read_damaged("test_preference_files", folder, damage(pack(encode(RANKINGS[format])), mutations), RANKINGS)


@fuzz(1500, rows=st.sampled_from((PROMPTS, RANKINGS)), number=st.integers(0, 4), place=PLACES, array=st.booleans())
def test_rows_with_other_values(
    folder: Path, rows: dict[str, list[dict[str, Any]]], number: int, place: tuple[int, int], array: bool
) -> None:
    chosen = list(rows.values())[number % len(rows)]
    text = with_value(chosen if array else chosen[1], *place)
    data = text.encode("utf-8") if array else _lines(chosen[:1]) + text.encode("utf-8") + b"\n" + _lines(chosen[2:])
    read_damaged("test_rows_with_other_values", folder, data, rows)


@fuzz(
    600,
    place=st.tuples(st.sampled_from([(kind, name) for kind, rows in GOOD.items() for name in rows]), PLACES),
)
def test_rows_of_every_format_with_other_values(folder: Path, place: tuple[tuple[str, str], tuple[int, int]]) -> None:
    (kind, name), (where, what) = place
    path = folder / "data" / "file"
    path.parent.mkdir(exist_ok=True)
    path.write_text(with_value([GOOD[kind][name]] * 2, where, what), encoding="utf-8")
    with example("test_rows_of_every_format_with_other_values", path.parent, names=path):
        stream = Stream(KINDS_OF_DATA[kind], path, name)
        records = list(stream)
        assert stream.report().num_records == len(records) > 0


COLUMNS = st.sampled_from(
    [
        pa.array([1, None, 3]),
        pa.array(["a", None, "b"]),
        pa.array([float("nan"), float("inf"), 1.0]),
        pa.array([b"\xff\xfe", b"a", None]),
        pa.array([b"\xff\xfe", b"a", b"\xc3"]).view(pa.string()),
        pa.array([["a", "b"], [], None]),
        pa.array([[b"\xff"], [], None]),
        pa.array([[{"role": "user", "content": "hi"}], [], [{"role": None, "content": None}]]),
        pa.array([2**62, -(2**62), 0]).cast(pa.timestamp("us")),
        pa.array([2**62, -(2**62), 0]).cast(pa.timestamp("us", tz="UTC")),
        pa.array([2**62, -(2**62), 0]).cast(pa.duration("ns")),
        pa.array([2**30, -(2**30), 0], pa.int32()).cast(pa.date32()),
        pa.array([[("k", 1)], [], None], pa.map_(pa.string(), pa.int32())),
        pa.array(["a", "b", "a"]).dictionary_encode(),
        pa.nulls(3),
        pa.array([{"a": {"b": [1]}}, None, {"a": None}]),
    ]
)
NAMES = st.sampled_from(sorted({name for row in (*PROMPTS.values(), *RANKINGS.values()) for name in row[0]}))


@fuzz(
    250, columns=st.lists(st.tuples(NAMES, COLUMNS), min_size=1, max_size=3), rows=st.sampled_from((PROMPTS, RANKINGS))
)
def test_parquet_of_other_schemas(folder: Path, columns: list[Any], rows: dict[str, list[dict[str, Any]]]) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays([array for _, array in columns], names=[name for name, _ in columns]), sink)
    read_damaged("test_parquet_of_other_schemas", folder, bytes(sink.getvalue()), rows)
