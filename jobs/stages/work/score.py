"""The work of stage `score`: a score or a failure for every sample, as one Parquet file of schema.REWARDS. Also the
states of a reward model for every sample, by which items for people are chosen."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from actors.groups.group import ActorGroup
from actors.groups.starter import Starter
from actors.rewards import DISAGREEMENT
from actors.roles.reward import RewardWorker
from actors.roles.states import StatesWorker
from jobs.command import imported
from jobs.stages.people import STATES_FILE
from jobs.stages.sample import SAMPLES
from jobs.stages.score import SCORES
from jobs.stages.settings import reward_path, samples_per_shard, start_s, states_section
from jobs.stages.stage import StageJob
from jobs.stages.work.data.replies import read_replies, replies_table
from jobs.stages.work.data.shards import ShardFiles, spread
from jobs.stages.work.wiring import all_ready, start_reward, start_states, starting, supervisor_of
from orchestrator.config.config import Config
from orchestrator.errors import DataError, StorageError
from orchestrator.planning.demands import REWARD_MODEL, reward_demand, states_demand
from orchestrator.planning.placement import Demand
from orchestrator.run.storage import replacing

Start = Callable[[Starter], Awaitable[ActorGroup]]


async def run(job: StageJob) -> Mapping[str, Any]:
    """An attempt keeps the shards of earlier ones.

    Raises:
        DataError: more samples failed than reward.max_failed_fraction allows. What succeeded is kept, so that another
            attempt asks for the others only if their shard failed as a whole.
        StorageError: the samples can't be read.
    """
    samples = read_table(job.inputs[SAMPLES]) if job.config.score.path is None else await asyncio.to_thread(_given, job)
    files = ShardFiles(job.config, job.output(SCORES))
    table = await score_shards(job, job.config, reward_path(job.config, job.inputs), samples, files)
    found = _described(job, table)
    job.say(f"{job.name}: {found['scored']} of {table.num_rows} samples scored, mean {found['mean']:.3f}")
    return found


def _given(job: StageJob) -> pa.Table:
    """The replies of score.path, as the artifact that stage `sample` would make of them."""
    records, report = read_replies(job.config)
    job.say(f"{job.name}: {report.summary()}")
    table = replies_table(records, job.prepared.chat)
    with replacing(job.output(SAMPLES)) as temporary:
        pq.write_table(table, temporary, compression="zstd")
    return table


def read_table(path: Path) -> pa.Table:
    """Raises StorageError."""
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise StorageError(
            f"{path} can't be read ({type(error).__name__}). Delete it, and its stage makes it again."
        ) from None


async def score_shards(
    job: StageJob, config: Config, model: str | None, samples: pa.Table, files: ShardFiles
) -> pa.Table:
    """Scores of all samples by row; shards in `files` are not scored again.

    Args:
        model: the reward model. None: the reward is not a model.
    """

    async def start(starter: Starter) -> ActorGroup:
        return await start_reward(config, starter, model)

    return await in_shards(job, config, reward_demand(config), start, RewardWorker.score, samples, files)


async def choose_items(
    job: StageJob, samples: pa.Table, candidates: Sequence[Any], asking: Any, known: Collection[str] = ()
) -> Any:
    """What stage `people` asks: `choose_items` of jobs/services/labelling/items/choosing.py with its arguments, by the
    reward model that an earlier stage has made; without one, all items are drawn at random.

    Args:
        samples: of which the candidates were made.
    """
    model = job.inputs.get(REWARD_MODEL)
    states = None if model is None else await measure_states(job, model, samples)
    return imported("jobs.services.labelling.items.choosing:choose_items")(candidates, states, asking, known)


async def measure_states(job: StageJob, model: Path, samples: pa.Table) -> pa.Table:
    """Table of schema.STATES for a table of schema.ROLLOUT, which is kept as STATES_FILE in the stage's folder
    (docs/adr/0026-what-to-ask.md).

    Args:
        model: the folder of the reward model.
    """
    config, source = job.config, states_section(job.config, str(model))

    async def start(starter: Starter) -> ActorGroup:
        return await start_states(config, starter, source)

    files = ShardFiles(config, job.run.place / STATES_FILE)
    return await in_shards(job, config, states_demand(config), start, StatesWorker.states, samples, files)


async def in_shards(
    job: StageJob,
    config: Config,
    demand: Demand,
    start: Start,
    method: Callable[..., pa.Table],
    samples: pa.Table,
    files: ShardFiles,
) -> pa.Table:
    """What a method of the actors of one role returns for all samples; shards in `files` are kept. The actors have
    ended when this returns."""
    size = samples_per_shard(config)
    shards = [samples.slice(begin, size) for begin in range(0, samples.num_rows, size)]
    if missing := files.missing(len(shards)):
        async with starting(config, [demand]) as starter:
            job.watch(starter.groups)
            replicas = await start(starter)
            deadline_s = start_s(config)
            await all_ready({demand.role: replicas}, deadline_s)
            supervisor = supervisor_of(config, starter, job.telemetry, job.run, deadline_s)

            async def ask(replica: int, number: int) -> None:
                work = partial(replicas.call, replica, method, config.deadlines.score_s, shards[number])
                files.write(number, await supervisor.keep(replicas, work))
                job.say(f"{job.name}: {number + 1} of {len(shards)} shards")

            await spread(replicas, missing, ask)
    return files.finish(len(shards))


def _described(job: StageJob, table: pa.Table) -> Mapping[str, Any]:
    scores = [score for score in table["reward"].to_pylist() if score is not None]
    num_failed = table.num_rows - len(scores)
    most = job.config.reward.max_failed_fraction
    if not scores or num_failed / table.num_rows > most:
        error = next(text for text in table["reward_error"].to_pylist() if text is not None)
        job.output(SCORES).unlink()
        raise DataError(
            f"{num_failed} of {table.num_rows} samples could not be scored, more than reward.max_failed_fraction="
            f"{most:g} allows: {error}. Correct the reward, or raise that share."
        )
    found = {"scored": len(scores), "failed": num_failed, "mean": statistics.fmean(scores)}
    found["std"] = statistics.pstdev(scores)
    parts = (dict(parts) for parts in table["reward_parts"].to_pylist())
    apart = [of_sample[DISAGREEMENT] for of_sample in parts if DISAGREEMENT in of_sample]
    return {**found, DISAGREEMENT: statistics.fmean(apart)} if apart else found
