"""Runs on the head's host: probes the cluster for a small run, and prints what `check --cluster` would report.

`python -m tests.ray_local.probing ADDRESS [section.key=value ...]`
"""

from __future__ import annotations

import asyncio
import json
import sys

from actors.groups.cluster import Address, connect, disconnect
from jobs.check.capacity import present_cluster
from jobs.check.nodes import check_nodes
from orchestrator.config.loader import load_config


def main() -> None:
    address, *overrides = sys.argv[1:]
    connect(Address(address, "test"), wait_s=60)
    _, problems = asyncio.run(check_nodes(load_config(None, overrides), present_cluster()))
    sys.stdout.write("\n" + json.dumps([str(problem) for problem in problems]) + "\n")
    sys.stdout.flush()
    disconnect()


if __name__ == "__main__":
    main()
