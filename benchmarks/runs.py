"""Whole runs as benchmarks: a job on a private local Ray, as `rlhf run` starts it, and the lines of its metrics."""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.cluster.jobs_api import Job, connect_local, follow, submit
from jobs.cluster.local_ray import local_ray
from jobs.quickstart import ENVIRONMENT
from orchestrator.errors import RlhfError
from orchestrator.watching.telemetry import METRICS_FILE, read_lines

ROOT = Path(__file__).resolve().parent.parent


def metrics_of_run(config: Path, keys: Sequence[str], *, num_cpus: int | None = None) -> list[Mapping[str, Any]]:
    """Runs a config with more keys in a temporary folder, to its end.

    Args:
        num_cpus: CPUs that Ray offers. None: all of this machine.

    Raises:
        RlhfError: the job fails.
    """
    os.environ.update(ENVIRONMENT)
    lines: list[str] = []
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as folder, local_ray(num_cpus=num_cpus) as ray:
        overrides = [*keys, f"run.root={folder}"]
        command = shlex.join([sys.executable, "-m", "jobs", "run", "--config", str(config), *overrides])
        client = connect_local(ray)
        job_id = submit(client, Job(f"cd {shlex.quote(str(ROOT))} && exec {command}"))
        if asyncio.run(follow(client, job_id, lines.append)):
            raise RlhfError(f"the run failed; its last lines:\n{''.join(lines)[-4000:]}")
        (file,) = Path(folder).glob(f"*/{METRICS_FILE}")
        return list(read_lines(file))
