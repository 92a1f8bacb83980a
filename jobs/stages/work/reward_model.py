"""The work of stage `reward_model`: trains on ranked replies with Ray Train, and measures on held-out ones."""

from __future__ import annotations

import math
import shutil
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

from actors.groups.cluster import alive_nodes, named_address
from actors.training.reward_model import RewardModelTask, RewardTraining, Trained
from actors.training.train_run import Progress
from jobs.check.capacity import find_cluster
from jobs.cluster.connection import cluster
from jobs.command import imported, run_async, say
from jobs.prepare import find_data
from jobs.resolve import WITHOUT_TRIAL, resolved
from jobs.stages.preferences import PREFERENCES
from jobs.stages.reward_model import RESULT_FILE
from jobs.stages.settings import alone, chat_template
from jobs.stages.stage import StageJob
from jobs.stages.work.labeller import read_gold
from jobs.stages.work.training import Report, train_section, work_of
from orchestrator.algorithms.ranking import concordant_pairs, kendall_tau, num_pairs, wilson_interval
from orchestrator.config.config import Config
from orchestrator.data.readers import read_rankings
from orchestrator.data.records import RankingRecord
from orchestrator.errors import ConfigError, DataError
from orchestrator.planning.demands import REWARD_MODEL, plan_training
from orchestrator.prompts import split
from orchestrator.run.folder import open_run
from orchestrator.run.storage import write_json
from orchestrator.watching.telemetry import Telemetry

_RECORDED = ("loss", "accuracy", "grad_norm", "learning_rate")

Say = Callable[[str], None]


@dataclass(frozen=True)
class RewardModelResult:
    """What the stage made and how good it is.

    Args:
        path: the reward model, a Hugging Face folder (AutoModelForSequenceClassification, one label).
        held_out_accuracy: share of held-out pairs in the right order, equal scores counting half; None: no pairs.
        interval: its 95 % interval (Wilson), as if pairs were independent; pairs of one prompt are not quite.
        num_pairs: held-out pairs.
        kendall_tau: mean over held-out prompts with more than two replies; None: there are none.
        loss, accuracy: means over the last tenth of the optimizer steps, on training pairs.
        num_truncated: transcripts that lost tokens at their start.
        score_mean, score_std: of raw scores of training replies, kept in reward_stats.json.
    """

    path: str
    held_out_accuracy: float | None
    interval: Sequence[float]
    num_pairs: int
    kendall_tau: float | None
    loss: float
    accuracy: float
    num_records: int
    num_held_out: int
    num_truncated: int
    optimizer_steps: int
    score_mean: float
    score_std: float
    seconds: float

    def describe(self) -> str:
        parts = [f"{self.path}: {self.num_records} prompts, {self.optimizer_steps} optimizer steps"]
        if self.held_out_accuracy is not None:
            low, high = self.interval
            parts.append(
                f"{self.held_out_accuracy:.1%} of {self.num_pairs} held-out pairs in order "
                f"(95 %: {low:.1%} to {high:.1%})"
            )
        if self.kendall_tau is not None:
            parts.append(f"Kendall tau {self.kendall_tau:.2f}")
        if self.num_truncated:
            parts.append(f"{self.num_truncated} transcripts cut at their start to reward_model.max_length")
        return ", ".join([*parts, f"{self.seconds:.0f} s"])


async def run(job: StageJob) -> Mapping[str, Any]:
    """Reads the preferences, trains, and writes the result next to the model."""
    config = job.config
    preferences = config.preferences
    is_given = preferences.path is not None
    path = find_data(preferences.path) if preferences.path is not None else job.inputs[PREFERENCES]
    records, report = read_rankings(path, preferences.format, preferences.limit)
    job.say(f"reward model: {report.summary()}")
    train, held_out = split_held_out(records, preferences.held_out)
    gold = None
    if not is_given:
        gold_of_prompt = read_gold(path)
        gold = [gold_of_prompt[record.id] for record in held_out]
    result = await train_reward_model(
        config, train, held_out, job.output(REWARD_MODEL), job.telemetry, job.say, gold=gold
    )
    write_json(job.run.place / RESULT_FILE, asdict(result))
    job.telemetry.event("trained", **asdict(result))
    job.say(f"reward model: {result.describe()}")
    return asdict(result)


def split_held_out(
    records: Sequence[RankingRecord], held_out: int | None
) -> tuple[Sequence[RankingRecord], Sequence[RankingRecord]]:
    """(to train on, held out): the last `held_out` records, or (None) a tenth by a hash of the prompt.

    Raises:
        DataError: nothing is left to train on.
    """
    if held_out is None:
        parts = split(records, held_out_fraction=0.1, reward_model_fraction=0.0, salt="preferences")
        train, kept = parts.train, parts.held_out
    else:
        start = max(len(records) - held_out, 0)
        train, kept = tuple(records[:start]), tuple(records[start:])
    if not train:
        raise DataError(
            f"of {len(records)} preferences {len(kept)} are held out, so none is left to train on. Give more "
            "preferences or lower preferences.held_out."
        )
    return train, kept


async def train_reward_model(
    config: Config,
    records: Sequence[RankingRecord],
    held_out: Sequence[RankingRecord],
    folder: Path,
    telemetry: Telemetry,
    say: Say,
    *,
    gold: Sequence[Sequence[float]] | None = None,
) -> RewardModelResult:
    """Trains on `records`, measures on `held_out`, leaves the finished model in `folder`.

    Ray is connected. The model appears in `folder` whole or not at all. Progress and checkpoints are in a work folder
    next to it, from which a later call continues; it is removed when the training has finished.

    Args:
        gold: for every held-out record the true scores of its replies; None: the records' own order is the truth.

    Raises:
        CapacityError: the workers do not fit into the cluster, or it has no room in time.
        DataError: the base model, its tokenizer, or a conversation that its chat template refuses.
        NonFiniteError: loss or gradient; `folder` is untouched.
        RoleError: workers failed more often than `failures` allows, or reported nothing before their deadline.
    """
    started = monotonic()
    folder = folder.absolute()
    settings = _settings(config, folder, num_records=len(records))
    trained: Trained
    steps, trained = await train_section(
        config,
        config.reward_model,
        partial(RewardModelTask, settings),
        (tuple(records), tuple(held_out)),
        settings.work,
        Report(telemetry, say, REWARD_MODEL, settings.total_optimizer_steps, _RECORDED, _words),
        identity=_identity(settings, records, held_out),
    )
    quality = measure(trained.held_out_scores, gold)
    if quality.accuracy is not None:
        telemetry.evaluation(len(steps), {"reward_model/held_out_accuracy": quality.accuracy})
    last = steps[-math.ceil(len(steps) / 10) :]
    result = RewardModelResult(
        path=str(folder),
        held_out_accuracy=quality.accuracy,
        interval=quality.interval,
        num_pairs=quality.num_pairs,
        kendall_tau=quality.kendall_tau,
        loss=_mean(step["loss"] for step in last),
        accuracy=_mean(step["accuracy"] for step in last),
        num_records=len(records),
        num_held_out=len(held_out),
        num_truncated=trained.num_truncated,
        optimizer_steps=len(steps),
        score_mean=trained.stats.mean,
        score_std=trained.stats.std,
        seconds=monotonic() - started,
    )
    shutil.rmtree(settings.work, ignore_errors=True)
    return result


@dataclass(frozen=True)
class Quality:
    """How scores order held-out replies; see RewardModelResult."""

    accuracy: float | None
    interval: tuple[float, float]
    num_pairs: int
    kendall_tau: float | None


def measure(scores: Sequence[Sequence[float]], gold: Sequence[Sequence[float]] | None = None) -> Quality:
    """Args:
    scores: per record, of its replies, best reply first.
    gold: per record, their true scores. None: the order is the truth.
    """
    correct = sum(concordant_pairs(replies) for replies in scores)
    pairs = sum(num_pairs(len(replies)) for replies in scores)
    truth = gold if gold is not None else [range(len(replies), 0, -1) for replies in scores]
    taus = [kendall_tau(replies, true) for replies, true in zip(scores, truth, strict=True) if len(replies) > 2]
    known = [tau for tau in taus if tau is not None]
    return Quality(
        accuracy=correct / pairs if pairs else None,
        interval=wilson_interval(correct, pairs),
        num_pairs=pairs,
        kendall_tau=_mean(known) if known else None,
    )


def _settings(config: Config, folder: Path, *, num_records: int) -> RewardTraining:
    return RewardTraining(
        stage=config.reward_model,
        policy=config.model,
        template=chat_template(config),
        cache=config.run.cache,
        folder=folder,
        work=work_of(folder),
        total_optimizer_steps=config.reward_model.num_steps(num_records),
        seed=config.run.seed,
    )


def _identity(
    settings: RewardTraining, records: Sequence[RankingRecord], held_out: Sequence[RankingRecord]
) -> tuple[object, ...]:
    """Everything that decides what is learned."""
    stage = settings.stage.model_dump(exclude={"checkpoint_every_steps"})
    model = settings.policy
    policy = (model.path, model.compute_dtype, model.system_prompt, model.today, settings.template)
    return policy, stage, settings.total_optimizer_steps, settings.seed, tuple(records), tuple(held_out)


def _words(steps: Sequence[Progress]) -> str:
    loss, accuracy = (_mean(step[name] for step in steps) for name in ("loss", "accuracy"))
    return f"loss {loss:.3f}  pairs in order {accuracy:.0%}"


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def run_alone(config: Config, ray_address: str | None) -> None:
    """Checks, then runs the stage, as a pipeline does. The run keeps the config as it is: `rlhf run` can continue with
    its other stages.

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
