"""Tasks of Label Studio with an annotation of each person, as its JSON import and export have them.

The labelling configurations that show these tasks are in docs/labelling.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from jobs.services.labelling.shapes.judged import Exported, Json, Judged
from jobs.services.labelling.shapes.texts import conversation, replies
from orchestrator.data.formats.format import LeftOut
from orchestrator.data.formats.label_studio import LEFT, NOT_RANKABLE, RANK, RIGHT, STRENGTH

TIED = "rankings with ties, which this shape does not hold"
_Results = Callable[[Mapping[str, Any]], Iterator[Json]]


def label_studio(judged: Judged, report: Exported) -> Iterator[Json]:
    item = judged.item
    shown, results_of = _TASKS[item.kind]
    annotations: list[Json] = []
    kept: list[str] = []
    for row in judged.given:
        try:
            results = list(results_of(row.answer))
        except LeftOut as reason:
            report.left_out[str(reason)] += 1
            continue
        kept.append(row.name)
        annotations.append(
            {
                "result": [{"id": f"{item.kind}-{number}", **result} for number, result in enumerate(results)],
                "was_cancelled": False,
                "ground_truth": False,
                "created_at": datetime.fromtimestamp(row.made_at, UTC).isoformat().replace("+00:00", "Z"),
                "lead_time": row.seconds,
            }
        )
    if not annotations:
        raise LeftOut("without a judgement that this shape holds")
    about = {"task": item.kind, "prompt_id": item.prompt_id, "people": kept}
    yield {
        "data": {"messages": conversation(judged), **shown(replies(judged)), **about},
        "annotations": annotations,
    }


def _items(texts: Sequence[str]) -> Json:
    return {"items": [{"id": str(place), "title": "", "body": text} for place, text in enumerate(texts, 1)]}


def _rank(answer: Mapping[str, Any]) -> Iterator[Json]:
    ranks: list[int | None] = answer["ranks"]
    ranked = sorted((rank, place) for place, rank in enumerate(ranks, 1) if rank is not None)
    if len({rank for rank, _ in ranked}) < len(ranked):
        raise LeftOut(TIED)
    others = [str(place) for place, rank in enumerate(ranks, 1) if rank is None]
    buckets = {RANK: [str(place) for _, place in ranked], NOT_RANKABLE: others}
    yield _result("rank", "items", "ranker", buckets)


def _answers(texts: Sequence[str]) -> Json:
    return {"answer1": texts[0], "answer2": texts[1]}


def _compare(answer: Mapping[str, Any]) -> Iterator[Json]:
    """Two equal replies are an annotation that selects none of them."""
    preference = answer["preference"]
    if preference:
        yield _result("comparison", "comparison", "pairwise", LEFT if preference < 0 else RIGHT, "selected")
        yield _result(STRENGTH, "answer1", "rating", abs(preference))


def _response(texts: Sequence[str]) -> Json:
    return {"response": texts[0]}


def _rate(answer: Mapping[str, Any]) -> Iterator[Json]:
    if answer["rating"] is not None:
        yield _result("rating", "response", "rating", answer["rating"])
    if answer["flags"]:
        yield _result("flags", "response", "choices", answer["flags"])


def _nothing(_: Sequence[str]) -> Json:
    return {}


def _write(answer: Mapping[str, Any]) -> Iterator[Json]:
    yield _result("reply", "messages", "textarea", [answer["text"]], "text")


def _result(name: str, of: str, kind: str, value: Any, key: str | None = None) -> Json:
    return {"from_name": name, "to_name": of, "type": kind, "value": {key or kind: value}}


_TASKS: Mapping[str, tuple[Callable[[Sequence[str]], Json], _Results]] = {
    "rank": (_items, _rank),
    "compare": (_answers, _compare),
    "rate": (_response, _rate),
    "write": (_nothing, _write),
}
"""Of each kind of task the data beside its messages, and the results of an answer."""
