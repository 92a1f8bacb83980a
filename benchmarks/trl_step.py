"""`python -m benchmarks.trl_step`: a complete GRPO step of ours against one of TRL, on the same work.

Both sides sample, score and learn with the same model, prompts, lengths, samples, minibatches and reward function, in
bf16. They alternate, each in a process that warms up first. benchmarks/trl/README.md describes each side.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from actors.groups.cluster import environment
from actors.models.model import resolve_model
from actors.text.tokenizing import load_tokenizer
from benchmarks.harness import Figure, Pairs, measure_turns, ratio_figure
from benchmarks.table import report
from benchmarks.trl.work import Measured, TrlSettings, Work
from jobs.command import say
from jobs.prepare import prepare
from jobs.resolve import resolved
from orchestrator.config.config import Config
from orchestrator.config.loader import load_config
from orchestrator.errors import RlhfError
from orchestrator.watching.telemetry import METRICS_FILE, read_lines

ROOT = Path(__file__).resolve().parent.parent
TRL_PYTHON = ROOT / "benchmarks" / ".venv-trl" / "bin" / "python"
CONFIG = ROOT / "jobs" / "configs" / "ppo.yaml"
DEADLINE_S = 1800.0
WARM_UP_STEPS = 1
TARGET = 0.5
QUICKSTART_TOKENS = 28


def main(
    rounds: Annotated[int, typer.Option(help="Turns of each side.")] = 3,
    steps: Annotated[int, typer.Option(help="Measured steps per turn.")] = 3,
    max_new_tokens: Annotated[int, typer.Option(help="Longest response.")] = QUICKSTART_TOKENS,
) -> None:
    """Measures, writes benchmarks/results/trl_step*.json and shows the table."""
    config = our_config(steps, max_new_tokens)
    work = work_of(config)
    install_trl()
    contenders = (
        partial(ours, config),
        partial(theirs, work, TrlSettings("bfloat16")),
        partial(theirs, work, TrlSettings("float32", autocast=config.model.compute_dtype == "bfloat16")),
    )
    turns = measure_turns([partial(_told, contender) for contender in contenders], rounds=rounds)
    suffix = "" if max_new_tokens == QUICKSTART_TOKENS else f"_{max_new_tokens}"
    report(f"trl_step{suffix}", figures(turns, work))


def figures(turns: Sequence[Sequence[float]], work: Work) -> list[Figure]:
    ours_s, plain_s, mixed_s = turns
    samples = f"{work.prompts_per_step} x {work.samples_per_prompt} samples of {work.max_new_tokens} tokens"
    return [
        ratio_figure(
            f"step / TRL GRPO step, {work.max_new_tokens} tokens",
            Pairs(ours_s, plain_s),
            "s",
            better="lower",
            target=TARGET,
            detail=f"{samples}; ours with fp32 masters; TRL, weights and Adam in bf16",
        ),
        ratio_figure(
            f"step / TRL GRPO step, fp32 masters, {work.max_new_tokens} tokens",
            Pairs(ours_s, mixed_s),
            "s",
            better="lower",
            detail=f"{samples}; TRL, fp32, under bf16 autocast where bf16 is the faster type",
        ),
    ]


def our_config(steps: int, max_new_tokens: int) -> Config:
    """The quickstart's work in TRL's shape: GRPO on groups of four, KL in the loss, a rule reward, no critic."""
    return resolved(load_config(CONFIG, our_overrides(steps, max_new_tokens)))


def our_overrides(steps: int, max_new_tokens: int) -> list[str]:
    return [
        "stages=[rl]",
        "run.name=trl-step",
        "reward.name=rules",
        "reward.rules=[{function: 'actors.rewards.rules:length_target'}]",
        f"model.max_length={64 + max_new_tokens}",
        f"rollout.max_new_tokens={max_new_tokens}",
        f"policy.cpus_per_rank={len(os.sched_getaffinity(0))}",
        "algorithm.name=grpo",
        "algorithm.kl_estimator=k3-loss",
        "rl.prompts_per_step=16",
        "rl.samples_per_prompt=4",
        f"rl.steps={WARM_UP_STEPS + steps}",
        "evaluation.prompts=0",
        "checkpoints.export=false",
        "telemetry.tensorboard=false",
    ]


def work_of(config: Config) -> Work:
    """The same work for TRL, with the prompts of our engines."""
    model = resolve_model(config.model.path, config.run.cache)
    tokenizer = load_tokenizer(model)
    rl, algorithm = config.rl, config.algorithm
    return Work(
        model=str(model),
        prompts=[tokenizer.decode(prompt.tokens) for prompt in prepare(config).prompts.train],
        prompts_per_step=rl.prompts_per_step,
        samples_per_prompt=rl.samples_per_prompt,
        max_new_tokens=config.rollout.max_new_tokens,
        minibatches=algorithm.minibatches,
        epochs=algorithm.epochs,
        learning_rate=config.policy.learning_rate,
        kl_coefficient=algorithm.kl_coefficient,
        steps=rl.steps,
    )


def ours(config: Config) -> Measured:
    """One run of `rlhf quickstart`. Raises RlhfError if it fails."""
    with tempfile.TemporaryDirectory(prefix="step-", dir="/tmp") as folder:
        keys = our_overrides(config.rl.steps - WARM_UP_STEPS, config.rollout.max_new_tokens)
        command = [sys.executable, "-m", "jobs", "quickstart", "--config", str(CONFIG), *keys, f"run.root={folder}"]
        call(command, {"RAY_worker_niceness": "0"})  # Ray's default, 15, is unfair under other load
        (file,) = Path(folder).glob(f"*/{METRICS_FILE}")
        steps = [line["metrics"] for line in read_lines(file) if line["kind"] == "step"]

    def column(name: str) -> list[float]:
        return [step[name] for step in steps]

    return Measured(
        column("time/step_s"),
        column("time/generate_s"),
        column("response/length_mean"),
        column("reward/mean"),
        parts_s={part: column(f"time/{part}_s") for part in ("score", "learn", "publish")},
    )


def theirs(work: Work, settings: TrlSettings) -> Measured:
    """One run of TRL. Raises RlhfError if it fails."""
    with tempfile.TemporaryDirectory(prefix="trl-", dir="/tmp") as folder:
        told, answered = Path(folder, "work.json"), Path(folder, "measured.json")
        told.write_text(json.dumps({"work": asdict(work), "settings": asdict(settings)}), encoding="utf-8")
        # The allocator of our actors, and all cores.
        variables = {**environment(len(os.sched_getaffinity(0)), on_gpu=False), "HF_HUB_OFFLINE": "1"}
        call([str(TRL_PYTHON), "-m", "benchmarks.trl.grpo", str(told), str(answered)], variables)
        return Measured(**json.loads(answered.read_text(encoding="utf-8")))


def install_trl() -> None:
    call([str(ROOT / "benchmarks" / "trl" / "install.sh")], {})


def _told(contender: partial[Measured]) -> float:
    """The median step of one turn. Prints a line with its parts."""
    measured = contender()
    columns = asdict(measured)
    columns |= {f"{name}_s": values for name, values in columns.pop("parts_s").items()}
    parts: dict[str, float] = {name: statistics.median(values[WARM_UP_STEPS:]) for name, values in columns.items()}
    settings = contender.args[-1]
    side = "ours" if isinstance(settings, Config) else f"TRL, {settings.masters}"
    say(f"{side}: " + ", ".join(f"{name} {value:.3g}" for name, value in parts.items()))
    return parts["step_s"]


def call(command: Sequence[str], variables: Mapping[str, str]) -> None:
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    if done.returncode:
        raise RlhfError(
            f"`{' '.join(command)}` ended with {done.returncode}; run it alone to see why. Its last lines:\n"
            f"{(done.stdout + done.stderr)[-4000:]}"
        )


if __name__ == "__main__":
    typer.run(main)
