"""Judgements as a file that no longer changes: what a stage of a run was given by people, and the rankings of it.

A line is an item with its judgements. Items are in the order of their keys and judgements in that of people's names, so
that the time at which somebody answered decides nothing.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

from sqlalchemy import Connection, Row, or_, select

from jobs.services.labelling.agreement.given import Given
from jobs.services.labelling.agreement.given import by_item as group_by_item
from jobs.services.labelling.agreement.merging import agreements, electorate, opinions
from jobs.services.labelling.shapes.judged import Exported, Judged
from jobs.services.labelling.shapes.own import rankings
from jobs.services.labelling.tables import items, judgements, people, showings
from jobs.services.labelling.waiting.batches import chunks
from orchestrator.data.formats.format import LeftOut
from orchestrator.errors import DataError, StorageError
from orchestrator.run.storage import reading, replacing

Json = dict[str, Any]


@dataclass(frozen=True)
class JudgedItem:
    """An item, and judgements of it that were not undone. Fields as in tables.py.

    Args:
        judgements: {id, person (a name), shown_at, made_at, seconds, order, answer}, by name.
    """

    key: str
    prompt_id: str
    kind: str
    messages: Sequence[Json]
    tools: Sequence[Json]
    replies: Sequence[Json]
    source: Json
    gold: Json | None
    judgements: Sequence[Json]


def judged_items(connection: Connection, keys: Sequence[str]) -> Iterator[JudgedItem]:
    """The items with these keys, judged or not; and gold items that were judged, which show how well people judge."""
    given: dict[int, list[Json]] = defaultdict(list)
    wanted = set(keys)
    for row in connection.execute(_given()).all():
        if row.key in wanted or row.gold is not None:
            given[row.item].append(
                {
                    "id": row.client_id,
                    "person": row.name,
                    "shown_at": row.shown_at,
                    "made_at": row.made_at,
                    "seconds": row.seconds,
                    "order": row.order,
                    "answer": row.answer,
                }
            )
    for some in chunks(keys):
        for item in connection.execute(select(items).where(items.c.key.in_(some), items.c.gold.is_(None))):
            yield _judged(item, given[item.id])
    for item in connection.execute(select(items).where(items.c.gold.is_not(None), items.c.num_judgements > 0)):
        yield _judged(item, given[item.id])


def _given() -> Any:
    return (
        select(
            judgements.c.item,
            judgements.c.client_id,
            judgements.c.made_at,
            judgements.c.seconds,
            judgements.c.answer,
            people.c.name,
            showings.c.order,
            showings.c.shown_at,
            items.c.key,
            items.c.gold,
        )
        .join(people, judgements.c.person == people.c.id)
        .join(showings, judgements.c.showing == showings.c.id)
        .join(items, judgements.c.item == items.c.id)
        .where(judgements.c.undone_at.is_(None), or_(items.c.gold.is_not(None), items.c.kind.in_(("rank", "compare"))))
    )


def _judged(item: Row[Any], given: Sequence[Json]) -> JudgedItem:
    names = (name for name in JudgedItem.__dataclass_fields__ if name != "judgements")
    return JudgedItem(**{name: getattr(item, name) for name in names}, judgements=given)


def joined(earlier: Iterable[JudgedItem], fresh: Iterable[JudgedItem]) -> list[JudgedItem]:
    """All items of both in the order of the file. Of two judgements of one item by one person the fresh one counts."""
    found: dict[str, JudgedItem] = {}
    given: dict[str, dict[str, Json]] = defaultdict(dict)
    for item in (*earlier, *fresh):
        found[item.key] = item
        given[item.key] |= {judgement["person"]: judgement for judgement in item.judgements}
    return [
        JudgedItem(**{**vars(found[key]), "judgements": [given[key][name] for name in sorted(given[key])]})
        for key in sorted(found)
    ]


def write_items(path: Path, found: Iterable[JudgedItem]) -> None:
    """Writes them whole, or not at all. Raises StorageError."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for item in found:
            file.write(json.dumps(asdict(item), ensure_ascii=False) + "\n")


def read_items(path: Path) -> list[JudgedItem]:
    """Raises StorageError."""
    with reading(path), path.open(encoding="utf-8") as file:
        try:
            return [JudgedItem(**json.loads(line)) for line in file]
        except (TypeError, ValueError):
            raise StorageError(f"{path} is damaged; delete it, and its stage makes it of the store again.") from None


def write_rankings(path: Path, found: Sequence[JudgedItem]) -> Exported:
    """Writes the merged judgements in the format ranking, whole or not at all.

    Raises:
        DataError: nobody preferred anything.
        StorageError: it can't be written.
    """
    report, answers = Exported(), _answers(found)
    judges, by_item = electorate(answers), group_by_item(answers)
    rows: list[Json] = []
    for place, item in enumerate(found):
        if item.gold is not None or place not in by_item:
            continue
        report.num_items += 1
        try:
            rows += rankings(Judged(SimpleNamespace(id=place, **vars(item)), by_item[place], judges), report)
        except LeftOut as reason:
            report.left_out[str(reason)] += 1
    report.num_rows = len(rows)
    if not rows:
        raise DataError(
            f"{len(answers)} judgements of people prefer no reply to another one, so there is nothing to learn. Run "
            "the stage again with --from, and ask for more."
        )
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return report


def _answers(found: Sequence[JudgedItem]) -> list[Given]:
    """People are numbered in the order of their names, items in that of the file."""
    numbers = {name: number for number, name in enumerate(sorted(_names(found)))}
    return [
        Given(
            place, numbers[each["person"]], each["answer"], each["order"], each["seconds"], item.gold, each["made_at"]
        )
        for place, item in enumerate(found)
        for each in item.judgements
    ]


def num_people(found: Iterable[JudgedItem]) -> int:
    return len(_names(found))


def agreement(found: Iterable[JudgedItem]) -> float | None:
    """Share of votes on pairs of replies on which two people agree; a tie is half. No reward model can be expected to
    agree with people more. None: no two people judged the same."""
    shares = [
        share
        for item in found
        if item.gold is None
        for share in agreements([opinions(each["answer"]) for each in item.judgements])
    ]
    return fmean(shares) if shares else None


def _names(found: Iterable[JudgedItem]) -> set[str]:
    return {each["person"] for item in found for each in item.judgements}
