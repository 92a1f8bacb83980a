"""The work of stage `sample`: K replies or episodes per prompt from the policy, as one Parquet file of
schema.ROLLOUT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from time import monotonic
from typing import Any

import numpy as np
import pyarrow as pa

from actors.roles.rollout import RolloutWorker
from jobs.stages.sample import SAMPLES, Sample, prompts_of
from jobs.stages.settings import samples_per_shard, sampling_of, start_s
from jobs.stages.stage import StageJob
from jobs.stages.work.data.shards import ShardFiles, spread
from jobs.stages.work.wiring import all_ready, start_engines, starting, supervisor_of
from orchestrator.config.config import Config
from orchestrator.errors import DataError
from orchestrator.planning.demands import engine_demand
from orchestrator.prompts import derive_seed, sample_requests
from orchestrator.sampler import cut_into_shards
from orchestrator.types import Prompt, ShardRequest

SAMPLE_STEP = -2  # replaces the step in the seeds of samples to be ranked


async def run(job: StageJob) -> Mapping[str, Any]:
    """Engines start and end with this stage. An attempt keeps the shards of earlier ones.

    Raises:
        DataError: no prompts are reserved.
    """
    chosen, seed = _chosen(job)
    requests = sample_requests(
        chosen, samples_per_prompt=job.config.sample.samples_per_prompt, seed=seed, step=SAMPLE_STEP
    )
    shards = cut_into_shards(
        SAMPLE_STEP,
        requests,
        samples_per_shard=samples_per_shard(job.config),
        sampling=sampling_of(job.config),
    )
    table = await sample_shards(job, job.config, shards, ShardFiles(job.config, job.output(SAMPLES)))
    return {"prompts": len(chosen), "samples": table.num_rows}


def _chosen(job: StageJob) -> tuple[Sequence[Prompt], int]:
    """The prompts and the seed of their samples. A stage with a unique name uses other prompts and seeds than the
    others of its kind."""
    config = job.config
    prompts = prompts_of(config, job.prepared)
    if not prompts:
        raise DataError(
            f"no prompts are in the split {config.sample.split!r} (sample.split): change prompts.reward_model_fraction "
            "or prompts.held_out_fraction, or give more prompts."
        )
    seed = config.run.seed
    if job.name != Sample.kind:
        seed = derive_seed("sample", seed, job.name)
        order = np.random.default_rng(seed).permutation(len(prompts))
        prompts = [prompts[number] for number in order[: config.sample.prompts]]
    return prompts[: config.sample.prompts], seed


async def sample_shards(job: StageJob, config: Config, shards: Sequence[ShardRequest], files: ShardFiles) -> pa.Table:
    """The samples of all shards; those in `files` are not sampled again. With an environment they are its episodes."""
    if missing := files.missing(len(shards)):
        await _sample(job, config, shards, missing, files)
    return files.finish(len(shards))


async def _sample(
    job: StageJob, config: Config, shards: Sequence[ShardRequest], missing: Sequence[int], files: ShardFiles
) -> None:
    async with starting(config, [engine_demand(config)]) as starter:
        job.watch(starter.groups)
        engines = await start_engines(config, starter, version=0)
        deadline_s = start_s(config)
        await all_ready({"rollout": engines}, deadline_s)
        supervisor = supervisor_of(config, starter, job.telemetry, job.run, deadline_s)
        started, done = monotonic(), 0

        async def sample(engine: int, number: int) -> None:
            nonlocal done
            generate = partial(
                engines.call, engine, RolloutWorker.generate, config.deadlines.generate_s, shards[number]
            )
            table, counts = await supervisor.keep(engines, generate)
            files.write(number, table)
            done += 1
            rate = counts["num_response_tokens"] / counts["seconds"]
            left = (len(missing) - done) * (monotonic() - started) / done
            finished = len(shards) - len(missing) + done
            job.say(f"{job.name} {finished}/{len(shards)}  {rate:.0f} tok/s  {left:.0f} s left")

        await spread(engines, missing, sample)
