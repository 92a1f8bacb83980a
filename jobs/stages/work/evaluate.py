"""The work of stage `evaluate`: samples of two models on the same held-out prompts, scored and compared."""

from __future__ import annotations

import asyncio
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress, islice
from time import monotonic
from typing import Any

import pyarrow as pa

from actors.rewards import samples as reward_samples
from actors.rewards.judge import judge_cache
from actors.rewards.pair_judge import Comparison, PairJudge
from actors.roles.reference import ReferenceWorker
from jobs.prepare import policy_chat, prepare
from jobs.stages.evaluate import EVALUATION, RESULT_FILE
from jobs.stages.settings import (
    has_reward,
    pair_template,
    rank_context,
    reward_path,
    samples_per_shard,
    sampling_of,
    start_s,
)
from jobs.stages.stage import StageJob
from jobs.stages.work.data.demonstrations import Demonstration, rows_of, sample
from jobs.stages.work.data.shards import ShardFiles
from jobs.stages.work.preferences import rule_scores
from jobs.stages.work.sample import sample_shards
from jobs.stages.work.score import score_shards
from jobs.stages.work.tasks import task_metrics
from jobs.stages.work.wiring import EVALUATION_STEP, all_ready, starting, supervisor_of
from orchestrator.config.config import Config
from orchestrator.config.loader import changed
from orchestrator.config.rewards import PairJudgeConfig
from orchestrator.errors import DataError, GuardTripped
from orchestrator.evaluation import EvaluationRow, compare
from orchestrator.planning.demands import reference_demand
from orchestrator.prompts import sample_requests
from orchestrator.run.storage import write_json
from orchestrator.sampler import cut_into_shards
from orchestrator.training.ranking import order, wilson_interval
from orchestrator.types import Prompt

LANGUAGE_FIELDS = ("language", "lang")
"""Fields of a prompt that name its language."""

_BOUND = re.compile(r"\s*(<=|>=|<|>)\s*(-?\d+(?:\.\d+)?)\s*")
_COMPARE = {"<": float.__lt__, "<=": float.__le__, ">": float.__gt__, ">=": float.__ge__}


@dataclass(frozen=True)
class Side:
    """Samples of one model with their scores by row; None: scoring failed, or there is no such source."""

    samples: pa.Table
    gold: Sequence[float | None]
    reward: Sequence[float | None]

    def of(self, rows: Sequence[int]) -> Side:
        gold, reward = ([scores[row] for row in rows] for scores in (self.gold, self.reward))
        return Side(self.samples.take(rows), gold, reward)


async def run(job: StageJob) -> Mapping[str, Any]:
    """Raises:
    DataError: nothing could be scored.
    GuardTripped: a metric does not meet evaluate.require; the results are written first.
    """
    config, folder = job.config, job.output(EVALUATION)
    folder.mkdir(parents=True, exist_ok=True)
    against = config.evaluate.against or job.start_policy
    other_config = changed(config, {"model.path": against}, source="evaluate.against")
    mine, theirs = _same_prompts(job, other_config)
    held_out = [] if config.demonstrations.path is None else sample(config, is_held_out=True).some
    policy = await _side(job, "policy", config, mine)
    languages = _languages(mine, policy.samples)
    metrics = _alone(policy) | await _likelihood(job, config, held_out, "")
    metrics |= _by_language(languages, lambda rows: _alone(policy.of(rows)))
    metrics |= await task_metrics(job, config, "")
    if against != config.model.path:
        other = await _side(job, "against", other_config, theirs)
        metrics |= _together(policy, other) | await _likelihood(job, other_config, held_out, "_against")
        metrics |= _by_language(languages, lambda rows: _together(policy.of(rows), other.of(rows)))
        metrics |= await task_metrics(job, other_config, "_against")
        if config.evaluate.judge is not None:
            metrics |= await _judged(job, config.evaluate.judge, policy.samples, other.samples)
        if job.start_policy == against:  # the same vocabulary: every stage keeps it
            metrics["kl"] = await _kl(job, policy.samples, other_config)
    unmet = [found for name, bound in config.evaluate.require.items() if (found := _unmet(metrics, name, bound))]
    result = {"against": against, "metrics": metrics, "unmet": unmet}
    write_json(folder / RESULT_FILE, result)
    job.telemetry.evaluation(0, {f"{job.name}/{name}": value for name, value in metrics.items()})
    job.say(f"{job.name}: policy compared with {against}\n" + "\n".join(_lines(metrics)))
    if unmet:
        raise GuardTripped(
            f"stage {job.name!r}: {'; '.join(unmet)} (evaluate.require). The samples are in {folder}. Train longer, or "
            "lower the requirement; then run again."
        )
    return result


def _same_prompts(job: StageJob, other: Config) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
    """The held-out prompts of both models, in one order: a template may make a prompt too long for one of them. All
    policies of a run have one template and vocabulary."""
    mine, number = job.prepared.prompts.held_out, job.config.evaluation.prompts
    if other.model.path in (job.start_policy, job.config.model.path):
        common = {prompt.id for prompt in mine[:1]}
        first = second = mine[:number]
    else:
        theirs = prepare(other).prompts.held_out
        common = {prompt.id for prompt in mine} & {prompt.id for prompt in theirs}
        shared = ((prompt for prompt in side if prompt.id in common) for side in (mine, theirs))
        first, second = (list(islice(side, number)) for side in shared)
    if not common:
        raise DataError("no held-out prompt fits both models: raise prompts.max_prompt_tokens, or give more prompts.")
    return first, second


async def _side(job: StageJob, name: str, config: Config, prompts: Sequence[Prompt]) -> Side:
    """An attempt keeps the shards of earlier ones."""
    requests = sample_requests(prompts, samples_per_prompt=1, seed=config.run.seed, step=EVALUATION_STEP)
    shards = cut_into_shards(
        EVALUATION_STEP, requests, samples_per_shard=samples_per_shard(config), sampling=sampling_of(config)
    )
    folder = job.output(EVALUATION)
    samples = await sample_shards(job, config, shards, ShardFiles(config, folder / f"{name}.parquet"))
    gold: Sequence[float | None] = [None] * samples.num_rows
    if config.evaluation.gold is not None:
        scores = await asyncio.to_thread(rule_scores, config, config.evaluation.gold, samples)
        gold = [score.value for score in scores]
    reward: Sequence[float | None] = [None] * samples.num_rows
    if has_reward(config, job.inputs):
        files = ShardFiles(config, folder / f"{name}-rewards.parquet")
        table = await score_shards(job, config, reward_path(config, job.inputs), samples, files)
        reward = table["reward"].to_pylist()
    if not _known(gold) and not _known(reward) and config.evaluate.judge is None:
        raise DataError(f"stage {job.name!r}: none of {samples.num_rows} samples has a score; correct evaluation.gold.")
    return Side(samples, gold, reward)


async def _judged(job: StageJob, judge: PairJudgeConfig, mine: pa.Table, theirs: pa.Table) -> dict[str, float]:
    """Raises DataError: more comparisons failed than reward.max_failed_fraction allows."""
    config = job.config
    source = PairJudge(judge, pair_template(judge), cache=judge_cache(config.run.cache))
    left, right = list(reward_samples(mine)), list(reward_samples(theirs))
    found: list[Comparison] = []
    size = samples_per_shard(config)
    for start in range(0, len(left), size):
        until = monotonic() + config.deadlines.score_s
        found += await source.compare(left[start : start + size], right[start : start + size], until)
        job.say(f"{job.name}: {len(found)} of {len(left)} pairs judged")
    return judge_metrics(found, config.reward.max_failed_fraction)


def judge_metrics(found: Sequence[Comparison], max_failed_fraction: float) -> dict[str, float]:
    """The win rate with its interval, and counts. Ties, and pairs on which the orders disagree, are half a win.

    Raises:
        DataError: too many failed, or all of them.
    """
    values = _known([comparison.value for comparison in found])
    num_failed = len(found) - len(values)
    if not values or num_failed / len(found) > max_failed_fraction:
        error = next((comparison.error for comparison in found if comparison.error), "there are no pairs")
        raise DataError(
            f"the judge failed on {num_failed} of {len(found)} pairs, more than reward.max_failed_fraction="
            f"{max_failed_fraction:g} allows: {error}. Correct evaluate.judge, or raise that share."
        )
    low, high = wilson_interval(sum(values), len(values))
    return {
        "judge_win_rate": statistics.fmean(values),
        "judge_win_low": low,
        "judge_win_high": high,
        "judge_ties": float(sum(value == 0.5 for value in values)),
        "judge_disagreed": float(sum(comparison.disagrees for comparison in found)),
        "judge_failed": float(num_failed),
    }


async def _likelihood(
    job: StageJob, config: Config, held_out: Sequence[Demonstration], suffix: str
) -> dict[str, float]:
    """Mean negative log-likelihood of a learned token of demonstrations, in nats, and its exponential. Empty without
    demonstrations."""
    if not held_out:
        return {}
    rows = rows_of(config, policy_chat(config), held_out).table()
    cold = config.model_copy(update={"rollout": config.rollout.model_copy(update={"temperature": 1.0})})
    logprobs = await _logprobs(job, rows.append_column("row", pa.array(range(rows.num_rows), pa.int32())), cold)
    marks = rows["learn"].to_pylist()
    learned = [value for row, mark in zip(logprobs, marks, strict=True) for value in compress(row, mark)]
    loss = -statistics.fmean(learned)
    return {f"loss{suffix}": loss, f"perplexity{suffix}": math.exp(min(loss, 700.0))}


async def _kl(job: StageJob, samples: pa.Table, against: Config) -> float:
    """KL(policy || against) per response in nats, estimated by the log-ratio of its samples (k1)."""
    of_policy, of_other = [await _logprobs(job, samples, config) for config in (job.config, against)]
    ratios = [sum(mine) - sum(theirs) for mine, theirs in zip(of_policy, of_other, strict=True)]
    return statistics.fmean(ratios)


async def _logprobs(job: StageJob, samples: pa.Table, config: Config) -> Sequence[Sequence[float]]:
    reference = config.reference.model_copy(update={"path": config.model.path, "ranks": 1, "sharded": False})
    async with starting(config, [reference_demand(config)]) as starter:
        job.watch(starter.groups)
        arguments = {"reference": reference, "context": rank_context(config)}
        ranks = await starter.ranks("reference", ReferenceWorker, arguments)
        deadline_s = start_s(config)
        await all_ready({"reference": ranks}, deadline_s)
        supervisor = supervisor_of(config, starter, job.telemetry, job.run, deadline_s)

        async def score() -> pa.Table:
            return await ranks.call(0, ReferenceWorker.logprobs, config.deadlines.score_s, samples)

        table = await supervisor.keep(ranks, score)
    found: Sequence[Sequence[float]] = table.sort_by("row")["logprobs"].to_pylist()
    return found


def _alone(side: Side) -> dict[str, float]:
    lengths = [len(tokens) for tokens in side.samples["response_tokens"].to_pylist()]
    stopped = [reason == "stop" for reason in side.samples["finish_reason"].to_pylist()]
    metrics = {"length": statistics.fmean(lengths), "stopped": statistics.fmean(stopped)}
    for name, scores in (("gold", side.gold), ("reward", side.reward)):
        if known := _known(scores):
            metrics[name] = statistics.fmean(known)
            metrics[f"{name}_failed"] = float(len(scores) - len(known))
    return metrics


def _together(policy: Side, other: Side) -> dict[str, float]:
    """Differences and win rates by prompt. Equal scores count as half a win."""
    metrics: dict[str, float] = {}
    for name, mine, theirs in (("gold", policy.gold, other.gold), ("reward", policy.reward, other.reward)):
        pairs = [
            (left, right) for left, right in zip(mine, theirs, strict=True) if left is not None and right is not None
        ]
        if not pairs:
            continue
        wins = sum(order(left, right) for left, right in pairs)
        low, high = wilson_interval(wins, len(pairs))
        metrics[f"{name}_against"] = statistics.fmean(right for _, right in pairs)
        metrics |= {f"{name}_win_rate": wins / len(pairs), f"{name}_win_low": low, f"{name}_win_high": high}
        found = compare(*([_row(number, pair[side]) for number, pair in enumerate(pairs)] for side in (1, 0)))
        metrics |= {f"{name}_delta": found.delta, f"{name}_delta_low": found.delta_low}
        metrics[f"{name}_delta_high"] = found.delta_high
    return metrics


def _languages(prompts: Sequence[Prompt], samples: pa.Table) -> Mapping[str, Sequence[int]]:
    """The rows of each language that the prompts name. Empty if they name fewer than two."""
    language_of = {prompt.id: next(filter(None, map(prompt.meta.get, LANGUAGE_FIELDS)), None) for prompt in prompts}
    found: dict[str, list[int]] = {}
    for row, prompt_id in enumerate(samples["prompt_id"].to_pylist()):
        if (language := language_of[prompt_id]) is not None:
            found.setdefault(str(language), []).append(row)
    return dict(sorted(found.items())) if len(found) > 1 else {}


def _by_language(
    languages: Mapping[str, Sequence[int]], measure: Callable[[Sequence[int]], Mapping[str, float]]
) -> dict[str, float]:
    """The metrics of each language's rows, as METRIC/LANGUAGE."""
    return {
        f"{name}/{language}": value for language, rows in languages.items() for name, value in measure(rows).items()
    }


def _row(number: int, score: float) -> EvaluationRow:
    return EvaluationRow(str(number), "", "", score, 0.0, 0)


def _known(scores: Sequence[float | None]) -> list[float]:
    return [score for score in scores if score is not None]


def _unmet(metrics: Mapping[str, float], name: str, bound: str) -> str | None:
    """A text about a bound that a metric does not meet."""
    if name not in metrics:
        return f"{name} was not measured (there are {', '.join(metrics)})"
    found = _BOUND.fullmatch(bound)
    assert found is not None, "checked when the config was read"
    is_met = _COMPARE[found[1]](float(metrics[name]), float(found[2]))
    return None if is_met else f"{name} is {metrics[name]:.4g}, required {bound.strip()}"


def _lines(metrics: Mapping[str, float]) -> Sequence[str]:
    return [f"  {name:<22} {value:.4g}" for name, value in metrics.items() if math.isfinite(value)]
