"""The work of stage `people`: puts samples into a labelling store, waits, and freezes what people judged.

1. choose  with people.items: asked.json, by actors that have ended before the wait
2. open    items and their batch are in the store; people.json says when the wait began
3. wait    until nothing is missing, the quota or the deadline is reached, or an admin has finished the batch
4. close   the store withdraws what is missing
5. freeze  judgements.jsonl, from which people.jsonl follows: later judgements change neither

An attempt repeats a step that a killed one had not ended; each one leaves the same whoever repeats it.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from jobs.prepare import find_data
from jobs.services.labelling.agreement.arms import arms_among, table_of
from jobs.services.labelling.items.adding import Wanted, add
from jobs.services.labelling.items.sources import Candidate
from jobs.services.labelling.store import Store
from jobs.services.labelling.waiting import batches
from jobs.services.labelling.waiting.batches import Progress
from jobs.services.labelling.waiting.frozen import (
    JudgedItem,
    agreement,
    joined,
    judged_items,
    num_people,
    read_items,
    write_items,
    write_rankings,
)
from jobs.services.labelling.web.hosting import Hosted, command_of, hosting
from jobs.stages.people import JUDGEMENTS, STATE_FILE, asked_of
from jobs.stages.preferences import PREFERENCES
from jobs.stages.stage import StageJob
from jobs.stages.work.asking import candidates_to_ask
from orchestrator.config.people import PeopleConfig
from orchestrator.errors import DataError, StorageError
from orchestrator.run.storage import read_json, replacing, write_json
from orchestrator.training.acquisition import ACTIVE

STORE_FILE, COPY_FILE = "labels.db", "labels-copy.db"
POLL_S = 2.0
SAID_S = 60.0


async def run(job: StageJob) -> Mapping[str, Any]:
    """Raises:
    DataError: the samples hold nothing to compare; nobody judged anything in time; the judgements prefer nothing.
    StorageError: the store can't be opened, or the judgements can't be written.
    """
    if not job.output(JUDGEMENTS).exists():
        _restore(job)
        with closing(Store(_place(job))) as store:
            await _collect(job, store)
    found = await asyncio.to_thread(read_items, job.output(JUDGEMENTS))
    report = await asyncio.to_thread(write_rankings, job.output(PREFERENCES), found)
    shared = agreement(found)
    num_judgements = sum(len(item.judgements) for item in found)
    result = {
        "judgements": num_judgements,
        "items": sum(bool(item.judgements) for item in found),
        "people": num_people(found),
        "rankings": report.num_rows,
        "left_out": dict(report.left_out),
        "agreement": shared,
    }
    agreed = {} if shared is None else {"people/agreement": shared}
    job.telemetry.evaluation(0, {"people/judgements": num_judgements, "people/waiting": 0.0, **agreed})
    job.say(f"{job.name}: {describe(result)}")
    if job.config.people.items is not None:
        _say_arms(job, found)
    return result


def describe(result: Mapping[str, Any]) -> str:
    """A line about a result of this stage."""
    agreed = "" if result["agreement"] is None else f"; two people agree on {result['agreement']:.1%} of pairs"
    return (
        f"{result['judgements']} judgements of {result['items']} items by {result['people']} people make "
        f"{result['rankings']} rankings{agreed}"
    )


def _say_arms(job: StageJob, found: Sequence[JudgedItem]) -> None:
    """What the choice was worth in this round and those before it; nothing if none was made by a reward model."""
    arms = arms_among(
        (item.key, each["answer"], item.source, item.replies)
        for item in found
        if item.gold is None
        for each in item.judgements
    )
    if ACTIVE in arms:
        for line in table_of(arms):
            job.say(f"{job.name}: {line}")


@dataclass(frozen=True)
class Wait:
    """A wait for people.

    Args:
        batch: its name in the store.
        opened_at: time of its begin, in whatever attempt.
    """

    batch: str
    opened_at: float
    people: PeopleConfig

    @property
    def until(self) -> float | None:
        hours = self.people.deadline_hours
        return None if hours is None else self.opened_at + 3600.0 * hours

    def num_missing(self, found: Progress) -> int:
        quota = self.people.judgements
        return found.num_missing if quota is None else min(found.num_missing, max(0, quota - found.num_judgements))

    def reason(self, found: Progress, now: float) -> str | None:
        """Why the run continues. None: it waits."""
        if found.closed_by is not None:  # by an attempt that was killed before it had frozen them
            return found.closed_by
        if not self.num_missing(found):
            return "all that were asked for" if not found.num_missing else "people.judgements are reached"
        if found.is_finished:
            return "an admin finished the batch"
        if self.until is not None and now >= self.until:
            return "people.deadline_hours are over"
        return None


async def _collect(job: StageJob, store: Store) -> None:
    """Leaves judgements.jsonl."""
    batch = f"{job.run.id}/{job.name}"
    candidates = await candidates_to_ask(job, store, batch)
    wait = await asyncio.to_thread(_open, job, store, batch, candidates)
    async with _hosted(job, store) as hosted:
        reason = await _until_judged(job, wait, store, hosted)
    await asyncio.to_thread(_close, job, store, wait.batch, reason)
    found = await asyncio.to_thread(_taken, job, store, wait.batch)
    await asyncio.to_thread(write_items, job.output(JUDGEMENTS), found)
    num_judgements = sum(len(item.judgements) for item in found)
    judged = sum(bool(item.judgements) for item in found)
    job.telemetry.event("people_judged", batch=wait.batch, judgements=num_judgements, judged=judged, reason=reason)


def _place(job: StageJob) -> str:
    given = job.config.people.store or str(job.run.path / STORE_FILE)
    return given if "://" in given else str(Path(given).expanduser().absolute())


def _restore(job: StageJob) -> None:
    """Copies the store back into a run's folder that was restored from its mirror, which holds only copies of it."""
    store, copy = job.run.path / STORE_FILE, job.run.path / COPY_FILE
    if job.config.people.store is None and copy.exists() and not store.exists():
        with replacing(store) as temporary:
            shutil.copyfile(copy, temporary)
            temporary.chmod(0o600)


def _open(job: StageJob, store: Store, name: str, candidates: Iterable[Candidate]) -> Wait:
    """Puts items into the store and asks for judgements, unless an earlier attempt has."""
    state = job.run.place / STATE_FILE
    kept = read_json(state) if state.exists() else {}
    wait = Wait(name, float(kept.get("opened_at", time.time())), job.config.people)
    with store.reading() as connection:
        is_there = batches.progress(connection, name) is not None
    if kept and is_there:
        return wait
    added = add(store, candidates, _wanted(wait.people), batch=name)
    if not added.overlaps:
        raise DataError(
            f"stage {job.name!r}: none of {added.num_unfit} prompts has two different replies to compare. Raise "
            f"{asked_of(job.config)[2]}.samples_per_prompt or rollout.temperature."
        )
    with store.writing() as connection:
        batches.open_batch(connection, name, added.overlaps, opened_at=wait.opened_at)
        found = batches.progress(connection, name)
    write_json(state, {"opened_at": wait.opened_at, "batch": name, "store": store.place})
    assert found is not None
    asked = found.num_judgements + found.num_missing
    job.telemetry.event("people_asked", batch=name, items=found.num_items, judgements=asked)
    unfit = f"; {added.num_unfit} prompts have no two different replies" if added.num_unfit else ""
    job.say(f"{job.name}: asks people for {asked} judgements of {found.num_items} items{unfit}")
    return wait


def _wanted(people: PeopleConfig) -> Wanted:
    return Wanted(people.task, people.overlap, people.overlap_share)


def _hosted(job: StageJob, store: Store) -> AbstractAsyncContextManager[Hosted]:
    people = job.config.people
    if people.address is None:
        return nullcontext(Hosted())
    guidelines = None if people.guidelines is None else find_data(people.guidelines).absolute()
    command = command_of(_place(job), people.address, guidelines)
    return hosting(store, command, lambda line: job.say(f"{job.name}: {line}"))


async def _until_judged(job: StageJob, wait: Wait, store: Store, hosted: Hosted) -> str:
    """Why the run continues. A store that can't be read at times delays that."""
    watch = _Watch(job, wait, store.place, hosted)
    copied_at = monotonic()
    while True:
        job.run.require_newest()
        try:
            watch.found(await asyncio.to_thread(_progress, store, wait.batch))
            if _is_mirrored(job) and (monotonic() - copied_at > job.config.run.mirror_every_s or watch.reason):
                await asyncio.to_thread(store.back_up, job.run.path / COPY_FILE)
                copied_at = monotonic()
        except StorageError as error:
            watch.failed(error)
        if watch.reason is not None:
            job.telemetry.waits_for_people(None, {"people/waiting": 0.0, "people/missing": 0.0})
            return watch.reason
        await asyncio.sleep(POLL_S)


def _is_mirrored(job: StageJob) -> bool:
    return job.config.run.mirror is not None and job.config.people.store is None


def _progress(store: Store, name: str) -> Progress:
    with store.reading() as connection:
        found = batches.progress(connection, name)
    if found is None:
        raise StorageError(f"{store.place} no longer has the batch {name!r}; restore it from a backup.")
    return found


class _Watch:
    """Tells of a wait: on the console, in the heartbeat and at the endpoint.

    Attributes:
        reason: why the run continues. None: it waits.
    """

    def __init__(
        self, job: StageJob, wait: Wait, place: str, hosted: Hosted, *, wall_clock: Callable[[], float] = time.time
    ) -> None:
        self._job, self._wait, self._place, self._hosted, self._wall_clock = job, wait, place, hosted, wall_clock
        self._said: tuple[float, int | None] = (0.0, None)
        self._last: Progress | None = None
        self._problem = ""
        self.reason: str | None = None

    def found(self, found: Progress) -> None:
        now = self._wall_clock()
        self._problem, self._last = "", found
        self.reason = self._wait.reason(found, now)
        self._show(now)
        missing = self._wait.num_missing(found)
        said_at, said = self._said
        if missing != said and (now - said_at >= SAID_S or said is None):
            self._said = now, missing
            few = self._few(found)
            self._job.say(f"{self._job.name}: {found.num_judgements} judgements, {missing} missing{few}")

    def failed(self, error: StorageError) -> None:
        if not self._problem:
            self._job.say(f"WARNING {self._job.name}: {error} The run waits on.")
        self._problem = str(error)
        self._show(self._wall_clock())

    def _few(self, found: Progress) -> str:
        if found.num_people >= found.most_overlap:
            return ""
        return (
            f"; {found.num_people} people have links and items are judged by up to {found.most_overlap}: "
            f"rlhf label invite NAME --store {self._place}"
        )

    def _show(self, now: float) -> None:
        last, wait = self._last, self._wait
        missing = None if last is None else wait.num_missing(last)
        address = wait.people.address if self._hosted.is_running else None
        what = {
            "batch": wait.batch,
            "store": self._place,
            "items": last and last.num_items,
            "judgements": last and last.num_judgements,
            "missing": missing,
            "since": wait.opened_at,
            "until": wait.until,
            "page": address and f"http://{address}",
            "problem": self._problem or None,
        }
        metrics = {"people/waiting": 1.0}
        if last is not None and missing is not None:
            counts = {"items": last.num_items, "judgements": last.num_judgements, "missing": missing}
            metrics |= {f"people/{name}": float(count) for name, count in counts.items()}
        if wait.until is not None:
            metrics["people/seconds_left"] = max(0.0, wait.until - now)
        self._job.telemetry.waits_for_people(what, metrics)


def _close(job: StageJob, store: Store, name: str, reason: str) -> None:
    """Raises DataError: there are no judgements; the batch stays open."""
    if not any(item.judgements for item in _taken(job, store, name) if item.gold is None):
        raise DataError(
            f"stage {job.name!r}: nobody has judged anything, and {reason}. Raise people.deadline_hours, or take the "
            f"end back (rlhf label finish {name} --undo --store {store.place}), and run again."
        )
    with store.writing() as connection:
        batches.close(connection, name, reason)


def _taken(job: StageJob, store: Store, name: str) -> Sequence[JudgedItem]:
    """The items of a batch and of earlier rounds, with all judgements that there are now."""
    earlier = read_items(job.inputs[JUDGEMENTS]) if JUDGEMENTS in job.inputs else []
    known = [item.key for item in earlier if item.gold is None]
    with store.reading() as connection:
        keys = {*known, *batches.keys_of(connection, name)}
        return joined(earlier, judged_items(connection, sorted(keys)))
