"""Rewards of episodes: what the environment returned while a sample was drawn (meta["environment"])."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from actors.rewards import RewardContext, RewardSource, Score, samples
from orchestrator.config.rewards import EnvironmentRewardConfig

EPISODE = "environment"  # key of `meta`


class EpisodeReward:
    """The sum of an episode's rewards. An episode that failed has no score."""

    def scores(self, table: pa.Table) -> list[Score]:
        scores = []
        for sample in samples(table):
            episode = sample.meta.get(EPISODE)
            if episode is None:
                scores.append(Score(None, error="the sample has no episode: it was drawn without an environment"))
            elif episode["error"] is not None:
                scores.append(Score(None, error=episode["error"]))
            else:
                scores.append(Score(episode["reward"], episode["parts"]))
        return scores


class WithEpisodes:
    """Another source's score plus the episode's reward, if the sample has an episode. Either's failure is the
    sample's."""

    def __init__(self, source: RewardSource) -> None:
        self._source = source

    def scores(self, table: pa.Table) -> Sequence[Score]:
        pairs = zip(self._source.scores(table), EpisodeReward().scores(table), samples(table), strict=True)
        return [_sum(score, episode) if EPISODE in sample.meta else score for score, episode, sample in pairs]


def build(reward: EnvironmentRewardConfig, context: RewardContext) -> EpisodeReward:
    return EpisodeReward()


def _sum(score: Score, episode: Score) -> Score:
    if score.value is None or episode.value is None:
        error = episode.error if episode.value is None else score.error
        return Score(None, error=error, tokens_cut=score.tokens_cut)
    return Score(score.value + episode.value, {**score.parts, **episode.parts}, tokens_cut=score.tokens_cut)
