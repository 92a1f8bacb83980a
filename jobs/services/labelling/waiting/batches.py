"""Batches: items that were added together, or whose judgements somebody waits for, such as a stage of a run. Functions
run in one transaction.

A batch that was added by hand is only a name in its items until an admin finishes it; one that somebody waits for has a
row and members from its beginning. An item may be in several, and is given out while one of them wants it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Row,
    Select,
    Subquery,
    and_,
    case,
    func,
    insert,
    or_,
    select,
    union,
    update,
)

from jobs.services.labelling.tables import LABELLER, batches, items, members, people
from orchestrator.errors import DataError

_CHUNK = 500  # values in one statement
_MISSING = items.c.overlap - items.c.num_judgements
_BY_HAND = "admin"  # in `closed_by` of a batch that nobody has waited for
T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    """Args:
    num_judgements, num_missing: of the batch's items; together they are what was asked for.
    num_people: labellers whose link is valid and who are not paused.
    most_overlap: most people who shall judge one item.
    is_finished: an admin wants no more judgements.
    closed_by: why nobody waits any more; None: somebody does.
    """

    num_items: int
    num_judgements: int
    num_missing: int
    num_people: int
    most_overlap: int
    is_finished: bool
    closed_by: str | None


def open_batch(connection: Connection, name: str, overlaps: Mapping[str, int], *, opened_at: float) -> None:
    """Asks for judgements of items that the store holds, also if a closed batch had withdrawn them. A batch that exists
    is opened again, with these items alone.

    Args:
        overlaps: number of people who shall judge an item, by its key. Gold items are left out.
    """
    fresh = {"opened_at": opened_at, "finished_at": None, "closed_by": None}
    if not connection.execute(update(batches).where(batches.c.name == name).values(**fresh)).rowcount:
        connection.execute(insert(batches).values(name=name, **fresh))
    _withdraw(connection, name)
    connection.execute(members.delete().where(members.c.batch == name))
    for keys in chunks(overlaps):
        found = connection.execute(
            select(items.c.id, items.c.key).where(items.c.key.in_(keys), items.c.gold.is_(None))
        ).all()
        if found:
            connection.execute(insert(members), [{"batch": name, "item": row.id} for row in found])
        for overlap in {overlaps[row.key] for row in found}:
            asked = [row.id for row in found if overlaps[row.key] == overlap]
            connection.execute(
                update(items).where(items.c.id.in_(asked), items.c.overlap < overlap).values(overlap=overlap)
            )


def progress(connection: Connection, name: str) -> Progress | None:
    """None: there is no such batch."""
    batch = connection.execute(select(batches).where(batches.c.name == name)).first()
    if batch is None:
        return None
    counts = connection.execute(
        select(
            func.count(),
            func.coalesce(func.sum(items.c.num_judgements), 0),
            func.coalesce(func.sum(case((_MISSING > 0, _MISSING), else_=0)), 0),
            func.coalesce(func.max(items.c.overlap), 0),
        )
        .select_from(members)
        .join(items, members.c.item == items.c.id)
        .where(members.c.batch == name)
    ).one()
    num_people = connection.scalar(
        select(func.count())
        .select_from(people)
        .where(people.c.role == LABELLER, people.c.revoked_at.is_(None), ~people.c.paused)
    )
    num_items, num_judgements, num_missing, most_overlap = map(int, counts)
    return Progress(
        num_items,
        num_judgements,
        num_missing,
        num_people or 0,
        most_overlap,
        batch.finished_at is not None,
        batch.closed_by,
    )


def finish(connection: Connection, name: str, *, is_finished: bool = True) -> None:
    """No more tasks of a batch are given out, and a run that waits for it continues with the judgements that there are.
    False takes that back.

    Raises:
        DataError: no item is of this batch, or the run that asked for it has continued.
    """
    batch = connection.execute(select(batches.c.closed_by).where(batches.c.name == name)).first()
    if batch is None and not connection.scalar(select(items.c.id).where(items.c.batch == name).limit(1)):
        names = ", ".join(row.name for row in listed(connection) if not row.over)
        raise DataError(f"no item is of a batch {name!r}; {f'there are: {names}' if names else 'there is none'}.")
    if batch is not None and batch.closed_by not in (None, _BY_HAND):
        raise DataError(f"nobody waits for the batch {name!r} any more: {batch.closed_by}.")
    now = time.time()
    if batch is None:
        connection.execute(insert(batches).values(name=name, opened_at=now, closed_by=_BY_HAND))
    at = now if is_finished else None
    connection.execute(update(batches).where(batches.c.name == name).values(finished_at=at))


def close(connection: Connection, name: str, reason: str) -> None:
    """Withdraws what is missing: nobody is asked for it any more. Tasks that people have before them may still be
    answered. Items that another batch wants too stay as they are."""
    _withdraw(connection, name)
    connection.execute(update(batches).where(batches.c.name == name).values(closed_by=reason[:200]))


def _withdraw(connection: Connection, name: str) -> None:
    mine = select(members.c.item).where(members.c.batch == name)
    others = _of_rows(batches.c.closed_by.is_(None), members.c.batch != name)
    is_mine_alone = or_(items.c.batch == name, items.c.batch.in_(_done()))
    connection.execute(
        update(items)
        .where(items.c.id.in_(mine), is_mine_alone, items.c.id.not_in(others))
        .where(items.c.num_judgements < items.c.overlap)
        .values(overlap=items.c.num_judgements)
    )


def is_given_out() -> ColumnElement[bool]:
    """Whether a batch of an item wants it: the one it was added with, or one that somebody waits for."""
    wanted = _of_rows(batches.c.finished_at.is_(None), batches.c.closed_by.is_(None))
    return or_(items.c.batch.not_in(_done()), items.c.id.in_(wanted))


def listed(connection: Connection) -> list[Any]:
    """Of each batch the `name`, the numbers of items, of judgements and of missing judgements, and whether an admin has
    `finished` it or it is `over`: the run that asked for it has continued. Of such ones nothing is missing. Gold items,
    which are never done, are left out."""
    of = _everywhere()
    ended = or_(batches.c.finished_at.is_not(None), _is_over())
    missing = case((or_(ended, items.c.overlap < items.c.num_judgements), 0), else_=_MISSING)
    states = (batches.c.finished_at.is_not(None).label("finished"), _is_over().label("over"))
    found = connection.execute(
        select(of.c.batch.label("name"), *_counts(missing), *states)
        .select_from(of)
        .join(items, items.c.id == of.c.item)
        .outerjoin(batches, batches.c.name == of.c.batch)
        .where(items.c.gold.is_(None))
        .group_by(of.c.batch, batches.c.finished_at, batches.c.closed_by)
        .order_by(of.c.batch)
    )
    return list(found.all())


def counted(connection: Connection, column: Column[Any]) -> list[Row[Any]]:
    """For each value of a column of `items`, as `name`: the numbers of items, of judgements and of missing judgements,
    those that are given out. Gold items are left out."""
    missing = case((and_(items.c.overlap > items.c.num_judgements, is_given_out()), _MISSING), else_=0)
    found = connection.execute(
        select(column.label("name"), *_counts(missing)).where(items.c.gold.is_(None)).group_by(column).order_by(column)
    )
    return list(found.all())


def _counts(missing: ColumnElement[int]) -> Sequence[ColumnElement[Any]]:
    return (
        func.count().label("items"),
        func.sum(items.c.num_judgements).label("judgements"),
        func.sum(missing).label("missing"),
    )


def _everywhere() -> Subquery:
    """Rows of batch and item: with which an item was added, and which ask for it."""
    added = select(items.c.batch.label("batch"), items.c.id.label("item"))
    return union(added, select(members.c.batch, members.c.item)).subquery()


def _of_rows(*conditions: ColumnElement[bool]) -> Select[tuple[int]]:
    """Ids of the members of batches."""
    return select(members.c.item).join(batches, members.c.batch == batches.c.name).where(*conditions)


def _done() -> Select[tuple[str]]:
    """Names of the batches that want no more."""
    return select(batches.c.name).where(or_(batches.c.finished_at.is_not(None), _is_over()))


def _is_over() -> ColumnElement[bool]:
    """Whether whoever waited for a batch has continued."""
    return and_(batches.c.closed_by.is_not(None), batches.c.closed_by != _BY_HAND)


def keys_of(connection: Connection, name: str) -> Sequence[str]:
    """Keys of a batch's items."""
    found = select(items.c.key).join(members, members.c.item == items.c.id).where(members.c.batch == name)
    return list(connection.scalars(found.order_by(items.c.key)))


def chunks(values: Iterable[T]) -> Iterator[list[T]]:
    """Some values at a time: a statement holds a bounded number."""
    left = iter(values)
    while some := list(islice(left, _CHUNK)):
        yield some
