"""Checks of stages: whether the config's trackers are installed and answer."""

from __future__ import annotations

from actors.watching.trackers import require_packages, try_trackers
from jobs.stages.stage import Found
from orchestrator.config.config import Config

PROBE_S = 10.0


def check_trackers(config: Config, found: Found) -> str | None:
    require_packages(config.telemetry)
    return "\n".join(try_trackers(config.telemetry, PROBE_S)) or None
