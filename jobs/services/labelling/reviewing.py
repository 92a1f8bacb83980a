"""Reviews of what people wrote, by the rule of OpenAssistant (arXiv 2304.07327).

A text is accepted when, of its reviews, the share that calls it spam and the share that calls its language wrong are
below 0.4 together. All functions run in one transaction.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Select, func, insert, select, update

from jobs.services.labelling.tables import items, judgements, people, reviews
from orchestrator.data.records import content_digest

WRITTEN = ("write", "prompt")
REVIEW = "review"
_THRESHOLD = 0.6
_REJECTING = ("spam", "wrong_language")
_SOONER = 1.0  # a review comes before more texts of the same priority are written
Json = dict[str, Any]


def rejects(answer: Mapping[str, Any]) -> bool:
    """Whether a review has a flag that rejects a text."""
    return any(flag in answer["flags"] for flag in _REJECTING)


def acceptance(answers: Sequence[Mapping[str, Any]]) -> float:
    """1 less the shares of reviews with each flag that rejects a text; below 0 if reviews have both flags."""
    return 1.0 - sum(statistics.fmean(flag in each["flags"] for each in answers) for flag in _REJECTING)


def enter(connection: Connection, judgement: int, num: int) -> None:
    """Puts the text of a judgement, by its `seq`, up for `num` reviews."""
    found = connection.execute(
        select(judgements.c.answer, judgements.c.client_id, people.c.name, items)
        .join(items, judgements.c.item == items.c.id)
        .join(people, judgements.c.person == people.c.id)
        .where(judgements.c.seq == judgement)
    ).one()
    source = {"item": found.key, "judgement": found.client_id, "person": found.name}
    values = {
        "key": content_digest(REVIEW, found.key, judgement).hex(),
        "prompt_id": found.prompt_id,
        "kind": REVIEW,
        "messages": found.messages,
        "tools": found.tools,
        "replies": [{"reply": found.answer["text"], "source": {}}],
        "source": source,
        "batch": found.batch,
        "priority": found.priority + _SOONER,
        "overlap": num,
        "num_judgements": 0,
        "added_at": time.time(),
    }
    item = connection.execute(insert(items).values(**values)).inserted_primary_key
    assert item is not None
    connection.execute(insert(reviews).values(item=item[0], judgement=judgement))


def settle(connection: Connection, item: int) -> None:
    """Accepts or rejects a text when a review of it was given or taken back. A rejected one does not count for the item
    that it was written for, which goes to somebody else."""
    review = _review(connection, reviews.c.item == item)
    if review is None or review.undone_at is not None:
        return
    answers = connection.scalars(
        select(judgements.c.answer).where(judgements.c.item == item, judgements.c.undone_at.is_(None))
    ).all()
    _decide(connection, review, acceptance(answers) > _THRESHOLD if len(answers) >= review.overlap else None)


def withdraw(connection: Connection, judgement: int) -> None:
    """Ends the review of a text that its writer has taken back."""
    review = _review(connection, reviews.c.judgement == judgement)
    if review is not None:
        connection.execute(update(items).where(items.c.id == review.item).values(overlap=0))
        _decide(connection, review, None)


def own(person: int) -> Select[tuple[int]]:
    """The items that are reviews of texts of a person."""
    found = select(reviews.c.item).join(judgements, judgements.c.seq == reviews.c.judgement)
    return found.where(judgements.c.person == person)


def states(connection: Connection) -> Mapping[str, int]:
    """The numbers of texts that wait for reviews, were accepted and were rejected."""
    found = connection.execute(
        select(reviews.c.accepted, func.count().label("num"))
        .join(judgements, reviews.c.judgement == judgements.c.seq)
        .where(judgements.c.undone_at.is_(None))
        .group_by(reviews.c.accepted)
    ).all()
    by_state = {row.accepted: row.num for row in found}
    return {
        name: by_state.get(value, 0) for name, value in (("waiting", None), ("accepted", True), ("rejected", False))
    }


def written(connection: Connection, kind: str, left_out: Counter[str]) -> Iterator[tuple[Row[Any], str, Json]]:
    """Items of a kind in WRITTEN, a text that somebody wrote for them, and what reviewers said of it (empty without
    reviews). Texts that wait for reviews, or were rejected, are counted in `left_out` instead."""
    found = connection.execute(
        select(items, judgements.c.answer, reviews.c.item.label("review"), reviews.c.accepted)
        .join(judgements, judgements.c.item == items.c.id)
        .outerjoin(reviews, reviews.c.judgement == judgements.c.seq)
        .where(items.c.kind == kind, judgements.c.undone_at.is_(None))
        .order_by(items.c.id, judgements.c.seq)
    )
    for row in found:
        if (reason := withheld(row)) is not None:
            left_out[reason] += 1
            continue
        yield row, row.answer["text"], {} if row.review is None else _opinion(connection, row.review)


def withheld(row: Any) -> str | None:
    """Why the text of a judgement is not exported. `row` has the `review` of it, if there is one, and `accepted`."""
    if row.review is None or row.accepted:
        return None
    return "waiting for reviews" if row.accepted is None else "rejected by reviewers"


def _opinion(connection: Connection, item: int) -> Json:
    given = connection.scalars(
        select(judgements.c.answer)
        .where(judgements.c.item == item, judgements.c.undone_at.is_(None))
        .order_by(judgements.c.seq)
    ).all()
    ratings = [answer["rating"] for answer in given if answer["rating"] is not None]
    flags = Counter(flag for answer in given for flag in answer["flags"])
    return {"people": {"reviews": len(given), "ratings": ratings, "flags": dict(flags)}}


def _review(connection: Connection, which: ColumnElement[bool]) -> Row[Any] | None:
    """With `original`, the item for which the text was written."""
    return connection.execute(
        select(reviews, items.c.overlap, judgements.c.item.label("original"), judgements.c.undone_at)
        .join(items, reviews.c.item == items.c.id)
        .join(judgements, reviews.c.judgement == judgements.c.seq)
        .where(which)
    ).first()


def _decide(connection: Connection, review: Row[Any], accepted: bool | None) -> None:
    connection.execute(update(reviews).where(reviews.c.item == review.item).values(accepted=accepted))
    more = (review.accepted is False) - (accepted is False)
    if more:
        connection.execute(
            update(items).where(items.c.id == review.original).values(num_judgements=items.c.num_judgements + more)
        )
