"""The stages of a run in a config: a kind, or a kind with a unique name and overridden keys."""

from __future__ import annotations

from collections.abc import Mapping
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
