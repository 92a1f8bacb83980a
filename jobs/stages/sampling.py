"""The work of stage `sample`: K replies per prompt from the start policy, as one Parquet file of schema.ROLLOUT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from time import monotonic
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from actors.roles.rollout import RolloutWorker
from jobs.stages.rl_wiring import all_ready, start_engines, starting, supervisor_of
from jobs.stages.sample import SAMPLES
from jobs.stages.settings import samples_per_shard, sampling_of
from jobs.stages.stage import StageJob
from orchestrator.concurrency import together
from orchestrator.errors import DataError
from orchestrator.planning.demands import engine_demand
from orchestrator.prompts import sample_requests
from orchestrator.run.storage import replacing
from orchestrator.sampler import cut_into_shards
from orchestrator.types import ShardRequest

SAMPLE_STEP = -2  # used instead of a step in the seeds of samples that are ranked


async def make_samples(job: StageJob) -> Mapping[str, Any]:
    """Engines start for this stage and end with it.

    Raises:
        DataError: no prompts were set aside.
    """
    labeller = job.config.labeller
    chosen = job.prepared.prompts.reward_model[: labeller.prompts]
    if not chosen:
        raise DataError("no prompts are set aside for the reward model: raise prompts.reward_model_fraction.")
    requests = sample_requests(
        chosen, samples_per_prompt=labeller.replies_per_prompt, seed=job.config.run.seed, step=SAMPLE_STEP
    )
    shards = cut_into_shards(
        SAMPLE_STEP,
        requests,
        samples_per_shard=samples_per_shard(job.config),
        sampling=sampling_of(job.config),
    )
    table = pa.concat_tables(await _sample(job, shards))
    with replacing(job.output(SAMPLES)) as temporary:
        pq.write_table(table, temporary, compression="zstd")
    return {"prompts": len(chosen), "samples": table.num_rows}


async def _sample(job: StageJob, shards: Sequence[ShardRequest]) -> list[pa.Table]:
    config = job.config
    async with starting(config, [engine_demand(config)]) as starter:
        job.watch(starter.groups)
        engines = await start_engines(config, starter, version=0)
        await all_ready({"rollout": engines}, config.deadlines.start_s)
        supervisor = supervisor_of(config, starter, job.telemetry, job.run)
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
                job.say(f"{job.name} {len(tables)}/{len(shards)}  {rate:.0f} tok/s  {left:.0f} s left")

        await together(drive(engine) for engine in range(len(engines)))
        return [tables[index] for index in range(len(shards))]
