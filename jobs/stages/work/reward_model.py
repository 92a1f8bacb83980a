"""The work of stage `reward_model`: trains on ranked replies with Ray Train, and measures on held-out ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

from actors.groups.cluster import alive_nodes, named_address
from actors.training.ranked_tokens import RankedTokens
from actors.training.reward_model import RewardModelTask, RewardTraining, Trained
from jobs.check.capacity import find_cluster
from jobs.cluster.connection import cluster
from jobs.command import imported, run_async, say
from jobs.prepare import Prepared, start_chat
from jobs.resolve import WITHOUT_TRIAL, resolved
from jobs.stages.preferences import PREFERENCES
from jobs.stages.reward_model import RESULT_FILE
from jobs.stages.settings import alone
from jobs.stages.stage import RowSizes, StageJob
from jobs.stages.work.data import judged
from jobs.stages.work.data.judged import StoredJudgements, measure_heads, measure_held_out, store_preferences
from jobs.stages.work.labeller import read_gold
from jobs.stages.work.training import Report, inputs_of, of_last_tenth, train_section, words
from orchestrator.config.config import Config
from orchestrator.errors import ConfigError
from orchestrator.planning.demands import REWARD_MODEL, plan_training
from orchestrator.run.folder import open_run
from orchestrator.run.storage import write_json
from orchestrator.training.calibration import Calibration
from orchestrator.training.ensemble import Disagreement
from orchestrator.watching.telemetry import Telemetry

_RECORDED = ("loss", "accuracy", "grad_norm", "learning_rate")
_RECORDED_OF_SCORES = ("loss", "absolute_error", "grad_norm", "learning_rate")

Say = Callable[[str], None]


@dataclass(frozen=True)
class RewardModelResult:
    """What the stage made and how good it is.

    Args:
        path: the reward model, a Hugging Face folder (AutoModelForSequenceClassification, one label per head).
        held_out_accuracy: share of held-out pairs in the right order, equal scores counting half; None: no pairs.
        interval: its 95 % interval (Wilson), as if pairs were independent; pairs of one prompt are not quite.
        num_pairs: held-out pairs.
        kendall_tau: mean over held-out prompts with more than two replies; None: there are none.
        calibration: of held-out replies; also kept in the model's folder.
        loss, accuracy: means over the last tenth of the optimizer steps, on training pairs; no accuracy of scores.
        num_truncated: transcripts that lost tokens at their start.
        score_mean, score_std: of raw scores of training replies, kept in reward_stats.json.
        heads: how they judge held-out pairs; None: there is one.
    """

    path: str
    held_out_accuracy: float | None
    interval: Sequence[float]
    num_pairs: int
    kendall_tau: float | None
    calibration: Calibration
    loss: float
    accuracy: float | None
    num_records: int
    num_held_out: int
    num_truncated: int
    optimizer_steps: int
    score_mean: float
    score_std: float
    seconds: float
    heads: Disagreement | None = None

    def describe(self) -> str:
        parts = [f"{self.path}: {self.num_records} records, {self.optimizer_steps} optimizer steps"]
        if self.held_out_accuracy is not None:
            low, high = self.interval
            parts.append(
                f"{self.held_out_accuracy:.1%} of {self.num_pairs} held-out pairs in order "
                f"(95 %: {low:.1%} to {high:.1%})"
            )
        if self.kendall_tau is not None:
            parts.append(f"Kendall tau {self.kendall_tau:.2f}")
        if self.calibration.expected_error is not None:
            parts.append(f"calibration error {self.calibration.expected_error:.2f}")
        if self.calibration.length_correlation is not None:
            parts.append(f"correlation with length {self.calibration.length_correlation:.2f}")
        if self.heads is not None:
            parts.append(_described(self.heads))
        if self.num_truncated:
            parts.append(f"{self.num_truncated} transcripts cut at their start to reward_model.max_length")
        return ", ".join([*parts, f"{self.seconds:.0f} s"])


def _described(heads: Disagreement) -> str:
    known = [accuracy for accuracy in heads.accuracies if accuracy is not None]
    alone = f", alone {min(known):.1%} to {max(known):.1%} in order" if known else ""
    means = {"right": heads.right, "wrong": heads.wrong}
    apart = [f"{mean:.3g} on {name} pairs" for name, mean in means.items() if mean is not None]
    return f"{len(heads.accuracies)} heads{alone}" + (f", disagreeing by {' and '.join(apart)}" if apart else "")


async def run(job: StageJob) -> Mapping[str, Any]:
    """Reads the preferences, trains, and writes the result next to the model."""
    folder = job.output(REWARD_MODEL).absolute()
    path = job.inputs.get(PREFERENCES)
    stage = job.config.reward_model
    train = RankedTokens(start_chat(job.config), stage.max_length, heads=stage.heads, seed=job.config.run.seed)
    data = await store_preferences(job.config, stage.loss.judgement, train, folder, job.say, made=path)
    job.say(f"reward model: {data.report.summary()}")
    gold = None
    if path is not None and (gold_of_prompt := read_gold(path)):
        gold = [gold_of_prompt[identity] for identity in data.held_out_ids]
    result = await train_reward_model(job.config, data, folder, job.telemetry, job.say, gold=gold)
    write_json(job.run.place / RESULT_FILE, asdict(result))
    job.telemetry.event("trained", **asdict(result))
    job.say(f"reward model: {result.describe()}")
    return asdict(result)


async def train_reward_model(
    config: Config,
    data: StoredJudgements,
    folder: Path,
    telemetry: Telemetry,
    say: Say,
    *,
    gold: Sequence[Sequence[float]] | None = None,
) -> RewardModelResult:
    """Trains on stored preferences, measures on those held out, leaves the finished model in `folder`.

    Ray is connected. The model appears in `folder` whole or not at all. Progress and checkpoints are in a work folder
    next to it, from which a later call continues; it and the rows are removed when the training has finished.

    Args:
        gold: for every held-out record the true scores of its replies; None: the records' own order is the truth.

    Raises:
        CapacityError: the workers do not fit into the cluster, or it has no room in time.
        DataError: the base model or its tokenizer.
        NonFiniteError: loss or gradient; `folder` is untouched.
        RoleError: workers failed more often than `failures` allows, or reported nothing before their deadline.
    """
    started = monotonic()
    settings = inputs_of(RewardTraining, config, config.reward_model, folder, num_records=data.train.num_records)
    recorded = _RECORDED if config.reward_model.loss.judgement == "rankings" else _RECORDED_OF_SCORES
    trained: Trained
    steps, trained = await train_section(
        config,
        config.reward_model,
        partial(RewardModelTask, settings),
        data.folders,
        settings.work,
        Report(telemetry, say, REWARD_MODEL, settings.total_optimizer_steps, recorded, words),
        identity=(*settings.identity, *data.digests),
    )
    qualities = data.held_out_qualities()
    quality = measure_held_out(trained.held_out_scores, qualities, gold)
    if quality.accuracy is not None:
        telemetry.evaluation(len(steps), {"reward_model/held_out_accuracy": quality.accuracy})
    result = RewardModelResult(
        path=str(settings.folder),
        held_out_accuracy=quality.accuracy,
        interval=quality.interval,
        num_pairs=quality.num_pairs,
        kendall_tau=quality.kendall_tau,
        calibration=trained.calibration,
        loss=of_last_tenth(steps, "loss"),
        accuracy=of_last_tenth(steps, "accuracy") if "accuracy" in recorded else None,
        num_records=data.train.num_records,
        num_held_out=data.held_out.num_records,
        num_truncated=data.num_truncated,
        optimizer_steps=len(steps),
        score_mean=trained.stats.mean,
        score_std=trained.stats.std,
        seconds=monotonic() - started,
        heads=measure_heads(trained.held_out_heads, qualities),
    )
    for unfinished in (settings.work, data.folder):
        shutil.rmtree(unfinished, ignore_errors=True)
    return result


def sizes(config: Config, prepared: Prepared) -> RowSizes:
    """Of the records to train on. Raises DataError."""
    stage = config.reward_model
    return judged.sizes(config, prepared, stage.loss.judgement, start_chat(config), stage.max_length)


def run_alone(config: Config, ray_address: str | None) -> Path:
    """Checks, then runs the stage, as a pipeline does. The run keeps the config as it is: `rlhf run` can continue with
    its other stages. Returns the run's folder.

    Raises:
        ConfigError, DataError, CapacityError: before anything starts, except for the resources of a named cluster.
    """
    preferences = config.preferences
    if preferences.path is None:
        raise ConfigError(
            "preferences.path is null: give a preference file, or let the labeller make one with `rlhf run` and "
            "stages: [sample, preferences, reward_model]."
        )
    config = resolved(config, keys=WITHOUT_TRIAL)
    say("checking data and models ...")
    prepared = imported("jobs.check.preflight:check_alone")(config, REWARD_MODEL)
    if named_address(ray_address) is None:
        plan_training(REWARD_MODEL, config.reward_model, find_cluster(None, wait_s=0.0).nodes)
    with cluster(ray_address, wait_s=config.placement.wait_s, tell=say):
        plan_training(REWARD_MODEL, config.reward_model, alive_nodes())
        run = open_run(config, say)
        say(f"run {run.id}, attempt {run.attempt}: {run.path}")
        if (run.path / RESULT_FILE).exists():
            say("an earlier attempt has trained its reward model; nothing is left to do")
        work = imported("jobs.pipeline:run_stages")(alone(config, REWARD_MODEL), run, prepared, say)
        run_async(work, grace_s=config.run.grace_s)
        return run.path
