"""Standardises the scores of a weighted reward's sources before they are summed.

Shapes: R rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from orchestrator.types import Moments, ShardRecord

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class WeightedPart:
    """A source of a weighted reward, by the part that holds its score; see WeightedSource."""

    name: str
    weight: float
    standardise: Literal["shard", "running"] | None = None


def weighted_sum(
    parts: Mapping[str, Doubles], sources: Sequence[WeightedPart], earlier: Mapping[str, Moments]
) -> Doubles:
    """Σ weight · z over the sources; z is the score, or (score - mean) / std.

    Mean and standard deviation are those of `earlier` for a running source, if these are of at least two samples, else
    those of the rows. Where all scores are equal, only the mean is subtracted.

    Args:
        parts: scores of each source; NaN where a sample failed, which gives NaN.
        earlier: moments of each running source over the samples of earlier steps.
    """
    total_R = np.zeros(len(next(iter(parts.values()))))
    for source in sources:
        score_R = parts[source.name]
        if source.standardise is not None:
            moments = earlier.get(source.name, Moments())
            if source.standardise == "shard" or moments.count < 2:
                moments = moments_of(score_R[~np.isnan(score_R)])
            score_R = (score_R - moments.mean) / (moments.std or 1.0)
        total_R = total_R + source.weight * score_R
    return total_R


def moments_of(score_R: Doubles) -> Moments:
    return Moments(len(score_R), float(score_R.sum()), float((score_R**2).sum()))


def squares_key(part: str) -> str:
    """The sum of squares of a running source among the sums of a shard."""
    return f"reward_part_{part}_squares_sum"


def running_names(sources: Sequence[WeightedPart]) -> list[str]:
    return [source.name for source in sources if source.standardise == "running"]


def with_step(earlier: Mapping[str, Moments], records: Sequence[ShardRecord]) -> dict[str, Moments]:
    """The moments of running sources after one more step, from the sums of its shards."""
    found = dict(earlier)
    for record in records:
        for key in record.sums:
            part = key.removeprefix("reward_part_").removesuffix("_squares_sum")
            if key == squares_key(part):
                of_shard = (record.sums[f"reward_part_{part}_{what}"] for what in ("count", "sum", "squares_sum"))
                count, total, squares = of_shard
                found[part] = Moments.merge([found.get(part, Moments()), Moments(int(count), total, squares)])
    return found
