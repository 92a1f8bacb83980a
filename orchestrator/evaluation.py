"""Evaluation files, and the gain of a policy over the initial policy on the same held-out prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from orchestrator.errors import DataError, StorageError
from orchestrator.types import Metrics

EVALUATION = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt_text", pa.string(), nullable=False),
        pa.field("response_text", pa.string(), nullable=False),
        pa.field("gold", pa.float64()),  # null: it failed
        pa.field("kl", pa.float64(), nullable=False),  # to the reference, summed over the response (k1)
        pa.field("length", pa.int32(), nullable=False),  # tokens, including EOS
        pa.field("reward", pa.float64()),  # the training reward; null: it failed or was not computed
    ]
)

_RESAMPLES_AT_ONCE = 256  # bounds memory at 256 × prompts indices


@dataclass(frozen=True)
class EvaluationRow:
    """One scored held-out response: a row of EVALUATION."""

    prompt_id: str
    prompt_text: str
    response_text: str
    gold: float
    kl: float
    length: int
    reward: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Paired comparison of gold scores of a last policy with those of a first policy.

    `low` and `high` bound the 95 % percentile interval of `delta_in_sd`. All three are NaN if the first policy's
    scores are all equal, because their SD is zero. `delta_low` and `delta_high` are in gold units.
    """

    num_prompts: int
    gold_first: float
    gold_last: float
    sd_first: float
    delta: float
    delta_low: float
    delta_high: float
    delta_in_sd: float
    low: float
    high: float


def evaluation_file(folder: Path, version: int) -> Path:
    """The file of one version of the weights."""
    return folder / f"step-{version:06d}.parquet"


def read_evaluation(path: Path) -> pa.Table:
    """Reads a table of EVALUATION. Raises StorageError if the file can't be read or has other columns."""
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"evaluation {path} can't be read ({type(error).__name__}). Restore or delete it.") from None
    if table.schema.names != EVALUATION.names:
        raise StorageError(f"evaluation {path} has columns of another version of this program.")
    return table


def evaluation_metrics(table: pa.Table) -> Metrics:
    """The `evaluation/*` metrics of a table of EVALUATION, without those that have no value."""
    metrics = {
        "evaluation/gold_mean": pc.mean(table["gold"]).as_py(),
        "evaluation/gold_std": pc.stddev(table["gold"], ddof=1).as_py(),
        "evaluation/kl_per_response": pc.mean(table["kl"]).as_py(),
        "evaluation/length_mean": pc.mean(table["length"]).as_py(),
        "evaluation/reward_mean": pc.mean(table["reward"]).as_py(),
        "evaluation/failed": table["gold"].null_count,
    }
    return {name: float(value) for name, value in metrics.items() if value is not None}


def compare(
    first: Sequence[EvaluationRow], last: Sequence[EvaluationRow], *, resamples: int = 10_000, seed: int = 0
) -> Comparison:
    """Paired bootstrap over prompts (Efron & Tibshirani 1993, percentile interval).

    Prompts that only one side has are excluded. Several responses to a prompt are averaged. The standard deviation is
    that of the first policy's individual scores (n - 1).

    Raises:
        DataError: the two sides have no prompt in common, or a score is not finite.
    """
    first_of, last_of = _mean_gold(first), _mean_gold(last)
    common = [prompt_id for prompt_id in first_of if prompt_id in last_of]
    if not common:
        raise DataError(
            "no prompt was scored in both evaluations; compare evaluations of one run, and see the failed-*.jsonl next "
            "to them for failed scores."
        )
    first_P = np.array([first_of[prompt_id] for prompt_id in common])
    last_P = np.array([last_of[prompt_id] for prompt_id in common])
    if not (np.isfinite(first_P).all() and np.isfinite(last_P).all()):
        raise DataError("a gold score is NaN or infinite; the gold function must return finite numbers.")
    scores = np.array([row.gold for row in first if row.prompt_id in last_of])
    sd = float(scores.std(ddof=1)) if len(scores) > 1 else 0.0
    unit = sd if sd > 0.0 else math.nan
    delta = float((last_P - first_P).mean())
    delta_low, delta_high = _interval(last_P - first_P, resamples, np.random.default_rng(seed))
    return Comparison(
        num_prompts=len(common),
        gold_first=float(first_P.mean()),
        gold_last=float(last_P.mean()),
        sd_first=sd,
        delta=delta,
        delta_low=delta_low,
        delta_high=delta_high,
        delta_in_sd=delta / unit,
        low=delta_low / unit,
        high=delta_high / unit,
    )


def _mean_gold(rows: Sequence[EvaluationRow]) -> dict[str, float]:
    golds: dict[str, list[float]] = {}
    for row in rows:
        golds.setdefault(row.prompt_id, []).append(row.gold)
    return {prompt_id: math.fsum(values) / len(values) for prompt_id, values in golds.items()}


def _interval(
    difference_P: npt.NDArray[np.float64], resamples: int, generator: np.random.Generator
) -> tuple[float, float]:
    means = []
    for start in range(0, resamples, _RESAMPLES_AT_ONCE):
        shape = (min(_RESAMPLES_AT_ONCE, resamples - start), len(difference_P))
        means.append(difference_P[generator.integers(0, len(difference_P), shape)].mean(axis=1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)
