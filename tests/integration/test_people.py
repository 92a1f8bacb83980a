"""People in the loop: a run samples, waits for people without an actor, and trains a reward model on what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private import state
from ray.util import placement_group_table

from orchestrator.run.lineage import read_lineage
from orchestrator.run.storage import read_json
from tests.deadlines import scaled
from tests.integration.pipelines import finish, start, write_config
from tests.people import labellers, until
from tests.tiny import tiny_llama
from tests.unit.jobs.services.labelling.running import free_port


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("people")
    tiny_llama(found / "base")
    (found / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Say {n}."}) + "\n" for n in range(60)))
    return found


def config(folder: Path, port: int) -> Path:
    tree: dict[str, Any] = {
        "stages": ["sample", "people", "reward_model"],
        "prompts": {"path": str(folder / "prompts.jsonl"), "max_prompt_tokens": 64, "reward_model_fraction": 0.7},
        "rollout": {"engine": "hf", "max_new_tokens": 16, "cpus_per_replica": 1, "samples_per_shard": 24},
        "sample": {"prompts": 24, "samples_per_prompt": 4},
        "people": {"address": f"127.0.0.1:{port}", "overlap": 2, "overlap_share": 0.25},
        "reward_model": {"records_per_batch": 4, "max_length": 128, "cpus_per_rank": 1},
    }
    return write_config(folder, tree)


def held() -> list[Any]:
    """What lives in the cluster or holds a part of it: actors, placement groups, resources. Not the coordinator of
    requests that Ray Train leaves to all jobs of a cluster after its first training; it holds nothing."""
    living = [
        actor
        for actor in state.actors().values()
        if actor["State"] != "DEAD" and actor["ActorClassName"] != "_AutoscalingCoordinatorActor"
    ]
    groups = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
    free, all_there = ray.available_resources(), ray.cluster_resources()
    return [*living, *groups, *(name for name in ("CPU", "GPU") if free.get(name) != all_there.get(name))]


def test_a_run_waits_for_people_without_actors_and_learns_what_they_judged(cluster: str, folder: Path) -> None:
    port, run = free_port(), folder / "loop"
    process = start(config(folder, port), cluster, "loop")
    try:
        until(lambda: (run / "people.json").exists() or process.poll() is not None, within_s=scaled(120), what="a wait")
        until(lambda: not held(), within_s=scaled(10), what="the end of all actors")
        with labellers(run / "labels.db", f"http://127.0.0.1:{port}", ("ann", "bob"), noise_std=0.01):
            output = finish(process)
    finally:
        process.kill()
    made = {entry.path: entry for entry in read_lineage(run)}
    result = made["people.jsonl"].result
    assert 24 <= result["judgements"] <= 30 and result["people"] == 2 and "asks people for" in output
    trained = read_json(run / "reward_model.json")
    rankings = [json.loads(line) for line in (run / "people.jsonl").read_text().splitlines()]
    assert trained["num_records"] + trained["num_held_out"] == len(rankings) == result["rankings"]
    assert made["reward-model"].reads == {"preferences": "people.jsonl"}
