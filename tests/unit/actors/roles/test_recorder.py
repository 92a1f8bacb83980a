"""The recorder on a real object store and disk: it returns what it writes, and reports damage."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import ray

from actors.roles.recorder import RecorderWorker
from orchestrator import schema
from orchestrator.algorithms.experience import ExperienceSettings
from orchestrator.algorithms.ppo import Ppo
from orchestrator.algorithms.summary import merge_metrics
from orchestrator.config.rewards import RuleLimits
from orchestrator.errors import RewardError, StorageError
from orchestrator.evaluation import EVALUATION
from orchestrator.run.best import BestByEvaluation
from orchestrator.run.storage import sha256
from tests.unit.actors.rewards.rollouts import rollout_table

TOKENS = [[4, 0], [5, 6, 0], [0]]
RESPONSES = ["I love it", "I hate it", "ok"]  # the target of length_target is 50 words


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    folder = Path("/tmp") / f"rc{os.getpid()}"  # Ray's socket paths must be short
    ray.init(
        "local",  # never the cluster of another test or of another user of the machine
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100_000_000,
        _temp_dir=str(folder),
    )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


SETTINGS = ExperienceSettings(Ppo(), samples_per_prompt=1)


@pytest.fixture
def recorder(cluster: None) -> RecorderWorker:
    return RecorderWorker(SETTINGS, "run-1", "actors.rewards.rules:length_target")


def rollout() -> pa.Table:
    table = rollout_table(RESPONSES, response_tokens=TOKENS)
    logprobs = pa.array([[-1.0] * len(tokens) for tokens in TOKENS], pa.list_(pa.float32()))
    return table.set_column(table.schema.get_field_index("engine_logprobs"), "engine_logprobs", logprobs)


def floats(value: float, rows: list[int]) -> pa.Array:
    return pa.array([[value] * len(TOKENS[row - 10]) for row in rows], pa.list_(pa.float32()))


def logprobs(value: float, rows: list[int]) -> ray.ObjectRef:
    columns = {"row": rows, "logprobs": floats(value, rows)}
    return ray.put(pa.table(columns, schema=schema.LOGPROBS))


def rewards(scores: list[float | None], cut: tuple[int, ...] = (0, 0, 0)) -> ray.ObjectRef:
    columns = {
        "row": [10, 11, 12],
        "reward": scores,
        "reward_parts": [[("style", 0.5)]] * 3,
        "reward_error": [None if score is not None else "grader died" for score in scores],
        "tokens_cut": cut,
    }
    return ray.put(pa.table(columns, schema=schema.REWARDS))


def scores(reward: list[float | None], cut: tuple[int, ...] = (0, 0, 0)) -> dict[str, list[Any]]:
    """The reference's result has two parts, as from two ranks."""
    rows = [10, 11, 12]
    values = {"row": rows, "values": floats(0.25, rows), "bootstrap_value": [0.0] * 3}
    return {
        "logprobs": [logprobs(-1.0, rows)],
        "ref_logprobs": [logprobs(-1.5, [11]), logprobs(-1.5, [10, 12])],
        "values": [ray.put(pa.table(values, schema=schema.VALUES))],
        "rewards": [rewards(reward, cut)],
    }


def test_what_is_written_is_what_is_handed_on(recorder: RecorderWorker, tmp_path: Path) -> None:
    file = tmp_path / "shard-0000.parquet"
    table, record = recorder.record(rollout(), scores([1.0, 2.0, 3.0]), kl_coefficient=0.1, file=str(file))
    assert table.schema == schema.EXPERIENCE
    loaded, _ = recorder.load(record, file=str(file))
    assert loaded.equals(table)
    assert (record.file, record.num_samples, record.num_dropped) == (file.name, 3, 0)
    assert (record.num_bytes, record.num_response_tokens) == (file.stat().st_size, 6)
    assert os.listdir(tmp_path) == [file.name]
    metadata = pq.read_metadata(file)
    assert metadata.metadata[b"run_id"] == b"run-1"
    assert metadata.row_group(0).column(0).compression == "ZSTD"


def test_samples_whose_reward_failed_are_left_out_and_listed(recorder: RecorderWorker, tmp_path: Path) -> None:
    file = tmp_path / "shard-0007.parquet"
    table, record = recorder.record(rollout(), scores([1.0, None, 3.0]), kl_coefficient=0.1, file=str(file))
    assert table["row"].to_pylist() == [10, 12]
    assert (record.num_samples, record.num_dropped) == (2, 1)
    listed = (tmp_path / "failed-shard-0007.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in listed] == [{"row": 11, "reward_error": "grader died"}]


def test_prompts_that_are_left_out_are_counted(recorder: RecorderWorker, tmp_path: Path) -> None:
    file = tmp_path / "shard-0000.parquet"
    given = scores([1.0, 2.0, 3.0])
    groups = recorder.groups(rollout(), given["rewards"])
    assert [(group.number, group.mean_reward, group.is_mixed) for group in groups] == [
        (10, 1.0, False),
        (11, 2.0, False),
        (12, 3.0, False),
    ]
    table, record = recorder.record(rollout(), given, kl_coefficient=0.1, file=str(file), groups=(10, 12))
    assert (table["row"].to_pylist(), record.num_samples, record.num_dropped) == ([10, 12], 2, 0)
    metrics = merge_metrics([record])
    assert (metrics["filter/prompts_sampled"], metrics["filter/prompts_kept"]) == (3, 2)
    some, other = scores([1.0, None, 3.0]), str(tmp_path / "shard-2.parquet")
    _, failed = recorder.record(rollout(), some, kl_coefficient=0.1, file=other, groups=(10,))
    assert (failed.num_samples, failed.num_dropped) == (1, 1)
    assert merge_metrics([failed])["reward/failed_fraction"] == pytest.approx(1 / 3)
    _, empty = recorder.record(rollout(), given, kl_coefficient=0.1, file=str(tmp_path / "shard-1.parquet"), groups=())
    assert merge_metrics([record, empty])["filter/prompts_sampled"] == 6


def test_a_shard_of_nothing_but_failures_is_recorded_empty(recorder: RecorderWorker, tmp_path: Path) -> None:
    file = tmp_path / "shard-0000.parquet"
    table, record = recorder.record(rollout(), scores([None] * 3), kl_coefficient=0.1, file=str(file))
    assert (table.num_rows, record.num_samples, record.num_dropped) == (0, 0, 3)
    assert recorder.load(record, file=str(file))[0].schema == schema.EXPERIENCE


def test_a_shard_that_was_altered_or_is_missing_is_named(recorder: RecorderWorker, tmp_path: Path) -> None:
    file = tmp_path / "shard-0003.parquet"
    _, record = recorder.record(rollout(), scores([1.0, 2.0, 3.0]), kl_coefficient=0.1, file=str(file))
    whole = file.read_bytes()
    middle = len(whole) // 2
    file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    with pytest.raises(StorageError, match=r"shard-0003\.parquet of the experience log was altered"):
        recorder.load(record, file=str(file))
    file.write_bytes(whole)
    with pytest.raises(StorageError, match="altered"):
        recorder.load(replace(record, sha256="00"), file=str(file))
    file.unlink()
    with pytest.raises(StorageError, match=r"shard-0003\.parquet of the experience log is missing"):
        recorder.load(record, file=str(file))


def test_a_shard_from_before_the_column_learn_is_read_as_all_learned(recorder: RecorderWorker, tmp_path: Path) -> None:
    file = tmp_path / "shard-0000.parquet"
    table, record = recorder.record(rollout(), scores([1.0, 2.0, 3.0]), kl_coefficient=0.1, file=str(file))
    pq.write_table(pq.read_table(file).drop_columns(["learn"]), file, compression="zstd")
    loaded, _ = recorder.load(replace(record, sha256=sha256(file)), file=str(file))
    assert loaded.equals(table)


def test_held_out_lengths_and_kl_go_by_learned_tokens(recorder: RecorderWorker, tmp_path: Path) -> None:
    table = rollout()
    index = table.schema.get_field_index("learn")
    marks = pa.array([[True, True], [True, False, False], [True]], pa.list_(pa.bool_()))
    rows = [10, 11, 12]
    shard = {
        "rollout": [ray.put(table.set_column(index, table.schema.field(index), marks))],
        "policy": [logprobs(-1.0, rows)],
        "reference": [logprobs(-1.5, rows)],
        "reward": [rewards([1.0, 2.0, 3.0])],
    }
    recorder.evaluate([shard], file=str(tmp_path / "step-000000.parquet"))
    found = pq.read_table(tmp_path / "step-000000.parquet")
    assert found["length"].to_pylist() == [2, 1, 1]
    assert found["kl"].to_pylist() == pytest.approx([1.0, 0.5, 0.5])


def test_held_out_samples_are_joined_with_the_gold_score(recorder: RecorderWorker, tmp_path: Path) -> None:
    file = tmp_path / "step-000000.parquet"
    rows = [10, 11, 12]
    shard = {
        "rollout": [ray.put(rollout())],
        "policy": [logprobs(-1.0, [12, 10]), logprobs(-1.0, [11])],
        "reference": [logprobs(-1.5, rows)],
        "reward": [rewards([1.0, None, 3.0])],
    }
    metrics = recorder.evaluate([shard], file=str(file))
    table = pq.read_table(file)
    assert table.schema.equals(EVALUATION)
    assert table["response_text"].to_pylist() == RESPONSES
    assert table["kl"].to_pylist() == pytest.approx([1.0, 1.5, 0.5])
    assert table["reward"].to_pylist() == [1.0, None, 3.0]
    assert table["gold"].to_pylist() == pytest.approx([-47 / 50, -47 / 50, -49 / 50])
    assert metrics["evaluation/gold_mean"] == pytest.approx(-143 / 150)
    assert metrics["evaluation/reward_mean"] == 2.0
    assert metrics["evaluation/kl_per_response"] == pytest.approx(1.0)


HOSTILE = "tests.unit.actors.rewards.hostile_rules:act"


def held_out(responses: list[str], reward: list[float | None]) -> dict[str, list[Any]]:
    """A shard whose prompt ids are its responses."""
    rows = [10, 11, 12]
    table = rollout().set_column(5, "response_text", pa.array(responses))
    table = table.set_column(1, "prompt_id", pa.array([f"prompt of {text}" for text in responses]))
    assert table.schema.names == schema.ROLLOUT.names
    return {
        "rollout": [ray.put(table)],
        "policy": [logprobs(-1.0, rows)],
        "reference": [logprobs(-1.0, rows)],
        "reward": [rewards(reward)],
    }


@pytest.mark.parametrize(("cut", "expected"), [((0, 0, 0), 0.0), ((7, 0, 1), 2.0)])
def test_transcripts_cut_for_the_reward_model_are_counted_in_steps_and_evaluations(
    recorder: RecorderWorker, tmp_path: Path, cut: tuple[int, ...], expected: float
) -> None:
    """Including the failed sample's; the manifest of a step without failures is unchanged."""
    file = tmp_path / "shard-0000.parquet"
    _, record = recorder.record(rollout(), scores([1.0, 2.0, None], cut), kl_coefficient=0.1, file=str(file))
    assert merge_metrics([record])["reward/cut"] == expected
    assert ("reward_cut_sum" in record.sums) == bool(expected)
    shard = {
        "rollout": [ray.put(rollout())],
        "policy": [logprobs(-1.0, [10, 11, 12])],
        "reference": [logprobs(-1.5, [10, 11, 12])],
        "reward": [rewards([1.0, None, 3.0], cut)],
    }
    metrics = recorder.evaluate([shard], file=str(tmp_path / "step-000000.parquet"))
    assert metrics["evaluation/reward_cut"] == expected
    found = BestByEvaluation(tmp_path, "evaluation/reward_mean").among([0])
    assert found is not None and found.value == metrics["evaluation/reward_mean"] == 2.0


@pytest.mark.parametrize(
    ("act", "why"),
    [
        ("lying", "rule act: ValueError: could not convert string to float: 'lying'"),
        ("exit 0", "rule act: SystemExit: 0"),
        ("kill", "rule act ended its process with SIGKILL"),
        ("sleep", r"rule act gave no answer within rule_limits.call_s=0.5 s"),
        ("400 digits", "not a finite number"),
    ],
)
def test_a_gold_rule_that_fails_on_one_sample_fails_that_sample(
    cluster: None, tmp_path: Path, act: str, why: str
) -> None:
    recorder = RecorderWorker(SETTINGS, "run-1", HOSTILE, limits=RuleLimits(call_s=0.5))
    shards = [held_out(["0.5", act, "1.5"], [1.0, 2.0, 3.0]), held_out(["2.5", "3.5", "4.5"], [1.0, 2.0, 3.0])]
    metrics = recorder.evaluate(shards, file=str(tmp_path / "step-000004.parquet"))
    table = pq.read_table(tmp_path / "step-000004.parquet")
    assert table["gold"].to_pylist() == [0.5, None, 1.5, 2.5, 3.5, 4.5]
    assert table["reward"].to_pylist() == [1.0, 2.0, 3.0] * 2
    assert metrics["evaluation/failed"] == 1.0
    assert metrics["evaluation/gold_mean"] == 2.5
    (line,) = (tmp_path / "failed-step-000004.jsonl").read_text().splitlines()
    failed = json.loads(line)
    assert failed["prompt_id"] == f"prompt of {act}" and why in failed["error"]


def test_a_training_reward_that_fails_on_one_held_out_sample_fails_that_sample(cluster: None, tmp_path: Path) -> None:
    recorder = RecorderWorker(SETTINGS, "run-1")
    metrics = recorder.evaluate(
        [held_out(["a", "b", "c"], [1.0, None, 3.0])], file=str(tmp_path / "step-000000.parquet")
    )
    assert pq.read_table(tmp_path / "step-000000.parquet")["gold"].to_pylist() == [1.0, None, 3.0]
    assert (metrics["evaluation/failed"], metrics["evaluation/gold_mean"]) == (1.0, 2.0)
    (line,) = (tmp_path / "failed-step-000000.jsonl").read_text().splitlines()
    assert json.loads(line) == {"prompt_id": "prompt of b", "error": "grader died"}


def test_nothing_is_listed_where_nothing_failed(recorder: RecorderWorker, tmp_path: Path) -> None:
    metrics = recorder.evaluate([held_out(["a", "b", "c"], [1.0] * 3)], file=str(tmp_path / "step-000000.parquet"))
    assert metrics["evaluation/failed"] == 0.0
    assert os.listdir(tmp_path) == ["step-000000.parquet"]


@pytest.mark.parametrize(
    ("gold", "match"),
    [
        (
            HOSTILE,
            r"the gold rule .*:act failed on all 3 held-out responses: rule act: .*'a'\. Correct evaluation.gold",
        ),
        (None, r"the reward failed on all 3 held-out responses: grader died. Correct the section `reward`"),
    ],
)
def test_scores_that_all_fail_stop_the_evaluation(cluster: None, tmp_path: Path, gold: str | None, match: str) -> None:
    recorder = RecorderWorker(SETTINGS, "run-1", gold)
    with pytest.raises(RewardError, match=match):
        recorder.evaluate([held_out(["a", "b", "c"], [None] * 3)], file=str(tmp_path / "step.parquet"))
    assert not (tmp_path / "step.parquet").exists()


def test_all_held_out_samples_share_the_gold_rules_time(
    recorder: RecorderWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    gold = recorder._gold
    assert gold is not None
    score = gold.scores
    monkeypatch.setattr(gold, "scores", lambda table: asked.append(table.num_rows) or score(table))
    recorder.evaluate([held_out(["a", "b", "c"], [1.0] * 3) for _ in range(4)], file=str(tmp_path / "step.parquet"))
    assert asked == [12]


def test_pyarrow_opens_a_whole_log(recorder: RecorderWorker, tmp_path: Path) -> None:
    """As in docs/experience-log.md, with the other files that a log has next to shards."""
    for step in range(2):
        folder = tmp_path / "log" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        file = folder / "shard-0000.parquet"
        recorder.record(rollout(), scores([1.0, None, 3.0]), kl_coefficient=0.1, file=str(file))
        (folder / "manifest.json").write_text("{}", encoding="utf-8")
    files = sorted(map(str, (tmp_path / "log").glob("*/*.parquet")))
    table = pyarrow.dataset.dataset(files).to_table()
    assert table.num_rows == 4
    assert pq.read_table(files).schema.equals(schema.EXPERIENCE)
