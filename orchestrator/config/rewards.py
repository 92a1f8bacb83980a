"""Sources of rewards: models, rules, endpoints, judges, and weighted sums of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, SerializeAsAny
from pydantic_core import PydanticCustomError

from orchestrator.config.base import (
    ByName,
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

    def sources_by_key(self) -> Mapping[str, Section]:
        """The sections that describe one source each, by their key in the config."""
        return {"reward": self}

    def contradictions(self, compared_parts: tuple[str, ...]) -> Iterator[str]:
        """Args: compared_parts: what the algorithm compares instead of the reward, if it does."""
        if compared_parts and self.clip is not None:
            yield (
                f"reward.clip={self.clip:g} clips the whole reward, of which algorithm.name=gdpo compares only parts. "
                "Set reward.clip=null."
            )


class WeightedSource(Section):
    """The keys of every source of a weighted sum."""

    name: str
    """Kind of this source. Its other keys are those of `reward` with this name."""
    weight: float = 1.0
    """Factor of this source's score in the reward."""
    standardise: Literal["shard", "running"] | None = None
    """What learning uses of the score before it is weighted: (score - mean) / standard deviation, over the samples of
    its shard, or over all samples of earlier steps (running; the first step by shard). Metrics and evaluations keep the
    score itself. Null: the score itself."""


class ModelSource(Section):
    """A reward model: a sequence classifier with one label."""

    path: str | None = None
    """Folder or name of the reward model. Null: the one that the reward_model stage trained."""
    micro_batch_tokens: Positive = 4096
    """Largest padded forward batch, in tokens."""
    max_length: Positive | None = None
    """Longer transcripts are cut at the start and counted in reward/cut. Null: reward_model.max_length for the model
    that the reward_model stage trained, else the model's maximum."""
    normalise: bool = True
    """Subtract the mean and divide by the standard deviation recorded with the reward model."""


class ModelRewardConfig(ModelSource, RewardConfig):
    """A reward model: a sequence classifier with one label."""

    name: Literal["model"] = "model"


class WeightedModel(ModelSource, WeightedSource):
    name: Literal["model"] = "model"


class RulesSource(Section):
    """Functions of (prompt, response, meta)."""

    rules: Annotated[tuple[RuleConfig, ...], Field(min_length=1)]
    """Rule functions, such as [{function: "my_rewards:brevity"}]; their weighted sum is the reward."""


class RulesRewardConfig(RulesSource, RewardConfig):
    """Functions of (prompt, response, meta)."""

    name: Literal["rules"] = "rules"


class WeightedRules(RulesSource, WeightedSource):
    name: Literal["rules"] = "rules"


class EndpointConfig(Section):
    """The keys of everything that is asked over HTTP."""

    url: str
    """Address of the endpoint."""
    timeout_s: Seconds = 30.0
    """Time limit of one request, from connecting to the last byte of the response."""
    retries: NonNegative = 3
    """Retries after a failure, with exponential backoff."""
    token_from: str | None = Field(None, pattern=r"^(env:[A-Za-z_][A-Za-z0-9_]*|file:/.+)$")
    """Source of the token that is sent as `Authorization: Bearer`: env:NAME or file:/PATH. The token itself is never in
    the config. Null: no token."""


class HttpSource(EndpointConfig):
    """An HTTP endpoint of the user."""

    url: str
    """Endpoint: POST {"samples": [{"prompt","response","meta"}]} returns {"rewards": [number or null]}."""


class HttpRewardConfig(HttpSource, RewardConfig):
    """An HTTP endpoint of the user."""

    name: Literal["http"] = "http"


class WeightedHttp(HttpSource, WeightedSource):
    name: Literal["http"] = "http"


def _one_group(pattern: str) -> str:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise PydanticCustomError("pattern", "is not a regular expression: {error}", {"error": str(error)}) from None
    if groups != 1:
        raise PydanticCustomError("pattern", "needs one group, the verdict; it has {groups}", {"groups": groups})
    return pattern


def _rising(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] >= bounds[1]:
        raise PydanticCustomError("range", "needs its lower bound first")
    return bounds


Verdict = Annotated[str, AfterValidator(_one_group)]


class JudgeConfig(EndpointConfig):
    """A language model that judges, at an OpenAI-compatible endpoint of chat completions."""

    url: str
    """Base URL, such as http://host:8000/v1; /chat/completions is appended."""
    model: str
    """Name of the model at the endpoint."""
    template: Path | None = None
    """Jinja file of the judge's prompt, sent as one user message (docs/rewards.md). Null: the shipped one."""
    verdict: Verdict
    """Regular expression with one group. Its last match in the judge's answer is the verdict; no match is a failure."""
    temperature: NonNegativeNumber | None = 0.0
    """Sampling temperature of the judge. Null: the endpoint's default."""
    max_tokens: Positive | None = 512
    """Longest answer of the judge, in tokens. Null: the endpoint's default."""
    timeout_s: Seconds = 120.0
    """Time limit of one request, from connecting to the last byte of the response."""
    concurrent_requests: Positive = 16
    """Most requests of one replica at the same time."""


class JudgeSource(JudgeConfig):
    """A language model that gives each reply a score."""

    verdict: Verdict = r"\[\[(-?\d+(?:\.\d+)?)\]\]"
    """Regular expression with one group. Its last match in the judge's answer is the score; no match is a failure."""
    score_range: Annotated[tuple[float, float], AfterValidator(_rising)] = (0.0, 10.0)
    """Lowest and highest score. A score outside is a failure."""


class JudgeRewardConfig(JudgeSource, RewardConfig):
    """A language model that gives each reply a score."""

    name: Literal["judge"] = "judge"


class WeightedJudge(JudgeSource, WeightedSource):
    name: Literal["judge"] = "judge"


class EnvironmentRewardConfig(RewardConfig):
    """The rewards of the environment alone. Beside any other source they are added to its scores."""

    name: Literal["environment"] = "environment"


class WeightedEnvironment(WeightedSource):
    name: Literal["environment"] = "environment"


WEIGHTED_SOURCES: Mapping[str, type[WeightedSource]] = {
    "model": WeightedModel,
    "rules": WeightedRules,
    "http": WeightedHttp,
    "judge": WeightedJudge,
    "environment": WeightedEnvironment,
}
_SourceName = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")]


class WeightedRewardConfig(RewardConfig):
    """The weighted sum of several sources, which one replica asks at the same time."""

    name: Literal["weighted"] = "weighted"
    sources: Annotated[
        Mapping[_SourceName, Annotated[SerializeAsAny[WeightedSource], ByName(WEIGHTED_SOURCES, default="model")]],
        Field(min_length=1),
    ]
    """The sources by a name of your choice, such as {quality: {name: model, path: FOLDER, weight: 0.7}}. A score is the
    part with the source's name (reward/part/NAME), and its parts are NAME.PART. If one source fails, the sample does.
    """

    def sources_by_key(self) -> Mapping[str, Section]:
        return {f"reward.sources.{name}": source for name, source in self.sources.items()}

    def contradictions(self, compared_parts: tuple[str, ...]) -> Iterator[str]:
        yield from super().contradictions(compared_parts)
        untrained = [key for key, source in reward_models(self).items() if source.path is None]
        if len(untrained) > 1:
            yield (
                f"{' and '.join(untrained)} have no path, so all would be the one model that stage "
                "reward_model trains. Give all but one a path."
            )
        standardised = [name for name, source in self.sources.items() if source.standardise]
        if compared_parts and standardised:
            yield (
                f"algorithm.name=gdpo standardises the parts of algorithm.part_weights itself, per prompt, so "
                f"reward.sources.{standardised[0]}.standardise would not be used. Set it to null."
            )


class PairJudgeConfig(JudgeConfig):
    """A language model that compares two replies."""

    verdict: Verdict = r"\[\[([ABC])\]\]"
    """Regular expression with one group, which matches A (the first reply is better), B (the second) or C (a tie)."""


REWARDS: Mapping[str, type[RewardConfig]] = {
    "model": ModelRewardConfig,
    "rules": RulesRewardConfig,
    "http": HttpRewardConfig,
    "judge": JudgeRewardConfig,
    "environment": EnvironmentRewardConfig,
    "weighted": WeightedRewardConfig,
}
"""Kinds of rewards by name."""


def reward_models(reward: RewardConfig) -> Mapping[str, ModelSource]:
    """The reward models among a reward's sources, by the key of their section."""
    return {key: source for key, source in reward.sources_by_key().items() if isinstance(source, ModelSource)}


def main_reward_model(reward: RewardConfig) -> tuple[str, ModelSource] | None:
    """(key, section) of the reward model from which the critic starts: the one that stage reward_model trains,
    otherwise the first. None: the reward has no model."""
    return min(reward_models(reward).items(), key=lambda item: item[1].path is not None, default=None)
