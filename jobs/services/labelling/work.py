"""The work of labellers: which task somebody gets, and what becomes of it. All functions run in one transaction."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, and_, exists, func, insert, select, union, update

from jobs.services.labelling import reviewing
from jobs.services.labelling.answers import Judgement
from jobs.services.labelling.people import Person
from jobs.services.labelling.refusals import Refused, Unfit, Unknown
from jobs.services.labelling.tables import ANSWERED, OPEN, RETURNED, SKIPPED, items, judgements, people, showings
from jobs.services.labelling.waiting.batches import is_given_out
from orchestrator.data.records import content_digest

_random = secrets.SystemRandom()


@dataclass(frozen=True)
class Rules:
    """Args:
    lease_s: after this time without a sign of life a task may go to somebody else.
    gold_share: share of tasks whose answer is known, which measure the labeller.
    num_reviews: other people who review each text that somebody writes; 0: none.
    """

    lease_s: float = 1800.0
    gold_share: float = 0.05
    num_reviews: int = 0


def next_task(connection: Connection, person: Person, rules: Rules) -> Row[Any] | None:
    """A showing with its item: one that the person has not finished, or a new one. None: nothing is left for them."""
    now = time.time()
    unfinished = _unfinished(connection, person, now)
    if unfinished is not None:
        keep(connection, person, unfinished, rules)
        return _showing(connection, person, unfinished)
    if person.paused:
        return None
    chosen = _choose(connection, person, rules, now)
    if chosen is None:
        return None
    item, num_replies = chosen
    order = list(range(num_replies))
    _random.shuffle(order)
    identity = secrets.token_hex(16)
    connection.execute(
        insert(showings).values(
            id=identity,
            item=item,
            person=person.id,
            order=order,
            shown_at=now,
            expires_at=now + rules.lease_s,
            state=OPEN,
        )
    )
    return _showing(connection, person, identity)


def keep(connection: Connection, person: Person, showing: str, rules: Rules) -> None:
    """Extends the lease of a task."""
    connection.execute(
        update(showings)
        .where(showings.c.id == showing, showings.c.person == person.id, showings.c.state == OPEN)
        .values(expires_at=time.time() + rules.lease_s)
    )


def judge(connection: Connection, person: Person, judgement: Judgement, *, num_reviews: int = 0) -> bool:
    """Stores a judgement. False: it was stored already.

    Raises:
        Unknown: the task was not shown to this person.
        Refused: another answer has this id, or the task has another answer.
        Unfit: the answer does not fit the task.
    """
    digest = content_digest(judgement.model_dump()).hex()
    known = connection.scalar(
        select(judgements.c.digest).where(judgements.c.person == person.id, judgements.c.client_id == judgement.id)
    )
    if known is not None:
        if known != digest:
            raise Refused(
                "other_answer", "another answer was stored under this id; send this one under an id of its own."
            )
        return False
    showing = _showing(connection, person, judgement.showing)
    if showing.state in (ANSWERED, SKIPPED) or _has_judged(connection, person, showing.item):
        raise Refused("answered", "this task has an answer already, or was skipped.")
    if judgement.answer.kind != showing.kind:
        raise Unfit("unfit", f"the task is to {showing.kind}, the answer is one to {judgement.answer.kind}")
    stored = connection.execute(
        insert(judgements).values(
            person=person.id,
            client_id=judgement.id,
            showing=showing.id,
            item=showing.item,
            answer=judgement.answer.stored(showing.order),
            digest=digest,
            made_at=time.time(),
            seconds=judgement.seconds,
        )
    )
    _set_state(connection, showing.id, ANSWERED)
    _count(connection, showing.item, 1)
    if showing.kind == reviewing.REVIEW:
        reviewing.settle(connection, showing.item)
    elif num_reviews and showing.kind in reviewing.WRITTEN and stored.inserted_primary_key:
        reviewing.enter(connection, stored.inserted_primary_key[0], num_reviews)
    return True


def skip(connection: Connection, person: Person, showing: str) -> None:
    """Gives a task to others. Raises Unknown, or Refused if it has an answer."""
    state = _showing(connection, person, showing).state
    if state not in (OPEN, SKIPPED):
        raise Refused("answered", f"this task was {state} already.")
    _set_state(connection, showing, SKIPPED)


def undo(connection: Connection, person: Person, showing: str, rules: Rules) -> None:
    """Opens the person's last task again, answered or skipped, and takes back its judgement.

    Raises:
        Unknown: no such task.
        Refused: it is not the last one.
    """
    state = _showing(connection, person, showing).state
    if state == OPEN:
        return  # a repetition
    if showing != _last(connection, person):
        raise Refused("not_last", "only the last task can be opened again.")
    if state == ANSWERED:
        _take_back(connection, showing)
    connection.execute(
        update(showings).where(showings.c.person == person.id, showings.c.state == OPEN).values(state=RETURNED)
    )
    _set_state(connection, showing, OPEN)
    keep(connection, person, showing, rules)


def _take_back(connection: Connection, showing: str) -> None:
    found = connection.execute(
        select(judgements.c.seq, judgements.c.item).where(
            judgements.c.showing == showing, judgements.c.undone_at.is_(None)
        )
    ).one()
    connection.execute(update(judgements).where(judgements.c.seq == found.seq).values(undone_at=time.time()))
    _count(connection, found.item, -1)
    reviewing.settle(connection, found.item)
    reviewing.withdraw(connection, found.seq)


def progress(connection: Connection, person: Person) -> Mapping[str, Any]:
    """How many tasks the person has done and could do, and the id of the showing that can be opened again."""
    mine = and_(judgements.c.person == person.id, judgements.c.undone_at.is_(None))
    done = connection.scalar(select(func.count()).select_from(judgements).where(mine))
    left = _num_left(connection, person, time.time())
    return {"done": done, "left": left, "last": _last(connection, person)}


def _last(connection: Connection, person: Person) -> str | None:
    """The showing that the person finished last. A person has one task at a time, so it was also shown last."""
    return connection.scalar(
        select(showings.c.id)
        .where(showings.c.person == person.id, showings.c.state.in_((ANSWERED, SKIPPED)))
        .order_by(showings.c.shown_at.desc(), showings.c.id)
        .limit(1)
    )


def _unfinished(connection: Connection, person: Person, now: float) -> str | None:
    """The open showing of a person. One whose lease has ended, and whose item others have judged, is returned."""
    for found in connection.execute(
        select(showings.c.id, showings.c.expires_at, items.c.num_judgements, items.c.overlap, items.c.gold)
        .join(items)
        .where(showings.c.person == person.id, showings.c.state == OPEN)
    ).all():
        if found.expires_at > now or found.num_judgements < found.overlap or found.gold is not None:
            return str(found.id)
        _set_state(connection, found.id, RETURNED)
    return None


def _choose(connection: Connection, person: Person, rules: Rules, now: float) -> tuple[int, int] | None:
    """The id of an item, and the number of its replies."""
    columns = select(items.c.id, func.json_array_length(items.c.replies).label("num_replies"))
    if _random.random() < rules.gold_share:
        gold = columns.where(items.c.gold.is_not(None), is_given_out(), ~_seen(person)).order_by(func.random()).limit(1)
        found = connection.execute(gold).first()
        if found is not None:
            return found.id, found.num_replies
    waiting = columns.where(_for(person, now)).order_by(items.c.priority.desc(), items.c.id).limit(1)
    found = connection.execute(waiting).first()
    return None if found is None else (found.id, found.num_replies)


def _waits() -> ColumnElement[bool]:
    """Whether an item lacks judgements and is given out."""
    return and_(items.c.gold.is_(None), items.c.num_judgements < items.c.overlap, is_given_out())


def _for(person: Person, now: float) -> ColumnElement[bool]:
    """Whether an item lacks judgements, even with those that others are about to give, and the person may judge it."""
    others = (
        select(func.count())
        .select_from(showings)
        .where(
            showings.c.item == items.c.id,
            showings.c.state == OPEN,
            showings.c.expires_at > now,
            showings.c.person != person.id,
        )
        .scalar_subquery()
    )
    return and_(
        _waits(),
        ~_seen(person),
        items.c.id.not_in(reviewing.own(person.id)),
        items.c.num_judgements + others < items.c.overlap,
    )


def _num_left(connection: Connection, person: Person, now: float) -> int:
    """How many items `_for` finds: those that wait, less those that are not for this person. These are few and have
    indexes; `_for` looks at every item."""
    waits = _waits()
    seen = select(showings.c.item).where(showings.c.person == person.id, showings.c.state.in_((ANSWERED, SKIPPED)))
    others = select(people.c.id).where(people.c.id != person.id)  # an index begins with the person
    taken = (
        select(showings.c.item)
        .join(items)
        .where(showings.c.person.in_(others), showings.c.state == OPEN, showings.c.expires_at > now)
        .group_by(showings.c.item, items.c.num_judgements, items.c.overlap)
        .having(items.c.num_judgements + func.count() >= items.c.overlap)
    )
    not_mine = union(seen, taken, reviewing.own(person.id))
    num_waiting = connection.scalar(select(func.count()).select_from(items).where(waits)) or 0
    num_not_mine = connection.scalar(
        select(func.count()).select_from(items).where(waits, items.c.id.in_(select(not_mine.subquery().c.item)))
    )
    return num_waiting - (num_not_mine or 0)


def _seen(person: Person) -> ColumnElement[bool]:
    return exists().where(
        showings.c.item == items.c.id,
        showings.c.person == person.id,
        showings.c.state.in_((ANSWERED, SKIPPED)),
    )


def _has_judged(connection: Connection, person: Person, item: int) -> bool:
    mine = and_(judgements.c.item == item, judgements.c.person == person.id, judgements.c.undone_at.is_(None))
    return connection.scalar(select(judgements.c.seq).where(mine)) is not None


def _showing(connection: Connection, person: Person, identity: str) -> Row[Any]:
    found = connection.execute(
        select(showings, items.c.kind, items.c.messages, items.c.replies)
        .join(items)
        .where(showings.c.id == identity, showings.c.person == person.id)
    ).first()
    if found is None:
        raise Unknown("not_yours", "no such task was given to you.")
    return found


def _set_state(connection: Connection, showing: str, state: str) -> None:
    connection.execute(update(showings).where(showings.c.id == showing).values(state=state))


def _count(connection: Connection, item: int, more: int) -> None:
    connection.execute(update(items).where(items.c.id == item).values(num_judgements=items.c.num_judgements + more))
