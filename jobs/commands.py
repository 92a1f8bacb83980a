"""The table of commands: purpose, example and function of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

PROGRAM = "rlhf"


@dataclass(frozen=True)
class Command:
    """Args:
    place: `module:function`; the function's signature is the command line, its docstring the help. Or `module:app` for
        a Typer app of several commands.
    summary: for the list of commands.
    example: arguments after `rlhf NAME`.
    """

    place: str
    summary: str
    example: str


COMMANDS: Mapping[str, Command] = MappingProxyType(
    {
        "quickstart": Command(
            "jobs.quickstart:main",
            "Run a small config on a private Ray on this machine, from nothing to a result.",
            "--config jobs/configs/ppo.yaml rl.steps=2",
        ),
        "check": Command(
            "jobs.check.command:main",
            "Check a config, its data, its models and the cluster before anything starts.",
            "--config jobs/configs/quickstart.yaml",
        ),
        "plan": Command(
            "jobs.plan.command:main",
            "Compare layouts of a run over GPUs: step time, memory, money.",
            "--config jobs/configs/gpu.yaml --gpus 16 --gpu-kind h100",
        ),
        "run": Command(
            "jobs.run:main",
            "Run the stages of a config, or continue a run.",
            "--config jobs/configs/quickstart.yaml run.id=my-run rl.steps=10",
        ),
        "reward-model": Command(
            "jobs.run:reward_model",
            "Train a reward model alone, on a file of preferences.",
            "--config jobs/configs/hh_rlhf.yaml preferences.path=FILE",
        ),
        "data": Command(
            "jobs.datasets.command:app",
            "Inspect a data file, or convert it to the canonical form.",
            "inspect jobs/data/quickstart_prompts.jsonl",
        ),
        "label": Command(
            "jobs.services.labelling.command:app",
            "Let people judge replies in a browser, and export what they judged.",
            "serve --store labels.db",
        ),
        "submit": Command(
            "jobs.cluster.submit:main",
            "Run a config on a Ray cluster, from this machine.",
            "--address http://10.0.0.1:8265 --config jobs/configs/gpu.yaml run.root=/shared/runs",
        ),
        "why": Command(
            "jobs.why.command:main", "Say what failed first in a run, its state, and how to continue it.", "runs/my-run"
        ),
        "lineage": Command(
            "jobs.lineage:main", "Show which artifact of a run was made from which, by which stage.", "runs/my-run"
        ),
        "report": Command("jobs.report.command:main", "Write one HTML page about a run.", "runs/my-run"),
        "replay": Command(
            "jobs.replay:main",
            "Learn again from the log of a run, without rollout engines.",
            "runs/my-run --until 5",
        ),
    }
)
