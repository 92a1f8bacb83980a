"""Stage `preferences`: sample K replies per prompt from the start policy and let the labeller rank them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from time import monotonic

import pyarrow as pa

from actors.rewards import Score
from actors.rewards.rules import RuleReward
from actors.roles.rollout import RolloutWorker
from jobs.stages.labeller import LabelReport, ScoredReplies, label, write_rankings
from jobs.stages.settings import demands, samples_per_shard, sampling_of
from jobs.stages.wiring import all_ready, start_engines, starting, supervisor_of
from orchestrator.concurrency import together
from orchestrator.config.config import Config
from orchestrator.config.rewards import RuleConfig
from orchestrator.data.records import messages_from_dicts
from orchestrator.errors import DataError
from orchestrator.prompts import sample_requests
from orchestrator.run.folder import RunFolder
from orchestrator.sampler import cut_into_shards
from orchestrator.types import Prompt, ShardRequest
from orchestrator.watching.telemetry import Telemetry

LABEL_STEP = -2  # stands in for a step in the seeds of samples that are ranked


async def make_preferences(
    config: Config, run: RunFolder, prompts: Sequence[Prompt], telemetry: Telemetry, say: Callable[[str], None]
) -> LabelReport:
    """Writes run.preferences. Engines start for this stage and end with it.

    Raises:
        DataError: no prompts were set aside, or nothing could be ranked.
    """
    chosen = prompts[: config.labeller.prompts]
    if not chosen:
        raise DataError("no prompts are set aside for the reward model: raise prompts.reward_model_fraction.")
    requests = sample_requests(
        chosen, samples_per_prompt=config.labeller.replies_per_prompt, seed=config.run.seed, step=LABEL_STEP
    )
    shards = cut_into_shards(
        LABEL_STEP,
        requests,
        samples_per_shard=samples_per_shard(config),
        sampling=sampling_of(config),
    )
    tables = await _sample(config, run, shards, telemetry, say)
    table = pa.concat_tables(tables)
    # In a thread: the event loop writes the heartbeat meanwhile.
    scores = await asyncio.to_thread(_gold_scores, config, table)
    failures = require_some(scores, config.labeller.gold)
    if failures:
        say(f"WARNING preferences: {failures}")
    scored = _scored(table, chosen, [score.value for score in scores])
    rankings, report = label(scored, noise_std=config.labeller.noise_std, seed=config.run.seed)
    write_rankings(run.preferences, rankings)
    return report


async def _sample(
    config: Config, run: RunFolder, shards: Sequence[ShardRequest], telemetry: Telemetry, say: Callable[[str], None]
) -> list[pa.Table]:
    async with starting(config, demands(config, learning=False)) as starter:
        engines = await start_engines(config, starter, version=0)
        await all_ready({"rollout": engines}, config.deadlines.start_s)
        supervisor = supervisor_of(config, starter, telemetry, run)
        pending = iter(enumerate(shards))
        tables: dict[int, pa.Table] = {}
        started = monotonic()

        async def drive(engine: int) -> None:
            for index, shard in pending:
                sample = partial(engines.call, engine, RolloutWorker.generate, config.deadlines.generate_s, shard)
                table, counts = await supervisor.keep(engines, sample)
                tables[index] = table
                rate = counts["num_response_tokens"] / counts["seconds"]
                left = (len(shards) - len(tables)) * (monotonic() - started) / len(tables)
                say(f"preferences {len(tables)}/{len(shards)}  {rate:.0f} tok/s  {left:.0f} s left")

        await together(drive(engine) for engine in range(len(engines)))
        return [tables[index] for index in range(len(shards))]


def require_some(scores: Sequence[Score], gold: str) -> str:
    """What to say about the replies that the gold rule could not score; empty where there are none.

    Raises:
        DataError: it could score none.
    """
    errors = [score.error for score in scores if score.value is None]
    if scores and len(errors) == len(scores):
        raise DataError(
            f"the gold rule {gold} failed on all {len(scores)} sampled replies: {errors[0]}. Correct labeller.gold, or "
            "give preferences.path and leave the stage preferences out."
        )
    if not errors:
        return ""
    return f"the gold rule {gold} failed on {len(errors)} of {len(scores)} replies, which are left out: {errors[0]}"


def _gold_scores(config: Config, table: pa.Table) -> list[Score]:
    rules = [RuleConfig(function=config.labeller.gold)]
    total_s = config.deadlines.score_s * math.ceil(table.num_rows / samples_per_shard(config))
    with RuleReward(rules, config.rule_limits, total_s=total_s) as gold:
        return gold.scores(table)


def _scored(table: pa.Table, prompts: Sequence[Prompt], values: Sequence[float | None]) -> list[ScoredReplies]:
    metas = {prompt.id: prompt.meta for prompt in prompts}
    ids, replies = table["prompt_id"].to_pylist(), table["response_text"].to_pylist()
    rows = zip(ids, replies, values, strict=True)
    scored = []
    for prompt_id, group in groupby(rows, key=lambda row: row[0]):
        _, texts, golds = zip(*group, strict=True)
        messages, tools = messages_from_dicts(metas[prompt_id]["messages"]), metas[prompt_id].get("tools", ())
        scored.append(ScoredReplies(prompt_id, messages, texts, golds, tuple(tools)))
    return scored
