"""The append-only log of all experience, committed before the run learns from it.

    log/step-000007/shard-0000.parquet   one row per sample, schema.EXPERIENCE, zstd
    log/step-000007/manifest.json        written last: a step without it is not committed
    log/set-aside/attempt-002-.../       steps after a lost step

Recorders write the shards; this class writes the manifest and holds no samples. docs/experience-log.md lists the
columns and shows how to open a log in pyarrow, pandas and DuckDB.
"""

from __future__ import annotations

import itertools
import json
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orchestrator.algorithms.summary import merge_metrics
from orchestrator.concurrency import together
from orchestrator.errors import RewardError, StorageError, Superseded
from orchestrator.roles import Recorder
from orchestrator.run.storage import create_sealed, damaged, inside, read_sealed, reading, sync_folder, writing
from orchestrator.types import Experience, Handle, Metrics, Moments, ScoredShard, ShardRecord, State

FORMAT = 1
MANIFEST = "manifest.json"
SET_ASIDE = "set-aside"
# Only folders with exactly these names are managed: a copy under another name is never touched.
_STEP = re.compile(r"step-(\d{6,})")
_SHARD = re.compile(r"shard-\d{4,}(-attempt-\d{3,})?\.parquet")


def failures_file(file: Path) -> Path:
    """The file that lists the failures of a file of samples."""
    return file.with_name(f"failed-{file.stem}.jsonl")


class ExperienceLog:
    """One run's log.

    Args:
        folder: folder of all steps, on storage that all nodes share.
        recorder: assembles, writes and reads shards.
        max_failed_fraction: share of a step's samples whose reward may fail before the run stops.
        attempt: number of the run's attempt; two attempts never write the same file.
        fence: called before a step is committed; raises if a newer attempt is writing the run.
    """

    def __init__(
        self,
        folder: Path,
        recorder: Recorder,
        *,
        max_failed_fraction: float,
        attempt: int = 1,
        fence: Callable[[], None] = lambda: None,
    ) -> None:
        self._folder = folder
        self._recorder = recorder
        self._max_failed_fraction = max_failed_fraction
        self._attempt = attempt
        self._fence = fence
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def holds(self, step: int) -> bool:
        """Whether step `step` is committed."""
        return _is_there(self._manifest(step))

    async def commit(self, state: State, scored: Sequence[ScoredShard]) -> Experience:
        """Writes all shards of step `state.step`, then the manifest. Afterwards the step is never sampled again.

        Raises:
            RewardError: more rewards failed than are allowed.
            StorageError: a file could not be written.
        """
        step = state.step
        with writing(self._step_folder(step)):
            self._step_folder(step).mkdir(exist_ok=True)
        written = await together(
            self._recorder.record(shard, state=state, file=str(self._step_folder(step) / self._shard_name(index)))
            for index, shard in enumerate(scored)
        )
        records = [record for _, record in written]
        self._check_failures(step, records)
        manifest = {
            "format": FORMAT,
            "step": step,
            "kl_coefficient": state.kl_coefficient,
            "shards": [asdict(record) for record in records],
        }
        self._fence()
        if not create_sealed(self._manifest(step), manifest):
            raise Superseded(f"step {step} was committed by another attempt of this run; resume it.")
        self._remove_others(step, records)
        return _experience(step, records, [handle for handle, _ in written], state.kl_coefficient)

    async def load(self, step: int) -> Experience:
        """Reads a committed step and verifies the checksums of its files. Raises StorageError."""
        kl_coefficient, records = self._read_manifest(step)
        files = [str(inside(self._step_folder(step), record.file)) for record in records]
        handles = await together(
            self._recorder.load(record, file=file) for record, file in zip(records, files, strict=True)
        )
        return _experience(step, records, handles, kl_coefficient)

    def set_aside_after(self, step: int) -> Sequence[int]:
        """If the log has lost `step`, moves the steps after it to set-aside/ and returns them.

        The run samples `step` again, and the later steps do not follow from the new samples.
        """
        if self.holds(step):
            return ()
        with writing(self._folder):
            steps = [int(found[1]) for path in self._folder.iterdir() if (found := _STEP.fullmatch(path.name))]
            later = sorted(number for number in steps if number > step and self.holds(number))
            if not later:
                return ()
            self._fence()
            target = self._folder / SET_ASIDE / f"attempt-{self._attempt:03d}-{uuid.uuid4().hex[:8]}"
            target.mkdir(parents=True)
            for number in later:
                self._step_folder(number).rename(target / self._step_folder(number).name)
            sync_folder(self._folder)
        return later

    def metrics(self, step: int) -> Metrics | None:
        """Metrics of a step, from its manifest. None: the step is not committed. Raises StorageError."""
        return merge_metrics(self._read_manifest(step)[1]) if self.holds(step) else None

    def _read_manifest(self, step: int) -> tuple[float, list[ShardRecord]]:
        """(KL coefficient, records of the step's shards)"""
        manifest = read_sealed(self._manifest(step))
        if manifest.get("format") != FORMAT:
            raise StorageError(
                f"{self._manifest(step)} has format {manifest.get('format')}, this program reads {FORMAT}; use the "
                "version of the program that wrote it."
            )
        try:
            committed_step, kl_coefficient, records = _parse(**manifest)
        except (AttributeError, KeyError, TypeError):
            raise damaged(self._manifest(step), "its entries do not form a manifest") from None
        if committed_step != step:
            raise damaged(self._manifest(step), f"it belongs to step {committed_step}")
        return kl_coefficient, records

    def _check_failures(self, step: int, records: Sequence[ShardRecord]) -> None:
        dropped = sum(record.num_dropped for record in records)
        left_out = int(sum(record.sums.get("samples_left_out", 0.0) for record in records))
        total = dropped + left_out + sum(record.num_samples for record in records)
        if dropped and (dropped == total or dropped / total > self._max_failed_fraction):
            first = self._first_failure(step, records)
            raise RewardError(
                f"step {step}: the reward of {dropped} of {total} samples failed, more than "
                f"reward.max_failed_fraction={self._max_failed_fraction:g}. {first}The column "
                f"reward_error in {self._step_folder(step)}/failed-*.jsonl says why; correct the reward source, then "
                "resume."
            )

    def _first_failure(self, step: int, records: Sequence[ShardRecord]) -> str:
        files = [failures_file(self._step_folder(step) / record.file) for record in records if record.num_dropped]
        there = next((file for file in files if file.exists()), None)
        if there is None:
            return ""
        with reading(there):
            first = there.read_text(encoding="utf-8").splitlines()[0]
        return f"The first: {json.loads(first)['reward_error']}. "

    def _shard_name(self, index: int) -> str:
        suffix = f"-attempt-{self._attempt:03d}" if self._attempt > 1 else ""
        return f"shard-{index:04d}{suffix}.parquet"

    def _remove_others(self, step: int, records: Sequence[ShardRecord]) -> None:
        """Removes uncommitted shards of earlier attempts."""
        names = {record.file for record in records}
        with writing(self._step_folder(step)):
            for path in self._step_folder(step).iterdir():
                if _SHARD.fullmatch(path.name) and path.name not in names:
                    path.unlink(missing_ok=True)

    def _step_folder(self, step: int) -> Path:
        return _step_folder(self._folder, step)

    def _manifest(self, step: int) -> Path:
        return self._step_folder(step) / MANIFEST


def committed_files(folder: Path, step: int) -> list[Path] | None:
    """The files of a step in the log in `folder`; their checksums are not verified. None: the step is not committed.

    Raises StorageError: its manifest is damaged.
    """
    manifest = _step_folder(folder, step) / MANIFEST
    return files_of(manifest) if _is_there(manifest) else None


def step_of(manifest: Path) -> int:
    """The step of a manifest's path."""
    return int(manifest.parent.name.removeprefix("step-"))


def files_of(manifest: Path) -> list[Path]:
    """The files that a manifest names. Raises StorageError: it is damaged, or can't be read."""
    content = read_sealed(manifest)
    try:
        return [inside(manifest.parent, shard["file"]) for shard in content["shards"]]
    except (KeyError, TypeError):
        raise damaged(manifest, "its entries do not form a manifest") from None


def num_committed(folder: Path) -> int:
    """Number of committed steps in `folder`, from step 0 to the first gap."""
    steps = itertools.count()
    return next(step for step in steps if not _is_there(_step_folder(folder, step) / MANIFEST))


def _is_there(manifest: Path) -> bool:
    with reading(manifest):
        return manifest.exists()


def _step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def _parse(
    format: int, step: int, kl_coefficient: float, shards: Sequence[dict[str, Any]]
) -> tuple[int, float, list[ShardRecord]]:
    """The entries of a manifest. Missing or unknown entries raise TypeError."""
    return step, kl_coefficient, [_record(item) for item in shards]


def _record(item: dict[str, Any]) -> ShardRecord:
    moments = Moments(**item.pop("advantage_moments"))
    return ShardRecord(**item, advantage_moments=moments)


def _experience(
    step: int, records: Sequence[ShardRecord], handles: Sequence[Handle], kl_coefficient: float
) -> Experience:
    moments = Moments.merge([record.advantage_moments for record in records])
    metrics = {**merge_metrics(records), "kl/coefficient": kl_coefficient}
    return Experience(step, records, handles, moments.mean, moments.std, kl_coefficient, metrics)
