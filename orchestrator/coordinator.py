"""The coordinator: the loop that drives the roles. It does not depend on Ray or torch and holds no tensors.

One step, and which call waits for which (roles.py has the calls):

    sample   engines            →  rollouts, labelled with the version of the weights that sampled them
    score    reference, reward, critic, policy, in parallel, each shard as soon as it is sampled
    commit   recorders          →  experience, durable before learning starts
    learn    policy and critic, in parallel, sharded over their ranks
    publish  policy → engines   →  all engines at version step + 1, verified
    save     policy, critic     →  a checkpoint when due, during the next sampling; learning waits for it

On shared GPUs these are the phases of turns.py: one at a time, each with what it needs on the devices.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from orchestrator.algorithms.standardising import with_step
from orchestrator.concurrency import both, together
from orchestrator.failures import Supervisor
from orchestrator.filtering import Filter, as_sampled
from orchestrator.held_out import Evaluation
from orchestrator.roles import Learners, Roles
from orchestrator.run.checkpoints import Checkpoints
from orchestrator.run.experience_log import ExperienceLog
from orchestrator.sampler import Sampler, StepRollouts
from orchestrator.turns import Turns, Unshared
from orchestrator.types import Experience, Metrics, RolloutShard, ScoredShard, State
from orchestrator.watching.guards import Guards
from orchestrator.watching.telemetry import Telemetry


@dataclass(frozen=True, kw_only=True)
class Relearning:
    """The part of a run that needs no engines: a fold over its log, state[k + 1] = learn(state[k], experience[k]).

    Args:
        steps: number of steps; the step at which to stop.
        critic_warmup_steps: number of initial steps in which only the critic learns.
        next_kl_coefficient: (coefficient, KL per response, number of samples) of a step -> the next coefficient.
    """

    steps: int
    critic_warmup_steps: int
    next_kl_coefficient: Callable[[float, float, int], float]
    roles: Learners
    log: ExperienceLog
    guards: Guards
    telemetry: Telemetry

    async def relearn(self, state: State) -> State:
        """Learns from the logged steps, starting at `state`, up to `steps`."""
        while state.step < self.steps and self.log.holds(state.step):
            with self.telemetry.step(state.step) as record:
                experience = await self.log.load(state.step)
                record(experience.metrics)
                record(learned := await self.learn(experience))
                await self.guards.check(state.step, {**experience.metrics, **learned})
                state = self.advance(state, experience)
        return state

    async def learn(self, experience: Experience) -> Metrics:
        with self.telemetry.phase("learn"):
            if experience.step < self.critic_warmup_steps:
                return _prefixed("critic", await self.roles.critic.learn(experience))
            policy, critic = await both(self.roles.policy.learn(experience), self.roles.critic.learn(experience))
            learned = experience.metrics["tokens/generated"] * policy["epochs"]
            return {**_prefixed("policy", policy), **_prefixed("critic", critic), "tokens/learned": learned}

    def advance(self, state: State, experience: Experience) -> State:
        kl = experience.metrics["kl/per_response"]
        samples = sum(record.num_samples for record in experience.records)
        coefficient = self.next_kl_coefficient(state.kl_coefficient, kl, samples)
        return state.advance(coefficient, with_step(state.part_moments, experience.records))


@dataclass(frozen=True, kw_only=True)
class Coordinator(Relearning):
    """Runs all steps. No part holds a reference to the coordinator.

    Args:
        filtered: (step, scored shards, score) -> the shards that are learned from, see filtering.py.
    """

    roles: Roles
    sampler: Sampler
    checkpoints: Checkpoints
    evaluation: Evaluation
    meter: Callable[[int], Awaitable[Metrics]]
    filtered: Filter = as_sampled
    turns: Turns = Unshared()  # noqa: RUF009  it has no state
    supervisor: Supervisor

    async def run(self, initial: State) -> State:
        """Runs all steps. After each failure that the supervisor handles, it restarts from the last checkpoint."""
        return await self.supervisor.until_done(lambda: self._run_on(initial))

    async def _run_on(self, initial: State) -> State:
        async with self.checkpoints.saved_on_stop() as standing_at:
            return await self._all_steps(initial, standing_at)

    async def _all_steps(self, initial: State, standing_at: Callable[[State | None], None]) -> State:
        self.turns.forget()
        state = await self.restore(initial)
        standing_at(state)
        await self.publish(state)
        await self.evaluation.run_if_due(state)
        await self.checkpoints.save_if_due(state)
        async with self.sampler.running(first_step=state.step, end_step=self.steps):
            while state.step < self.steps:
                with self.telemetry.step(state.step) as record:
                    with self.telemetry.phase("generate"):
                        rollouts = await self.sampler.next()
                    await self.checkpoints.settled()
                    with self.telemetry.phase("score"):
                        scored = await self.filtered(state.step, await self.score(rollouts), self.score)
                    with self.telemetry.phase("commit"):
                        experience = await self.log.commit(state, scored)
                    record(experience.metrics)
                    standing_at(None)
                    record(learned := await self.learn(experience))
                    await self.guards.check(state.step, {**experience.metrics, **learned})
                    state = self.advance(state, experience)
                    standing_at(state)
                    record(await self.meter(state.version))
                    record(await self.publish(state))
                await self.evaluation.run_if_due(state)
                await self.checkpoints.begin_if_due(state, self.telemetry.phase("save"))
        return state

    async def restore(self, initial: State) -> State:
        """Restores the last checkpoint, then learns the logged steps after it again."""
        saved = await self.checkpoints.restore() or initial
        self.telemetry.rewind(saved.step)
        state = await self.relearn(saved)
        if later := self.log.set_aside_after(state.step):
            self.telemetry.event("set_aside", lost_step=state.step, steps=list(later))
        self.evaluation.resume(state)
        if state.step:
            self.telemetry.restored(_whence(saved, state))
        return state

    async def score(self, rollouts: StepRollouts) -> list[ScoredShard]:
        async with self.turns.hold("score"):
            return await together(self._score_shard(shard) for shard in rollouts.shards)

    async def _score_shard(self, pending: Awaitable[RolloutShard]) -> ScoredShard:
        with self.telemetry.phase("generate"):
            shard = await pending
        roles = self.roles
        scorers = (roles.policy, roles.reference, roles.critic, roles.reward)
        old_logprobs, ref_logprobs, values, rewards = await together(scorer.score(shard) for scorer in scorers)
        return ScoredShard(shard, old_logprobs, ref_logprobs, values, rewards)

    async def publish(self, state: State) -> Metrics:
        with self.telemetry.phase("publish"):
            async with self.turns.hold("publish"):
                report = await self.roles.publisher.publish(state.version)
            await self.sampler.announce(state.version)
        return {
            "publish/tensors_verified": report.num_tensors,
            "publish/bytes": report.num_bytes,
            "publish/verify_s": report.verify_s,
            "publish/apply_s": report.apply_s,
        }


def _whence(saved: State, state: State) -> Mapping[str, str]:
    """The parts of a resumed run's state, and the source of each."""
    again = f"steps {saved.step} to {state.step - 1}" if state.step > saved.step else "nothing"
    return {
        "weights, fp32 masters, optimizers, learning rates": f"checkpoint of step {saved.step}"
        if saved.step
        else "the start",
        "learned again from the log": again,
        "step, and version of the weights": str(state.step),
        "KL coefficient": f"{state.kl_coefficient:g}",
        "next prompts and seeds": f"those of step {state.step}",
        "metrics": f"steps 0 to {state.step - 1}, each once",
    }


def _prefixed(role: str, metrics: Mapping[str, float]) -> Metrics:
    return {f"{role}/{name}": value for name, value in metrics.items()}
