"""Stage `people` with people.source=log: what is judged are the samples that a stage `rl` learned from."""

from __future__ import annotations

import asyncio
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.check.people import check_people
from jobs.pipeline import run_stages
from jobs.prepare import without_prompts
from jobs.services.labelling.store import Store
from jobs.stages.stage import Found
from jobs.stages.work import people as stage
from jobs.stages.work import score
from orchestrator.run.folder import open_run
from orchestrator.run.lineage import read_lineage
from orchestrator.run.storage import write_sealed
from orchestrator.schema import STATES
from tests.deadlines import scaled
from tests.unit.jobs.stages.work.test_people import judge, reached, rows
from tests.unit.jobs.stages.work.waiting import config_of, samples


def logged(place: Path, step: int, **columns: Any) -> None:
    """A committed step of an experience log, in two files."""
    folder = place / "log" / f"step-{step:06d}"
    for shard in range(2):
        file = folder / f"shard-{shard:04d}.parquet"
        samples(file, first=10 * step + 2 * shard, num_prompts=2)
        table = pq.read_table(file)
        pq.write_table(table.append_column("reward", pa.array([0.5] * table.num_rows, pa.float32())), file)
    shards = [{"file": file.name} for file in sorted(folder.glob("*.parquet"))]
    write_sealed(folder / "manifest.json", {"shards": shards})


@pytest.mark.parametrize(
    ("name", "people"),
    [("rl", {}), ("rl-2", {"items": 3}), ("rl", {"items": 2, "choose": "active"})],
)
async def test_samples_of_the_last_step_of_a_log_are_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, people: Any
) -> None:
    stages: list[Any] = ["reward_model", {"name": name, "kind": "rl"}, "people"]
    sections = {"stages": stages, "rl": {"steps": 2}, "reward_model": {"heads": 2}, "preferences": {"path": "x"}}
    config = config_of(tmp_path, source="log", overlap_share=0.0, sections=sections, **people)
    run = tmp_path / "demo"
    place = run if name == "rl" else run / "stages" / name
    for step in (0, 1):
        logged(place, step)

    async def measured(job: Any, model: Path, table: pa.Table) -> pa.Table:
        found = [
            {
                "row": row["row"],
                "prompt_id": row["prompt_id"],
                "heads": [float(row["sample_index"]), 0.0],
                "state": [1.0],
            }
            for row in table.to_pylist()
        ]
        return pa.Table.from_pylist(found, STATES)

    monkeypatch.setattr(stage, "POLL_S", 0.05)
    monkeypatch.setattr(score, "measure_states", measured)
    opened = open_run(config)
    task = asyncio.create_task(
        run_stages(config, opened, without_prompts(None), lambda line: None, only="people")  # type: ignore[arg-type]
    )
    await reached(lambda: task.done() or (run / "people.json").exists())
    with closing(Store(str(run / "labels.db"))) as store:
        judge(store, "ann", people.get("items", 4))
    await asyncio.wait_for(task, scaled(20))
    found = rows(run / "judgements.jsonl")
    prompts = {row["prompt_id"] for row in found}
    assert prompts <= {"p10", "p11", "p12", "p13"} and len(prompts) == people.get("items", 4)
    assert {(row["source"]["run"], row["source"]["stage"], row["source"]["step"]) for row in found} == {
        ("demo", "" if name == "rl" else name, 1)
    }
    assert {reply["source"]["reward"] for row in found for reply in row["replies"]} == {0.5}
    manifest = str((place / "log" / "step-000001" / "manifest.json").relative_to(run))
    made = next(entry for entry in read_lineage(run) if entry.path == "people.jsonl")
    assert made.reads["experience"] == manifest


def test_a_check_says_how_many_prompts_of_a_step_people_are_asked_about(tmp_path: Path) -> None:
    sections = {"stages": ["rl", "people"], "rl": {"prompts_per_step": 20}}
    prepared: Any = object()
    for items, numbers in ((None, "about 24 judgements of up to 20"), (10, "about 12 judgements of up to 10")):
        config = config_of(tmp_path, source="log", sections=sections, items=items)
        said = check_people(config, Found(None, prepared, None))
        assert said is not None and numbers in said
