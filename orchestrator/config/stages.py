"""The stages of a run in a config: a kind, a kind with a unique name and overridden keys, or rounds of stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from pydantic import Field, model_serializer, model_validator

from orchestrator.config.base import Section

_NAME = r"^[a-z0-9][a-z0-9_-]{0,40}$"


OLD_KINDS: Mapping[str, str] = MappingProxyType({"ppo": "rl"})
"""New kind by old kind. Kept configs, metrics and events may contain old kinds."""


def translated_stages(stages: Any) -> Any:
    """Translates `stages` of a kept config to the current names. `preferences` used to include the stage `sample`."""
    if not isinstance(stages, list):
        return stages
    found = [OLD_KINDS.get(entry, entry) if isinstance(entry, str) else entry for entry in stages]
    if "preferences" in found and "sample" not in found:
        found.insert(found.index("preferences"), "sample")
    return found


def in_rounds(stages: Any) -> Any:
    """Replaces each entry `{rounds: 2, stages: [sample, rl]}` by its rounds: sample-1, rl-1, sample-2, rl-2.

    Raises:
        ValueError: an entry of rounds has another form.
    """
    if not isinstance(stages, (list, tuple)):
        return stages
    return [single for entry in stages for single in (_rounds(entry) if _has_rounds(entry) else (entry,))]


def _has_rounds(entry: Any) -> bool:
    return isinstance(entry, Mapping) and ("rounds" in entry or "stages" in entry)


def _rounds(entry: Mapping[str, Any]) -> Iterator[Any]:
    form = "write {rounds: 3, stages: [sample, score, select, sft]}."
    if set(entry) != {"rounds", "stages"}:
        raise ValueError(
            f"stages: rounds have the keys rounds and stages, and no others; got {', '.join(entry)}: {form}"
        )
    count, stages = entry["rounds"], entry["stages"]
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"stages: rounds must be a whole number from 1 on, got {count!r}: {form}")
    if not isinstance(stages, (list, tuple)) or not stages:
        raise ValueError(f"stages: the stages of rounds must be a list of at least one stage, got {stages!r}: {form}")
    if any(map(_has_rounds, stages)):
        raise ValueError(f"stages: rounds can't contain rounds: write them one after the other, {form}")
    for number in range(1, count + 1):
        for stage in stages:
            tree = dict(stage) if isinstance(stage, Mapping) else {"kind": stage}
            yield {**tree, "name": f"{tree.get('name', tree.get('kind'))}-{number}"}


class StageEntry(Section):
    """`rl`, or `{name: rl-again, kind: rl, set: {rl.steps: 5}}`."""

    kind: str = Field(pattern=_NAME)
    """Kind of the stage."""
    name: str = Field("", pattern=_NAME, validate_default=False)
    """Unique name in events, metrics and files, so that a kind may occur twice. Default: the kind."""
    set: Mapping[str, Any] = Field(default_factory=dict)
    """Dotted keys to override in this stage."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        tree = {"kind": value} if isinstance(value, str) else value
        return {"name": tree.get("kind"), **tree} if isinstance(tree, Mapping) else tree

    @model_serializer
    def _to_text(self) -> Any:
        if self.name == self.kind and not self.set:
            return self.kind
        return {"name": self.name, "kind": self.kind, "set": dict(self.set)}
