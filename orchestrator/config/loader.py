"""Reads a configuration: unknown keys are refused, every error names the key and the way out.

A YAML file and dotted overrides (`ppo.steps=10 model.path=/models/llama`) become a `Config`, or a ConfigError.
"""

from __future__ import annotations

import difflib
import reprlib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from orchestrator.config.base import Section
from orchestrator.config.config import Config
from orchestrator.config.yaml_text import MAX_YAML_BYTES, parse_yaml
from orchestrator.data.inputs import read_text
from orchestrator.data.outside_text import has_credential
from orchestrator.errors import ConfigError

_SHOWN_ERRORS = 20


_DEEPEST_KEY = 20  # sections before a key of an override; real keys have up to three


_CREDENTIAL_PLACES = {
    "run.mirror": "pyarrow reads AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws/credentials",
    "telemetry.mlflow_uri": "MLflow reads MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
    "MLFLOW_TRACKING_TOKEN",
    "reward.http.url": "name its environment variable or file in reward.http.token_from",
}


def load_config(path: Path | None, overrides: Iterable[str] = ()) -> Config:
    """Reads a YAML file and applies dotted overrides `section.key=value` (value in YAML).

    Raises:
        ConfigError: no such file, not YAML, an unknown key (with the nearest known one), a wrong type, or keys
            that contradict each other.
    """
    tree = _read_yaml(path) if path else {}
    for override in overrides:
        _apply_override(tree, override)
    return config_from_tree(tree, source=str(path) if path else "the command line")


def config_from_tree(tree: Mapping[str, Any], *, source: str) -> Config:
    for key in _credentials("", tree):
        raise ConfigError(
            f"{source}: {key} holds a credential, which would reach the process list, logs, config.yaml and reports. "
            f"Take it out of the URL; {_CREDENTIAL_PLACES.get(key, 'give it by the environment')}."
        )
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(item) for item in error.errors()[:_SHOWN_ERRORS]]
        if error.error_count() > _SHOWN_ERRORS:
            lines.append(f"and {error.error_count() - _SHOWN_ERRORS} more")
        raise ConfigError(f"{source}: " + "\n  ".join(lines)) from None


def _credentials(prefix: str, value: Any) -> Iterator[str]:
    """Names of the keys whose values are URLs with a credential."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _credentials(f"{prefix}.{name}" if prefix else str(name), inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _credentials(prefix, inner)
    elif isinstance(value, str) and has_credential(value):
        yield prefix


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _read_yaml(path: Path) -> dict[str, Any]:
    text = read_text(path, f"--config: config file {path}", ConfigError, max_bytes=MAX_YAML_BYTES)
    tree = _parsed(text, str(path))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold sections (`ppo:`, `model:`, ...), found {type(tree).__name__}.")
    return tree


def _parsed(text: str, what: str) -> Any:
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{what} is not valid YAML: {error}") from None


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    shown = f"override {_shortened(override)!r}"
    if not separator or not key:
        raise ConfigError(f"{shown} is not of the form section.key=value, e.g. ppo.steps=10.")
    value = _parsed(text, f"value of {shown}")
    *sections, leaf = key.strip().split(".")
    if len(sections) > _DEEPEST_KEY:
        raise ConfigError(f"{shown}: no key has {len(sections)} sections before it.")
    for section in sections:
        child = tree.get(section)
        if child is None:
            child = tree[section] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"{shown}: {_shortened(section)!r} is a value, not a section.")
        tree = child
    tree[leaf] = value


def _shortened(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:197]}..."


def _explain(error: Any) -> str:
    location = _shortened(".".join(str(part) for part in error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"unknown key {location!r}{_suggestion(error['loc'])}"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    return f"{location}: {error['msg'].lower()}, got {reprlib.repr(error['input'])}."


def _suggestion(location: tuple[int | str, ...]) -> str:
    *parents, key = (part for part in location if isinstance(part, str))
    section: type[BaseModel] = Config
    for parent in parents:
        section = _section_type(section.model_fields[parent].annotation)
    near = difflib.get_close_matches(key, section.model_fields, n=1, cutoff=0.5)
    prefix = ".".join([*parents, ""])
    if near:
        return f"; did you mean {prefix + near[0]!r}?"
    elsewhere = [
        f"{name}.{key}"
        for name, field in Config.model_fields.items()
        if isinstance(field.annotation, type)
        and issubclass(field.annotation, Section)
        and key in field.annotation.model_fields
    ]
    if elsewhere:
        return f"; did you mean {elsewhere[0]!r}?"
    return f"; known here: {', '.join(section.model_fields)}."


def _section_type(annotation: Any) -> type[BaseModel]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in typing.get_args(annotation):
        if inner not in (types.NoneType, Ellipsis):
            return _section_type(inner)
    raise TypeError(f"{annotation} holds no section")
