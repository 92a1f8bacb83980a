"""Reads a configuration. Rejects unknown keys; every error names the key and a remedy.

A YAML file and dotted overrides (`rl.steps=10 model.path=/models/llama`) become a `Config`, or a ConfigError.
"""

from __future__ import annotations

import copy
import difflib
import reprlib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from orchestrator.config.base import ByName, Section, by_name, by_name_in_mapping
from orchestrator.config.config import Config
from orchestrator.config.described import description_of
from orchestrator.config.stages import translated_stages
from orchestrator.config.yaml_text import MAX_YAML_BYTES, parse_yaml
from orchestrator.data.inputs import read_text
from orchestrator.data.outside_text import has_credential
from orchestrator.errors import ConfigError

RENAMED: Mapping[str, str] = {
    "ppo.steps": "rl.steps",
    "ppo.prompts_per_step": "rl.prompts_per_step",
    "ppo.samples_per_prompt": "rl.samples_per_prompt",
    "ppo.max_staleness": "rl.max_staleness",
    "ppo.advantage": "algorithm.name",
    "ppo.minibatches": "algorithm.minibatches",
    "ppo.epochs": "algorithm.epochs",
    "ppo.clip_ratio": "algorithm.clip_ratio",
    "ppo.clip_value": "algorithm.clip_value",
    "ppo.entropy_coefficient": "algorithm.entropy_coefficient",
    "ppo.gamma": "algorithm.gamma",
    "ppo.lam": "algorithm.lam",
    "ppo.whiten_advantages": "algorithm.whiten_advantages",
    "ppo.kl_estimator": "algorithm.kl_estimator",
    "ppo.kl_coefficient": "algorithm.kl_coefficient",
    "ppo.kl_target": "algorithm.adaptive_kl_target",
    "ppo.kl_horizon_samples": "algorithm.kl_horizon_samples",
    "ppo.target_kl": "algorithm.early_stop_kl",
    "ppo.truncated": "algorithm.truncated",
    "ppo.truncation_penalty": "algorithm.truncation_penalty",
    "ppo.importance_cap": "algorithm.importance_cap",
    "reward.kind": "reward.name",
    "reward.http.url": "reward.url",
    "reward.http.timeout_s": "reward.timeout_s",
    "reward.http.retries": "reward.retries",
    "reward.http.token_from": "reward.token_from",
    "reward.limits.call_s": "rule_limits.call_s",
    "reward.limits.import_s": "rule_limits.import_s",
    "reward.limits.memory_gib": "rule_limits.memory_gib",
    "reward.limits.processes": "rule_limits.processes",
    "labeller.prompts": "sample.prompts",
    "labeller.replies_per_prompt": "sample.samples_per_prompt",
    "reward_model.workers": "reward_model.ranks",
    "reward_model.prompts_per_batch": "reward_model.records_per_batch",
    "reward_model.threads_per_worker": "reward_model.cpus_per_rank",
    "reward_model.gpus_per_worker": "reward_model.gpus_per_rank",
    "reference.replicas": "reference.ranks",
    "reference.cpus_per_replica": "reference.cpus_per_rank",
    "reference.gpus_per_replica": "reference.gpus_per_rank",
    "rollout.engines": "rollout.replicas",
    "rollout.cpus_per_engine": "rollout.cpus_per_replica",
    "rollout.gpus_per_engine": "rollout.gpus_per_replica",
}
"""New key by old key. An old key in a user's config is an error that names the new key; a kept config is translated."""

RENAMED_VALUES: Mapping[str, Mapping[str, str]] = {"algorithm.name": {"gae": "ppo"}}
"""New value by old value, for each new key."""

_SHOWN_ERRORS = 20


_DEEPEST_KEY = 20  # maximum nesting of an override's key; real keys have up to three sections


_CREDENTIAL_PLACES = {
    "run.mirror": "pyarrow reads AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws/credentials",
    "telemetry.mlflow_uri": "MLflow reads MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
    "MLFLOW_TRACKING_TOKEN",
    "reward.url": "name its environment variable or file in reward.token_from",
    "evaluate.judge.url": "name its environment variable or file in evaluate.judge.token_from",
}


def _place_of_credential(key: str) -> str:
    if key.startswith("reward.sources."):
        return f"name its environment variable or file in {key.rpartition('.')[0]}.token_from"
    return _CREDENTIAL_PLACES.get(key, "pass it through the environment")


def load_config(path: Path | None, overrides: Iterable[str] = ()) -> Config:
    """Reads a YAML file and applies dotted overrides `section.key=value` (value in YAML).

    Raises:
        ConfigError: missing file, invalid YAML, an unknown key (names the nearest known key), a wrong type, or
            contradicting keys.
    """
    tree = _read_yaml(path) if path else {}
    for override in overrides:
        _apply_override(tree, override)
    return config_from_tree(tree, source=str(path) if path else "the command line")


def load_kept_config(path: Path) -> Config:
    """Reads the config.yaml of a run folder, which an older version of the program may have written.

    Raises:
        ConfigError: as `load_config`.
    """
    return config_from_tree(translated(_read_yaml(path)), source=str(path))


def config_from_tree(tree: Mapping[str, Any], *, source: str) -> Config:
    for key in _credentials("", tree):
        raise ConfigError(
            f"{source}: {key} holds a credential, which would leak to the process list, logs, config.yaml and reports. "
            f"Remove it from the URL; {_place_of_credential(key)}."
        )
    if old := list(_old_keys(tree)):
        raise ConfigError(f"{source}: " + "\n  ".join(old))
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(item, tree) for item in error.errors()[:_SHOWN_ERRORS]]
        if error.error_count() > _SHOWN_ERRORS:
            lines.append(f"and {error.error_count() - _SHOWN_ERRORS} more")
        raise ConfigError(f"{source}: " + "\n  ".join(lines)) from None


def translated(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Translates the tree of a kept config to the current names. Drops keys of sections that `name` does not select:
    older versions wrote them but never read them."""
    found: dict[str, Any] = copy.deepcopy(dict(tree))
    for old, new in RENAMED.items():
        holder, leaf = _holder(found, old)
        if leaf in holder:
            _set(found, new, holder.pop(leaf))
    for section in sorted({old.rpartition(".")[0] for old in RENAMED}, reverse=True):
        holder, leaf = _holder(found, section)
        is_absent = holder is not found and holder.get(leaf, section) is None
        if is_absent or holder.get(leaf) == {}:
            del holder[leaf]  # an optional section that is null or now empty
    if "stages" in found:
        found["stages"] = translated_stages(found["stages"])
    for key, values in RENAMED_VALUES.items():
        holder, leaf = _holder(found, key)
        if leaf in holder:
            holder[leaf] = _renamed_value(holder[leaf], values)
    for name, field in Config.model_fields.items():
        choice, value = by_name(field), found.get(name)
        if choice is not None and isinstance(value, dict) and (chosen := choice.section(value)) is not None:
            found[name] = {
                key: inner for key, inner in value.items() if key in chosen.model_fields or not choice.owners(key)
            }
    return found


def _old_keys(tree: Mapping[str, Any]) -> Iterator[str]:
    for old, new in RENAMED.items():
        holder, leaf = _holder(tree, old)
        if leaf not in holder:
            continue
        value = _renamed_value(holder[leaf], RENAMED_VALUES.get(new, {}))
        yield f"{old} is now called {new}" + (f"; write {new}={value}." if value != holder[leaf] else ".")


def _renamed_value(value: Any, values: Mapping[str, str]) -> Any:
    if isinstance(value, list):
        return [_renamed_value(inner, values) for inner in value]
    return values.get(value, value) if isinstance(value, str) else value


def _holder(tree: Mapping[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """The section that contains a dotted key (empty if missing), and the last part of the key."""
    *sections, leaf = key.split(".")
    holder: Any = tree
    for section in sections:
        holder = holder.get(section) if isinstance(holder, Mapping) else None
    return (holder if isinstance(holder, dict) else {}), leaf


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, leaf = key.split(".")
    holder: Any = tree
    for section in sections:
        holder = holder.setdefault(section, {})
        if not isinstance(holder, dict):
            return  # a damaged config: the parent is not a section
    holder[leaf] = value


def _credentials(prefix: str, value: Any) -> Iterator[str]:
    """Keys whose values are URLs with a credential."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _credentials(f"{prefix}.{name}" if prefix else str(name), inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _credentials(prefix, inner)
    elif isinstance(value, str) and has_credential(value):
        yield prefix


def changed(config: Config, keys: Mapping[str, Any], *, source: str) -> Config:
    """A copy of the config with new values for dotted keys. Raises ConfigError as `load_config`."""
    tree = config.model_dump(mode="json")
    for key, value in keys.items():
        *sections, leaf = key.split(".")
        place = tree
        for section in sections:
            if place.get(section) is None:  # a section that is off by default
                place[section] = {}
            place = place[section]
            if not isinstance(place, dict):
                raise ConfigError(f"{source}: {key!r}: {section!r} is a value, not a section.")
        place[leaf] = value
    return config_from_tree(tree, source=source)


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _read_yaml(path: Path) -> dict[str, Any]:
    text = read_text(path, f"--config: config file {path}", ConfigError, max_bytes=MAX_YAML_BYTES)
    tree = _parsed(text, str(path))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold sections (`rl:`, `model:`, ...), found {type(tree).__name__}.")
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
        raise ConfigError(f"{shown} does not have the form section.key=value, e.g. rl.steps=10.")
    value = _parsed(text, f"value of {shown}")
    *sections, leaf = key.strip().split(".")
    if len(sections) > _DEEPEST_KEY:
        raise ConfigError(f"{shown}: no key is nested in {len(sections)} sections.")
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


def _explain(error: Any, tree: Mapping[str, Any]) -> str:
    location = _shortened(".".join(str(part) for part in error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"unknown key {location!r}{_suggestion(error['loc'], tree)}"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if error["type"] == "missing":
        *parents, key = (part for part in error["loc"] if isinstance(part, str))
        return f"{location} is required: {description_of(_section_at(parents, tree)[0], key)}"
    return f"{location}: {error['msg'].lower()}, got {reprlib.repr(error['input'])}."


def _suggestion(location: tuple[int | str, ...], tree: Mapping[str, Any]) -> str:
    *parents, key = (part for part in location if isinstance(part, str))
    section, choice = _section_at(parents, tree)
    owners = choice.owners(key) if choice else []
    prefix = ".".join([*parents, ""])
    if owners:
        whole = f"{'.'.join(parents)}={{name: ...}}"
        return (
            f": it is legal only with {prefix}name={' or '.join(owners)}. Remove it; on the command line, {whole} "
            "replaces the file's whole section."
        )
    near = difflib.get_close_matches(key, section.model_fields, n=1, cutoff=0.5)
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
    return f"; known keys: {', '.join(section.model_fields)}."


def _section_at(parents: Iterable[str], tree: Mapping[str, Any]) -> tuple[type[BaseModel], ByName | None]:
    """The section at this path, and the choice that it was selected from, if any."""
    section: type[BaseModel] = Config
    choice: ByName | None = None
    value: Any = tree
    named: ByName | None = None  # the last parent holds sections by names of the user's
    for parent in parents:
        value = value.get(parent) if isinstance(value, Mapping) else None
        if named is not None:
            choice, named = named, None
            section = choice.section(value) or section
            continue
        field = section.model_fields[parent]
        choice, named = by_name(field), by_name_in_mapping(field)
        if named is None:
            section = (choice and choice.section(value)) or _section_type(field.annotation)
    return section, choice


def _section_type(annotation: Any) -> type[BaseModel]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in typing.get_args(annotation):
        if inner not in (types.NoneType, Ellipsis):
            return _section_type(inner)
    raise TypeError(f"{annotation} holds no section")
