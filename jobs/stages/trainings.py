"""Stages that train without rollouts: what they have in common."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from jobs.stages.stage import ModelUse, Sizes, Stage
from orchestrator.config.changes import value_of
from orchestrator.config.config import Config
from orchestrator.config.losses import PreferenceLoss, RewardLoss
from orchestrator.config.trainings import OfflineConfig
from orchestrator.planning.demands import plan_training
from orchestrator.planning.disk import Disk, learned_params, training_disk
from orchestrator.planning.placement import Node, Plan
from orchestrator.run.folder import RunFolder


class TrainingStage(Stage):
    """Its kind is also the name of its section and of its workers. The first of its `leaves` is its result, a file that
    is written last."""

    start_s = 25.0
    starts_from_policy = True

    def section(self, config: Config) -> OfflineConfig:
        found: OfflineConfig = value_of(config, self.kind)
        return found

    def initial_model(self, config: Config) -> tuple[str, int | None]:
        """The model, and how many of its layers are kept; None: all."""
        return config.model.path, None

    def plan(self, config: Config, nodes: Sequence[Node]) -> Plan:
        return plan_training(self.kind, self.section(config), nodes)

    def disk(self, config: Config, sizes: Sizes) -> Disk:
        size = sizes.of(*self.initial_model(config))
        section = self.section(config)
        num_saved = learned_params(size, section) if section.checkpoint_every_steps else 0
        return training_disk(size.num_params, num_saved)

    def is_finished(self, config: Config, run: RunFolder) -> bool:
        return (run.place / self.leaves[0]).exists()


class PolicyTrainingStage(TrainingStage):
    """One that trains the policy."""

    def problems(self, config: Config) -> Iterable[str]:
        longest = self.section(config).max_length
        if longest > config.model.max_length:
            yield (
                f"{self.kind}.max_length={longest} exceeds the policy's window model.max_length="
                f"{config.model.max_length}: raise that, or lower {self.kind}.max_length."
            )

    def models(self, config: Config) -> Iterable[ModelUse]:
        section = self.section(config)
        yield ModelUse(
            "model.path",
            config.model.path,
            scores=False,
            window=section.max_length,
            window_key=f"{self.kind}.max_length",
            checkpointing=section.gradient_checkpointing,
            exports=True,
            lora=section.lora,
        )


def unmade_judgements(config: Config, kind: str, loss: PreferenceLoss | RewardLoss, instead: str) -> Iterator[str]:
    """The problem of a loss that learns what no stage makes."""
    if config.preferences.path is None and loss.judgement != "rankings":
        yield (
            f"{kind}.loss.name={loss.name!r} learns {loss.judgement}, which no stage makes: give a file of them, "
            f"preferences.path, or choose {kind}.loss.name={instead}."
        )
