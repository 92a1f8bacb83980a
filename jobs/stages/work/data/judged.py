"""Replies that people or a rule judged: reads them for the stages that learn from them, and measures scores by them."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from actors.text.conversations import Chat
from actors.training.ranked_rows import first_rows
from actors.training.ranked_tokens import JudgedRecord, RankedTokens, judged
from actors.training.stored_rows import row_column
from jobs.prepare import Prepared, find_data
from jobs.stages.sample import sample_sizes, sampled
from jobs.stages.stage import RowSizes, Say, row_sizes
from jobs.stages.work.data import sampling
from jobs.stages.work.data.sampling import Sampled, path_of, sample_file
from jobs.stages.work.data.storing import Stored, store
from orchestrator.config.config import Config
from orchestrator.config.losses import Judgement
from orchestrator.data.kinds import LABELS, RANKINGS, SCORES, Kind
from orchestrator.data.mixtures import MixedStream, stream_of
from orchestrator.data.records import ReadReport
from orchestrator.data.streams import Stream
from orchestrator.training.ensemble import Disagreement, mean_disagreement
from orchestrator.training.ranking import (
    concordant_pairs,
    kendall_tau,
    num_pairs,
    order,
    spread,
    wilson_interval,
)

_MOST_COMPARED = 500

Judgements = Stream[Any] | MixedStream[Any]
Value = TypeVar("Value")
Qualities = Sequence[Sequence[float]]
"""Per record, of its replies (ranked_tokens.judged)."""

_KINDS: Mapping[Judgement, Kind[Any]] = {"rankings": RANKINGS, "labels": LABELS, "scores": SCORES}


def stream(config: Config, judgement: Judgement, made: Path | None = None) -> Judgements:
    """The records of preferences.path, otherwise those that an earlier stage made.

    Raises:
        DataError: now or during reading: the file can't be read, or a row is bad.
    """
    section = config.preferences
    path = path_of(section.path, made, section="preferences", what=judgement)
    return stream_of(_KINDS[judgement], path, section.format, section.limit)


def marked(config: Config, records: Judgements) -> Iterator[tuple[JudgedRecord, bool]]:
    """See sampling.marked."""
    return sampling.marked(records, config.preferences.held_out, section="preferences")


def sample(config: Config, judgement: Judgement) -> Sampled[JudgedRecord]:
    """Of the records to train on. Raises DataError."""
    found, section = stream(config, judgement), config.preferences
    assert section.path is not None, "else stream raises"
    records = (record for record, is_held_out in marked(config, found) if not is_held_out)
    key = section, judgement
    return sample_file(find_data(section.path), key, records, found.report, lambda record: len(judged(record)[0]))


def sizes(config: Config, prepared: Prepared, judgement: Judgement, chat: Chat, max_length: int) -> RowSizes:
    """Of the file, or of the samples that will be ranked. Raises DataError."""
    if config.preferences.path is None:
        prompts = sampled(config, prepared)
        num_rows = len(prompts) * config.sample.samples_per_prompt
        return sample_sizes(config, prompts, num_rows=num_rows, num_records=len(prompts))
    found = sample(config, judgement)
    replies = chat.replies((record.messages, judged(record)[0], record.tools) for record in found.some)
    transcripts = itertools.chain.from_iterable(replies)
    measured = [(min(len(each), max_length), min(len(each.response_tokens), max_length)) for each in transcripts]
    return row_sizes(measured, num_rows=found.num_replies, num_records=found.num_records)


@dataclass(frozen=True)
class StoredJudgements:
    """Judged replies as rows of tokens. `held_out_ids`: of records that an earlier stage made."""

    folder: Path
    train: Stored[RankedTokens]
    held_out: Stored[RankedTokens]
    report: ReadReport
    held_out_ids: Sequence[str] = field(default=())

    @property
    def folders(self) -> tuple[Path, Path]:
        return self.train.folder, self.held_out.folder

    @property
    def digests(self) -> tuple[str, str]:
        return self.train.writer.digest, self.held_out.writer.digest

    @property
    def num_truncated(self) -> int:
        return self.train.tokens.num_truncated + self.held_out.tokens.num_truncated

    def held_out_qualities(self) -> list[list[float]]:
        """Of every held-out record, the qualities of its replies (ranked_tokens.judged). Raises StorageError."""
        place = self.held_out.folder
        quality = row_column(place, "quality").tolist()
        bounds = first_rows(row_column(place, "record")).tolist()
        return [quality[start:end] for start, end in itertools.pairwise(bounds)]


async def store_preferences(
    config: Config, judgement: Judgement, train: RankedTokens, model: Path, say: Say, *, made: Path | None
) -> StoredJudgements:
    """Writes the rows of a training next to the model that will be in `model`.

    Args:
        train: for the records to train on; those held out get the same tokens without what is added for learning.
        made: the file of an earlier stage.

    Raises:
        DataError: the preferences, or a conversation that the chat template refuses.
        StorageError: writing.
    """
    tokens = train, RankedTokens(train.chat, train.max_length)
    return await store_judged(config, judgement, tokens, model.with_name(f".{model.name}.rows"), say, made=made)


async def store_judged(
    config: Config,
    judgement: Judgement,
    tokens: tuple[RankedTokens, RankedTokens],
    folder: Path,
    say: Say,
    *,
    made: Path | None,
) -> StoredJudgements:
    """Writes the rows to train on, and those held out.

    Args:
        tokens: for the records to train on, and for those held out.
        made: the file of an earlier stage.

    Raises:
        DataError: reading, or a record that the chat template refuses.
        StorageError: writing.
    """
    records = stream(config, judgement, made)
    ids: list[str] = []

    def noted() -> Iterator[tuple[JudgedRecord, bool]]:
        for record, is_held_out in marked(config, records):
            if made is not None and is_held_out:
                ids.append(record.id)
            yield record, is_held_out

    train, held_out = await store(noted(), tokens, folder, say, what="preferences")
    return StoredJudgements(folder, train, held_out, records.report(), ids)


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
    scores: Sequence[Sequence[float]], qualities: Qualities, gold: Sequence[Sequence[float]] | None = None
) -> Quality:
    """`measure`, or `measure_singles` where records hold one reply each. `qualities` are by record, as `scores`."""
    if _are_ranked(qualities):
        return measure(scores, gold)
    return measure_singles([score for (score,) in scores], [quality for (quality,) in qualities])


def measure_heads(heads: Sequence[Sequence[Sequence[float]]], qualities: Qualities) -> Disagreement | None:
    """How several heads judge held-out replies; None: there is only one head.

    Args:
        heads: per record, of its replies, best reply first, the score by each head.
    """
    num_heads = max((len(of_reply) for replies in heads for of_reply in replies), default=1)
    if num_heads == 1:
        return None
    alone = [[[reply[head] for reply in replies] for replies in heads] for head in range(num_heads)]
    right, wrong = mean_disagreement(_differences(heads, qualities, num_heads))
    return Disagreement([measure_held_out(scores, qualities).accuracy for scores in alone], right, wrong)


def _differences(
    heads: Sequence[Sequence[Sequence[float]]], qualities: Qualities, num_heads: int
) -> npt.NDArray[np.float64]:
    """Per pair of held-out replies and head, the score of the better reply less that of the worse one."""
    pairs: Iterable[tuple[Sequence[float], Sequence[float]]]
    if _are_ranked(qualities):
        pairs = itertools.chain.from_iterable(itertools.combinations(replies, 2) for replies in heads)
    else:
        singles = zip((reply for (reply,) in heads), (quality for (quality,) in qualities), strict=True)
        pairs = _differently_judged(spread(list(singles), _MOST_COMPARED))
    found = list(pairs)
    better_PH, worse_PH = np.asarray(found, np.float64).reshape(len(found), 2, num_heads).transpose(1, 0, 2)
    return better_PH - worse_PH


def _are_ranked(qualities: Qualities) -> bool:
    return any(len(replies) > 1 for replies in qualities)
