"""How far the work is, and how well people judge, as data for the admin's page."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from sqlalchemy import Connection, select

from jobs.services.labelling import quality, reviewing
from jobs.services.labelling.exporting import SHAPES
from jobs.services.labelling.finishing import counts, finished_batches
from jobs.services.labelling.tables import LABELLER, items, people

Json = dict[str, Any]


def overview(connection: Connection) -> Json:
    """`people` by name, `kinds` and `batches` with their counts, `reviews` by state, `shapes` of exports."""
    figures = quality_report(connection)
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


def quality_report(connection: Connection) -> Json:
    """`people`: of each labeller the fields of Figures, `spam`, `paused` and `revoked`, by name. `alpha`: by kind of
    task Krippendorff's alpha as `value`, and `num_items` that several people judged."""
    states = {
        row.name: {"paused": row.paused, "revoked": row.revoked_at is not None}
        for row in connection.execute(
            select(people.c.name, people.c.paused, people.c.revoked_at).where(people.c.role == LABELLER)
        )
    }
    found = [{**asdict(each), "spam": each.spam, **states[each.name]} for each in quality.figures(connection)]
    return {"people": found, "alpha": {}}
