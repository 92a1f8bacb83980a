"""Where rewards come from: models, rules, endpoints."""

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
    """Dotted name `package.module:function` of (prompt, response, meta) -> float or mapping of parts."""
    weight: float = 1.0
    """Factor of this rule in the sum."""


class RuleLimits(Section):
    """Limits of the process in which rules run: rewards, the labeller's and the evaluation's gold rules."""

    call_s: Seconds = 30.0
    """Time for one call of a rule. It is ended then, and its sample fails."""
    import_s: Seconds = 60.0
    """Time to import the rules' modules."""
    memory_gib: PositiveNumber | None = 4.0
    """Memory of the process and all that it starts. Null: no limit."""
    processes: Positive = 64
    """Processes that it may have at one time. Whatever it has started ends with it; where this program may make a PID
    namespace (as root with CAP_SYS_ADMIN) also what forks faster than it could be killed."""


class RewardConfig(Section):
    """The keys of every kind of reward."""

    name: str
    """Where rewards come from."""
    replicas: Positive = 1
    """Actors that score."""
    clip: PositiveNumber | None = None
    """Clip the sequence reward to ±clip."""
    max_failed_fraction: Fraction = 0.1
    """Share of samples of one step whose reward may fail; they are dropped and counted."""
    cpus_per_replica: PositiveNumber = 1.0
    """CPU threads of one replica."""
    gpus_per_replica: NonNegativeNumber = 0.0
    """GPUs of one replica."""


class ModelRewardConfig(RewardConfig):
    """A reward model: a sequence classifier with one label."""

    name: Literal["model"] = "model"
    path: str | None = None
    """Reward model folder or name. Null: the one that the reward_model stage trained."""
    micro_batch_tokens: Positive = 4096
    """Largest padded forward batch, in tokens."""
    max_length: Positive | None = None
    """Longer transcripts lose tokens at their start, counted in reward/cut. Null: reward_model.max_length for the model
    that the reward_model stage trains, else what the model can take."""
    normalise: bool = True
    """Subtract the mean and divide by the standard deviation recorded with the reward model."""


class RulesRewardConfig(RewardConfig):
    """Functions of (prompt, response, meta)."""

    name: Literal["rules"] = "rules"
    rules: Annotated[tuple[RuleConfig, ...], Field(min_length=1)]
    """Rule functions, such as [{function: "my_rewards:brevity"}]; their weighted sum is the reward."""


class HttpRewardConfig(RewardConfig):
    """An endpoint of yours."""

    name: Literal["http"] = "http"
    url: str
    """Endpoint: POST {"samples": [{"prompt","response","meta"}]} answers {"rewards": [number or null]}."""
    timeout_s: Seconds = 30.0
    """Time for one request, from connecting to the last byte of the answer."""
    retries: NonNegative = 3
    """Further tries after a failure, with growing pauses."""
    token_from: str | None = Field(None, pattern=r"^(env:[A-Za-z_][A-Za-z0-9_]*|file:/.+)$")
    """Where the reward replicas find a token that is sent as `Authorization: Bearer`: env:NAME or file:/PATH. The token
    itself is never written in the config. Null: none is sent."""


REWARDS: Mapping[str, type[RewardConfig]] = {
    "model": ModelRewardConfig,
    "rules": RulesRewardConfig,
    "http": HttpRewardConfig,
}
