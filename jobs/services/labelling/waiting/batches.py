"""Batches: items whose judgements somebody waits for, such as a stage of a run. Functions run in one transaction."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from sqlalchemy import Connection, case, func, insert, select, update

from jobs.services.labelling.tables import LABELLER, batches, items, members, people
from orchestrator.errors import DataError

_CHUNK = 500  # values in one statement
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
    is opened again, with these items.

    Args:
        overlaps: number of people who shall judge an item, by its key. Gold items are left out.
    """
    fresh = {"opened_at": opened_at, "finished_at": None, "closed_by": None}
    if not connection.execute(update(batches).where(batches.c.name == name).values(**fresh)).rowcount:
        connection.execute(insert(batches).values(name=name, **fresh))
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
    missing = items.c.overlap - items.c.num_judgements
    counts = connection.execute(
        select(
            func.count(),
            func.coalesce(func.sum(items.c.num_judgements), 0),
            func.coalesce(func.sum(case((missing > 0, missing), else_=0)), 0),
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


def open_batches(connection: Connection) -> list[str]:
    """Names of the batches that somebody waits for."""
    return list(
        connection.scalars(select(batches.c.name).where(batches.c.closed_by.is_(None)).order_by(batches.c.name))
    )


def finish(connection: Connection, name: str, *, is_finished: bool = True) -> None:
    """Lets whoever waits for a batch continue with the judgements that there are, or (False) takes that back.

    Raises:
        DataError: nobody waits for a batch of this name.
    """
    names = open_batches(connection)
    if name not in names:
        waiting = f"there are: {', '.join(names)}" if names else "nobody waits for any"
        raise DataError(f"nobody waits for the batch {name!r}; {waiting}.")
    mark_finished(connection, name, is_finished=is_finished)


def mark_finished(connection: Connection, name: str, *, is_finished: bool) -> bool:
    """Whether there is such a batch."""
    at = time.time() if is_finished else None
    return bool(connection.execute(update(batches).where(batches.c.name == name).values(finished_at=at)).rowcount)


def close(connection: Connection, name: str, reason: str) -> None:
    """Withdraws what is missing: nobody is asked for it any more. Tasks that people have before them may still be
    answered. Items that another open batch has too stay as they are."""
    others = (
        select(members.c.item)
        .join(batches, members.c.batch == batches.c.name)
        .where(members.c.batch != name, batches.c.closed_by.is_(None))
    )
    mine = select(members.c.item).where(members.c.batch == name)
    connection.execute(
        update(items)
        .where(items.c.id.in_(mine), items.c.id.not_in(others), items.c.num_judgements < items.c.overlap)
        .values(overlap=items.c.num_judgements)
    )
    connection.execute(update(batches).where(batches.c.name == name).values(closed_by=reason[:200]))


def keys_of(connection: Connection, name: str) -> Sequence[str]:
    """Keys of a batch's items."""
    found = select(items.c.key).join(members, members.c.item == items.c.id).where(members.c.batch == name)
    return list(connection.scalars(found.order_by(items.c.key)))


def chunks(values: Iterable[T]) -> Iterator[list[T]]:
    """Some values at a time: a statement holds a bounded number."""
    left = iter(values)
    while some := list(islice(left, _CHUNK)):
        yield some
