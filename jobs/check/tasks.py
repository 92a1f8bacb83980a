"""Check of evaluate.tasks: lm-eval is installed and knows them."""

from __future__ import annotations

from actors.roles.tasks import found_tasks
from jobs.stages.stage import Found
from orchestrator.config.config import Config


def check_tasks(config: Config, found: Found) -> str | None:
    """Raises DataError: the package is missing, or it knows no such task."""
    names = config.evaluate.tasks
    if not names:
        return None
    found_tasks(names)
    return f"tasks of lm-eval: {', '.join(names)}"
