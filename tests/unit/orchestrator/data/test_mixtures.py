"""Several files mixed by weight, in the place of one."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from orchestrator.data.kinds import DEMONSTRATIONS, PROMPTS
from orchestrator.data.mixtures import sources_of
from orchestrator.data.readers import read_all
from orchestrator.errors import DataError


def source(folder: Path, name: str, count: int, *, first: int = 0) -> Path:
    path = folder / name
    rows = [{"id": str(i), "prompt": f"q{i}", "response": "a"} for i in range(first, first + count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def mixture(folder: Path, *lines: str) -> Path:
    path = folder / "mixture.yaml"
    path.write_text("\n".join(["sources:", *(f"  - {line}" for line in lines)]), encoding="utf-8")
    return path


def test_weights_say_how_often_records_are_used(tmp_path: Path) -> None:
    source(tmp_path, "a.jsonl", 400)
    source(tmp_path, "b.jsonl", 400, first=400)
    path = mixture(tmp_path, "{path: a.jsonl, weight: 2.25}", "{path: b.jsonl, weight: 0.5, format: prompt}")
    records, report = read_all(DEMONSTRATIONS, path)
    counts = Counter(record.id for record in records)
    assert len([name for name in counts if name.startswith("a:")]) == 400
    assert {count for name, count in counts.items() if name.startswith("a:")} == {2, 3}
    assert abs(sum(count for name, count in counts.items() if name.startswith("a:")) - 900) < 40
    few = [count for name, count in counts.items() if name.startswith("b:")]
    assert set(few) == {1} and abs(len(few) - 200) < 40
    assert report.left_out == {"records by weight": 400 - len(few)}
    assert (report.format, report.num_rows, report.num_records) == (
        "2.25 x a (prompt) + 0.5 x b (prompt)",
        800,
        len(records),
    )
    assert read_all(DEMONSTRATIONS, path)[0] == records


def test_a_record_of_two_sources_is_used_once_and_ids_stay_distinct(tmp_path: Path) -> None:
    source(tmp_path, "a.jsonl", 3)
    (tmp_path / "more").mkdir()
    source(tmp_path / "more", "b.jsonl", 3, first=2)
    path = mixture(tmp_path, "{path: a.jsonl}", f"{{path: {tmp_path}/more/b.jsonl, name: other}}")
    records, report = read_all(PROMPTS, path)
    assert [record.id for record in records] == ["a:0", "other:2", "a:1", "other:3", "other:4"]
    assert report.left_out == {"already read": 1}
    assert [record.id for record in read_all(PROMPTS, path, limit=2)[0]] == ["a:0", "other:2"]
    assert [record.id for record in read_all(PROMPTS, path, limit=1)[0]] == ["a:0"]


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        (["{path: a.jsonl, wait: 2}"], "sources.0.wait: Extra inputs are not permitted"),
        (["{path: a.jsonl, weight: 0}"], "sources.0.weight: Input should be greater than 0"),
        (["{weight: 1}"], "sources.0.path: Field required"),
        (["{path: a.jsonl}", "{path: a.jsonl}"], "several sources are called 'a'; give each a name of its own"),
        (["{path: a.jsonl, weight: 2}"], "weight=2 of 'a' repeats prompts, whose ids are distinct"),
        (["{path: a.jsonl, format: csv}"], "prompts.format='csv' is unknown"),
        (["{path: none.jsonl}"], "none.jsonl does not exist"),
        (["{path: bad.jsonl}"], "bad.jsonl: 1 bad row"),
        (["{path: blank.jsonl}"], "0 records from 0 rows"),
        (["{"], "is not YAML"),
        ([], "sources: Input should be a valid tuple"),
    ],
)
def test_faults_of_a_mixture_are_named(tmp_path: Path, lines: list[str], fault: str) -> None:
    source(tmp_path, "a.jsonl", 2)
    (tmp_path / "bad.jsonl").write_text('{"prompt": 1}\n')
    (tmp_path / "blank.jsonl").write_text("\n")
    with pytest.raises(DataError) as caught:
        read_all(PROMPTS, mixture(tmp_path, *lines))
    assert fault in str(caught.value)


def test_paths_start_at_the_folder_of_the_mixture_and_addresses_stay(tmp_path: Path) -> None:
    path = mixture(tmp_path, "{path: a.jsonl}", "{path: 's3://bucket/b.jsonl'}", "{path: 'datasets:x:train'}")
    assert [str(found.path) for found in sources_of(path)] == [
        f"{tmp_path}/a.jsonl",
        "s3:/bucket/b.jsonl",
        "datasets:x:train",
    ]
