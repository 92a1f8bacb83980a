"""`python -m benchmarks.lora_learning [--seeds N] [--steps N] [--rank N] [--trunk-bits 4] [KEY=VALUE ...]`: what GRPO
learns with adapters and with all weights, from the same prompts, on the embedded model.

The reward is the positivity of a reply (VADER), with a length bound. For each seed both contenders run in turns. The
result is the mean score of held-out replies after the last step less that before the first; both draw the same
replies before the first. The interval of the difference is Student's, over seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import typer

from benchmarks.harness import Figure, interval, measure_turns, plain_figure
from benchmarks.runs import ROOT, metrics_of_run
from benchmarks.table import report
from jobs.command import say

CONFIG = ROOT / "jobs" / "configs" / "quickstart.yaml"
SCORE = "evaluation/gold_mean"
RULE = "actors.rewards.gold:vader_positivity"
FULL, LORA = "full", "lora"


@dataclass(frozen=True)
class Run:
    """Mean held-out scores before and after, mean rewards by step, KL to the start, and median seconds of a step."""

    before: float
    after: float
    rewards: Sequence[float]
    kl: float
    step_s: float

    @property
    def gain(self) -> float:
        return self.after - self.before


def main(
    more: Annotated[list[str] | None, typer.Argument(help="More keys of the config, of both contenders.")] = None,
    seeds: Annotated[int, typer.Option(help="Seeds, from 0 on.")] = 3,
    steps: Annotated[int, typer.Option(help="Steps of a run.")] = 10,
    rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 16,
    trunk_bits: Annotated[int, typer.Option(help="4 or 8: the trunk in so many bits. 0: as it is.")] = 0,
    learning_rate: Annotated[float, typer.Option(help="Of all weights.")] = 9e-5,
    lora_learning_rate: Annotated[float, typer.Option(help="Of adapters.")] = 9e-4,
) -> None:
    """Measures, writes benchmarks/results/lora_learning.json and shows the table."""
    adapters = [f"policy.lora.rank={rank}", *([f"policy.lora.trunk_bits={trunk_bits}"] if trunk_bits else [])]
    keys = {
        FULL: [f"policy.learning_rate={learning_rate}"],
        LORA: [f"policy.learning_rate={lora_learning_rate}", *adapters],
    }
    runs: dict[str, list[Run]] = {name: [] for name in keys}

    def turn(name: str) -> float:
        seed = len(runs[name])
        own = [*keys[name], f"run.seed={seed}", f"rl.steps={steps}", *(more or [])]
        found = run_of(metrics_of_run(CONFIG, [*OVERRIDES, *own]))
        runs[name].append(found)
        say(f"{name}, seed {seed}: {describe(found)}")
        return found.gain

    measure_turns([partial(turn, name) for name in keys], rounds=seeds)
    trunk = f", trunk in {trunk_bits} bits" if trunk_bits else ""
    report("lora_learning", figures(runs, f"{steps} steps, rank {rank}{trunk}"))


def describe(found: Run) -> str:
    rewards = " ".join(f"{reward:.3f}" for reward in found.rewards)
    return (
        f"held out {found.before:.3f} to {found.after:.3f}, KL {found.kl:.2f}, {found.step_s:.1f} s a step; rewards "
        f"{rewards}"
    )


def figures(runs: Mapping[str, Sequence[Run]], what: str) -> list[Figure]:
    differences = [lora.gain - full.gain for lora, full in zip(runs[LORA], runs[FULL], strict=True)]
    gains = [
        plain_figure(
            f"{name}: gain of held-out score",
            [found.gain for found in of_name],
            "score",
            detail=f"{what}; mean {interval([found.gain for found in of_name])}; "
            f"{statistics.median(found.step_s for found in of_name):.1f} s a step",
        )
        for name, of_name in runs.items()
    ]
    detail = f"{what}; mean {interval(differences)}, paired by seed"
    return [*gains, plain_figure("lora less full: gain of held-out score", differences, "score", detail=detail)]


def run_of(lines: Sequence[Mapping[str, object]]) -> Run:
    """From the lines of a run's metrics."""
    kinds: dict[str, list[Mapping[str, float]]] = {"step": [], "evaluation": []}
    for line in lines:
        if line["kind"] in kinds:
            kinds[str(line["kind"])].append(line["metrics"])  # type: ignore[arg-type]
    first, last = kinds["evaluation"][0], kinds["evaluation"][-1]
    return Run(
        first[SCORE],
        last[SCORE],
        [step["reward/mean"] for step in kinds["step"]],
        last["evaluation/kl_per_response"],
        statistics.median(step["time/step_s"] for step in kinds["step"]),
    )


OVERRIDES = (
    "stages=[rl]",
    "run.name=lora-learning",
    f"reward={{name: rules, rules: [{{function: '{RULE}'}}]}}",
    f"evaluation.gold={RULE}",
    "prompts.reward_model_fraction=0",
    "model.dtype=float32",
    "checkpoints.export=false",
    "telemetry.tensorboard=false",
    "telemetry.prometheus_port=null",
)


if __name__ == "__main__":
    typer.run(main)
