"""`python -m benchmarks.trl_step`: complete steps of GRPO and PPO, with and without LoRA, against GRPO steps of TRL.

All sides sample, score and learn with the same model, prompts, lengths, samples, minibatches and reward function, in
bf16. They alternate, each in a process that warms up first. benchmarks/trl/README.md describes each side.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
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
OURS = ("grpo", "ppo")


@dataclass(frozen=True)
class Side:
    """One contender: its name in the output, its run, and the samples of one of its steps."""

    name: str
    run: Callable[[], Measured]
    samples: int


@dataclass(frozen=True)
class Steps:
    """Medians of a side's turns, in seconds of a step and in response tokens per second."""

    seconds: list[float] = field(default_factory=list)
    tokens_per_s: list[float] = field(default_factory=list)


def main(
    rounds: Annotated[int, typer.Option(help="Turns of each side.")] = 3,
    steps: Annotated[int, typer.Option(help="Measured steps per turn.")] = 3,
    max_new_tokens: Annotated[int, typer.Option(help="Longest response.")] = QUICKSTART_TOKENS,
    lora_rank: Annotated[int, typer.Option(help="Rank of LoRA where it is on.")] = 16,
) -> None:
    """Measures, writes benchmarks/results/trl_step*.json and shows the table."""
    config = our_config(steps, max_new_tokens)
    work = work_of(config)
    install_trl()
    fast_bf16 = config.model.compute_dtype == "bfloat16"
    mixed = TrlSettings("float32", autocast=fast_bf16)
    samples = work.prompts_per_step * work.samples_per_prompt
    sides = [
        *(Side(f"ours, {name}", partial(ours, steps, max_new_tokens, name), samples) for name in OURS),
        *(Side(f"ours, {name}, LoRA", partial(ours, steps, max_new_tokens, name, lora_rank), samples) for name in OURS),
        # Where bf16 is the slower type, a run in it would tell of the machine only.
        *([Side("TRL, bf16", partial(theirs, work, TrlSettings("bfloat16")), samples)] if fast_bf16 else []),
        Side("TRL, fp32 masters", partial(theirs, work, mixed), samples),
        Side("TRL, LoRA", partial(theirs, work, replace(mixed, lora_rank=lora_rank)), samples),
    ]
    measured = {side.name: Steps() for side in sides}
    measure_turns([partial(_turn, side, measured[side.name]) for side in sides], rounds=rounds)
    suffix = "" if max_new_tokens == QUICKSTART_TOKENS else f"_{max_new_tokens}"
    report(f"trl_step{suffix}", figures(measured, work))


def figures(measured: Mapping[str, Steps], work: Work) -> list[Figure]:
    samples = f"{work.prompts_per_step} x {work.samples_per_prompt} samples of {work.max_new_tokens} tokens"
    against = {"": ("TRL, bf16", "TRL, fp32 masters"), ", LoRA": ("TRL, LoRA",)}
    found = []
    fastest = "TRL, bf16" if "TRL, bf16" in measured else "TRL, fp32 masters"
    for name, (adapters, references) in product(OURS, against.items()):
        ours_name = f"{name}{adapters}"
        steps = measured[f"ours, {ours_name}"]
        for reference in [reference for reference in references if reference in measured]:
            theirs = measured[reference]
            found += [
                ratio_figure(
                    f"{ours_name} ÷ {reference}: step",
                    Pairs(steps.seconds, theirs.seconds),
                    "s",
                    better="lower",
                    target=TARGET if (name, reference) == ("grpo", fastest) else None,
                    detail=samples,
                ),
                ratio_figure(
                    f"{ours_name} ÷ {reference}: tokens/s",
                    Pairs(steps.tokens_per_s, theirs.tokens_per_s),
                    "tokens/s",
                    detail="response tokens of a step over its seconds",
                ),
            ]
    return found


def our_config(steps: int, max_new_tokens: int) -> Config:
    """The quickstart's work in TRL's shape: GRPO on groups of four, KL in the loss, a rule reward, no critic."""
    return resolved(load_config(CONFIG, our_overrides(steps, max_new_tokens)))


def our_overrides(steps: int, max_new_tokens: int, algorithm: str = "grpo", lora_rank: int = 0) -> list[str]:
    """PPO learns a critic besides, and has its KL in the reward. With LoRA all its roles share the policy's trunk."""
    return [
        "stages=[rl]",
        "run.name=trl-step",
        "reward.name=rules",
        "reward.rules=[{function: 'actors.rewards.rules:length_target'}]",
        f"model.max_length={64 + max_new_tokens}",
        f"rollout.max_new_tokens={max_new_tokens}",
        f"policy.cpus_per_rank={len(os.sched_getaffinity(0))}",
        f"algorithm.name={algorithm}",
        *(["algorithm.kl_estimator=k3-loss"] if algorithm == "grpo" else []),
        f"policy.lora.rank={lora_rank}",
        f"critic.lora.rank={lora_rank}",
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


def ours(steps: int, max_new_tokens: int, algorithm: str, lora_rank: int = 0) -> Measured:
    """One run of `rlhf quickstart`. Raises RlhfError if it fails."""
    with tempfile.TemporaryDirectory(prefix="step-", dir="/tmp") as folder:
        keys = our_overrides(steps, max_new_tokens, algorithm, lora_rank)
        command = [sys.executable, "-m", "jobs", "quickstart", "--config", str(CONFIG), *keys, f"run.root={folder}"]
        call(command, {"RAY_worker_niceness": "0"})  # Ray's default, 15, is unfair under other load
        (file,) = Path(folder).glob(f"*/{METRICS_FILE}")
        metrics = [line["metrics"] for line in read_lines(file) if line["kind"] == "step"]

    def column(name: str) -> list[float]:
        return [step[name] for step in metrics]

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


def _turn(side: Side, steps: Steps) -> float:
    """The median step of one turn, which is kept in `steps`. Prints a line with its parts."""
    columns = asdict(side.run())
    columns |= {f"{name}_s": values for name, values in columns.pop("parts_s").items()}
    parts: dict[str, float] = {name: statistics.median(values[WARM_UP_STEPS:]) for name, values in columns.items()}
    say(f"{side.name}: " + ", ".join(f"{name} {value:.3g}" for name, value in parts.items()))
    steps.seconds.append(parts["step_s"])
    steps.tokens_per_s.append(parts["response_tokens"] * side.samples / parts["step_s"])
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
