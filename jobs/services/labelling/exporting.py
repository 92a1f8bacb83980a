"""Writes what people judged as data files that the stages read (docs/data.md), or as one line per judgement."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sqlalchemy import Connection, Row, select

from jobs.services.labelling.adding import TOPIC
from jobs.services.labelling.merging import Vote, as_order, margins, ranked_pairs, reliabilities, votes_of, weight
from jobs.services.labelling.reviewing import written
from jobs.services.labelling.store import Store
from jobs.services.labelling.tables import items, judgements, people, showings
from orchestrator.data.canonical import demonstration_row, prompt_row, ranking_row, scored_row
from orchestrator.data.records import (
    DemonstrationRecord,
    Message,
    PromptRecord,
    RankingRecord,
    Reply,
    ScoredRecord,
    content_id,
    message_from_dict,
    messages_from_dicts,
)
from orchestrator.errors import ConfigError, DataError
from orchestrator.run.storage import replacing

Json = dict[str, Any]


@dataclass
class Exported:
    """`left_out`: items by the reason why they make no row."""

    num_items: int = 0
    num_rows: int = 0
    left_out: Counter[str] = field(default_factory=Counter)


def export(store: Store, out: Path, shape: str) -> Exported:
    """Writes OUT, whole or not at all, from one state of the store.

    Raises:
        ConfigError: an unknown shape.
        DataError: nothing was judged that has this shape.
        StorageError: OUT can't be written, or the store can't be read.
    """
    if shape not in SHAPES:
        raise ConfigError(f"--as {shape} is not known; choose one of {', '.join(SHAPES)}.")
    report = Exported()
    with store.reading() as connection, replacing(out) as temporary:
        with temporary.open("w", encoding="utf-8") as file:
            for row in SHAPES[shape](connection, report):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                report.num_rows += 1
        if not report.num_rows:
            reasons = "".join(f"; {count} {reason}" for reason, count in report.left_out.items())
            raise DataError(f"{store.place} has no judgements that make {shape}{reasons}.")
    return report


def _rankings(connection: Connection, report: Exported) -> Iterator[Json]:
    """Judgements of ranks and comparisons, merged for each item. An item whose order has ties makes a row per pair."""
    weights = {person: weight(found) for person, found in reliabilities_of(connection).items()}
    for item, given in _judged(connection, ("rank", "compare")):
        report.num_items += 1
        votes = [vote for row in given for vote in votes_of(item.id, row.person, row.answer)]
        order = ranked_pairs(margins(votes, weights))
        if not order:
            report.left_out["without a preference"] += 1
            continue
        whole = as_order(order)
        for ranked in [whole] if whole else sorted(map(list, order)):
            row = ranking_row(
                RankingRecord(
                    item.prompt_id,
                    messages_from_dicts(item.messages),
                    tuple(_reply(item.replies[index]["reply"]) for index in ranked),
                    tuple(item.tools),
                )
            )
            if item.kind == "compare":
                row["margin"] = abs(statistics.fmean(each.answer["preference"] for each in given))
            yield {**row, "people": _certainty(votes, ranked, weights, len(given)), "source": _source(item, ranked)}


def _scores(connection: Connection, report: Exported) -> Iterator[Json]:
    """The mean rating of each reply, and how often each flag was given."""
    for item, given in _judged(connection, ("rate",)):
        report.num_items += 1
        ratings = [row.answer["rating"] for row in given if row.answer["rating"] is not None]
        if not ratings:
            report.left_out["only flagged"] += 1
            continue
        record = ScoredRecord(
            item.prompt_id,
            messages_from_dicts(item.messages),
            _reply(item.replies[0]["reply"]),
            statistics.fmean(ratings),
            tuple(item.tools),
        )
        flags = Counter(flag for row in given for flag in row.answer["flags"])
        yield {**scored_row(record), "people": {"judgements": len(given), "ratings": ratings, "flags": dict(flags)}}


def _demonstrations(connection: Connection, report: Exported) -> Iterator[Json]:
    for item, text, opinion in written(connection, "write", report.left_out):
        report.num_items += 1
        messages = (*messages_from_dicts(item.messages), Message("assistant", text))
        yield {**demonstration_row(DemonstrationRecord(item.prompt_id, messages, tuple(item.tools))), **opinion}


def _prompts(connection: Connection, report: Exported) -> Iterator[Json]:
    for item, text, opinion in written(connection, "prompt", report.left_out):
        report.num_items += 1
        before = [message for message in item.messages if message["role"] != TOPIC]
        messages = (*messages_from_dicts(before), Message("user", text))
        tools = tuple(item.tools)
        record = PromptRecord(content_id(messages, tools), messages, text, opinion, tools)
        yield prompt_row(record)


def _every_judgement(connection: Connection, report: Exported) -> Iterator[Json]:
    """Everything that is known of each judgement, also of those that were undone and those of gold items."""
    found = connection.execution_options(yield_per=1000).execute(
        select(judgements, people.c.name, showings.c.order, showings.c.shown_at, items)
        .join(people, judgements.c.person == people.c.id)
        .join(showings, judgements.c.showing == showings.c.id)
        .join(items, judgements.c.item == items.c.id)
        .order_by(judgements.c.seq)
    )
    for row in found.mappings():
        report.num_items += 1
        yield {
            "id": row[judgements.c.client_id],
            "person": row[people.c.name],
            "shown_at": row[showings.c.shown_at],
            "made_at": row[judgements.c.made_at],
            "seconds": row[judgements.c.seconds],
            "undone_at": row[judgements.c.undone_at],
            "order": row[showings.c.order],
            "answer": row[judgements.c.answer],
            "item": row[items.c.key],
            "prompt_id": row[items.c.prompt_id],
            "batch": row[items.c.batch],
            "gold": row[items.c.gold],
            "source": row[items.c.source],
            "messages": row[items.c.messages],
            "replies": row[items.c.replies],
        }


SHAPES: Mapping[str, Callable[[Connection, Exported], Iterator[Json]]] = MappingProxyType(
    {
        "rankings": _rankings,
        "scores": _scores,
        "demonstrations": _demonstrations,
        "prompts": _prompts,
        "judgements": _every_judgement,
    }
)


def reliabilities_of(connection: Connection) -> Mapping[int, float]:
    """The reliability of each person who has ranked or compared, over all items of the store."""
    found = connection.execute(
        select(judgements.c.item, judgements.c.person, judgements.c.answer, items.c.gold)
        .join(items)
        .where(judgements.c.undone_at.is_(None), items.c.kind.in_(("rank", "compare")))
    ).all()
    known = {row.item: row.gold for row in found if row.gold is not None}
    gold = {
        (vote.item, vote.first, vote.second): vote.first_is_better
        for item, answer in known.items()
        for vote in votes_of(item, 0, answer)
    }
    return reliabilities((vote for row in found for vote in votes_of(row.item, row.person, row.answer)), gold)


def _judged(connection: Connection, kinds: Iterable[str]) -> Iterator[tuple[Row[Any], Sequence[Any]]]:
    """Items with their judgements, without gold ones and those that were undone."""
    wanted = select(items).where(items.c.kind.in_(tuple(kinds)), items.c.gold.is_(None), items.c.num_judgements > 0)
    for item in connection.execute(wanted.order_by(items.c.id)).yield_per(500):
        given = connection.execute(
            select(judgements.c.person, judgements.c.answer)
            .where(judgements.c.item == item.id, judgements.c.undone_at.is_(None))
            .order_by(judgements.c.seq)
        ).all()
        yield item, given


def _certainty(votes: Iterable[Vote], ranked: list[int], weights: Mapping[int, float], count: int) -> Json:
    """The number of judgements, and the share of weighted votes that agree with the order."""
    agreed = given = 0.0
    places = {index: place for place, index in enumerate(ranked)}
    for vote in votes:
        if vote.first in places and vote.second in places:
            is_first = places[vote.first] < places[vote.second]
            agreed += weights[vote.person] * (vote.first_is_better if is_first else 1 - vote.first_is_better)
            given += weights[vote.person]
    return {"judgements": count, "agreement": round(agreed / given, 4) if given else None}


def _source(item: Row[Any], ranked: Iterable[int]) -> Json:
    return {**item.source, "replies": [item.replies[index]["source"] for index in ranked]}


def _reply(value: Any) -> Reply:
    return value if isinstance(value, str) else message_from_dict(value)
