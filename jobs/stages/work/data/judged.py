"""Replies that people or a rule judged: reads them for the stages that learn from them, and measures scores by them."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from actors.training.ranked_rows import JudgedRecord, judged
from jobs.prepare import find_data
from orchestrator.algorithms.ensemble import Disagreement, mean_disagreement
from orchestrator.algorithms.ranking import concordant_pairs, kendall_tau, num_pairs, order, spread, wilson_interval
from orchestrator.config.config import Config
from orchestrator.config.losses import Judgement
from orchestrator.data.readers import read_labels, read_rankings, read_scores
from orchestrator.data.records import ReadReport
from orchestrator.errors import DataError
from orchestrator.prompts import split_held_out

_MOST_COMPARED = 500

Records = Sequence[JudgedRecord]
Value = TypeVar("Value")

_READERS: Mapping[Judgement, Callable[..., tuple[Any, ReadReport]]] = {
    "rankings": read_rankings,
    "labels": read_labels,
    "scores": read_scores,
}


def read_judged(config: Config, judgement: Judgement, path: Path | None = None) -> tuple[Records, ReadReport]:
    """Reads preferences.path, or where it is null `path`. Raises DataError."""
    section = config.preferences
    if path is None and section.path is None:
        raise DataError(f"preferences.path is null: give a file of {judgement}.")
    file = find_data(section.path) if section.path is not None else path
    return _READERS[judgement](file, section.format, section.limit)


def split_judged(config: Config, records: Records) -> tuple[Records, Records]:
    """(to train on, held out), as preferences.held_out says. Raises DataError: nothing is left to train on."""
    return split_held_out(records, config.preferences.held_out, section="preferences")


@dataclass(frozen=True)
class Quality:
    """How scores order held-out replies.

    Args:
        accuracy: share of pairs in the right order, equal scores counting half; None: no pairs.
        interval: its 95 % interval (Wilson), as if pairs were independent; pairs of one prompt are not quite.
        kendall_tau: mean over records with more than two replies; None: there are none.
    """

    accuracy: float | None
    interval: tuple[float, float]
    num_pairs: int
    kendall_tau: float | None


def measure(scores: Sequence[Sequence[float]], gold: Sequence[Sequence[float]] | None = None) -> Quality:
    """Args:
    scores: per record, of its replies, best reply first.
    gold: per record, their true scores. None: the order is the truth.
    """
    correct = sum(concordant_pairs(replies) for replies in scores)
    pairs = sum(num_pairs(len(replies)) for replies in scores)
    truth = gold if gold is not None else [range(len(replies), 0, -1) for replies in scores]
    taus = [kendall_tau(replies, true) for replies, true in zip(scores, truth, strict=True) if len(replies) > 2]
    known = [tau for tau in taus if tau is not None]
    return Quality(
        accuracy=correct / pairs if pairs else None,
        interval=wilson_interval(correct, pairs),
        num_pairs=pairs,
        kendall_tau=statistics.fmean(known) if known else None,
    )


def measure_singles(scores: Sequence[float], judgements: Sequence[float]) -> Quality:
    """The same for single replies with a label or a score: pairs are those of two replies that were judged differently.
    The interval is that of as many independent pairs as there are replies. At most 500 replies are compared."""
    some = spread(list(zip(scores, judgements, strict=True)), _MOST_COMPARED)
    found = _differently_judged(some)
    correct = sum(order(better, worse) for better, worse in found)
    accuracy = correct / len(found) if found else None
    return Quality(
        accuracy=accuracy,
        interval=wilson_interval((accuracy or 0.0) * len(some), len(some) if found else 0),
        num_pairs=len(found),
        kendall_tau=kendall_tau(*zip(*some, strict=True)) if some else None,
    )


def _differently_judged(judged: Sequence[tuple[Value, float]]) -> list[tuple[Value, Value]]:
    """Pairs of a better and a worse one, from values with their judgements."""
    by_judgement = sorted(judged, key=lambda item: -item[1])
    return [(a, b) for (a, mine), (b, others) in itertools.combinations(by_judgement, 2) if mine > others]


def measure_held_out(
    scores: Sequence[Sequence[float]], records: Records, gold: Sequence[Sequence[float]] | None = None
) -> Quality:
    """`measure`, or `measure_singles` where records hold one reply each."""
    if _are_ranked(records):
        return measure(scores, gold)
    return measure_singles([score for (score,) in scores], _judgements(records))


def measure_heads(heads: Sequence[Sequence[Sequence[float]]], records: Records) -> Disagreement | None:
    """How several heads judge held-out replies; None: there is only one head.

    Args:
        heads: per record, of its replies, best reply first, the score by each head.
    """
    num_heads = max((len(of_reply) for replies in heads for of_reply in replies), default=1)
    if num_heads == 1:
        return None
    alone = [[[reply[head] for reply in replies] for replies in heads] for head in range(num_heads)]
    right, wrong = mean_disagreement(_differences(heads, records))
    return Disagreement([measure_held_out(scores, records).accuracy for scores in alone], right, wrong)


def _differences(heads: Sequence[Sequence[Sequence[float]]], records: Records) -> npt.NDArray[np.float64]:
    """Per pair of held-out replies and head, the score of the better reply less that of the worse one."""
    pairs: Iterable[tuple[Sequence[float], Sequence[float]]]
    if _are_ranked(records):
        pairs = itertools.chain.from_iterable(itertools.combinations(replies, 2) for replies in heads)
    else:
        singles = zip((reply for (reply,) in heads), _judgements(records), strict=True)
        pairs = _differently_judged(spread(list(singles), _MOST_COMPARED))
    found = [(better, worse) for better, worse in pairs]
    better_PH, worse_PH = np.asarray(found, np.float64).reshape(len(found), 2, -1).transpose(1, 0, 2)
    return better_PH - worse_PH


def _are_ranked(records: Records) -> bool:
    return len(_judgements(records)) > len(records)


def _judgements(records: Records) -> list[float]:
    return [judgement for record in records for judgement in judged(record)[1]]
