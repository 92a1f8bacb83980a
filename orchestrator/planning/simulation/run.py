"""Runs the coordinator over simulated roles and measures its steps."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from orchestrator.coordinator import Coordinator
from orchestrator.failures import Unsupervised
from orchestrator.filtering import Filter, Score
from orchestrator.held_out import Evaluation
from orchestrator.planning.simulation.roles import (
    Cluster,
    SimulatedModel,
    SimulatedPublisher,
    SimulatedRecorder,
    SimulatedRollouts,
    SimulatedSchedule,
)
from orchestrator.planning.simulation.scenario import ROLES, Layout, Prediction, Work
from orchestrator.planning.simulation.virtual_time import VirtualTimeLoop
from orchestrator.roles import Roles
from orchestrator.run.checkpoints import Checkpoints
from orchestrator.run.experience_log import ExperienceLog
from orchestrator.sampler import Sampler
from orchestrator.turns import InTurn, SharedGpus, Turns, Unshared
from orchestrator.types import Sampling, ScoredShard, State
from orchestrator.watching.guards import Guards
from orchestrator.watching.telemetry import METRICS_FILE, Telemetry, read_lines

PHASES = ("generate", "score", "commit", "learn", "publish")
_STEADY = 2  # number of measured steps; excludes the first, with the first publish, and those at a pipeline's ends


def simulate(work: Work, layout: Layout, *, cache_tokens: float) -> Prediction:
    """Args:
    cache_tokens: capacity of one engine's KV cache.
    """
    filled = 1 + layout.max_staleness
    measured = simulate_steps(work, layout, cache_tokens=cache_tokens, steps=filled + _STEADY + layout.max_staleness)
    steady = measured[filled : filled + _STEADY]
    mean = {name: fmean(step.get(name, 0.0) for step in steady) for name in steady[0]}
    step_s = mean["time/step_s"]
    busy = sum(mean[f"busy/{role}_s"] * layout.devices_of(role) for role in ROLES if f"busy/{role}_s" in mean)
    return Prediction(
        step_s=step_s,
        phases_s={phase: mean[f"time/{phase}_s"] for phase in PHASES},
        idle={role: mean[f"idle/{role}"] for role in _alone(work)},
        idle_devices=max(0.0, 1.0 - busy / (layout.devices * step_s)),
        generated_per_s=mean["tokens/generated"] / step_s,
    )


def _alone(work: Work) -> list[str]:
    """The roles with ranks of their own."""
    return [role for role in ROLES if (work.models.get(role) or role == "rollout") and role not in work.on_trunk]


def simulate_steps(work: Work, layout: Layout, *, cache_tokens: float, steps: int) -> Sequence[Mapping[str, float]]:
    """The metrics of each step, as in a run's metrics.jsonl."""
    with tempfile.TemporaryDirectory(prefix="simulation-") as folder:
        loop = VirtualTimeLoop()
        try:
            coordinator = _coordinator(Path(folder), loop, Cluster(work, layout), cache_tokens, steps)
            loop.run_until_complete(coordinator.run(State(0, 0.0)))
        finally:
            loop.close()
        return [line["metrics"] for line in read_lines(Path(folder) / METRICS_FILE) if line["kind"] == "step"]


def _coordinator(folder: Path, loop: VirtualTimeLoop, cluster: Cluster, cache_tokens: float, steps: int) -> Coordinator:
    layout = cluster.layout
    policy, reference = (SimulatedModel(cluster, role, has_head=True) for role in ("policy", "reference"))
    critic, reward = (SimulatedModel(cluster, role, has_head=False) for role in ("critic", "reward"))
    rollouts, recorder = SimulatedRollouts(cluster, cache_tokens), SimulatedRecorder()
    has_critic = cluster.work.models["critic"] is not None
    learners = {"policy": policy, **({"critic": critic} if has_critic else {})}
    turns = _turns(layout, rollouts, learners, samples_again=cluster.work.rounds > 0)
    telemetry = Telemetry(folder, "simulation", 1, clock=loop.time, wall_clock=loop.time)
    log = ExperienceLog(folder / "log", recorder, max_failed_fraction=0.0)
    cut: dict[str, Any] = {"sampling": Sampling(), "samples_per_shard": layout.samples_per_shard}
    roles = Roles(
        policy=InTurn(policy, "policy", turns),
        critic=InTurn(critic, "critic", turns),
        rollouts=rollouts,
        reference=reference,
        reward=reward,
        recorder=recorder,
        publisher=SimulatedPublisher(cluster),
    )
    sampler = Sampler(
        rollouts,
        SimulatedSchedule(cluster.work.scored),
        max_staleness=layout.max_staleness,
        takes_turns=layout.takes_turns,
        turns=turns,
        **cut,
    )
    return Coordinator(
        steps=steps,
        critic_warmup_steps=0,
        next_kl_coefficient=lambda coefficient, kl, samples: coefficient,
        sampler=sampler,
        filtered=_refilled(sampler, cluster.work.rounds),
        turns=turns,
        roles=roles,
        log=log,
        checkpoints=Checkpoints(folder / "checkpoints", {}, every_steps=0, last_step=steps + 1, keep=1),
        evaluation=Evaluation(
            folder / "evaluation",
            (),
            roles=roles,
            telemetry=telemetry,
            every_steps=0,
            last_step=steps,
            **cut,
        ),
        guards=Guards((), folder=folder, telemetry=telemetry, past=log.metrics, console=_silent),
        telemetry=telemetry,
        meter=cluster.meter,
        supervisor=Unsupervised(),
    )


def _turns(
    layout: Layout, rollouts: SimulatedRollouts, learners: Mapping[str, SimulatedModel], *, samples_again: bool
) -> Turns:
    if not layout.shares_gpus:
        return Unshared()
    return SharedGpus(rollouts if layout.takes_turns else None, learners, samples_again=samples_again)


def _refilled(sampler: Sampler, rounds: int) -> Filter:
    """Samples and scores as many further prompts in each round. Those of a step are learned from, for as many."""

    async def refilled(step: int, scored: list[ScoredShard], score: Score) -> list[ScoredShard]:
        for number in range(1, rounds + 1):
            await score(await sampler.more(step, number, first_index=number * len(scored)))
        return scored

    return refilled


def _silent(line: str) -> None:
    pass
