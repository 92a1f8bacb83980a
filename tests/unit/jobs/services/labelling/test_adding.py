"""Items from files, from samples of a run and from its log."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sqlalchemy import select

from jobs.services.labelling.items.adding import MAX_REPLIES, Wanted, add
from jobs.services.labelling.items.sources import from_file, from_run
from jobs.services.labelling.store import Store
from jobs.services.labelling.tables import items
from orchestrator.errors import ConfigError, DataError
from orchestrator.run.storage import write_sealed
from orchestrator.schema import ROLLOUT
from tests.unit.jobs.services.labelling.filled import candidate


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "labels.db"))


def added(store: Store) -> list[Any]:
    with store.reading() as connection:
        return list(connection.execute(select(items).order_by(items.c.id)).all())


def samples(path: Path, *, num_prompts: int = 2) -> None:
    """Three samples per prompt, two of which are equal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = json.dumps({"messages": [{"role": "user", "content": "Why?"}], "answer": "x"})
    table = [
        {
            "row": 3 * prompt + sample,
            "prompt_id": f"p{prompt}",
            "sample_index": sample,
            "seed": 7 + sample,
            "prompt_text": "Why?",
            "response_text": f"because {prompt} {min(sample, 1)}",
            "finish_reason": "stop",
            "prompt_tokens": [1],
            "response_tokens": [2],
            "learn": [True],
            "engine_logprobs": [-0.5],
            "version": 4,
            "meta": meta,
        }
        for prompt in range(num_prompts)
        for sample in range(3)
    ]
    pq.write_table(pa.Table.from_pylist(table, ROLLOUT), path)


def test_samples_of_a_stage_keep_where_they_come_from(tmp_path: Path, store: Store) -> None:
    run = tmp_path / "my-run"
    samples(run / "stages" / "again" / "samples.parquet")
    (run / "config.yaml").write_text(
        "rollout: {temperature: 1.0, top_p: 0.9, replicas: 2}\n"
        "stages:\n- {name: again, kind: sample, set: {rollout.temperature: 0.5}}\n"
    )
    assert add(store, from_run(run, stage=None, step=None), Wanted("rank"), batch="x").num_new == 2
    item = added(store)[1]
    assert item.source == {
        "run": "my-run",
        "stage": "again",
        "step": None,
        "sampling": {"temperature": 0.5, "top_p": 0.9},
    }
    assert item.prompt_id == "p1" and item.messages == [{"role": "user", "content": "Why?"}]
    assert item.replies == [
        {
            "reply": f"because 1 {sample}",
            "source": {"sample_index": sample, "seed": 7 + sample, "version": 4, "finish_reason": "stop"},
        }
        for sample in range(2)
    ]


def test_samples_of_a_step_come_from_the_files_of_its_manifest(tmp_path: Path, store: Store) -> None:
    run = tmp_path / "my-run"
    samples(run / "log" / "step-000007" / "shard-0000.parquet")
    samples(run / "log" / "step-000007" / "shard-0001-attempt-002.parquet", num_prompts=9)
    with pytest.raises(DataError, match="no step 7"):
        list(from_run(run, stage=None, step=7))
    write_sealed(run / "log" / "step-000007" / "manifest.json", {"shards": [{"file": "shard-0000.parquet"}]})
    assert add(store, from_run(run, stage=None, step=7), Wanted("rank"), batch="x").num_new == 2
    assert added(store)[0].source == {"run": "my-run", "stage": "", "step": 7, "sampling": {}}
    with pytest.raises(DataError, match=r"holds no samples\.parquet"):
        list(from_run(run, stage=None, step=None))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "is damaged: it is not valid JSON"),
        ('{"shards": 7}', "is damaged: its entries do not form a manifest"),
        ('{"shards": [{"file": 7}]}', "is damaged: its entries do not form a manifest"),
        ('{"shards": [{"file": "../other.parquet"}]}', "which is not inside it"),
        ('{"shards": [], "sha256": "0"}', "is damaged: it does not match its own checksum"),
    ],
)
def test_a_damaged_manifest_is_named_with_the_way_out(tmp_path: Path, content: str, problem: str) -> None:
    manifest = tmp_path / "log" / "step-000007" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(content)
    with pytest.raises(DataError, match=problem) as caught:
        list(from_run(tmp_path, stage=None, step=7))
    assert str(manifest.parent) in str(caught.value) and "Restore it" in str(caught.value)


def test_samples_of_the_log_bring_their_rewards(tmp_path: Path, store: Store) -> None:
    file = tmp_path / "log" / "step-000000" / "shard-0000.parquet"
    samples(file, num_prompts=1)
    table = pq.read_table(file)
    pq.write_table(table.append_column("reward", pa.array([0.5, -1.0, 2.0], pa.float32())), file)
    write_sealed(file.with_name("manifest.json"), {"shards": [{"file": file.name}]})
    add(store, from_run(tmp_path, stage=None, step=0), Wanted("rank"), batch="x")
    assert [each["source"]["reward"] for each in added(store)[0].replies] == [0.5, -1.0]
    with pytest.raises(DataError, match=r"shard-0000\.parquet: samples can't be read"):
        file.write_bytes(b"PAR1")
        list(from_run(tmp_path, stage=None, step=0))


def test_the_same_source_adds_nothing_twice(store: Store) -> None:
    found = [candidate(number) for number in range(1200)]
    first = add(store, found, Wanted("rank"), batch="x")
    second = add(store, [*found, candidate(5000)], Wanted("rank"), batch="y")
    assert (first.num_new, first.num_known) == (1200, 0)
    assert (second.num_new, second.num_known) == (1, 1200)
    assert len(second.overlaps) == 1201 and set(second.overlaps.values()) == {1, 3}
    assert all(first.overlaps[item.key] == item.overlap for item in added(store) if item.key in first.overlaps)
    shared = sum(item.overlap == 3 for item in added(store))
    assert 60 < shared < 180  # a tenth
    assert add(store, found, Wanted("compare"), batch="x").num_new == 1200


def test_kinds_take_the_replies_that_they_need(store: Store) -> None:
    one, many = candidate(1, num_replies=1), candidate(2, num_replies=12)
    assert add(store, [one], Wanted("rank"), batch="x").num_unfit == 1
    add(store, [many], Wanted("rank"), batch="x")
    add(store, [many], Wanted("compare"), batch="x")
    add(store, [many], Wanted("rate", limit=3), batch="x")
    add(store, [many], Wanted("write"), batch="x")
    assert [(item.kind, len(item.replies)) for item in added(store)] == [
        ("rank", MAX_REPLIES), ("compare", 2), ("rate", 1), ("rate", 1), ("rate", 1), ("write", 0),
    ]  # fmt: skip


def test_files_of_any_kind_can_be_judged(tmp_path: Path, store: Store) -> None:
    rows = {
        "pairs": {"prompt": "a", "chosen": "b", "rejected": "c"},
        "scores": {"user_input": "d", "completion": "e", "score": 1},
        "chats": {"messages": [{"role": "user", "content": "f"}, {"role": "assistant", "content": "g"}]},
        "prompts": {"prompt": "h"},
    }
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
        add(store, from_file(tmp_path / f"{name}.jsonl", "auto", None), Wanted("write"), batch=name)
    assert [item.messages[-1]["content"] for item in added(store)] == ["a", "d", "f", "h"]
    add(store, from_file(tmp_path / "chats.jsonl", "auto", None), Wanted("rate"), batch="x")
    assert added(store)[-1].replies == [{"reply": {"role": "assistant", "content": "g"}, "source": {}}]


def test_gold_is_the_order_of_the_file(tmp_path: Path, store: Store) -> None:
    file = tmp_path / "gold.jsonl"
    file.write_text(json.dumps({"prompt": "a", "replies": ["x", "y", "z"], "scores": [3, 1, 1]}) + "\n")
    add(store, from_file(file, "auto", None), Wanted("rank", gold=True), batch="x")
    add(store, from_file(file, "auto", None), Wanted("compare", gold=True), batch="x")
    assert [item.gold for item in added(store)] == [
        {"kind": "rank", "ranks": [1, 2, 2]},
        {"kind": "compare", "preference": -1},
    ]
    turned = replace(candidate(8), scores=[-2.0, 0.0, -1.0, -0.0])
    tied = replace(candidate(9), scores=[1.0, 3.0, 2.0, 1.0])
    for kind in ("rank", "compare"):
        add(store, [turned, tied], Wanted(kind, gold=True), batch="y")
    assert [item.gold for item in added(store)[2:]] == [
        {"kind": "rank", "ranks": [3, 1, 2, 1]},
        {"kind": "rank", "ranks": [3, 1, 2, 3]},
        {"kind": "compare", "preference": 1},
        {"kind": "compare", "preference": 0},
    ]
    assert add(store, [candidate(7)], Wanted("rank", gold=True), batch="x").num_unfit == 1  # no known order
    with pytest.raises(ConfigError, match="rank or compare, not write"):
        add(store, [candidate(7)], Wanted("write", gold=True), batch="x")
    with pytest.raises(ConfigError, match="rank, compare, rate, write"):
        add(store, [candidate(7)], Wanted("guess"), batch="x")
