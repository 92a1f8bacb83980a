"""Shapes of this program: data files that its stages read (docs/data.md), and one line per judgement."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sqlalchemy import Connection, Row, select

from jobs.services.labelling.agreement.merging import Vote, as_order
from jobs.services.labelling.items.adding import TOPIC
from jobs.services.labelling.reviewing import written
from jobs.services.labelling.shapes.judged import Exported, Json, Judged
from jobs.services.labelling.tables import items, judgements, people, showings
from orchestrator.data.canonical import demonstration_row, prompt_row, ranking_row, scored_row
from orchestrator.data.formats.format import LeftOut
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

_DIGITS = 4
_FLAGS_ONLY = "only flagged"


def rankings(judged: Judged, _: Exported) -> Iterator[Json]:
    """All judgements of an item, merged. An order with ties makes a row per pair."""
    item, order, votes = judged.item, judged.order(), judged.votes
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
            row["margin"] = abs(preference_of(judged))
        certainty = _certainty(votes, ranked, judged.judges.weights, len(judged.given))
        yield {**row, "people": certainty, "source": _source(item, ranked)}


def scores(judged: Judged, _: Exported) -> Iterator[Json]:
    """The mean rating of a reply by weighted voters, and how often each flag was given."""
    item, ratings = judged.item, ratings_of(judged)
    record = ScoredRecord(
        item.prompt_id,
        messages_from_dicts(item.messages),
        _reply(item.replies[0]["reply"]),
        round(mean_rating(judged), _DIGITS),
        tuple(item.tools),
    )
    flags = Counter(flag for row in judged.given for flag in row.answer["flags"])
    about = {"judgements": len(judged.given), "ratings": ratings, "flags": dict(flags)}
    yield {**scored_row(record), "people": about}


def demonstrations(connection: Connection, report: Exported) -> Iterator[Json]:
    for item, text, opinion in written(connection, "write", report.left_out):
        report.num_items += 1
        messages = (*messages_from_dicts(item.messages), Message("assistant", text))
        yield {**demonstration_row(DemonstrationRecord(item.prompt_id, messages, tuple(item.tools))), **opinion}


def prompts(connection: Connection, report: Exported) -> Iterator[Json]:
    for item, text, opinion in written(connection, "prompt", report.left_out):
        report.num_items += 1
        before = [message for message in item.messages if message["role"] != TOPIC]
        messages = (*messages_from_dicts(before), Message("user", text))
        tools = tuple(item.tools)
        yield prompt_row(PromptRecord(content_id(messages, tools), messages, text, opinion, tools))


def every_judgement(connection: Connection, report: Exported) -> Iterator[Json]:
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


def preference_of(judged: Judged) -> float:
    """Of a comparison, from -3 to 3; below 0 the first reply is better. Its size is the mean strength over voters, by
    their weights, and its side that of the merged order. The order counts votes and not their strengths: where the mean
    contradicts it, and where it has a tie, this is 0."""
    given: dict[int, list[int]] = defaultdict(list)
    for row in judged.given:
        given[judged.judges.voters.of(row.person)].append(row.answer["preference"])
    weights = judged.judges.weights
    total = sum(weights[voter] for voter in given)
    mean = sum(weights[voter] * statistics.fmean(found) for voter, found in given.items()) / (total or 1.0)
    better = (0, 1) if mean < 0 else (1, 0)
    return round(mean, _DIGITS) if better in judged.pairs() else 0.0


def ratings_of(judged: Judged) -> list[int]:
    """Raises LeftOut: there are only flags."""
    ratings = [row.answer["rating"] for row in judged.given if row.answer["rating"] is not None]
    if not ratings:
        raise LeftOut(_FLAGS_ONLY)
    return ratings


def mean_rating(judged: Judged) -> float:
    """Over voters, by their weights; equal ones if none is known to rate better than chance. Raises LeftOut: there are
    only flags."""
    given: dict[int, list[int]] = {}
    for row in judged.given:
        if row.answer["rating"] is not None:
            given.setdefault(judged.judges.voters.of(row.person), []).append(row.answer["rating"])
    if not given:
        raise LeftOut(_FLAGS_ONLY)
    weights = [judged.judges.rating_weight(voter) for voter in given]
    return statistics.fmean(map(statistics.fmean, given.values()), weights if any(weights) else None)


def _certainty(votes: Iterable[Vote], ranked: list[int], weights: Mapping[int, float], count: int) -> Json:
    """The number of judgements, and the share of weighted votes that agree with the order."""
    agreed = given = 0.0
    places = {index: place for place, index in enumerate(ranked)}
    for vote in votes:
        if vote.first in places and vote.second in places:
            is_first = places[vote.first] < places[vote.second]
            agreed += weights[vote.person] * (vote.first_is_better if is_first else 1 - vote.first_is_better)
            given += weights[vote.person]
    return {"judgements": count, "agreement": round(agreed / given, _DIGITS) if given else None}


def _source(item: Row[Any], ranked: Iterable[int]) -> Json:
    return {**item.source, "replies": [item.replies[index]["source"] for index in ranked]}


def _reply(value: Any) -> Reply:
    return value if isinstance(value, str) else message_from_dict(value)
