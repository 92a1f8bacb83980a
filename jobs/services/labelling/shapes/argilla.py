"""Records of Argilla 2, as its `records.to_json` writes them: one per item, with a response of each person.

The settings of a data set that takes these records are in docs/labelling.md.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jobs.services.labelling.shapes.judged import Exported, Json, Judged
from jobs.services.labelling.shapes.texts import conversation, replies
from orchestrator.data.formats.argilla import EQUAL, FLAGS, PREFERENCE, RANKING, RATING, REPLY, SUBMITTED
from orchestrator.data.formats.format import LeftOut

UNORDERED = "rankings with ties or replies that are not rankable, which this shape does not hold"
_PEOPLE = uuid.UUID("6d0d7a1e-6a0c-4f0e-9a44-6a1f5c1c2f53")  # namespace of ids made of names


def argilla(judged: Judged, report: Exported) -> Iterator[Json]:
    item = judged.item
    texts = replies(judged)
    names = ["response"] if len(texts) == 1 else [f"response_{place}" for place in range(1, len(texts) + 1)]
    responses: dict[str, list[Json]] = {}
    kept: list[str] = []
    for row in judged.given:
        try:
            answers = _ANSWERS[item.kind](row.answer)
        except LeftOut as reason:
            report.left_out[str(reason)] += 1
            continue
        kept.append(row.name)
        for question, value in answers.items():
            user = str(uuid.uuid5(_PEOPLE, row.name))
            responses.setdefault(question, []).append({"value": value, "user_id": user, "status": SUBMITTED})
    if not responses:
        raise LeftOut("without a judgement that this shape holds")
    yield {
        "id": item.key,
        "fields": {"chat": conversation(judged), **dict(zip(names, texts, strict=True))},
        "metadata": {"task": item.kind, "prompt_id": item.prompt_id, "people": kept},
        "suggestions": {},
        "responses": responses,
        "vectors": {},
        "_server_id": None,
    }


def _rank(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    return {RANKING: [f"response_{index + 1}" for index in strict_order(answer["ranks"])]}


def strict_order(ranks: list[int | None]) -> list[int]:
    """Indices of the replies, best first. Raises LeftOut: two are equal, or one has no rank."""
    if None in ranks or len(set(ranks)) < len(ranks):
        raise LeftOut(UNORDERED)
    return sorted(range(len(ranks)), key=lambda index: ranks[index] or 0)


def _compare(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    return {PREFERENCE: answer["preference"] + EQUAL}


def _rate(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    rating = {} if answer["rating"] is None else {RATING: answer["rating"]}
    return {**rating, **({FLAGS: answer["flags"]} if answer["flags"] else {})}


def _write(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    return {REPLY: answer["text"]}


_ANSWERS: Mapping[str, Callable[[Mapping[str, Any]], Mapping[str, Any]]] = {
    "rank": _rank,
    "compare": _compare,
    "rate": _rate,
    "write": _write,
}
