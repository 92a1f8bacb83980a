"""Check of stage `sft`: reads the demonstrations and formats some of them as training will."""

from __future__ import annotations

from jobs.stages.stage import Found
from jobs.stages.work.data.demonstrations import rows_of, sample
from orchestrator.config.config import Config


def check_demonstrations(config: Config, found: Found) -> str | None:
    """Raises DataError, which names a bad row or a conversation that the chat template refuses."""
    if config.demonstrations.path is None:
        return None  # a stage of this run makes them
    sampled = sample(config)
    what = f"demonstrations: {sampled.report.summary()}"
    if found.chat is None:
        return what
    rows = rows_of(config, found.chat, sampled.some)
    learned, total = sum(int(row.learn.sum()) for row in rows.rows), sum(len(row.tokens) for row in rows.rows)
    parts = [
        f"demonstrations: {sampled.report.summary()}",
        f"{learned} of {total} tokens are learned in a sample of them",
    ]
    return ", ".join([*parts, *filter(None, [rows.describe(f"sft.max_length={config.sft.max_length}")])])


def check_mixed_in(config: Config, found: Found) -> str | None:
    """The same for demonstrations that reinforcement learning mixes in."""
    return check_demonstrations(config, found) if config.ptx.coefficient else None
