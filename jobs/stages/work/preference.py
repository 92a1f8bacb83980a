"""The work of stage `preference`: trains the policy on preferences with Ray Train, and measures on held-out ones."""

from __future__ import annotations

import asyncio
import itertools
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

from actors.training.preference import PreferenceTask, PreferenceTraining, Preferred, learns_prompts
from actors.training.ranked_rows import Mismatched, stored_rankings
from actors.training.ranked_tokens import ADDED, RankedTokens, mismatched_table
from actors.training.stored_rows import writing_rows
from jobs.prepare import Prepared, policy_chat
from jobs.stages.preference import RESULT_FILE
from jobs.stages.preferences import PREFERENCES
from jobs.stages.stage import POLICY, RowSizes, StageJob
from jobs.stages.work.data import judged
from jobs.stages.work.data.judged import StoredJudgements, measure_held_out, store_preferences
from jobs.stages.work.data.storing import APPENDED_ROWS
from jobs.stages.work.training import Report, inputs_of, of_last_tenth, train_section, words
from orchestrator.config.config import Config
from orchestrator.planning.demands import PREFERENCE
from orchestrator.run.storage import write_json
from orchestrator.watching.telemetry import Telemetry

_RECORDED = ("loss", "accuracy", "margin", "grad_norm", "learning_rate")

Say = Callable[[str], None]


@dataclass(frozen=True)
class PreferenceResult:
    """What the stage made and how good it is.

    Args:
        path: the policy, a Hugging Face folder.
        loss_name: of preference.loss.
        held_out_accuracy: share of held-out pairs that the policy's implicit rewards put in the right order, equal ones
            counting half; None: no pairs. Of labelled replies, pairs of a desirable and an undesirable one.
        interval: its 95 % interval (Wilson), as if pairs were independent.
        num_pairs: held-out pairs.
        loss, accuracy, margin: means over the last tenth of the optimizer steps, on training pairs.
        num_truncated: transcripts that lost tokens at their start.
    """

    path: str
    loss_name: str
    held_out_accuracy: float | None
    interval: Sequence[float]
    num_pairs: int
    loss: float
    accuracy: float
    margin: float
    num_records: int
    num_held_out: int
    num_truncated: int
    optimizer_steps: int
    seconds: float

    def describe(self) -> str:
        parts = [f"{self.path}: {self.loss_name}, {self.num_records} records, {self.optimizer_steps} optimizer steps"]
        if self.held_out_accuracy is not None:
            low, high = self.interval
            parts.append(
                f"implicit rewards order {self.held_out_accuracy:.1%} of {self.num_pairs} held-out pairs "
                f"(95 %: {low:.1%} to {high:.1%})"
            )
        if self.num_truncated:
            parts.append(f"{self.num_truncated} transcripts cut at their start to preference.max_length")
        return ", ".join([*parts, f"{self.seconds:.0f} s"])


async def run(job: StageJob) -> Mapping[str, Any]:
    """Reads the preferences, trains, and writes the result next to the policy."""
    folder = job.output(POLICY).absolute()
    stage, made = job.config.preference, job.inputs.get(PREFERENCES)
    train = RankedTokens(policy_chat(job.config), stage.max_length, learns_prompts=learns_prompts(stage))
    data = await store_preferences(job.config, stage.loss.judgement, train, folder, job.say, made=made)
    job.say(f"preference: {data.report.summary()}")
    result = await train_on_preferences(job.config, data, folder, job.telemetry, job.say)
    write_json(job.run.place / RESULT_FILE, asdict(result))
    job.telemetry.event("policy_trained", **asdict(result))
    job.say(f"preference: {result.describe()}")
    return asdict(result)


async def store_mismatched(data: StoredJudgements, config: Config) -> Path:
    """Writes the rows of mismatched replies of the whole training. Raises StorageError."""
    stage, place = config.preference, data.folder / "mismatched"
    train, pairs = stored_rankings(data.train.folder), Mismatched(data.train.num_records, stage, config.run.seed)
    with writing_rows(place, *ADDED) as writer:
        left = iter(pairs)
        while some := list(itertools.islice(left, APPENDED_ROWS)):
            writer.append(mismatched_table(train, some, max_length=stage.max_length, first=writer.num_rows))
            await asyncio.sleep(0)  # a stop is noticed here
    return place


async def train_on_preferences(
    config: Config, data: StoredJudgements, folder: Path, telemetry: Telemetry, say: Say
) -> PreferenceResult:
    """Trains on stored preferences, measures on those held out, leaves the finished policy in `folder`.

    Ray is connected. The policy appears in `folder` whole or not at all. Progress, the reference's log-probs and
    checkpoints are in a work folder next to it, from which a later call continues; it and the rows are removed when the
    training has finished.

    Raises:
        CapacityError: the workers do not fit into the cluster, or it has no room in time.
        DataError: the model or its tokenizer.
        NonFiniteError: loss or gradient; `folder` is untouched.
        RoleError: workers failed more often than `failures` allows, or reported nothing before their deadline.
    """
    started = monotonic()
    settings = inputs_of(PreferenceTraining, config, config.preference, folder, num_records=data.train.num_records)
    mixed = await store_mismatched(data, config) if config.preference.loss.judgement == "labels" else None
    preferred: Preferred
    steps, preferred = await train_section(
        config,
        config.preference,
        partial(PreferenceTask, settings),
        (*data.folders, mixed),
        settings.work,
        Report(telemetry, say, PREFERENCE, settings.total_optimizer_steps, _RECORDED, words),
        identity=(*settings.identity, *data.digests),
    )
    quality = measure_held_out(preferred.held_out_rewards, data.held_out_qualities())
    if quality.accuracy is not None:
        telemetry.evaluation(len(steps), {"preference/held_out_accuracy": quality.accuracy})
    result = PreferenceResult(
        path=str(settings.folder),
        loss_name=config.preference.loss.name,
        held_out_accuracy=quality.accuracy,
        interval=quality.interval,
        num_pairs=quality.num_pairs,
        loss=of_last_tenth(steps, "loss"),
        accuracy=of_last_tenth(steps, "accuracy"),
        margin=of_last_tenth(steps, "margin"),
        num_records=data.train.num_records,
        num_held_out=data.held_out.num_records,
        num_truncated=data.num_truncated,
        optimizer_steps=len(steps),
        seconds=monotonic() - started,
    )
    for unfinished in (settings.work, data.folder):
        shutil.rmtree(unfinished, ignore_errors=True)
    return result


def sizes(config: Config, prepared: Prepared) -> RowSizes:
    """Of the records to train on. Raises DataError."""
    stage = config.preference
    return judged.sizes(config, prepared, stage.loss.judgement, prepared.chat, stage.max_length)
