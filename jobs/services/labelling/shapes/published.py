"""Shapes of published data sets: hh-rlhf, UltraFeedback, HelpSteer 2 and 3, Chatbot Arena."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, groupby
from typing import Any

from sqlalchemy import Connection

from jobs.services.labelling.shapes.judged import Exported, Json, Judged, every, judges_of
from jobs.services.labelling.shapes.own import mean_rating, preference_of
from jobs.services.labelling.shapes.texts import exchange, model_of, replies, require_kept
from orchestrator.data.formats import arena
from orchestrator.data.formats.feedback import SCORE_FORMATS
from orchestrator.data.formats.format import LeftOut
from orchestrator.data.formats.rankings import RANKING_FORMATS

_SPEAKERS = {"user": "Human", "assistant": "Assistant"}
_HELPSTEER = {"user": "User", "assistant": "Assistant"}
FLAGS = "flags, which this shape does not hold"
STRENGTHS = "strengths, which this shape does not hold"
HALF_RANKED = "pairs with one reply that is not rankable"


def hh_rlhf(judged: Judged, _: Exported) -> Iterator[Json]:
    """A row for every pair of the merged order; the strength of a comparison is its `margin`."""
    messages, texts = exchange(judged), replies(judged)
    head = "".join(f"\n\n{_SPEAKERS[turn['role']]}: {turn['content'].strip()}" for turn in messages)
    whole = [f"{head}\n\nAssistant: {text.strip()}" for text in texts]
    more = {"margin": abs(preference_of(judged))} if judged.item.kind == "compare" else {}
    rows = []
    for better, worse in sorted(judged.order()):
        row = {"id": judged.item.prompt_id, "chosen": whole[better], "rejected": whole[worse], **more}
        require_kept(RANKING_FORMATS["hh-rlhf"], row, messages, [texts[better], texts[worse]])
        rows.append(row)
    yield from rows


def ultrafeedback(connection: Connection, report: Exported) -> Iterator[Json]:
    """Replies to one prompt that were added together, with their mean ratings."""
    for _, group in groupby(every(connection, judges_of(connection), report), key=_prompt_of):
        completions: list[Json] = []
        for judged in group:
            report.num_items += 1
            try:
                completions.append(_completion(judged, report))
                first = judged
            except LeftOut as reason:
                report.left_out[str(reason)] += 1
        if completions:
            yield {
                "id": first.item.prompt_id,
                "source": str(first.item.source.get("run") or first.item.source.get("file") or ""),
                "instruction": first.item.messages[0]["content"],
                "models": [each["model"] for each in completions],
                "completions": completions,
            }


def _prompt_of(judged: Judged) -> tuple[str, Any]:
    return judged.item.prompt_id, judged.item.messages


def _completion(judged: Judged, report: Exported) -> Json:
    if judged.item.kind != "rate":
        raise LeftOut(f"tasks to {judged.item.kind}, which ultrafeedback does not hold")
    if len(exchange(judged)) > 1:
        raise LeftOut("with several turns")
    (text,) = replies(judged)
    _count_flags(judged, report)
    return {"model": model_of(judged, 0), "response": text, "overall_score": mean_rating(judged)}


def helpsteer2(judged: Judged, report: Exported) -> Iterator[Json]:
    """The mean rating as `helpfulness`, from 0 to 4; the other attributes were not asked."""
    messages, (text,) = exchange(judged), replies(judged)
    first, *rest = messages
    turns = [f"\n<extra_id_1>{_HELPSTEER[turn['role']]}\n{turn['content']}" for turn in rest]
    row = {
        "id": judged.item.prompt_id,
        "prompt": "".join([first["content"], *turns]),
        "response": text,
        "helpfulness": _whole(mean_rating(judged) - 1),
    }
    require_kept(SCORE_FORMATS["helpsteer"], row, messages, [text])
    _count_flags(judged, report)
    yield row


def helpsteer3(judged: Judged, _: Exported) -> Iterator[Json]:
    """A comparison: the merged preference, and that of each person."""
    first, second = replies(judged)
    individual = [
        {"score": row.answer["preference"], "reasoning": "", "feedback1": "", "feedback2": ""} for row in judged.given
    ]
    yield {
        "id": judged.item.prompt_id,
        "domain": None,
        "language": None,
        "context": exchange(judged),
        "response1": first,
        "response2": second,
        "overall_preference": _whole(preference_of(judged)),
        "individual_preference": individual,
    }


def arena_votes(judged: Judged, report: Exported) -> Iterator[Json]:
    """A vote of every person on every pair of replies."""
    messages, texts = exchange(judged), replies(judged)
    for row in judged.given:
        for first, second, winner in _votes(row.answer, report):
            yield {
                "question_id": f"{judged.item.key[:16]}-{first}-{second}",
                "model_a": model_of(judged, first),
                "model_b": model_of(judged, second),
                "winner": winner,
                "judge": row.name,
                "conversation_a": [*messages, {"role": "assistant", "content": texts[first]}],
                "conversation_b": [*messages, {"role": "assistant", "content": texts[second]}],
                "turn": (len(messages) + 1) // 2,
                "anony": True,
                "language": None,
                "tstamp": row.made_at,
            }


def _votes(answer: Mapping[str, Any], report: Exported) -> Iterator[tuple[int, int, str]]:
    if answer["kind"] == "compare":
        preference = answer["preference"]
        report.left_out.update([STRENGTHS] * (abs(preference) > 1))
        yield 0, 1, _winner(preference)
        return
    ranks: Sequence[int | None] = answer["ranks"]
    for (first, rank), (second, other) in combinations(enumerate(ranks), 2):
        if rank is not None and other is not None:
            yield first, second, _winner(rank - other)
        elif rank is None and other is None:
            yield first, second, arena.BOTH_BAD
        else:
            report.left_out[HALF_RANKED] += 1


def _winner(difference: float) -> str:
    return arena.TIED if difference == 0 else arena.FIRST if difference < 0 else arena.SECOND


def _count_flags(judged: Judged, report: Exported) -> None:
    report.left_out.update(FLAGS for row in judged.given for _ in row.answer["flags"])


def _whole(number: float) -> float:
    """An integer where it is one, as in the published files."""
    return int(number) if number == int(number) else number
