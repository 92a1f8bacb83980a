"""Stage `rl`: reinforcement learning with the coordinator and all of its roles."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from jobs.command import imported
from jobs.stages.rewarding import INSTEAD, environments, reward_inputs, reward_reads, reward_uses
from jobs.stages.sample import EPISODES, EXPERIENCE, policy_use
from jobs.stages.stage import POLICY, Artifact, Costs, Inputs, ModelUse, Row, Sizes, Stage
from orchestrator.config.config import Config
from orchestrator.config.rewards import main_reward_model
from orchestrator.planning.demands import all_demands
from orchestrator.planning.disk import (
    EXPORTED_BYTES_PER_PARAM,
    SAVED_BYTES_PER_PARAM,
    Disk,
    learned_params,
    samples_disk,
)
from orchestrator.planning.memory import AVERAGE_BYTES
from orchestrator.planning.placement import Node, Plan, place
from orchestrator.run.checkpoints import is_complete
from orchestrator.run.experience_log import MANIFEST
from orchestrator.run.folder import RunFolder, has_finished
from orchestrator.watching.telemetry import SHOWN

if TYPE_CHECKING:
    from jobs.prepare import Prepared


class Rl(Stage):
    kind = "rl"
    start_s = 40.0
    samples = True
    starts_from_policy = True
    sections = (
        "algorithm",
        "checkpoints",
        "critic",
        "demonstrations",
        "environment",
        "evaluation",
        "policy",
        "prompts",
        "ptx",
        "reference",
        "reward",
        "reward_model",
        "rl",
        "rollout",
        "sft",
    )
    leaves = ("checkpoints", "export", "export-best", "evaluation", "log", "tensorboard")
    has_log = True
    steps_key = "rl.steps"
    shown = SHOWN
    checks = (
        "jobs.check.prompts:enough_to_train",
        "jobs.check.rewards:check_reward",
        "jobs.check.rewards:check_gold",
        "jobs.check.environments:check_environment",
        "jobs.check.conversations:check_vocabularies",
        "jobs.check.conversations:check_scoring_conversations",
        "jobs.check.rewards:check_reward_window",
        "jobs.check.trackers:check_trackers",
        "jobs.check.demonstrations:check_mixed_in",
    )
    instead = MappingProxyType(INSTEAD)

    def reads(self, config: Config) -> Sequence[str]:
        return reward_reads(config)

    def makes(self, config: Config) -> Sequence[Artifact]:
        policy = [Artifact(POLICY, "export")] if config.checkpoints.export else []
        return (*policy, *([_experience(config)] if _is_judged(config) else []))

    def problems(self, config: Config) -> Iterable[str]:
        if not config.ptx.coefficient:
            return
        if config.demonstrations.path is None:
            yield "ptx.coefficient needs demonstrations, and demonstrations.path is null: give a file, or set it to 0."
        if config.rollout.temperature != 1.0:
            yield (
                "ptx.coefficient needs rollout.temperature=1, because log-probs are at that temperature. It "
                f"is {config.rollout.temperature:g}. Change one of them."
            )
        if config.sft.max_length > config.model.max_length:
            yield f"sft.max_length={config.sft.max_length} exceeds model.max_length={config.model.max_length}: lower it"

    def inputs(self, config: Config) -> Inputs:
        reward, evaluation = reward_inputs(config), config.evaluation
        gold = {evaluation.gold} if evaluation.gold and evaluation.prompts else set()
        files = {"demonstrations.path": config.demonstrations.path} if config.ptx.coefficient else {}
        own = {"critic.path": config.critic.path, "reference.path": config.reference.path}
        rules = reward.rules | gold | environments(config)
        return Inputs(
            files={**reward.files, **files},
            models={**reward.models, **own},
            rules=rules,
        )

    def models(self, config: Config) -> Iterable[ModelUse]:
        longest = config.model.max_length
        yield replace(policy_use(config, exports=True), lora=config.policy.lora)
        if config.reference.path is not None and not config.reference_is_trunk:
            yield ModelUse("reference.path", config.reference.path, scores=False, window=longest)
        yield from reward_uses(config)
        if config.algorithm.needs_critic:
            yield _critic_use(config)

    def plan(self, config: Config, nodes: Sequence[Node]) -> Plan:
        return place(all_demands(config), nodes, mode=config.placement.mode)

    def arithmetic(self, config: Config, prepared: Prepared) -> Sequence[Row]:
        return imported("jobs.check.batches:batch_rows")(config, len(prepared.prompts.train))  # type: ignore[no-any-return]

    def disk(self, config: Config, sizes: Sizes) -> Disk:
        """Checkpoints (those kept, the best, and one more while saving), exports, and the experience log."""
        size = sizes.of(config.model.path)
        num_params, num_saved = size.num_params, learned_params(size, config.policy)
        average = AVERAGE_BYTES * num_params if config.policy.ema_decay else 0
        if config.algorithm.needs_critic:
            critic = sizes.of(*imported("jobs.stages.settings:critic_base")(config))
            num_params += critic.num_params
            num_saved += learned_params(critic, config.critic)
        keeps_best = config.checkpoints.best_metric is not None and config.evaluation.every_steps > 0
        saved = (config.checkpoints.keep + 1 + keeps_best) * (SAVED_BYTES_PER_PARAM * num_saved + average)
        exported = EXPORTED_BYTES_PER_PARAM * num_params * (1 + keeps_best)
        experience = samples_disk(config.rl.steps * config.samples_per_step, config.model.max_length)
        return Disk(saved + exported + experience.kept)

    def seconds(self, costs: Costs, prepared: Prepared) -> float:
        return costs.rl(prepared.prompts.train, prepared.prompts.held_out)

    def is_finished(self, config: Config, run: RunFolder) -> bool:
        """Its last step is saved and exported. A finished run can be extended by more steps."""
        made = all((run.place / made.path).exists() for made in self.makes(config))
        told = has_finished(run.path, run.stage or self.kind)
        return made and told and is_complete(run.checkpoints, config.rl.steps)


def _is_judged(config: Config) -> bool:
    """Whether people judge samples of the log."""
    key = "people.source"
    return any(e.kind == "people" and e.set.get(key, config.people.source) == "log" for e in config.stages)


def _experience(config: Config) -> Artifact:
    manifest = f"log/step-{config.rl.steps - 1:06d}/{MANIFEST}"
    return Artifact(EXPERIENCE, manifest, holds=EPISODES if config.environment.name else "")


def _critic_use(config: Config) -> ModelUse:
    main = main_reward_model(config.reward)
    key, source = main if main is not None else ("reward", None)
    starts = (
        ("critic.path", config.critic.path),
        (f"{key}.path", source.path if source else None),
        ("reward_model.base", config.reward_model.base if source else None),
        ("model.path", config.model.path),
    )
    key, path = next((key, path) for key, path in starts if path is not None)
    return ModelUse(
        f"critic ({key})",
        path,
        scores=True,
        window=config.model.max_length,
        checkpointing=config.critic.gradient_checkpointing,
        lora=config.critic.lora,
    )
