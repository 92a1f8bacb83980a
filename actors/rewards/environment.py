"""Rewards of episodes: what the environment returned while a sample was drawn (meta["episode"])."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from actors.rewards import RewardContext, RewardSource, Score, samples
from orchestrator.config.rewards import EnvironmentRewardConfig, WeightedEnvironment

EPISODE = "episode"  # key of `meta`
_KEYS = {"reward", "parts", "error", "spans"}


def episode_of(meta: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What actors.environments.episodes recorded. None: the sample was drawn without an environment."""
    episode = meta.get(EPISODE)
    return episode if isinstance(episode, Mapping) and episode.keys() >= _KEYS else None


class EpisodeReward:
    """The sum of an episode's rewards. An episode that failed has no score."""

    def scores(self, table: pa.Table) -> list[Score]:
        return [_score_of(episode_of(sample.meta)) for sample in samples(table)]


class WithEpisodes:
    """Another source's score plus the episode's reward, if the sample has an episode. Either's failure is the
    sample's."""

    def __init__(self, source: RewardSource) -> None:
        self._source = source

    def scores(self, table: pa.Table) -> Sequence[Score]:
        episodes = (episode_of(sample.meta) for sample in samples(table))
        pairs = zip(self._source.scores(table), episodes, strict=True)
        return [score if episode is None else _sum(score, _score_of(episode)) for score, episode in pairs]


def build(reward: EnvironmentRewardConfig | WeightedEnvironment, context: RewardContext) -> EpisodeReward:
    return EpisodeReward()


def _score_of(episode: Mapping[str, Any] | None) -> Score:
    if episode is None:
        return Score(None, error="the sample has no episode: it was drawn without an environment")
    if episode["error"] is not None:
        return Score(None, error=episode["error"])
    return Score(episode["reward"], episode["parts"])


def _sum(score: Score, episode: Score) -> Score:
    if score.value is None or episode.value is None:
        error = episode.error if episode.value is None else score.error
        return replace(score, value=None, parts={}, error=error)
    return replace(score, value=score.value + episode.value, parts={**score.parts, **episode.parts})
