"""Compares the configs of a resumed run: which keys differ, and which of them change the results."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.config.config import Config

# Sections and keys that do not affect results. All others matter, including new ones.
_SECTIONS = frozenset({"deadlines", "failures", "guards", "rule_limits", "telemetry"})
_KEYS = frozenset(
    {
        "checkpoints.best_max_kl",
        "checkpoints.best_metric",
        "checkpoints.every_steps",
        "checkpoints.export",
        "checkpoints.keep",
        "evaluation.every_steps",
        "people.address",
        "people.deadline_hours",
        "people.guidelines",
        "people.judgements",
        "people.store",
        "placement.wait_s",
        "run.accept_changed_files",
        "run.cache",
        "run.grace_s",
        "run.id",
        "run.mirror",
        "run.mirror_every_s",
        "run.name",
        "run.root",
    }
)

CONTENTS = "run.contents."
"""Prefix of the keys that hold digests of files."""

_START_WEIGHTS = tuple(f"{CONTENTS}{name}.path" for name in ("model", "critic", "reward"))

# Keys that are resolved once, when a run starts (jobs/resolve.py). Before that, their value is one of OPEN.
RESOLVED_ONCE = frozenset({"model.dtype", "model.today", "rollout.engine"})
OPEN = ("auto", None)


@dataclass(frozen=True)
class Change:
    """One key whose value differs; null where a section is absent.

    `matters`: the change would affect the results of the steps that follow.
    """

    key: str
    old: Any
    new: Any
    matters: bool

    def __str__(self) -> str:
        if self.is_of_contents and self.old and self.new:
            name = self.key.removeprefix(CONTENTS)
            return f"what {name} holds: digest {self.old[:12]} -> {self.new[:12]}"
        return f"{self.key}: {json.dumps(self.old)} -> {json.dumps(self.new)}"

    @property
    def is_of_contents(self) -> bool:
        """Whether the content of a file changed rather than a key."""
        return self.key.startswith(CONTENTS)

    @property
    def is_model(self) -> bool:
        """Whether the initial weights changed."""
        return self.key in _START_WEIGHTS


def changed_keys(old: Config, new: Config) -> tuple[Change, ...]:
    """The keys that differ, in the order of the config, with values as in JSON."""
    before, after = (dict(_leaves("", config.model_dump(mode="json"))) for config in (old, new))
    keys = [key for key in {**after, **before} if before.get(key) != after.get(key)]
    return tuple(Change(key, before.get(key), after.get(key), _matters(key, old, new)) for key in keys)


def value_of(config: Config, key: str) -> Any:
    """The value at a dotted key."""
    return functools.reduce(getattr, key.split("."), config)


def _matters(key: str, old: Config, new: Config) -> bool:
    if key == "rl.steps":
        by_total_steps = any(learner.schedule != "constant" for learner in (new.policy, new.critic))
        return new.rl.steps < old.rl.steps or by_total_steps
    if key == "stages":
        return new.stages[: len(old.stages)] != old.stages  # appended stages do not matter
    if key in RESOLVED_ONCE and value_of(old, key) in OPEN:
        return False  # the run is older than this key
    before, after = old.run.contents, new.run.contents
    if key.startswith(CONTENTS):
        name = key.removeprefix(CONTENTS)
        return name in before and name in after and not new.run.accept_changed_files
    if key in before and before[key] == after.get(key):
        return False  # the same content under another path
    if key == "rollout.replicas":
        return not new.rollout.reproducible
    if key.endswith(".checkpoint_every_steps") or key.startswith("evaluate.require"):
        return False
    return key not in _KEYS and key.partition(".")[0] not in _SECTIONS


def _leaves(prefix: str, section: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _leaves(f"{prefix}{key}.", value)
        else:
            yield prefix + key, value
