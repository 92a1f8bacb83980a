"""The labeller: a gold rule with noise, which simulates a human who ranks K replies to a prompt (Ouyang 2022).

Pure functions from scores to rankings. The noise of a prompt depends only on (run seed, prompt id).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from orchestrator.data.canonical import scored_ranking_row
from orchestrator.data.records import Message, RankingRecord, Tools
from orchestrator.errors import DataError
from orchestrator.prompts import derive_seed
from orchestrator.run.storage import replacing
from orchestrator.training.ranking import concordant_pairs, num_pairs


@dataclass(frozen=True)
class ScoredReplies:
    """Replies to one prompt in the order of their sample index, with gold scores; None where the gold rule failed."""

    id: str
    messages: tuple[Message, ...]
    replies: tuple[str, ...]
    gold: tuple[float | None, ...]
    tools: Tools = ()


@dataclass(frozen=True)
class LabelledRanking:
    """A ranking and the gold score of each of its replies. Models never read the scores."""

    record: RankingRecord
    gold: tuple[float, ...]


@dataclass(frozen=True)
class LabelReport:
    """Counts of one labelling.

    Args:
        num_left_out: prompts with fewer than two distinct scored replies.
        num_repeated: replies equal to another one of their prompt.
        num_failed: replies that the gold rule could not score.
        pair_agreement: share of pairs that the noisy ranking orders as the gold scores do (ties count as half):
            no reward model can be expected to do better on these labels.
    """

    num_rankings: int
    num_left_out: int
    num_repeated: int
    num_failed: int
    pair_agreement: float


def label(scored: Iterable[ScoredReplies], *, noise_std: float, seed: int) -> tuple[list[LabelledRanking], LabelReport]:
    """Ranks the distinct replies of every prompt by gold score plus Gaussian noise.

    Raises:
        DataError: no prompt has two distinct replies.
    """
    rankings: list[LabelledRanking] = []
    left_out = repeated = failed = 0
    for prompt in scored:
        gold_of_reply: dict[str, float] = {}
        for reply, gold in zip(prompt.replies, prompt.gold, strict=True):
            failed += gold is None
            repeated += reply in gold_of_reply
            if gold is not None:
                gold_of_reply.setdefault(reply, gold)
        if len(gold_of_reply) < 2:
            left_out += 1
            continue
        rankings.append(_ranking(prompt, gold_of_reply, noise_std=noise_std, seed=seed))
    if not rankings:
        raise DataError(
            f"none of {left_out} prompts has two distinct replies to rank ({failed} replies without a score, "
            f"{repeated} repeated). Raise sample.samples_per_prompt or rollout.temperature, or check labeller.gold."
        )
    return rankings, LabelReport(len(rankings), left_out, repeated, failed, _pair_agreement(rankings))


def rank(scores: Sequence[float], *, noise_std: float, seed: int) -> tuple[int, ...]:
    """Positions of the scores, best first, after noise of N(0, noise_std²) is added to each; ties keep their order."""
    noisy = [score + noise for score, noise in zip(scores, _noise(len(scores), noise_std, seed), strict=True)]
    return tuple(sorted(range(len(scores)), key=lambda position: -noisy[position]))


def write_rankings(path: Path, rankings: Iterable[LabelledRanking]) -> None:
    """Writes JSONL {id, messages, replies: best first, gold} completely or not at all, in the format ranking.

    Raises:
        StorageError: it can't be written.
    """
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for ranking in rankings:
            row = scored_ranking_row(ranking.record, ranking.gold)
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_gold(path: Path) -> dict[str, tuple[float, ...]]:
    """Gold scores of the replies that `write_rankings` wrote, best first by label, by prompt id. Empty: people ranked
    them."""
    with path.open(encoding="utf-8") as stream:
        rows = map(json.loads, stream)
        return {row["id"]: tuple(row["gold"]) for row in rows if "gold" in row}


def _ranking(prompt: ScoredReplies, gold_of_reply: dict[str, float], *, noise_std: float, seed: int) -> LabelledRanking:
    replies, gold = tuple(gold_of_reply), tuple(gold_of_reply.values())
    order = rank(gold, noise_std=noise_std, seed=derive_seed("label", seed, prompt.id))
    record = RankingRecord(prompt.id, prompt.messages, tuple(replies[position] for position in order), prompt.tools)
    return LabelledRanking(record, tuple(gold[position] for position in order))


def _noise(count: int, std: float, seed: int) -> list[float]:
    """Normal numbers by inversion of raw Philox words: equal in all versions of numpy."""
    if std == 0.0:
        return [0.0] * count
    words = np.random.Philox(np.random.SeedSequence(seed)).random_raw(count)
    normal = statistics.NormalDist(0.0, std)
    return [normal.inv_cdf(((int(word) >> 12) + 0.5) / 2**52) for word in words]


def _pair_agreement(rankings: Sequence[LabelledRanking]) -> float:
    concordant = sum(concordant_pairs(ranking.gold) for ranking in rankings)
    return concordant / sum(num_pairs(len(ranking.gold)) for ranking in rankings)
