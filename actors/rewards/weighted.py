"""The weighted sum of several sources. Endpoints and rules are asked while reward models compute."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pyarrow as pa

from actors.rewards import RewardContext, RewardSource, Score
from actors.rewards.table import build_alone
from orchestrator.config.rewards import ModelSource, WeightedRewardConfig
from orchestrator.errors import ConfigError, DataError, RewardError


@dataclass(frozen=True)
class Weighted:
    """One source. `is_local`: it computes in this process, so it shares the threads with others of its kind."""

    source: RewardSource
    weight: float
    is_local: bool = False


class WeightedReward:
    """A sample's score is Σ weight · score over the sources. Its parts are the score of each source, under the source's
    name, and the source's own parts, under NAME.PART. If a source fails, the sample does.

    Args:
        sources: by name. Local ones are asked one after the other, in this thread; the others at the same time.
    """

    def __init__(self, sources: Mapping[str, Weighted]) -> None:
        self._sources = sources
        others = sum(not source.is_local for source in sources.values())
        self._threads = ThreadPoolExecutor(max(others, 1), thread_name_prefix="reward")

    def scores(self, table: pa.Table) -> list[Score]:
        """Raises RewardError, which names the source, if a whole source fails."""
        asked: dict[str, Future[Sequence[Score]]] = {
            name: self._threads.submit(each.source.scores, table)
            for name, each in self._sources.items()
            if not each.is_local
        }
        found: dict[str, Sequence[Score]] = {}
        for name, each in self._sources.items():
            if each.is_local:
                with _naming(name):
                    found[name] = each.source.scores(table)
        for name, future in asked.items():
            with _naming(name):
                found[name] = future.result()
        return [self._sum({name: found[name][row] for name in self._sources}) for row in range(table.num_rows)]

    def _sum(self, scores: Mapping[str, Score]) -> Score:
        """The sum of one sample's scores, in the order of the sources."""
        cut = max(score.tokens_cut for score in scores.values())
        failed = [f"source {name}: {score.error}" for name, score in scores.items() if score.value is None]
        if failed:
            return Score(None, error="; ".join(failed), tokens_cut=cut)
        values = {name: score.value for name, score in scores.items() if score.value is not None}
        parts = {}
        for name, score in scores.items():
            parts[name] = values[name]
            parts |= {f"{name}.{part}": value for part, value in score.parts.items()}
        try:
            total = math.fsum(self._sources[name].weight * value for name, value in values.items())
        except (OverflowError, ValueError):  # infinite, or the difference of two infinities
            return Score(None, error=f"the weighted sum of {values} is not a finite number", tokens_cut=cut)
        return Score(total, parts, tokens_cut=cut)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Errors name the source."""
    try:
        yield
    except (ConfigError, DataError, RewardError) as error:
        raise type(error)(f"reward.sources.{name}: {error}") from error


def build(reward: WeightedRewardConfig, context: RewardContext) -> WeightedReward:
    """Raises ConfigError, DataError: a source can't be built; names it."""
    sources = {}
    for name, section in reward.sources.items():
        with _naming(name):
            source = build_alone(section, replace(context, key=f"reward.sources.{name}"))
        sources[name] = Weighted(source, section.weight, is_local=isinstance(section, ModelSource))
    return WeightedReward(sources)
