"""Writes what people judged: as data files that the stages read, or in shapes of others (shapes/)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from jobs.services.labelling.shapes.judged import Exported, Json
from jobs.services.labelling.shapes.table import SHAPES, Shape
from jobs.services.labelling.store import Store
from orchestrator.errors import ConfigError, DataError
from orchestrator.run.storage import replacing


def export(store: Store, out: Path, shape: str) -> Exported:
    """Writes OUT, whole or not at all, from one state of the store.

    Raises:
        ConfigError: an unknown shape, or OUT is a file of the store.
        DataError: nothing was judged that has this shape.
        StorageError: OUT can't be written, or the store can't be read.
    """
    if shape not in SHAPES:
        raise ConfigError(f"--as {shape} is not known; choose one of {', '.join(SHAPES)}.")
    store.require_other(out)
    report = Exported()
    with store.reading() as connection, replacing(out) as temporary:
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(_text(SHAPES[shape], SHAPES[shape].rows(connection, report), report))
        if not report.num_rows:
            reasons = "".join(f"; {count} {reason}" for reason, count in report.left_out.items())
            raise DataError(f"{store.place} has no judgements that make {shape}{reasons}.")
    return report


def _text(shape: Shape, rows: Iterable[Json], report: Exported) -> Iterator[str]:
    """The text of the file, row by row."""
    before, between, after = ("[\n", ",\n", "\n]\n") if shape.is_array else ("", "\n", "\n")
    yield before
    for row in rows:
        yield (between if report.num_rows else "") + json.dumps(row, ensure_ascii=shape.is_ascii)
        report.num_rows += 1
    yield after
