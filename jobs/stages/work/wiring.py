"""Wires the parts of a config: groups of actors, placed by the plan, and the coordinator that drives them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from typing import Any

from actors.engines.contract import EngineContext
from actors.groups.cluster import alive_nodes
from actors.groups.group import ActorGroup
from actors.groups.starter import Starter, placed
from actors.groups.supervisor import RaySupervisor
from actors.learning.worker import MixedIn
from actors.remote.publisher import BucketPublisher, PolicyWeights
from actors.remote.roles import (
    ClusterMeter,
    LearnMethods,
    RayLearner,
    RayRecorder,
    RayRollouts,
    ReplicatedScorer,
    ShardedScorer,
)
from actors.remote.transports import CollectiveTransport, HostTransport, SharedTransport, Transport
from actors.rewards import RewardContext
from actors.roles.critic import CriticWorker
from actors.roles.policy import PolicyWorker
from actors.roles.recorder import RecorderWorker
from actors.roles.reference import ReferenceWorker
from actors.roles.reward import RewardWorker
from actors.roles.rollout import RolloutWorker
from actors.roles.states import StatesWorker
from actors.weights.sender import PublishingPolicy
from jobs.command import say
from jobs.grace import saving_s
from jobs.stages.settings import (
    chat_template,
    critic_section,
    critic_warmup_steps,
    engines_sleep,
    episode_tokens,
    experience_settings,
    judge_templates,
    rank_context,
    reward_section,
    roles_in_turn,
    samples_per_shard,
    sampling_of,
    shards_per_step,
    start_s,
    transport_of,
    within,
)
from jobs.stages.work.data.demonstrations import mixed_in
from orchestrator.concurrency import together
from orchestrator.config.config import Config
from orchestrator.config.rewards import ModelSource
from orchestrator.config.sections import LearnerConfig
from orchestrator.coordinator import Coordinator
from orchestrator.failures import FailurePolicy
from orchestrator.filtering import DynamicSampling, Filter, as_sampled
from orchestrator.held_out import Evaluation
from orchestrator.planning.demands import STATES, all_demands
from orchestrator.planning.placement import Demand, Slot
from orchestrator.prompts import PromptSchedule, Splits, sample_requests
from orchestrator.roles import Grouping, Learner, Learners, NoCritic, Recorder, Roles, Rollouts, Trimming
from orchestrator.run.best import Best, BestByEvaluation
from orchestrator.run.checkpoints import Checkpoints
from orchestrator.run.experience_log import ExperienceLog
from orchestrator.run.folder import RunFolder
from orchestrator.sampler import Sampler
from orchestrator.turns import InTurn, Phase, SharedGpus, Turns, Unshared
from orchestrator.types import Prompt
from orchestrator.watching.guards import Guards, acted_before, guard_table
from orchestrator.watching.telemetry import Telemetry

_CRITIC_ON_TRUNK = LearnMethods(
    PolicyWorker.critic_values, PolicyWorker.critic_learn, PolicyWorker.critic_save, PolicyWorker.critic_load
)
EVALUATION_STEP = -1  # used instead of a step in the seeds of held-out samples: the same at every evaluation


def starting(
    config: Config, needed: Sequence[Demand], tell: Callable[[str], None] = say
) -> AbstractAsyncContextManager[Starter]:
    """Places what is needed; on exit all actors have ended and their resources are free.

    Args:
        tell: gets a line for the console while it waits.
    """
    placement = config.placement
    return placed(
        needed,
        mode=placement.mode,
        wait_s=placement.wait_s,
        collective_s=config.deadlines.learn_s,
        tell=tell,
    )


async def start_engines(config: Config, starter: Starter, *, version: int | None) -> ActorGroup:
    """The rollout engines, at `version` from the start, or (None) out of service until the first publish. Their samples
    are episodes of the config's environment, if it names one."""

    def arguments(slot: Slot) -> Mapping[str, Any]:
        context = EngineContext(
            model=config.model,
            threads=slot.threads,
            max_samples=samples_per_shard(config),
            template=chat_template(config),
            rollout=config.rollout,
            publish=config.publish,
            seed=config.run.seed,
            version=version,
            sleeps=version is None and engines_sleep(config),
            environment=config.environment,
            limits=config.rule_limits,
            environment_s=within(config.deadlines.generate_s),
            episode_tokens=episode_tokens(config),
        )
        return {"context": context, "cache": config.run.cache}

    return await starter.group("rollout", RolloutWorker, arguments, starts_alone=engines_sleep(config))


async def start_learners(config: Config, starter: Starter, reward_path: str | None) -> dict[str, ActorGroup]:
    """Policy and critic, if there is one in processes of its own, starting at once."""
    context = rank_context(config)
    table, ptx = mixed_in(config), config.ptx
    rows = None if table is None else MixedIn(table, coefficient=ptx.coefficient, num_rows=ptx.records)
    critic = critic_section(config, reward_path) if config.algorithm.needs_critic else None
    shared = critic if config.critic_is_on_trunk else None
    policy = {"policy": config.policy, "context": context, "mixed_in": rows, "critic": shared}
    groups = {"policy": await starter.ranks("policy", PublishingPolicy, policy)}
    if critic is None or shared is not None:
        return groups
    return {**groups, "critic": await starter.ranks("critic", CriticWorker, {"critic": critic, "context": context})}


async def start_scorers(config: Config, starter: Starter, reward_path: str | None) -> dict[str, ActorGroup]:
    """Reward and reference, if it is not the policy's trunk, starting at once."""
    groups = {"reward": await start_reward(config, starter, reward_path)}
    if not config.reference_is_trunk:
        reference = {"reference": config.reference, "context": rank_context(config)}
        groups["reference"] = await starter.ranks("reference", ReferenceWorker, reference)
    return groups


async def start_reward(config: Config, starter: Starter, reward_path: str | None) -> ActorGroup:
    reward, context = reward_section(config, reward_path), reward_context(config)
    return await starter.group(
        "reward", RewardWorker, lambda slot: {"reward": reward, "context": replace(context, threads=slot.threads)}
    )


async def start_states(config: Config, starter: Starter, source: ModelSource) -> ActorGroup:
    """Replicas of the reward model of `source`."""
    context = reward_context(config)
    return await starter.group(
        STATES, StatesWorker, lambda slot: {"reward": source, "context": replace(context, threads=slot.threads)}
    )


def reward_context(config: Config) -> RewardContext:
    return RewardContext(
        policy=config.model,
        template=chat_template(config),
        cache=config.run.cache,
        limits=config.rule_limits,
        total_s=within(config.deadlines.score_s),
        judge_templates=judge_templates(config),
        adds_episodes=config.environment.name is not None,
    )


async def start_recorders(config: Config, starter: Starter, run: RunFolder) -> ActorGroup:
    arguments = {
        "settings": experience_settings(config),
        "run_id": run.id,
        "gold": config.evaluation.gold,
        "limits": config.rule_limits,
        "gold_s": within(config.deadlines.record_s),
    }
    return await starter.group("recorder", RecorderWorker, lambda slot: arguments)


async def all_ready(groups: Mapping[str, ActorGroup], deadline_s: float) -> None:
    """Waits until every constructor has finished; raises what the first failing one raised."""
    await together(group.await_ready(deadline_s) for group in groups.values())


@asynccontextmanager
async def coordinating(
    config: Config,
    run: RunFolder,
    prompts: Splits[Prompt],
    reward_path: str | None,
    telemetry: Telemetry,
    on_placed: Callable[[Starter], None],
) -> AsyncIterator[Coordinator]:
    """A coordinator whose actors are ready; they end with the context."""

    def tell(what: str) -> None:
        telemetry.event("waiting", what=what)
        say(what)

    async with starting(config, all_demands(config), tell) as starter:
        on_placed(starter)
        deadline_s = start_s(config)
        groups: dict[str, ActorGroup] = {}
        if engines_sleep(config):  # they need empty GPUs to start, and are asleep when they are ready
            groups["rollout"] = await start_engines(config, starter, version=None)
            await all_ready(groups, deadline_s)
        groups |= await start_learners(config, starter, reward_path)
        groups |= await start_scorers(config, starter, reward_path)
        if "rollout" not in groups:
            groups["rollout"] = await start_engines(config, starter, version=None)
        recorders = await start_recorders(config, starter, run)
        await all_ready({**groups, "recorder": recorders}, deadline_s)
        supervisor = supervisor_of(config, starter, telemetry, run, deadline_s)
        yield _coordinator(config, run, prompts, telemetry, {**groups, "recorder": recorders}, supervisor)


def supervisor_of(
    config: Config, starter: Starter, telemetry: Telemetry, run: RunFolder, deadline_s: float
) -> RaySupervisor:
    """Args: deadline_s: of the start of an actor (settings.start_s)."""
    failures = config.failures
    policy = FailurePolicy(
        {
            "infrastructure": failures.infrastructure,
            "programming": failures.programming,
            "data": failures.data,
        },
        failures.window_steps,
    )
    return RaySupervisor(starter, policy, telemetry, say, run=run.path, start_s=deadline_s)


def roles_of(config: Config, groups: Mapping[str, ActorGroup], supervisor: RaySupervisor) -> tuple[Roles, Turns]:
    """The roles over their groups of actors, and their turns on the devices."""
    limits = config.deadlines
    weights = PolicyWeights()
    learners = learners_of(config, groups, weights)
    reward = ReplicatedScorer(groups["reward"], RewardWorker.score, score_s=limits.score_s, supervisor=supervisor)

    async def catch_up(engine: int) -> None:
        await publisher.catch_up(engine)

    rollouts = RayRollouts(
        groups["rollout"],
        generate_s=limits.generate_s,
        sleeps=engines_sleep(config),
        supervisor=supervisor,
        catch_up=catch_up,
    )
    publisher = BucketPublisher(
        groups["policy"],
        groups["rollout"],
        weights=weights,
        supervisor=supervisor,
        bucket_bytes=config.publish.bucket_mib << 20,
        publish_s=limits.publish_s,
        transport=_transport_of(config, groups["policy"], groups["rollout"]),
        tell=say,
        rouse=rollouts.rouse,
    )
    reference = _reference_of(config, groups, supervisor)
    turns = turns_of(config, learners, {"reference": reference, "reward": reward}, rollouts)
    recorder = recorder_of(config, groups["recorder"], supervisor)
    return Roles(
        policy=_in_turn(learners.policy, "policy", turns),
        critic=_in_turn(learners.critic, "policy" if config.critic_is_on_trunk else "critic", turns),
        rollouts=rollouts,
        reference=reference,
        reward=reward,
        recorder=recorder,
        publisher=publisher,
    ), turns


def turns_of(config: Config, learners: Learners, scorers: Mapping[str, Trimming], rollouts: Rollouts) -> Turns:
    """Turns where models share GPUs, with the engines unless these have their own. The states of a critic on the
    policy's trunk come and go with the policy's."""
    there = roles_in_turn(config)
    if not there:
        return Unshared()
    learning = learners.by_role.items()
    return SharedGpus(
        rollouts if engines_sleep(config) else None,
        {role: learner for role, learner in learning if role in there and isinstance(learner, RayLearner)},
        {role: scorer for role, scorer in scorers.items() if role in there},
        samples_again=config.algorithm.filter_rounds is not None,
    )


def _transport_of(config: Config, policy: ActorGroup, engines: ActorGroup) -> Transport:
    publish_s = config.deadlines.publish_s
    kind = transport_of(config, one_host=len(alive_nodes()) == 1)
    if kind == "host":
        return HostTransport(policy, engines, publish_s=publish_s)
    if kind == "shared":
        return SharedTransport(policy, engines, publish_s=publish_s)
    workers = config.rollout.tensor_parallel_size
    return CollectiveTransport(policy, engines, publish_s=publish_s, workers_per_engine=workers)


def _in_turn(learner: Learner, phase: Phase, turns: Turns) -> Learner:
    has_turns = isinstance(turns, SharedGpus) and not isinstance(learner, NoCritic)
    return InTurn(learner, phase, turns) if has_turns else learner


def _reference_of(config: Config, groups: Mapping[str, ActorGroup], supervisor: RaySupervisor) -> ShardedScorer:
    score_s = config.deadlines.score_s
    if config.reference_is_trunk:  # what the policy's ranks have learned would be lost in a restart: none is tried
        shards = shards_per_step(config, is_sharded=config.policy.zero_stage == 3)
        return ShardedScorer(groups["policy"], PolicyWorker.reference_logprobs, shards_per_step=shards, score_s=score_s)
    return ShardedScorer(
        groups["reference"],
        ReferenceWorker.logprobs,
        shards_per_step=shards_per_step(config, is_sharded=config.reference.sharded),
        score_s=score_s,
        supervisor=supervisor,
    )


def _coordinator(
    config: Config,
    run: RunFolder,
    prompts: Splits[Prompt],
    telemetry: Telemetry,
    groups: Mapping[str, ActorGroup],
    supervisor: RaySupervisor,
) -> Coordinator:
    roles, turns = roles_of(config, groups, supervisor)
    rl = config.rl
    schedule = PromptSchedule(
        prompts.train,
        seed=config.run.seed,
        prompts_per_step=rl.prompts_per_step,
        samples_per_prompt=rl.samples_per_prompt,
        greedy_samples=config.algorithm.greedy_samples,
    )
    held_out = sample_requests(
        prompts.held_out[: config.evaluation.prompts],
        samples_per_prompt=1,
        seed=config.run.seed,
        step=EVALUATION_STEP,
    )
    log = experience_log(config, run, roles.recorder)
    sampler = Sampler(
        roles.rollouts,
        schedule,
        sampling=sampling_of(config),
        samples_per_shard=samples_per_shard(config),
        max_staleness=rl.max_staleness,
        takes_turns=config.placement.mode == "colocated",
        turns=turns,
    )
    return Coordinator(
        steps=rl.steps,
        critic_warmup_steps=critic_warmup_steps(config),
        next_kl_coefficient=config.algorithm.next_kl_coefficient,
        sampler=sampler,
        filtered=filtered_of(config, recorder_of(config, groups["recorder"], supervisor), sampler, telemetry),
        roles=roles,
        log=log,
        guards=Guards(
            guard_table(config.guards),
            folder=run.path,
            telemetry=telemetry,
            past=log.metrics,
            console=say,
            acted=acted_before(run.path),
        ),
        checkpoints=Checkpoints(
            run.checkpoints,
            roles.by_role,
            every_steps=config.checkpoints.every_steps,
            last_step=rl.steps,
            keep=config.checkpoints.keep,
            grace_s=saving_s(config.run),
            fence=run.require_newest,
            best=best_of(config, run),
        ),
        evaluation=Evaluation(
            run.evaluation,
            held_out,
            roles=roles,
            telemetry=telemetry,
            sampling=sampling_of(config),
            samples_per_shard=samples_per_shard(config),
            every_steps=config.evaluation.every_steps,
            last_step=rl.steps,
            turns=turns,
        ),
        turns=turns,
        telemetry=telemetry,
        meter=ClusterMeter(
            {role: group for role, group in groups.items() if role != "recorder"},
            run_id=run.id,
        ),
        supervisor=supervisor,
    )


def filtered_of(config: Config, grouping: Grouping, sampler: Sampler, telemetry: Telemetry) -> Filter:
    """Chooses the prompts of a step that are learned from."""
    rounds = config.algorithm.filter_rounds
    if rounds is None:
        return as_sampled
    return DynamicSampling(grouping, sampler, telemetry, prompts_per_step=config.rl.prompts_per_step, rounds=rounds)


def best_of(config: Config, run: RunFolder) -> Callable[[Iterable[int]], Best | None]:
    """Chooses the best of some steps by their evaluations; none without checkpoints.best_metric."""
    metric = config.checkpoints.best_metric
    if metric is None:
        return lambda steps: None
    return BestByEvaluation(run.evaluation, metric, config.checkpoints.best_max_kl).among


def learners_of(config: Config, groups: Mapping[str, ActorGroup], weights: PolicyWeights | None = None) -> Learners:
    """The policy and, if the algorithm needs one, the critic."""
    limits = config.deadlines

    def learner(role: str, settings: LearnerConfig, methods: LearnMethods, **more: Any) -> RayLearner:
        return RayLearner(
            groups[role],
            methods,
            seed=config.run.seed,
            shards_per_step=shards_per_step(config, is_sharded=settings.zero_stage == 3),
            score_s=limits.score_s,
            learn_s=limits.learn_s,
            save_s=limits.save_s,
            **more,
        )

    policy = learner("policy", config.policy, LearnMethods(PolicyWorker.logprobs), weights=weights)
    if not config.algorithm.needs_critic:
        return Learners(policy=policy)
    if config.critic_is_on_trunk:
        critic = learner("policy", config.policy, _CRITIC_ON_TRUNK)
    else:
        critic = learner("critic", config.critic, LearnMethods(CriticWorker.values))
    return Learners(policy=policy, critic=critic)


def recorder_of(config: Config, recorders: ActorGroup, supervisor: RaySupervisor | None = None) -> RayRecorder:
    return RayRecorder(recorders, record_s=config.deadlines.record_s, supervisor=supervisor)


def experience_log(config: Config, run: RunFolder, recorder: Recorder) -> ExperienceLog:
    return ExperienceLog(
        run.log,
        recorder,
        max_failed_fraction=config.reward.max_failed_fraction,
        attempt=run.attempt,
        fence=run.require_newest,
    )
