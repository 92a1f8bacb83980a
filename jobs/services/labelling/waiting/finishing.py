"""Which batches an admin has finished, and how far batches and kinds of tasks are."""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import Column, ColumnElement, Connection, Row, and_, case, func, insert, or_, select

from jobs.services.labelling.tables import batches, items, members
from jobs.services.labelling.waiting.batches import mark_finished
from orchestrator.errors import DataError


def finish_batch(connection: Connection, batch: str) -> None:
    """No more tasks of the batch are given out, and a run that waits for it continues with what was judged.

    Raises DataError: no item is of this batch.
    """
    if mark_finished(connection, batch, is_finished=True):
        return
    if connection.scalar(select(items.c.id).where(items.c.batch == batch).limit(1)) is None:
        raise DataError(f"no item is of a batch {batch!r}.")
    now = time.time()
    connection.execute(insert(batches).values(name=batch, opened_at=now, finished_at=now, closed_by="admin"))


def reopen_batch(connection: Connection, batch: str) -> None:
    """Gives out its tasks again."""
    mark_finished(connection, batch, is_finished=False)


def finished_batches(connection: Connection) -> frozenset[str]:
    return frozenset(connection.scalars(_finished()))


def is_given_out() -> ColumnElement[bool]:
    """Whether an item is of a batch that is not finished, or somebody waits for it in another batch."""
    wanted = (
        select(members.c.item)
        .join(batches, members.c.batch == batches.c.name)
        .where(batches.c.finished_at.is_(None), batches.c.closed_by.is_(None))
    )
    return or_(items.c.batch.not_in(_finished()), items.c.id.in_(wanted))


def counts(connection: Connection, column: Column[Any]) -> list[Row[Any]]:
    """For each value of a column of `items`, as `name`: the numbers of items, of judgements and of missing judgements.
    Gold items, which are never done, are left out; of finished batches nothing is missing.
    """
    is_waiting = and_(items.c.overlap > items.c.num_judgements, is_given_out())
    found = connection.execute(
        select(
            column.label("name"),
            func.count().label("items"),
            func.sum(items.c.num_judgements).label("judgements"),
            func.sum(case((is_waiting, items.c.overlap - items.c.num_judgements), else_=0)).label("missing"),
        )
        .where(items.c.gold.is_(None))
        .group_by(column)
        .order_by(column)
    )
    return list(found.all())


def _finished() -> Any:
    return select(batches.c.name).where(batches.c.finished_at.is_not(None))
