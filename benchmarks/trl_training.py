"""`python -m benchmarks.trl_training [sft] [reward_model] [preference]`: a training of ours against one of TRL's.

Both start from SmolLM2-135M-Instruct in fp32 and learn the same tokens in the same order, in the same batches and with
the same learning rates, each in a process of its own. DPO's reference log-probs are computed before the first step on
both sides. Ours is the loop of the stages (actors/training/trainer.py) without Ray.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
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
) -> None:
    """Measures, writes benchmarks/results/trl_training.json and shows the table."""
    install_trl()
    figures: list[Figure] = []
    for kind in kinds or SECTIONS:
        with tempfile.TemporaryDirectory(prefix="trl-", dir="/tmp") as folder:
            figures.append(compare(kind, steps, layers, Path(folder)))
    report("trl_training", figures)


def compare(kind: str, num_steps: int, layers: int, folder: Path) -> Figure:
    variables = {**environment(len(os.sched_getaffinity(0)), on_gpu=False), "HF_HUB_OFFLINE": "1"}
    call([sys.executable, "-m", "benchmarks.trl.ours", kind, str(num_steps), str(layers), str(folder)], variables)
    work, answered = folder / "work.json", folder / "trl.json"
    call([str(TRL_PYTHON), "-m", "benchmarks.trl.training", str(work), str(answered)], variables)
    lines = map(json.loads, (folder / "work" / PROGRESS_FILE).read_text(encoding="utf-8").splitlines())
    ours = [line["metrics"] for line in lines if "step" in line]
    theirs = json.loads(answered.read_text(encoding="utf-8"))
    apart = [abs(step["loss"] - loss) / loss for step, loss in zip(ours, theirs["loss"], strict=True)]
    words = f"last loss {ours[-1]['loss']:.4f}, TRL's {theirs['loss'][-1]:.4f}; at most {max(apart):.2%} apart"
    say(f"{kind}: {words}")
    return ratio_figure(
        f"{kind}: tokens/s / TRL",
        Pairs(speeds(ours, [step["seconds"] for step in ours]), speeds(ours, theirs["step_s"])),
        "tok/s",
        target=TARGET,
        detail=f"{num_steps} steps of {layers} layers in fp32; {words}",
    )


def speeds(steps: Sequence[Mapping[str, float]], seconds: Sequence[float]) -> list[float]:
    """Tokens per second of every step after those that warm up."""
    pairs = list(zip(steps, seconds, strict=True))[WARM_UP_STEPS:]
    return [step["tokens"] / taken for step, taken in pairs]


if __name__ == "__main__":
    typer.run(main)
