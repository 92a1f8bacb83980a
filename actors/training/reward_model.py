"""Reward-model training, as one Ray Train worker runs it: all replies to a prompt in one term of the loss (Ouyang 2022,
eq. 1), the learner, packing and losses those of PPO."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from actors.learning import distributed
from actors.learning.distributed import Group
from actors.learning.heads import ValueModel
from actors.learning.learner import Learner, LearnerSettings, Update
from actors.learning.model import load_scorer, resolve_model
from actors.learning.objectives.losses import LossTerms, ranking_loss
from actors.learning.packing import MicroBatch, TokenRows
from actors.learning.worker import Share, answers
from actors.rewards.model import RewardStats, write_stats
from actors.text.conversations import Chat, base_chat
from actors.text.templates import OWN_CHAT, ChatSettings
from actors.training.ranked_rows import RankedRows, padding_token, ranked_rows
from actors.training.train_run import PROGRESS_FILE
from orchestrator.algorithms.ranking import epoch_batches, spread
from orchestrator.data.records import RankingRecord
from orchestrator.errors import RlhfError
from orchestrator.run.storage import follow_umask, sync_tree, writing

CALIBRATION_REPLIES = 256  # the mean of that many scores is known to a sixteenth of their standard deviation

Result = TypeVar("Result")


@dataclass(frozen=True)
class RewardTraining:
    """What every worker is told beside the preferences.

    Args:
        model: folder or name of the model to start from, see resolve_model; `cache_dir` holds converted models.
        policy: of the policy, whose conversations `chat` is about; see base_chat.
        folder: the finished reward model; replaced as a whole.
        work: folder for progress and the unfinished model, on the file system of `folder`.
        learner: its `total_optimizer_steps` covers all epochs.
        threads: CPU threads of one worker.
        timeout_s: deadline of every collective.
        layers: kept of the base's; see load_scorer.
    """

    model: str
    policy: str
    cache_dir: Path
    folder: Path
    work: Path
    learner: LearnerSettings
    seed: int
    epochs: int
    prompts_per_batch: int
    micro_batch_tokens: int
    max_length: int
    threads: int
    timeout_s: float
    layers: int | None = None
    chat: ChatSettings = OWN_CHAT
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Trained:
    """What training found. `held_out_scores` holds, per record, the scores of its replies, best reply first."""

    held_out_scores: Sequence[Sequence[float]]
    stats: RewardStats
    num_truncated: int


class RewardTrainer:
    """One rank of reward-model training. Complete when constructed; see Learner for what is collective.

    Raises:
        DataError: on all ranks, when one of them can't load the model or tokenise the preferences.
    """

    def __init__(
        self,
        settings: RewardTraining,
        train: Sequence[RankingRecord],
        held_out: Sequence[RankingRecord],
        group: Group,
    ) -> None:
        self.settings, self.group = settings, group

        def load() -> tuple[Chat, Any, RankedRows, RankedRows]:
            folder = resolve_model(settings.model, settings.cache_dir)
            policy = resolve_model(settings.policy, settings.cache_dir)
            chat = base_chat(folder, policy, settings.chat, trust_remote_code=settings.trust_remote_code)
            scorer = load_scorer(
                folder,
                settings.learner.torch_dtype,
                new_head="normal",
                seed=settings.seed,
                layers=settings.layers,
                trust_remote_code=settings.trust_remote_code,
            )
            rows = [ranked_rows(part, chat, max_length=settings.max_length) for part in (train, held_out)]
            return chat, scorer, rows[0], rows[1]

        self.chat, scorer, self._train, self._held_out = _all_or_none(load, group)
        padding = padding_token(self.chat)
        self.chat.tokenizer.pad_token = self.chat.tokenizer.convert_ids_to_tokens(padding)
        scorer.config.pad_token_id = padding
        self._learner = Learner(ValueModel(scorer), settings.learner)

    def fit(self, report: Callable[[Mapping[str, float]], None]) -> None:
        """All epochs.

        Args:
            report: gets the metrics of every optimizer step.

        Raises:
            NonFiniteError: on all ranks, before anything non-finite is applied.
        """
        settings = self.settings
        for epoch in range(settings.epochs):
            batches = epoch_batches(
                self._train.num_records,
                records_per_batch=settings.prompts_per_batch,
                seed=settings.seed,
                epoch=epoch,
            )
            for number, records in enumerate(batches):
                started = time.monotonic()
                update = self._update(records, what=f"epoch {epoch}, batch {number}")
                seconds = time.monotonic() - started
                num_tokens = sum(self._train.lengths[row] for record in records for row in self._train.rows_of(record))
                report(_step_metrics(update) | {"tokens": num_tokens, "seconds": seconds})

    def _update(self, records: Sequence[int], *, what: str) -> Update:
        micros = self._train.micro_batches(records, self.group, self.settings.micro_batch_tokens)
        return self._learner.update(
            [self._train.rows.pack(rows, self._learner.device) for rows in micros],
            _objective,
            count=float(len(records)),
            what=f"reward model, {what}",
        )

    def finish(self) -> Trained:
        """Scores the held-out replies and some of the training replies, writes the finished model."""
        held_out = self._scores(self._held_out.rows)
        calibration = spread(range(self._train.first_row[-1]), CALIBRATION_REPLIES)
        stats = self._export(self._scores(TokenRows(self._train.table.take(calibration))))
        ranked = [[held_out[row] for row in self._held_out.rows_of(i)] for i in range(self._held_out.num_records)]
        return Trained(ranked, stats, self._train.num_truncated + self._held_out.num_truncated)

    def _scores(self, rows: TokenRows) -> list[float]:
        if not rows.num_rows:
            return []
        mine: dict[int, float] = {}
        for micro, (_, last_B) in answers(
            rows,
            self._learner.pass_through,
            Share(self.group.rank, self.group.world_size),
            micro_batch_tokens=self.settings.micro_batch_tokens,
            device=self._learner.device,
        ):
            mine |= dict(zip(micro.rows, last_B.float().cpu().tolist(), strict=True))
        parts: list[dict[int, float]] = [{} for _ in range(self.group.world_size)]
        dist.all_gather_object(parts, mine)
        scores = {row: score for part in parts for row, score in part.items()}
        return [scores[row] for row in range(rows.num_rows)]

    def _export(self, calibration: Sequence[float]) -> RewardStats:
        """Writes the model beside its place and moves it there; rank 0 decides, all ranks take part."""
        unfinished = self.settings.work / "model"
        if self.group.rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
            with writing(unfinished):
                unfinished.mkdir(parents=True)
        self._learner.export(unfinished, self.chat.tokenizer)

        def publish() -> RewardStats | None:
            if self.group.rank:
                return None
            with writing(unfinished):
                self.chat.save(unfinished)
                stats = write_stats(unfinished, calibration)
                follow_umask(unfinished)
                sync_tree(unfinished)
                _replace_folder(unfinished, self.settings.folder)
            return stats

        published: list[RewardStats | None] = [None] * self.group.world_size
        dist.all_gather_object(published, _all_or_none(publish, self.group))
        return next(stats for stats in published if stats is not None)


def train_worker(config: Mapping[str, Any]) -> Trained | RlhfError:
    """The loop of one Ray Train worker.

    Args:
        config: `settings` (RewardTraining) and `records`, an object reference to (train, held_out).

    Returns:
        What was found, or the error of ours that ended all ranks: it would come again, so Ray Train shall not retry.
    """
    settings: RewardTraining = config["settings"]
    train, held_out = ray.get(config["records"])
    group = _group_of_ray_train(settings)
    progress = settings.work / PROGRESS_FILE
    if group.rank == 0:
        progress.unlink(missing_ok=True)
    try:
        trainer = RewardTrainer(settings, train, held_out, group)
        trainer.fit(lambda metrics: _append(progress, metrics) if group.rank == 0 else None)
        return trainer.finish()
    except RlhfError as error:
        return error


def _group_of_ray_train(settings: RewardTraining) -> Group:
    """DeepSpeed on the process group that Ray Train has made."""
    context = ray.train.get_context()
    local_rank = os.environ["LOCAL_RANK"]
    if torch.cuda.is_available():
        torch.cuda.set_device(ray.train.torch.get_device())
    group = Group(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        master_addr=os.environ["MASTER_ADDR"],
        master_port=int(os.environ["MASTER_PORT"]),
        timeout_s=settings.timeout_s,
        threads=settings.threads,
    )
    distributed.join(group)
    # Ray Train shows a worker all GPUs of its node, and DeepSpeed takes the one of this number.
    os.environ["LOCAL_RANK"] = local_rank
    return group


def _objective(output: tuple[torch.Tensor, torch.Tensor], micro: MicroBatch) -> LossTerms:
    return ranking_loss(output[1], micro.columns["quality"], micro.columns["group"])


def _step_metrics(update: Update) -> dict[str, float]:
    means = update.means
    return {
        "loss": means["ranking_loss"],
        "accuracy": means["correct_pairs"] / means["pairs"],
        "margin": means["margin_pairs"] / means["pairs"],
        "grad_norm": update.grad_norm,
        "learning_rate": update.learning_rate,
    }


def _all_or_none(work: Callable[[], Result], group: Group) -> Result:
    """Runs `work` on every rank; when it fails on one, all raise, so that none waits for the others in vain."""
    results: list[Result] = []
    problem: RlhfError | None = None
    try:
        results.append(work())
    except RlhfError as error:
        problem = error
    problems: list[RlhfError | None] = [None] * group.world_size
    dist.all_gather_object(problems, problem)
    for found in problems:
        if found is not None:
            raise found
    return results[0]


def _replace_folder(source: Path, target: Path) -> None:
    replaced = source.with_name("replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        target.rename(replaced)
    source.rename(target)


def _append(path: Path, metrics: Mapping[str, float]) -> None:
    with writing(path), path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(metrics) + "\n")
