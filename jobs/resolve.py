"""Values of the config that depend on the machine or the moment, resolved once when a run starts.

A key of the table below is open while it is `auto` or null. A new run resolves it, and its config.yaml keeps the value
for later attempts. All other code sees only resolved values. Every attempt computes the digests of the files that a run
reads, and compares them with the kept ones (orchestrator/config/changes.py).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from actors.machine.probe import machine_speed
from jobs.check.engine_trial import verdict_on_vllm
from jobs.command import say
from jobs.contents import contents
from jobs.stages.table import samples_prompts
from orchestrator.config.changes import OPEN, value_of
from orchestrator.config.config import Config
from orchestrator.config.loader import changed
from orchestrator.errors import DataError
from orchestrator.run.folder import kept_config


@dataclass(frozen=True)
class Resolved:
    """A value for one key, and why it was chosen: a line for the console, which may be empty."""

    value: Any
    why: str = ""


Tell = Callable[[str], None]


def model_dtype(config: Config, tell: Tell) -> Resolved:
    """bf16 on GPUs; on CPUs the type in which this machine multiplies faster."""
    if uses_gpus(config):
        return Resolved("bfloat16", "on GPUs")
    speed = machine_speed(config.run.cache)
    return Resolved(speed.dtype, speed.describe())


def model_today(config: Config, tell: Tell) -> Resolved:
    """Chat templates that write a date write the same date during the whole run."""
    return Resolved(datetime.now().astimezone().date().isoformat())


def rollout_engine(config: Config, tell: Tell) -> Resolved:
    """vLLM if it is installed (it is not published for macOS) and, according to a trial, serves the policy's
    architecture; otherwise generation by transformers. Stays open if nothing samples."""
    if not samples_prompts(config):
        return Resolved("auto")
    if importlib.util.find_spec("vllm") is None:
        return Resolved("hf", "vLLM is not installed here; transformers samples, more slowly")
    try:
        verdict = verdict_on_vllm(config, lambda line: tell(f"rollout.engine=auto: {line}"))
    except DataError:  # the model can't be found; the checks of the run report that, with all other problems
        verdict = None
    if verdict is None or verdict.refusal is None:
        return Resolved("vllm")
    reason = f"vLLM can't serve model.path={config.model.path}: {verdict.refusal.rstrip('.')}"
    return Resolved("hf", f"{reason}; transformers samples, more slowly")


# In this order: the engine is tried in the dtype. Keys must also be in orchestrator.config.changes.RESOLVED_ONCE.
RESOLVERS: Mapping[str, Callable[[Config, Tell], Resolved]] = {
    "model.dtype": model_dtype,
    "model.today": model_today,
    "rollout.engine": rollout_engine,
}
WITHOUT_TRIAL = ("model.dtype", "model.today")
"""For what only computes with a config: trying an engine takes a while."""


def resolved(config: Config, tell: Tell = say, keys: Collection[str] = tuple(RESOLVERS)) -> Config:
    """The config without open values: those that the run's own config.yaml keeps, otherwise what the resolvers choose.

    Args:
        tell: gets a line for each value that is chosen here.
        keys: others are left open, unless the run keeps a value.

    Raises:
        ConfigError: the kept config can't be read, or the values contradict others.
        StorageError: the run folder can't be read.
    """
    kept = kept_config(config)
    for key, resolve in RESOLVERS.items():
        if value_of(config, key) not in OPEN:
            continue
        kept_value = value_of(kept, key) if kept else None
        if kept_value not in OPEN:
            found = Resolved(kept_value)
        elif key in keys:
            found = resolve(config, tell)
        else:
            continue
        config = changed(config, {key: found.value}, source="the resolved config")
        if found.why:
            tell(f"{key}: {found.value} ({found.why})")
    return changed(config, {"run.contents": contents(config)}, source="the resolved config")


def uses_gpus(config: Config) -> bool:
    shares = (
        config.policy.gpus_per_rank,
        config.critic.gpus_per_rank if config.algorithm.needs_critic else 0.0,
        config.reference.gpus_per_rank,
        config.reward.gpus_per_replica,
        config.reward_model.gpus_per_rank,
        config.rollout.gpus_per_replica,
    )
    return any(shares)
