"""What stage `people` asks: replies to all prompts of the samples, or to some that are chosen once and kept
(docs/adr/0026-what-to-ask.md)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa

from jobs.services.labelling.items.adding import known_keys
from jobs.services.labelling.items.choosing import Asked, Asking, read_asked, write_asked
from jobs.services.labelling.items.sources import Candidate, of_samples
from jobs.services.labelling.store import Store
from jobs.stages.people import ASKED_FILE
from jobs.stages.sample import EXPERIENCE, SAMPLES
from jobs.stages.stage import StageJob
from jobs.stages.work.score import choose_items, read_table
from orchestrator.errors import DataError
from orchestrator.prompts import derive_seed
from orchestrator.run.experience_log import files_of, step_of


async def candidates_to_ask(job: StageJob, store: Store, batch: str) -> Iterable[Candidate]:
    """All actors that choose have ended when this returns. Attempts after it get the same candidates.

    Raises:
        DataError: nothing can be asked for; the reward model has one head.
        StorageError: samples or store can't be read, or the choice can't be written.
        RoleError: the reward model's actors failed more often than `failures` allows.
    """
    if job.config.people.items is None:
        return _sampled(job)
    kept = job.run.place / ASKED_FILE
    if not kept.exists():
        await asyncio.to_thread(write_asked, kept, await _choose(job, store, batch, job.config.people.items))
    return (await asyncio.to_thread(read_asked, kept)).candidates


async def _choose(job: StageJob, store: Store, batch: str, budget: int) -> Asked:
    people = job.config.people
    seed = derive_seed("people", job.config.run.seed, job.name)
    known = await asyncio.to_thread(known_keys, store, but_of=batch)
    candidates = await asyncio.to_thread(lambda: list(_sampled(job)))
    samples = await asyncio.to_thread(lambda: pa.concat_tables(map(read_table, _files(job))))
    asking = Asking(people.task, budget, people.control_share, seed)
    found: Asked = await choose_items(job, samples, candidates, asking, known)
    job.watch(())
    if not found.candidates and found.num_known:
        raise DataError(
            f"stage {job.name!r}: the {found.num_known} prompts whose replies can be compared are in {store.place} "
            "already, with the same replies. Sample others, or unset people.items to ask for the judgements of these."
        )
    job.say(f"{job.name}: {found.describe()}")
    return found


def _sampled(job: StageJob) -> Iterable[Candidate]:
    manifest = job.inputs.get(EXPERIENCE)
    step = None if manifest is None else step_of(manifest)
    return of_samples(_files(job), job.run.path, _sampler(job), step=step)


def _files(job: StageJob) -> Sequence[Path]:
    """The files of the samples that people judge. Raises StorageError."""
    manifest = job.inputs.get(EXPERIENCE)
    return [job.inputs[SAMPLES]] if manifest is None else files_of(manifest)


def _sampler(job: StageJob) -> str:
    """The name under which the samples' stage has its files; empty for the run's own folder."""
    manifest = job.inputs.get(EXPERIENCE)
    place = job.inputs[SAMPLES].parent if manifest is None else manifest.parents[2]
    return "" if place == job.run.path else place.name
