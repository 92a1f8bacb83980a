"""What a run may change when it is resumed: every key that differs, and whether it changes what the run computes."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.config import Config

# What waits, watches, names or keeps, and computes nothing. All else matters, also keys that are new.
_SECTIONS = frozenset({"deadlines", "failures", "guards", "telemetry"})
_KEYS = frozenset(
    {
        "checkpoints.every_steps",
        "checkpoints.export",
        "checkpoints.keep",
        "evaluation.every_steps",
        "placement.wait_s",
        "reward.limits.call_s",
        "reward.limits.import_s",
        "reward.limits.memory_gib",
        "reward.limits.processes",
        "run.cache",
        "run.grace_s",
        "run.id",
        "run.mirror",
        "run.mirror_every_s",
        "run.name",
        "run.root",
    }
)

# Keys that are resolved once, when a run starts (jobs/resolve.py). Until then they have one of the values OPEN.
RESOLVED_ONCE = frozenset({"model.dtype", "model.today", "rollout.engine"})
OPEN = ("auto", None)


@dataclass(frozen=True)
class Change:
    """One key whose value differs, null where a section is absent.

    `matters`: the run would compute something else from here on.
    """

    key: str
    old: Any
    new: Any
    matters: bool

    def __str__(self) -> str:
        return f"{self.key}: {json.dumps(self.old)} -> {json.dumps(self.new)}"


def changed_keys(old: Config, new: Config) -> tuple[Change, ...]:
    """The keys that differ, in the order of the config; values as JSON has them."""
    before, after = (dict(_leaves("", config.model_dump(mode="json"))) for config in (old, new))
    keys = [key for key in {**after, **before} if before.get(key) != after.get(key)]
    return tuple(Change(key, before.get(key), after.get(key), _matters(key, old, new)) for key in keys)


def value_of(config: Config, key: str) -> Any:
    """The value at a dotted key."""
    return functools.reduce(getattr, key.split("."), config)


def _matters(key: str, old: Config, new: Config) -> bool:
    if key == "ppo.steps":
        by_total_steps = any(learner.schedule != "constant" for learner in (new.policy, new.critic))
        return new.ppo.steps < old.ppo.steps or by_total_steps
    if key in RESOLVED_ONCE and value_of(old, key) in OPEN:
        return False  # a run from before this key was kept
    if key == "rollout.engines":
        return not new.rollout.reproducible
    return key not in _KEYS and key.partition(".")[0] not in _SECTIONS


def _leaves(prefix: str, section: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _leaves(f"{prefix}{key}.", value)
        else:
            yield prefix + key, value
