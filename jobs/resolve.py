"""Values of the config that depend on the machine or the moment, resolved once when a run starts.

A key of the table below is open while it is `auto` or null. A new run resolves it, and its config.yaml keeps the value;
a later attempt takes the kept one. Code after this sees resolved values only. The digests of the files that a run reads
are computed at every attempt, and compared with the kept ones (config_changes.py).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from actors.probe import machine_speed
from jobs.command import say
from jobs.contents import contents
from jobs.run_folder import kept_config
from orchestrator.config import Config, config_from_tree
from orchestrator.config_changes import OPEN, value_of


@dataclass(frozen=True)
class Resolved:
    """A value for one key, and why it was chosen: a line for people, empty where there is nothing to say."""

    value: Any
    why: str = ""


def model_dtype(config: Config) -> Resolved:
    """bf16 on GPUs; on CPUs the type in which this machine multiplies faster."""
    if uses_gpus(config):
        return Resolved("bfloat16", "on GPUs")
    speed = machine_speed(config.run.cache)
    return Resolved(speed.dtype, speed.describe())


def model_today(config: Config) -> Resolved:
    """Chat templates that write a date write the same one as long as the run lives."""
    return Resolved(datetime.now().astimezone().date().isoformat())


def rollout_engine(config: Config) -> Resolved:
    """vLLM; where it is not installed (it is not published for macOS), generation by transformers."""
    if importlib.util.find_spec("vllm") is not None:
        return Resolved("vllm")
    return Resolved("hf", "vLLM is not installed here; transformers samples, more slowly")


# Keys must also be in orchestrator.config_changes.RESOLVED_ONCE.
RESOLVERS: Mapping[str, Callable[[Config], Resolved]] = {
    "model.dtype": model_dtype,
    "model.today": model_today,
    "rollout.engine": rollout_engine,
}


def resolved(config: Config, tell: Callable[[str], None] = say) -> Config:
    """The config without open values: those that the run's own config.yaml keeps, else what the resolvers choose.

    Args:
        tell: gets a line for each value that is chosen here.

    Raises:
        ConfigError: the kept config can't be read, or the values contradict others.
        StorageError: the run folder can't be read.
    """
    kept = kept_config(config)
    tree = config.model_dump(mode="json")
    for key, resolve in RESOLVERS.items():
        if value_of(config, key) not in OPEN:
            continue
        kept_value = value_of(kept, key) if kept else None
        found = Resolved(kept_value) if kept_value not in OPEN else resolve(config)
        _set(tree, key, found.value)
        if found.why:
            tell(f"{key}: {found.value} ({found.why})")
    tree["run"]["contents"] = contents(config)
    return config_from_tree(tree, source="the resolved config")


def uses_gpus(config: Config) -> bool:
    shares = (
        config.policy.gpus_per_rank,
        config.critic.gpus_per_rank if config.ppo.has_critic else 0.0,
        config.reference.gpus_per_replica,
        config.reward.gpus_per_replica,
        config.reward_model.gpus_per_worker,
        config.rollout.gpus_per_engine,
    )
    return any(shares)


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, leaf = key.split(".")
    for section in sections:
        tree = tree[section]
    tree[leaf] = value
