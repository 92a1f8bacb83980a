"""How far the work is, and how well people judge, as data for the admin's page."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection

from jobs.services.labelling import reviewing
from jobs.services.labelling.agreement import quality
from jobs.services.labelling.shapes.table import SHAPES
from jobs.services.labelling.tables import items
from jobs.services.labelling.waiting.finishing import counts, finished_batches

Json = dict[str, Any]


def overview(connection: Connection) -> Json:
    """`people` by name, `kinds` and `batches` with their counts, `reviews` by state, `shapes` of exports."""
    figures = quality.report(connection)
    finished = finished_batches(connection)
    return {
        "people": figures["people"],
        "kinds": [
            {**row._asdict(), "alpha": figures["alpha"].get(row.name)} for row in counts(connection, items.c.kind)
        ],
        "batches": [{**row._asdict(), "finished": row.name in finished} for row in counts(connection, items.c.batch)],
        "reviews": reviewing.states(connection),
        "shapes": list(SHAPES),
    }
