"""The work of stage `preferences`: a gold rule scores the samples, and the labeller ranks them."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from actors.rewards import Score
from actors.rewards.rules import RuleReward
from jobs.stages.preferences import PREFERENCES
from jobs.stages.sample import SAMPLES
from jobs.stages.settings import samples_per_shard
from jobs.stages.stage import StageJob
from jobs.stages.work.labeller import ScoredReplies, label, write_rankings
from orchestrator.config.config import Config
from orchestrator.config.rewards import RuleConfig
from orchestrator.data.records import messages_from_dicts
from orchestrator.errors import DataError, StorageError


async def run(job: StageJob) -> Mapping[str, Any]:
    """Raises:
    DataError: nothing could be scored or ranked.
    StorageError: the samples can't be read.
    """
    config = job.config
    path = job.inputs[SAMPLES]
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise StorageError(
            f"samples {path} can't be read ({type(error).__name__}). Delete it, and they are made again."
        ) from None
    # In a thread, so that the event loop can write the heartbeat.
    scores = await asyncio.to_thread(rule_scores, config, config.labeller.gold, table)
    failures = require_some(scores, config.labeller.gold)
    if failures:
        job.say(f"WARNING {job.name}: {failures}")
    scored = _scored(table, [score.value for score in scores])
    rankings, report = label(scored, noise_std=config.labeller.noise_std, seed=config.run.seed)
    write_rankings(job.output(PREFERENCES), rankings)
    job.telemetry.event("labelled", **asdict(report))
    job.say(
        f"{job.name}: {report.num_rankings} prompts ranked; noisy labels agree with gold on "
        f"{report.pair_agreement:.1%} of pairs"
    )
    return asdict(report)


def require_some(scores: Sequence[Score], gold: str) -> str:
    """A line about the replies that the gold rule could not score; empty if there are none.

    Raises:
        DataError: it could score no reply.
    """
    errors = [score.error for score in scores if score.value is None]
    if scores and len(errors) == len(scores):
        raise DataError(
            f"the gold rule {gold} failed on all {len(scores)} sampled replies: {errors[0]}. Correct labeller.gold, or "
            "give preferences.path and leave the stages sample and preferences out."
        )
    if not errors:
        return ""
    return f"the gold rule {gold} failed on {len(errors)} of {len(scores)} replies, which are left out: {errors[0]}"


def rule_scores(config: Config, function: str, table: pa.Table) -> list[Score]:
    """Scores of one rule."""
    rules = [RuleConfig(function=function)]
    total_s = config.deadlines.score_s * math.ceil(table.num_rows / samples_per_shard(config))
    with RuleReward(rules, config.rule_limits, total_s=total_s) as gold:
        return gold.scores(table)


def _scored(table: pa.Table, values: Sequence[float | None]) -> list[ScoredReplies]:
    """Replies by prompt; a prompt's rows are adjacent. Conversations come from `meta`."""
    columns = (table[name].to_pylist() for name in ("prompt_id", "meta", "response_text"))
    rows = zip(*columns, values, strict=True)
    scored = []
    for prompt_id, group in groupby(rows, key=lambda row: row[0]):
        _, metas, texts, golds = zip(*group, strict=True)
        meta = json.loads(metas[0])
        messages, tools = messages_from_dicts(meta["messages"]), meta.get("tools", ())
        scored.append(ScoredReplies(prompt_id, messages, texts, golds, tuple(tools)))
    return scored
