"""The matrix of kills (`make chaos`). Each row is a run in which one kind of process is killed in every phase. It must
end with the same bits as an undisturbed run.

    python -m tests.chaos.matrix [ROW ...]      rows: rollout policy critic reference reward driver
                                            one-engine parts throughput staleness trainer raylet
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import yaml
from rich.console import Console
from rich.table import Table

from jobs.stages.work.replay import fingerprint
from orchestrator.run.storage import sha256
from orchestrator.watching.telemetry import read_lines
from tests.chaos.sabotage import CLASSES
from tests.deadlines import of_a_run, scaled
from tests.local_ray import local_ray
from tests.ray_local.net import Cluster, three_nodes
from tests.tiny import tiny_llama

ROOT = Path(__file__).resolve().parents[2]
PHASES = ("generate", "score", "commit", "learn", "publish", "save")
ROLES = ("rollout", "policy", "critic", "reference", "reward")
STEPS = 7
TRAINING_STEPS = 300
console = Console(width=150)
RUN_S = scaled(600.0)

Blow = dict[str, Any]


def blows(role: str, *, seed: int, kind: str = "KILL", **more: Any) -> list[Blow]:
    """One blow per phase, each in a different step. While steps 2, 4 and 6 are sampled, the state before them
    is saved."""
    delays = random.Random(f"{role} {seed}")
    steps = {phase: step for step, phase in enumerate(PHASES)} | {"save": STEPS - 1}
    return [
        {"step": step, "phase": phase, "role": role, "signal": kind, "delay_s": delays.uniform(0, 0.2), **more}
        for phase, step in steps.items()
    ]


def settings(folder: Path) -> dict[str, Any]:
    """A tiny model, two engines, two ranks of the policy, all roles real."""
    return {
        "stages": ["rl"],
        "run": {"root": str(folder / "runs")},
        "model": {"path": str(folder / "model"), "max_length": 128},
        "prompts": {"limit": 60, "max_prompt_tokens": 88, "held_out_fraction": 0.1},
        "reward": {"name": "rules", "rules": [{"function": "actors.rewards.rules:length_target"}]},
        "policy": {"learning_rate": 1e-3, "ranks": 2},
        "critic": {"learning_rate": 1e-3},
        "rollout": {
            "replicas": 2,
            "cpus_per_replica": 1,
            "max_new_tokens": 16,
            "samples_per_shard": 8,
            "kv_cache_gib": 0.1,
        },
        "rl": {"steps": STEPS, "prompts_per_step": 16, "samples_per_prompt": 1},
        "algorithm": {"minibatches": 2, "adaptive_kl_target": 0.5},
        "checkpoints": {"every_steps": 2, "export": False},
        "evaluation": {"prompts": 0},
        "telemetry": {"prometheus_port": None, "tensorboard": False},
        "deadlines": of_a_run(),
        "failures": {"infrastructure": 20},
        "placement": {"wait_s": 60.0},
    }


@dataclass
class Field:
    """The environment of runs: a cluster, and a folder with a model and a config."""

    folder: Path
    address: str
    prefix: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))

    def __post_init__(self) -> None:
        if not (self.folder / "config.yaml").exists():
            tiny_llama(self.folder / "model")
            (self.folder / "config.yaml").write_text(yaml.safe_dump(settings(self.folder)), encoding="utf-8")

    def run_folder(self, run_id: str) -> Path:
        return self.folder / "runs" / run_id

    def attempt(
        self, run_id: str, plan: Sequence[Blow], *overrides: str, limit_s: float = RUN_S
    ) -> subprocess.CompletedProcess[str]:
        """One attempt of a run, with these blows. Raises subprocess.TimeoutExpired if it hangs."""
        file = self.folder / f"{run_id}.json"
        if not file.exists():
            file.write_text(json.dumps(list(plan)), encoding="utf-8")
        command = [*self.prefix, sys.executable, "-m", "tests.chaos.sabotage", str(file)]
        arguments = ["--config", str(self.folder / "config.yaml"), f"run.id={run_id}", *overrides]
        return subprocess.run(
            [*command, *arguments],
            cwd=ROOT,
            env={**self.environment, "RAY_ADDRESS": self.address, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=limit_s,
            check=False,
        )

    def replay(self, outcome: Outcome) -> tuple[str, str]:
        """The final bits of a replay of the run's log from step 0."""
        target = self.folder / f"{outcome.path.name}-replay"
        command = [*self.prefix, sys.executable, "-m", "jobs", "replay", str(outcome.path), "--to", str(target)]
        environment = {**self.environment, "RAY_ADDRESS": self.address}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=RUN_S)
        return replace(outcome, path=target).bits()

    def run(self, run_id: str, plan: Sequence[Blow] = (), *overrides: str, limit_s: float = RUN_S) -> Outcome:
        """As many attempts as the blows to the driver require."""
        started = time.monotonic()
        attempts = 1 + sum(blow["role"] == "driver" for blow in plan)
        done = self.attempt(run_id, plan, *overrides, limit_s=limit_s)
        for _ in range(attempts - 1):
            if done.returncode == 0:
                break
            done = self.attempt(run_id, plan, *overrides, limit_s=limit_s)
        struck = sum((self.folder / f"{run_id}.{index}").exists() for index in range(len(plan)))
        return Outcome(self.run_folder(run_id), done.returncode, done.stdout, struck, time.monotonic() - started)


@dataclass(frozen=True)
class Outcome:
    """The result of a run."""

    path: Path
    code: int
    output: str
    struck: int
    seconds: float

    def bits(self, step: int = STEPS) -> tuple[str, str]:
        """SHA-256 of the final weights, master weights and optimizers of policy and critic."""
        checkpoint = self.path / "checkpoints" / f"step-{step:06d}"
        return fingerprint(checkpoint, "policy"), fingerprint(checkpoint, "critic")

    def trained(self) -> str:
        """SHA-256 of the reward model's weights."""
        return sha256(self.path / "reward-model" / "model.safetensors")

    def steps(self) -> list[int]:
        return [line["step"] for line in read_lines(self.path / "metrics.jsonl") if line["kind"] == "step"]

    def relearned(self) -> int:
        """Steps that were learned again from the log, over all recoveries."""
        spans = (event["table"]["learned again from the log"].split() for event in self.events("restored"))
        return sum(int(span[3]) - int(span[1]) + 1 for span in spans if span[0] == "steps")

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in read_lines(self.path / "events.jsonl") if line["kind"] == kind]

    def tokens(self) -> int:
        """Number of committed response tokens."""
        manifests = sorted((self.path / "log").glob("step-*/manifest.json"))
        shards = [shard for path in manifests for shard in json.loads(path.read_text())["shards"]]
        return sum(shard["num_response_tokens"] for shard in shards)


def actors_left() -> list[str]:
    """This program's live actors; those of a run end soon after it."""
    deadline = time.monotonic() + scaled(20)
    while True:
        titles = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
        left = [title for title in titles if title.startswith(tuple(f"ray::{name}" for name in CLASSES.values()))]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.5)


@contextmanager
def one_node(folder: Path) -> Iterator[Field]:
    # Slots, not cores: with staleness all roles compute concurrently.
    with local_ray("cx", num_cpus=16) as address:
        yield Field(folder, address)


@contextmanager
def hosts_that_die(folder: Path, *, comes_back: bool) -> Iterator[Field]:
    """Three hosts; a worker node that dies joins again or stays away."""
    short = Path("/tmp") / f"ch{os.getpid()}"
    short.mkdir()
    try:
        with three_nodes(short, comes_back=comes_back) as cluster:
            yield Field(folder, f"{cluster.head.address}:6379", _on(cluster), cluster.environment)
    finally:
        shutil.rmtree(short, ignore_errors=True)


def _on(cluster: Cluster) -> tuple[str, ...]:
    return ("ip", "netns", "exec", cluster.head.namespace)


def raylet_blows(seed: int) -> list[Blow]:
    """Alternates the workers, so that the killed one is always in use."""
    return [blow | {"host": f"10.77.0.{3 - index % 2}"} for index, blow in enumerate(blows("raylet", seed=seed))]


@dataclass
class Report:
    """The table, and whether all its rows passed."""

    quiet: Outcome
    table: Table = field(
        default_factory=lambda: Table(
            "run", "blows", "restarts", "attempts", "bits", "steps once", "tokens", "relearned", "left", "s"
        )
    )
    failed: int = 0

    def add(self, name: str, outcome: Outcome, expected: tuple[str, str] | None = None) -> None:
        """`expected`: final bits. None: bits and tokens of the undisturbed run."""
        is_same = outcome.code == 0 and outcome.bits() == (expected or self.quiet.bits())
        once = outcome.steps() == list(range(STEPS))
        left = actors_left()
        tokens = outcome.tokens()
        good = is_same and once and not left and (expected is not None or tokens == self.quiet.tokens())
        self.failed += not good
        restarts = Counter(event["action"] for event in outcome.events("recovered"))
        cells = [
            str(outcome.struck),
            ", ".join(f"{count} {action}" for action, count in restarts.items()) or "-",
            str(len(list((outcome.path / "attempts").iterdir()))),
            ("equal" if expected is None else "equal to replay") if is_same else f"DIFFERENT, exit {outcome.code}",
            "yes" if once else f"NO: {outcome.steps()}",
            str(tokens),
            str(outcome.relearned()),
            str(len(left)),
            f"{outcome.seconds:.0f}",
        ]
        self._show(name, cells, outcome, good=good)

    def add_training(self, name: str, outcome: Outcome, quiet: Outcome) -> None:
        """Training of a reward model, whose result must equal the undisturbed one."""
        is_same = outcome.code == 0 and outcome.trained() == quiet.trained()
        once = outcome.steps() == quiet.steps() == list(range(TRAINING_STEPS))
        left = actors_left()
        good = is_same and once and not left
        self.failed += not good
        cells = [
            str(outcome.struck),
            f"{len(outcome.events('training_continued'))} continued",
            str(len(list((outcome.path / "attempts").iterdir()))),
            "equal" if is_same else f"DIFFERENT, exit {outcome.code}",
            "yes" if once else f"NO: {outcome.steps()}",
            "-",
            "-",
            str(len(left)),
            f"{outcome.seconds:.0f}",
        ]
        self._show(name, cells, outcome, good=good)

    def _show(self, name: str, cells: Sequence[str], outcome: Outcome, *, good: bool) -> None:
        self.table.add_row(name, *cells)
        console.print("  ".join([name, *cells]), soft_wrap=True)
        if not good:
            console.print(outcome.output[-6000:], markup=False)


def in_parts(field: Field, run_id: str, ends: Sequence[int]) -> Outcome:
    """A run that ends after some steps and is then continued."""
    for end in ends:
        outcome = field.run(run_id, (), f"rl.steps={end}")
    return outcome


def training_rows(field: Field, report: Report) -> None:
    """A reward model, two of whose workers and whose driver are killed."""
    rows = [{"prompt": f"Say {n}.", "chosen": f"{n}, kind", "rejected": f"{n}, rude"} for n in range(TRAINING_STEPS)]
    file = field.folder / "preferences.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    stage = {"ranks": 2, "cpus_per_rank": 1, "records_per_batch": 1, "checkpoint_every_steps": 20}
    overrides = ["stages=[reward_model]", f"preferences.path={file}", "preferences.held_out=0"]
    overrides += [f"reward_model.{key}={value}" for key, value in stage.items()]
    blow = {"phase": "train", "role": "trainer", "signal": "KILL", "delay_s": 0.05}
    plan = [
        blow | {"step": 10, "rank": 0},
        blow | {"step": TRAINING_STEPS // 3, "rank": 1},
        blow | {"step": TRAINING_STEPS // 2, "role": "driver"},
    ]
    quiet = field.run("training", (), *overrides)
    report.add_training("training", quiet, quiet)
    report.add_training("trainer", field.run("trainer", plan, *overrides), quiet)


EVERY_ROW = (*ROLES, "driver", "one-engine", "parts", "throughput", "staleness", "trainer", "raylet", "lost-host")


def main(rows: Sequence[str]) -> int:
    wanted = set(rows or EVERY_ROW)
    folder = Path("/tmp") / f"chaos{os.getpid()}"
    folder.mkdir()
    with one_node(folder) as here:
        report = Report(here.run("quiet"))
        report.add("quiet", report.quiet)
        for role in (role for role in (*ROLES, "driver") if role in wanted):
            report.add(role, here.run(role, blows(role, seed=0)))
        if "one-engine" in wanted:
            report.add("one engine", here.run("one", (), "rollout.replicas=1"))
        if "parts" in wanted:
            report.add("3 + 4 steps", in_parts(here, "halves", (3, STEPS)))
            report.add("a step at a time", in_parts(here, "single", range(1, STEPS + 1)))
        if "throughput" in wanted:
            outcome = here.run("throughput", blows("rollout", seed=1), "rollout.reproducible=false")
            report.add("not reproducible", outcome, here.replay(outcome))
        if "staleness" in wanted:
            overrides = ("rl.max_staleness=1", "algorithm.importance_cap=2.0", "placement.mode=separate")
            plan = [*blows("rollout", seed=2)[:3], *blows("policy", seed=2)[3:]]
            outcome = here.run("staleness", plan, *overrides)
            report.add("staleness 1", outcome, here.replay(outcome))
        if "trainer" in wanted:
            training_rows(here, report)
    if "raylet" in wanted:
        with hosts_that_die(folder, comes_back=True) as hosts:
            report.add("raylet", hosts.run("raylet", raylet_blows(0)))
    if "lost-host" in wanted:
        with hosts_that_die(folder, comes_back=False) as hosts:
            report.add("lost host", hosts.run("lost", raylet_blows(1)[3:4]))
    console.print(report.table)
    if report.failed:
        console.print(f"what the runs left: {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
