"""`python -m tests.chaos.soak [--steps 200]`: a long run of a tiny model in which a role is killed every tenth step.

At the end: checks that each step is in metrics and log once; prints each role's memory slope between kills.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from orchestrator.failures import LEARNERS
from orchestrator.run.experience_log import num_committed
from orchestrator.watching.telemetry import read_lines
from tests.chaos.matrix import PHASES, Blow, Field, Outcome, actors_left, one_node

ROLES = ("rollout", "policy", "critic", "reference", "reward", "driver")
WARM_STEPS = 12  # steps in which a new process fills its pools
FLAT_BYTES_PER_STEP = 1_000_000
console = Console(width=120)


def blows(steps: int, seed: int = 0) -> list[Blow]:
    """Every tenth step kills another role, in a phase drawn from the seed."""
    draw = random.Random(seed)
    roles = itertools.cycle(ROLES)
    return [
        {
            "step": step,
            "phase": draw.choice(PHASES),
            "role": next(roles),
            "signal": "KILL",
            "delay_s": draw.uniform(0, 0.2),
        }
        for step in range(5, steps, 10)
    ]


def slopes(outcome: Outcome, plan: list[Blow]) -> dict[str, tuple[float, int]]:
    """By role: median slope of resident bytes per step over its processes, and the number of long-lived ones."""
    lines = [line for line in read_lines(outcome.path / "metrics.jsonl") if line["kind"] == "step"]
    names = sorted({name for line in lines for name in line["metrics"] if name.startswith("memory/")})
    found = {}
    for name in names:
        role = name.removeprefix("memory/").removesuffix("_rss_bytes")
        fatal = {"driver", *(LEARNERS if role in LEARNERS else (role,))}
        deaths = [blow["step"] + 1 for blow in plan if blow["role"] in fatal]
        rates = []
        for begin, end in itertools.pairwise([0, *deaths, len(lines)]):
            life = [line["metrics"].get(name) for line in lines[begin + WARM_STEPS : end]]
            sizes = np.array([size for size in life if size is not None])
            if len(sizes) >= 8:
                rates.append(float(np.polyfit(np.arange(len(sizes)), sizes, 1)[0]))
        found[role] = (float(np.median(rates)) if rates else math.nan, len(rates))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--quiet", action="store_true", help="kill nothing")
    arguments = parser.parse_args()
    steps: int = arguments.steps
    folder = Path("/tmp") / "soak"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    plan = [] if arguments.quiet else blows(steps)
    with one_node(folder) as here:
        outcome = soak(here, plan, steps)
    once = outcome.steps() == list(range(steps)) and num_committed(outcome.path / "log") == steps
    restarts = Counter(event["action"] for event in outcome.events("recovered"))
    console.print(
        f"exit {outcome.code}, {outcome.seconds:.0f} s, {outcome.struck} of {len(plan)} blows, {dict(restarts)}"
    )
    console.print(f"every step once in metrics and log: {once}; processes left: {len(actors_left())}")
    table = Table("role", "MB per step (median over lives)", "lives")
    found = slopes(outcome, plan)
    for role, (slope, lives) in found.items():
        table.add_row(role, f"{slope / 1e6:+.3f}", str(lives))
    console.print(table)
    flat = all(slope < FLAT_BYTES_PER_STEP for slope, _ in found.values())
    good = outcome.code == 0 and once and flat
    if not good:
        console.print(outcome.output[-5000:], markup=False)
    return 0 if good else 1


def soak(here: Field, plan: list[Blow], steps: int) -> Outcome:
    overrides = (f"rl.steps={steps}", "checkpoints.every_steps=5", "rollout.replicas=1", "policy.ranks=1")
    return here.run("soak", plan, *overrides, "failures.infrastructure=20", limit_s=3600.0)


if __name__ == "__main__":
    sys.exit(main())
