"""`python -m benchmarks.trl_losses`: losses of ours and of TRL on the same small model and batch, in fp32.

Exit code 1 when one differs by more than 1e-5, relative to the larger of it and 1. See benchmarks/trl/losses.py.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

from actors.groups.cluster import environment
from actors.models.model import EMBEDDED, resolve_model
from benchmarks.trl_step import TRL_PYTHON, call, install_trl
from jobs.command import say
from orchestrator.config.sections import RunConfig

TOLERANCE = 1e-5


def main() -> int:
    install_trl()
    tokenizer = resolve_model(EMBEDDED, RunConfig().cache)
    with tempfile.TemporaryDirectory(prefix="trl-", dir="/tmp") as folder:
        answered = Path(folder, "losses.json")
        variables = {**environment(len(os.sched_getaffinity(0)), on_gpu=False), "HF_HUB_OFFLINE": "1"}
        call([str(TRL_PYTHON), "-m", "benchmarks.trl.losses", str(tokenizer), str(answered)], variables)
        losses = json.loads(answered.read_text(encoding="utf-8"))
    say(f"{'loss':30} {'ours':>12} {'TRL':>12} {'difference':>11}")
    worst = 0.0
    for loss in losses:
        difference = abs(loss["ours"] - loss["trl"])
        worst = max(worst, difference / max(abs(loss["trl"]), 1.0))
        say(f"{loss['name']:30} {loss['ours']:12.7f} {loss['trl']:12.7f} {difference:11.1e}")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
