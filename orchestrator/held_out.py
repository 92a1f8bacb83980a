"""Scheduled evaluation on held-out prompts: the same prompts and seeds every time, so that differences are paired."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from orchestrator.concurrency import together
from orchestrator.errors import StorageError
from orchestrator.evaluation import evaluation_file, evaluation_metrics, read_evaluation
from orchestrator.roles import Roles
from orchestrator.run.experience_log import failures_file
from orchestrator.run.storage import writing
from orchestrator.sampler import cut_into_shards
from orchestrator.turns import Turns, Unshared
from orchestrator.types import EvaluatedShard, RolloutShard, SampleRequest, Sampling, State
from orchestrator.watching.telemetry import Telemetry


class Evaluation:
    """Samples held-out prompts, scores them and writes evaluation/step-NNNNNN.parquet, one row per prompt. A file next
    to it lists failed scores.

    Args:
        folder: folder of the evaluation files.
        requests: samples to draw; empty: no evaluation.
        every_steps: steps between evaluations; 0: only before the first and after the last step.
        turns: holds the devices while engines sample and models score.
    """

    def __init__(  # noqa: PLR0913  its parts
        self,
        folder: Path,
        requests: Sequence[SampleRequest],
        *,
        roles: Roles,
        telemetry: Telemetry,
        sampling: Sampling,
        samples_per_shard: int,
        every_steps: int,
        last_step: int,
        turns: Turns = Unshared(),  # noqa: B008  it has no state
    ) -> None:
        self._folder, self._requests = folder, requests
        self._roles, self._telemetry, self._turns = roles, telemetry, turns
        self._sampling, self._samples_per_shard = sampling, samples_per_shard
        self._every_steps, self._last_step = every_steps, last_step
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)

    async def run_if_due(self, state: State) -> None:
        """Evaluates the weights of `state` unless they were evaluated before, possibly by an earlier attempt."""
        on_schedule = self._every_steps and state.step % self._every_steps == 0
        due = self._requests and (state.step in (0, self._last_step) or on_schedule)
        if due and not self._file(state.step).exists():
            with self._telemetry.phase("evaluate"):
                await self._run(state)

    def resume(self, state: State) -> None:
        """Makes evaluations consistent with a run that continues from `state`: metrics lines that were lost are written
        again from the files, and evaluations of later versions, which do not belong to this run, are removed."""
        with writing(self._folder):
            found = {_version(path): path for path in sorted(self._folder.glob("step-*.parquet"))}
            for path in [path for version, path in found.items() if version > state.version]:
                path.unlink()
                failures_file(path).unlink(missing_ok=True)
        for version in sorted(found.keys() - self._telemetry.evaluated()):
            if 0 <= version <= state.version:
                with suppress(StorageError):  # a damaged file has no metrics to write
                    self._telemetry.evaluation(version, evaluation_metrics(read_evaluation(found[version])))

    async def _run(self, state: State) -> None:
        shards = cut_into_shards(
            state.step, self._requests, samples_per_shard=self._samples_per_shard, sampling=self._sampling
        )
        rollouts = self._roles.rollouts
        async with self._turns.hold("sample"):
            sampled = await together(rollouts.generate(shard) for shard in shards)
        async with self._turns.hold("evaluate"):
            scored = await together(self._score(shard) for shard in sampled)
        file = self._file(state.step)
        metrics = await self._roles.recorder.evaluate(scored, file=str(file))
        self._telemetry.evaluation(state.version, metrics)
        self._tell_failures(state.version, int(metrics.get("evaluation/failed", 0)), file)

    async def _score(self, shard: RolloutShard) -> EvaluatedShard:
        scorers = (self._roles.policy, self._roles.reference, self._roles.reward)
        logprobs, ref_logprobs, rewards = await together(scorer.score(shard) for scorer in scorers)
        return EvaluatedShard(shard, logprobs, ref_logprobs, rewards)

    def _tell_failures(self, version: int, num_failed: int, file: Path) -> None:
        if num_failed:
            reasons = failures_file(file)
            self._telemetry.tell(
                f"WARNING evaluation of version {version}: {num_failed} of {len(self._requests)} held-out responses "
                f"have no score and are left out; {reasons} says why",
                "evaluation_failures",
                version=version,
                failed=num_failed,
                reasons=str(reasons),
            )

    def _file(self, step: int) -> Path:
        return evaluation_file(self._folder, step)


def _version(path: Path) -> int:
    """-1: the file is not from this program."""
    found = re.fullmatch(r"step-(\d{6,})", path.stem)
    return int(found[1]) if found else -1
