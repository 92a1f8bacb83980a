"""How far the work is, and how well people judge, as data for the admin's page."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection

from jobs.services.labelling import reviewing
from jobs.services.labelling.agreement import quality
from jobs.services.labelling.shapes.table import SHAPES
from jobs.services.labelling.tables import items
from jobs.services.labelling.waiting.batches import counted, listed

Json = dict[str, Any]


def overview(connection: Connection) -> Json:
    """`people` by name, `kinds` and `batches` with their counts, `reviews` by state, `shapes` of exports."""
    figures = quality.report(connection)
    return {
        "people": figures["people"],
        "kinds": [
            {**row._asdict(), "alpha": figures["alpha"].get(row.name)} for row in counted(connection, items.c.kind)
        ],
        "batches": [row._asdict() for row in listed(connection)],
        "reviews": reviewing.states(connection),
        "shapes": list(SHAPES),
    }
