"""Assembles and writes experience on the nodes that hold the data; samples never pass through the coordinator."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from actors.rewards.rules import RuleReward
from orchestrator import schema
from orchestrator.algorithms.experience import ExperienceSettings, assemble, groups_of, summarise
from orchestrator.algorithms.standardising import running_names
from orchestrator.config.rewards import RuleConfig, RuleLimits
from orchestrator.errors import RewardError, StorageError
from orchestrator.evaluation import EVALUATION, evaluation_metrics
from orchestrator.run.experience_log import failures_file
from orchestrator.run.storage import reading, replacing, sha256
from orchestrator.types import Handle, Metrics, Moments, PromptGroup, ShardRecord

_NOTHING: tuple[Moments, dict[str, float], dict[str, float]] = (Moments(), {}, {})
_WAY_OUT = "restore it from a copy, or delete its folder."


class RecorderWorker:
    """One recorder process.

    Args:
        settings: settings of token rewards and advantages.
        run_id: written to the metadata of each file.
        gold: dotted name of the rule that scores held-out samples. None: the training reward scores them.
        limits: limits of the gold rule's process.
        gold_s: time limit of the gold rule for all held-out samples.
    """

    def __init__(
        self,
        settings: ExperienceSettings,
        run_id: str,
        gold: str | None = None,
        *,
        limits: RuleLimits = RuleLimits(),  # noqa: B008  frozen
        gold_s: float = 240.0,
    ) -> None:
        self._settings = settings
        self._run_id = run_id
        self._gold_name = gold
        self._gold = RuleReward([RuleConfig(function=gold)], limits, total_s=gold_s) if gold else None

    def record(
        self,
        rollout: pa.Table,
        scores: dict[str, list[Any]],
        *,
        kl_coefficient: float,
        file: str,
        groups: tuple[int, ...] | None = None,
        earlier: Mapping[str, Moments] | None = None,
    ) -> tuple[pa.Table, ShardRecord]:
        """Writes one shard of experience. `scores` maps parameter names of assemble() to object references, `groups` is
        as there. `earlier`: see ExperienceSettings."""
        parts = {name: _fetch(handles) for name, handles in scores.items()}
        settings = replace(self._settings, earlier=earlier or {})
        table, num_dropped = assemble(rollout, **parts, settings=settings, kl_coefficient=kl_coefficient, groups=groups)
        path = Path(file)
        if num_dropped:
            _write_failures(failures_file(path), pa.concat_tables(parts["rewards"]))
        _write(path, table, {"run_id": self._run_id})
        moments, sums, extremes = summarise(table, running_names(settings.sources)) if table.num_rows else _NOTHING
        num_cut = sum(map(_num_cut, parts["rewards"]))
        if num_cut:
            sums = {**sums, "reward_cut_sum": float(num_cut)}
        if groups is not None:
            num_sampled = len(np.unique(self._settings.group_of(rollout)))
            sums = {
                **sums,
                "prompts_sampled": float(num_sampled),
                "prompts_kept": float(len(groups)),
                "samples_left_out": float(rollout.num_rows - table.num_rows - num_dropped),
            }
        record = ShardRecord(
            file=path.name,
            sha256=sha256(path),
            num_bytes=path.stat().st_size,
            num_samples=table.num_rows,
            num_dropped=num_dropped,
            num_response_tokens=int(sums.get("response_tokens", 0)),
            advantage_moments=moments,
            sums=sums,
            extremes=extremes,
        )
        return table, record

    def groups(self, rollout: pa.Table, rewards: list[Any]) -> list[PromptGroup]:
        """The prompts of a shard, see groups_of. `rewards` are object references."""
        return groups_of(rollout, _fetch(rewards), self._settings)

    def load(self, record: ShardRecord, *, file: str) -> tuple[pa.Table, int]:
        """Reads a shard. Raises StorageError if the file is missing or differs from the committed one."""
        path = Path(file)
        with reading(path):
            if not path.is_file():
                raise StorageError(
                    f"{path} of the experience log is missing; restore it from a copy, or delete its folder."
                )
            if sha256(path) != record.sha256:
                raise StorageError(f"{path} of the experience log was altered or truncated; {_WAY_OUT}")
            table = schema.with_all_columns(pq.read_table(path))
        if table.schema != schema.EXPERIENCE:
            raise StorageError(f"{path} has other columns; use the version of the program that wrote it.")
        return table.replace_schema_metadata(None).combine_chunks(), table.num_rows

    def evaluate(self, shards: list[dict[str, list[Any]]], *, file: str) -> Metrics:
        """Joins held-out samples with their scores, writes one Parquet file, returns `evaluation/*` metrics.

        A sample whose score failed has a null gold score; a second file lists it with the reason.

        Raises:
            RewardError: all scores failed.
        """
        joined = pa.concat_tables([_joined(shard) for shard in shards])
        errors = joined["reward_error"]
        if self._gold is not None:
            scores = self._gold.scores(joined)  # one call: the time limit is for all samples
            gold = pa.array([score.value for score in scores], pa.float64())
            errors = pa.array([score.error for score in scores], pa.string())
            joined = joined.set_column(joined.schema.get_field_index("gold"), "gold", gold)
        num_failed = joined["gold"].null_count
        path = Path(file)
        if num_failed == joined.num_rows:
            raise RewardError(_all_failed(self._gold_name, joined.num_rows, errors[0].as_py()))
        if num_failed:
            listed = pa.table({"prompt_id": joined["prompt_id"], "error": errors}).filter(pc.is_null(joined["gold"]))
            _write_lines(failures_file(path), listed)
        table = joined.select(EVALUATION.names).cast(EVALUATION)
        _write(path, table, {"run_id": self._run_id})
        num_cut = sum(_num_cut(part) for shard in shards for part in _fetch(shard["reward"]))
        return {**evaluation_metrics(table), "evaluation/reward_cut": float(num_cut)}


def _num_cut(rewards: pa.Table) -> int:
    """Number of samples that the reward model did not read in full."""
    return int(np.count_nonzero(rewards["tokens_cut"].to_numpy()))


def _fetch(handles: Sequence[Handle]) -> list[pa.Table]:
    return ray.get(list(handles))


def _write(path: Path, table: pa.Table, metadata: dict[str, str]) -> None:
    with replacing(path) as temporary:
        pq.write_table(table.replace_schema_metadata(metadata), temporary, compression="zstd")


def _write_failures(path: Path, rewards: pa.Table) -> None:
    _write_lines(path, rewards.filter(pc.is_null(rewards["reward"])).select(["row", "reward_error"]))


def _write_lines(path: Path, failed: pa.Table) -> None:
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(item) + "\n" for item in failed.to_pylist()), encoding="utf-8")


def _joined(shard: dict[str, list[Any]]) -> pa.Table:
    """Columns of EVALUATION, scored by the training reward, plus the columns that a gold rule reads."""
    parts = {name: pa.concat_tables(_fetch(handles)).sort_by("row") for name, handles in shard.items()}
    rollout = parts["rollout"]
    policy, reference = (pc.list_flatten(parts[name]["logprobs"]).to_numpy() for name in ("policy", "reference"))
    learn = pc.list_flatten(rollout["learn"]).to_numpy()
    lengths = pc.list_value_length(rollout["response_tokens"]).to_numpy()
    kl = _sum_rows(np.where(learn, policy.astype("float64") - reference, 0.0), lengths)
    reward = parts["reward"]["reward"].cast(pa.float64())
    columns = {
        **{name: rollout[name] for name in ("prompt_id", "prompt_text", "response_text", "meta")},
        "gold": reward,
        "kl": pa.array(kl),
        "length": pa.array(_sum_rows(learn, lengths).astype(np.int32)),
        "reward": reward,
        "reward_error": parts["reward"]["reward_error"],
    }
    return pa.table(columns)


def _sum_rows(flat: Any, lengths: Any) -> Any:
    row_of_item = np.repeat(np.arange(len(lengths)), lengths)
    return np.bincount(row_of_item, weights=flat, minlength=len(lengths))


def _all_failed(gold: str | None, num_rows: int, first: str) -> str:
    if gold is None:
        return f"the reward failed on all {num_rows} held-out responses: {first}. Correct the section `reward`."
    return (
        f"the gold rule {gold} failed on all {num_rows} held-out responses: {first}. Correct evaluation.gold, or set "
        "evaluation.gold=null to score with the training reward, or evaluation.prompts=0."
    )
