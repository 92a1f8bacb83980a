"""`python -m benchmarks.staleness`: the loop at `rl.max_staleness` 0, 1 and 2, with sampling and learning on separate
cores.

Real runs of the quickstart's model. A step can't be shorter than the longer of its two sides, which are measured in the
same step: `sample` is the engine's busy time (including weight updates), `learn` the learning of policy and critic,
`score` the time of policy, critic, reference and reward after sampling.
"""

from __future__ import annotations

import os
import statistics
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from functools import partial
from typing import Annotated

import psutil
import typer

from benchmarks.harness import Figure, Pairs, measure_turns, ratio_figure
from benchmarks.runs import ROOT, metrics_of_run
from benchmarks.table import report
from jobs.command import say
from orchestrator.errors import CapacityError

CONFIG = ROOT / "jobs" / "configs" / "ppo.yaml"
STALENESS = (0, 1, 2)
WARM_UP_STEPS = 1
QUICKSTART_TOKENS = 28
TARGET = 1.15
PLACES = 16  # CPUs that Ray offers; cores are assigned below
PIN_EVERY_S = 1.0
SAMPLING_ROLES = ("RolloutWorker", "ReferenceWorker", "RewardWorker")
LEARNING_ROLES = ("PublishingPolicy", "CriticWorker")


@dataclass(frozen=True)
class Step:
    """Seconds of one step and of its parts."""

    step_s: float
    sample_s: float
    score_s: float
    learn_s: float
    publish_s: float

    @property
    def longer_side_s(self) -> float:
        return max(self.sample_s, self.learn_s)

    @property
    def longer_side_with_scoring_s(self) -> float:
        return max(self.sample_s, self.score_s + self.learn_s)


def main(
    rounds: Annotated[int, typer.Option(help="Runs at each staleness.")] = 1,
    steps: Annotated[int, typer.Option(help="Measured steps per run.")] = 5,
    max_new_tokens: Annotated[int, typer.Option(help="Longest response.")] = QUICKSTART_TOKENS,
) -> None:
    """Measures, writes benchmarks/results/staleness*.json and shows the table."""
    measured: dict[int, list[Step]] = {staleness: [] for staleness in STALENESS}

    def turn(staleness: int) -> float:
        found = run(staleness, steps, max_new_tokens)
        measured[staleness].extend(found)
        say(f"staleness {staleness}: {describe(found)}")
        return statistics.median(step.step_s for step in found)

    measure_turns([partial(turn, staleness) for staleness in STALENESS], rounds=rounds)
    suffix = "" if max_new_tokens == QUICKSTART_TOKENS else f"_{max_new_tokens}"
    report(f"staleness{suffix}", figures(measured, max_new_tokens))


def figures(measured: Mapping[int, Sequence[Step]], max_new_tokens: int) -> list[Figure]:
    on_policy_s = statistics.median(step.step_s for step in measured[0])
    found = []
    for staleness, steps in measured.items():
        step_s = [step.step_s for step in steps]
        name = f"staleness {staleness}, {max_new_tokens} tokens: step"
        detail = f"{describe(steps)}; {on_policy_s / statistics.median(step_s):.2f} x as fast as on-policy"
        found += [
            ratio_figure(
                f"{name} / max(sample, learn)",
                Pairs(step_s, [step.longer_side_s for step in steps]),
                "s",
                better="lower",
                target=TARGET if staleness == 1 else None,
                detail=detail,
            ),
            ratio_figure(
                f"{name} / max(sample, score + learn)",
                Pairs(step_s, [step.longer_side_with_scoring_s for step in steps]),
                "s",
                better="lower",
            ),
        ]
    return found


def describe(steps: Sequence[Step]) -> str:
    """The medians of a step's parts."""
    names = [field.name for field in fields(Step)]
    parts = {name: statistics.median(getattr(step, name) for step in steps) for name in names}
    return ", ".join(f"{name.removesuffix('_s')} {seconds:.3g}" for name, seconds in parts.items())


def run(staleness: int, steps: int, max_new_tokens: int) -> list[Step]:
    """The measured steps of one run. Raises RlhfError if the job fails."""
    keys = overrides(staleness, WARM_UP_STEPS + steps, max_new_tokens)
    with pinned():
        lines = metrics_of_run(CONFIG, keys, num_cpus=PLACES)
    found = [line["metrics"] for line in lines if line["kind"] == "step"]
    return [step_of(metrics) for metrics in found[WARM_UP_STEPS:]]


def overrides(staleness: int, steps: int, max_new_tokens: int) -> list[str]:
    cores = len(os.sched_getaffinity(0))
    return [
        "stages=[rl]",
        "run.name=staleness",
        "reward.name=rules",
        "reward.rules=[{function: 'actors.rewards.rules:length_target'}]",
        f"model.max_length={64 + max_new_tokens}",
        f"rollout.max_new_tokens={max_new_tokens}",
        f"rollout.cpus_per_replica={cores // 2}",
        "critic.warmup_steps=0",
        "rl.prompts_per_step=32",
        "algorithm.minibatches=2",
        f"rl.steps={steps}",
        f"rl.max_staleness={staleness}",
        "algorithm.importance_cap=2.0",
        "placement.mode=separate",
        "evaluation.prompts=0",
        "checkpoints.export=false",
        "telemetry.tensorboard=false",
    ]


def step_of(metrics: Mapping[str, float]) -> Step:
    return Step(
        step_s=metrics["time/step_s"],
        sample_s=metrics["busy/rollout_s"],
        score_s=metrics["time/score_s"] - metrics["time/generate_s"],  # scoring waits for the step's only shard
        learn_s=metrics["time/learn_s"],
        publish_s=metrics["time/publish_s"],
    )


@contextmanager
def pinned() -> Iterator[None]:
    """Pins sampling roles and learning roles to separate halves of the cores during the context."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise CapacityError("sampling and learning need one core each, but this machine has only one; use another.")
    sampling, learning = set(cores[: len(cores) // 2]), set(cores[len(cores) // 2 :])
    over = threading.Event()

    def keep_pinning() -> None:
        while not over.wait(PIN_EVERY_S):
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.NoSuchProcess, ProcessLookupError):
                    _pin(process, sampling, learning)

    thread = threading.Thread(target=keep_pinning, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _pin(process: psutil.Process, sampling: set[int], learning: set[int]) -> None:
    """Threads that are not yet on their role's cores: affinity is per thread and inherited."""
    title = " ".join(process.cmdline()[:1])
    role = title.removeprefix("ray::").partition(".")[0].strip()
    if role not in (*SAMPLING_ROLES, *LEARNING_ROLES):
        return
    mine = sampling if role in SAMPLING_ROLES else learning
    for thread in process.threads():
        if os.sched_getaffinity(thread.id) != mine:
            os.sched_setaffinity(thread.id, mine)


if __name__ == "__main__":
    typer.run(main)
