"""Sources of rewards: models, rules, endpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from orchestrator.config.base import (
    Fraction,
    NonNegative,
    NonNegativeNumber,
    Positive,
    PositiveNumber,
    Seconds,
    Section,
)


class RuleConfig(Section):
    function: str
    """Dotted name `package.module:function` of a function (prompt, response, meta) -> float or mapping of parts."""
    weight: float = 1.0
    """Weight of this rule in the sum."""


class RuleLimits(Section):
    """Limits of the process that runs rules: rewards, and the gold rules of labeller and evaluation."""

    call_s: Seconds = 30.0
    """Time limit of one rule call. A call that exceeds it is killed and its sample fails."""
    import_s: Seconds = 60.0
    """Time limit to import the rules' modules."""
    memory_gib: PositiveNumber | None = 4.0
    """Memory limit of the process and its descendants. Null: no limit."""
    processes: Positive = 64
    """Maximum number of concurrent processes. All descendants end with the rule process. Killing processes that fork
    continuously needs a PID namespace (root with CAP_SYS_ADMIN)."""


class RewardConfig(Section):
    """The keys of every kind of reward."""

    name: str
    """Source of rewards."""
    replicas: Positive = 1
    """Number of scoring actors."""
    clip: PositiveNumber | None = None
    """Clip the sequence reward to ±clip. Null: off."""
    max_failed_fraction: Fraction = 0.1
    """Maximum share of one step's samples whose reward may fail; these are dropped and counted."""
    cpus_per_replica: PositiveNumber = 1.0
    """CPU threads of one replica."""
    gpus_per_replica: NonNegativeNumber = 0.0
    """GPUs of one replica."""


class ModelRewardConfig(RewardConfig):
    """A reward model: a sequence classifier with one label."""

    name: Literal["model"] = "model"
    path: str | None = None
    """Folder or name of the reward model. Null: the one that the reward_model stage trained."""
    micro_batch_tokens: Positive = 4096
    """Largest padded forward batch, in tokens."""
    max_length: Positive | None = None
    """Longer transcripts are cut at the start and counted in reward/cut. Null: reward_model.max_length for the model
    that the reward_model stage trained, else the model's maximum."""
    normalise: bool = True
    """Subtract the mean and divide by the standard deviation recorded with the reward model."""


class RulesRewardConfig(RewardConfig):
    """Functions of (prompt, response, meta)."""

    name: Literal["rules"] = "rules"
    rules: Annotated[tuple[RuleConfig, ...], Field(min_length=1)]
    """Rule functions, such as [{function: "my_rewards:brevity"}]; their weighted sum is the reward."""


class HttpRewardConfig(RewardConfig):
    """An HTTP endpoint of the user."""

    name: Literal["http"] = "http"
    url: str
    """Endpoint: POST {"samples": [{"prompt","response","meta"}]} returns {"rewards": [number or null]}."""
    timeout_s: Seconds = 30.0
    """Time limit of one request, from connecting to the last byte of the response."""
    retries: NonNegative = 3
    """Retries after a failure, with exponential backoff."""
    token_from: str | None = Field(None, pattern=r"^(env:[A-Za-z_][A-Za-z0-9_]*|file:/.+)$")
    """Source of the token that reward replicas send as `Authorization: Bearer`: env:NAME or file:/PATH. The token
    itself is never in the config. Null: no token."""


REWARDS: Mapping[str, type[RewardConfig]] = {
    "model": ModelRewardConfig,
    "rules": RulesRewardConfig,
    "http": HttpRewardConfig,
}
