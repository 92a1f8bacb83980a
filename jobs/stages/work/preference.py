"""The work of stage `preference`: trains the policy on preferences with Ray Train, and measures on held-out ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

from actors.training.preference import PreferenceTask, PreferenceTraining, Preferred
from actors.training.ranked_rows import judged
from jobs.prepare import Prepared
from jobs.stages.preference import RESULT_FILE
from jobs.stages.preferences import PREFERENCES
from jobs.stages.sample import sample_sizes, sampled
from jobs.stages.stage import POLICY, RowSizes, StageJob, row_sizes
from jobs.stages.work.data.demonstrations import MEASURED
from jobs.stages.work.data.judged import Records, measure_held_out, read_judged, split_judged
from jobs.stages.work.training import Report, inputs_of, of_last_tenth, train_section, words
from orchestrator.algorithms.ranking import spread
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
    config = job.config
    records, report = read_judged(config, config.preference.loss.judgement, job.inputs.get(PREFERENCES))
    job.say(f"preference: {report.summary()}")
    train, held_out = split_judged(config, records)
    result = await train_on_preferences(config, train, held_out, job.output(POLICY), job.telemetry, job.say)
    write_json(job.run.place / RESULT_FILE, asdict(result))
    job.telemetry.event("policy_trained", **asdict(result))
    job.say(f"preference: {result.describe()}")
    return asdict(result)


async def train_on_preferences(
    config: Config, records: Records, held_out: Records, folder: Path, telemetry: Telemetry, say: Say
) -> PreferenceResult:
    """Trains on `records`, measures on `held_out`, leaves the finished policy in `folder`.

    Ray is connected. The policy appears in `folder` whole or not at all. Progress, the reference's log-probs and
    checkpoints are in a work folder next to it, from which a later call continues.

    Raises:
        CapacityError: the workers do not fit into the cluster, or it has no room in time.
        DataError: the model, its tokenizer, or a conversation that its chat template refuses.
        NonFiniteError: loss or gradient; `folder` is untouched.
        RoleError: workers failed more often than `failures` allows, or reported nothing before their deadline.
    """
    started = monotonic()
    settings = inputs_of(PreferenceTraining, config, config.preference, folder, num_records=len(records))
    preferred: Preferred
    steps, preferred = await train_section(
        config,
        config.preference,
        partial(PreferenceTask, settings),
        (tuple(records), tuple(held_out)),
        settings.work,
        Report(telemetry, say, PREFERENCE, settings.total_optimizer_steps, _RECORDED, words),
        identity=(*settings.identity, tuple(records), tuple(held_out)),
    )
    quality = measure_held_out(preferred.held_out_rewards, held_out)
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
        num_records=len(records),
        num_held_out=len(held_out),
        num_truncated=preferred.num_truncated,
        optimizer_steps=len(steps),
        seconds=monotonic() - started,
    )
    shutil.rmtree(settings.work, ignore_errors=True)
    return result


def sizes(config: Config, prepared: Prepared) -> RowSizes:
    """Of the file, or of the samples that will be ranked. Raises DataError."""
    if config.preferences.path is None:
        prompts = sampled(config, prepared)
        num_rows = len(prompts) * config.sample.samples_per_prompt
        return sample_sizes(config, prompts, num_rows=num_rows, num_records=len(prompts))
    records, _ = read_judged(config, config.preference.loss.judgement)
    train, _ = split_judged(config, records)
    longest = config.preference.max_length
    transcripts = [
        prepared.chat.reply(record.messages, reply, record.tools)
        for record in spread(train, MEASURED)
        for reply in judged(record)[0]
    ]
    measured = [(min(len(found), longest), min(len(found.response_tokens), longest)) for found in transcripts]
    return row_sizes(measured, num_rows=sum(len(judged(record)[0]) for record in train), num_records=len(train))
