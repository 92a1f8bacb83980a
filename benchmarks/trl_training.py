"""`python -m benchmarks.trl_training [sft] [reward_model] [preference]`: a training of ours against one of TRL's.

Both start from SmolLM2-135M-Instruct in fp32 and learn the same tokens in the same order, in the same batches and with
the same learning rates, each in a process of its own. DPO's reference log-probs are computed before the first step on
both sides. Ours is the loop of the stages (actors/training/trainer.py) without Ray. The sides take turns.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from actors.groups.cluster import environment
from actors.training.work import PROGRESS_FILE
from benchmarks.harness import Figure, Pairs, ratio_figure
from benchmarks.table import report
from benchmarks.trl.ours import SECTIONS
from benchmarks.trl_step import TRL_PYTHON, call, install_trl
from jobs.command import say

WARM_UP_STEPS = 2
TARGET = 1.5


def main(
    kinds: Annotated[list[str] | None, typer.Argument(help="sft, reward_model, preference; without: all.")] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 20,
    layers: Annotated[int, typer.Option(help="How many of the model's 30 layers are kept.")] = 30,
    rounds: Annotated[int, typer.Option(help="Turns of each side.")] = 2,
) -> None:
    """Measures, writes benchmarks/results/trl_training.json and shows the table."""
    install_trl()
    figures: list[Figure] = []
    for kind in kinds or SECTIONS:
        turns = []
        for _ in range(rounds):
            with tempfile.TemporaryDirectory(prefix="trl-", dir="/tmp") as folder:
                turns.append(turn(kind, steps, layers, Path(folder)))
        figures.append(compare(kind, turns, f"{steps} steps of {layers} layers in fp32"))
    report("trl_training", figures)


@dataclass(frozen=True)
class Turn:
    """Losses and tokens per second of both sides' steps; the speeds without those that warm up."""

    ours: Sequence[float]
    theirs: Sequence[float]
    our_speeds: Sequence[float]
    their_speeds: Sequence[float]

    @property
    def apart(self) -> float:
        """The largest difference of the losses of a step, over TRL's loss."""
        return max(abs(mine - loss) / loss for mine, loss in zip(self.ours, self.theirs, strict=True))


def turn(kind: str, num_steps: int, layers: int, folder: Path) -> Turn:
    variables = {**environment(len(os.sched_getaffinity(0)), on_gpu=False), "HF_HUB_OFFLINE": "1"}
    call([sys.executable, "-m", "benchmarks.trl.ours", kind, str(num_steps), str(layers), str(folder)], variables)
    work, answered = folder / "work.json", folder / "trl.json"
    call([str(TRL_PYTHON), "-m", "benchmarks.trl.training", str(work), str(answered)], variables)
    lines = map(json.loads, (folder / "work" / PROGRESS_FILE).read_text(encoding="utf-8").splitlines())
    ours = [line["metrics"] for line in lines if "step" in line]
    theirs = json.loads(answered.read_text(encoding="utf-8"))
    return Turn(
        [step["loss"] for step in ours],
        theirs["loss"],
        speeds(ours, [step["seconds"] for step in ours]),
        speeds(ours, theirs["step_s"]),
    )


def compare(kind: str, turns: Sequence[Turn], what: str) -> Figure:
    apart = max(found.apart for found in turns)
    words = f"last loss {turns[0].ours[-1]:.4f}, TRL's {turns[0].theirs[-1]:.4f}; at most {apart:.2%} apart"
    medians = [(statistics.median(found.our_speeds), statistics.median(found.their_speeds)) for found in turns]
    say(f"{kind}: {words}; tokens/s of ours and TRL's by turn: {', '.join(f'{a:.0f} {b:.0f}' for a, b in medians)}")
    speed = Pairs(
        [speed for found in turns for speed in found.our_speeds],
        [speed for found in turns for speed in found.their_speeds],
    )
    return ratio_figure(f"{kind}: tokens/s / TRL", speed, "tok/s", target=TARGET, detail=f"{what}; {words}")


def speeds(steps: Sequence[Mapping[str, float]], seconds: Sequence[float]) -> list[float]:
    """Tokens per second of every step after those that warm up."""
    pairs = list(zip(steps, seconds, strict=True))[WARM_UP_STEPS:]
    return [step["tokens"] / taken for step, taken in pairs]


if __name__ == "__main__":
    typer.run(main)
