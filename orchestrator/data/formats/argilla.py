"""Records of Argilla 2: of `records.to_json` ({fields, responses: {QUESTION: [{value, status}]}}), and of
`records.to_datasets` (a column per field, and QUESTION.responses).

A ranking is an answer that names fields, best first. Answers that were not submitted are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from orchestrator.data.formats.annotations import UNRANKED, UNWRITTEN, asked, compared, mean, ranked, rated
from orchestrator.data.formats.format import LeftOut, field_sets
from orchestrator.data.formats.transcripts import Ranked, Scored, as_reply, with_reply
from orchestrator.data.messages import BadRow, Fields, Messages, number_of, required
from orchestrator.data.values import describe

RANKING, PREFERENCE, RATING, FLAGS, REPLY = "ranking", "preference", "rating", "flags", "reply"
"""Questions that an export of the labelling service has; in other records rankings may have any name."""
EQUAL = 4  # of a preference from 1 (the first reply) to 7 (the second)
SUBMITTED = "submitted"
_COLUMN, _STATUS = ".responses", ".responses.status"


def fields_of(question: str) -> Sequence[frozenset[str]]:
    """Records in both forms. Of columns only those of one question are detected."""
    return field_sets("fields responses", f"{question}{_COLUMN}")


def argilla_rankings(fields: Fields) -> Iterator[Ranked | LeftOut]:
    """A ranking of every person who gave one."""
    content, answers = _content(fields), _answers(fields)
    yield from _unsubmitted(answers)
    found = [
        (question, value) for question, value in _submitted(answers) if _is_order(question, value, content, fields)
    ]
    if not found:
        yield LeftOut(UNRANKED)
        return
    messages = asked(content)
    for question, value in found:
        if isinstance(value, list):
            named = [_choice(choice, place) for place, choice in enumerate(value)]
            yield from ranked(messages, [(place, as_reply(content[name], name)) for name, place in named])
        else:
            first, second = (as_reply(required(content, name), name) for name in ("response_1", "response_2"))
            yield compared(messages, first, second, _number(question, value) - EQUAL, has_strength=True)


def argilla_scores(fields: Fields) -> Iterator[Scored | LeftOut]:
    """The mean of the ratings."""
    content, answers = _content(fields), _answers(fields)
    yield from _unsubmitted(answers)
    score = mean([_number(question, value) for question, value in _submitted(answers) if question == RATING])
    yield (*rated(content), score)


def argilla_replies(fields: Fields) -> Iterator[Messages | LeftOut]:
    """The conversation with each written reply."""
    content, answers = _content(fields), _answers(fields)
    yield from _unsubmitted(answers)
    written = [value for question, value in _submitted(answers) if question == REPLY]
    if not written:
        yield LeftOut(UNWRITTEN)
    for value in written:
        yield with_reply(asked(content), value, REPLY)


Answers = Sequence[tuple[str, Any, str]]
"""Question, value and status."""


def _content(fields: Fields) -> Fields:
    found = fields.get("fields", fields)
    if not isinstance(found, dict):
        raise BadRow(f"'fields' must be an object, found {describe(found)}")
    return found


def _answers(fields: Fields) -> Answers:
    columns = {name.removesuffix(_COLUMN): _list(fields, name) for name in fields if name.endswith(_COLUMN)}
    if not columns:
        return [
            (question, each["value"], str(each.get("status") or SUBMITTED))
            for question, given in _mapping(required(fields, "responses"), "responses").items()
            for each in _listed(given, f"responses.{question}")
            if "value" in each
        ]
    return [
        (question, value, str(status or SUBMITTED))
        for question, values in columns.items()
        for value, status in zip_longest(values, _list(fields, f"{question}{_STATUS}")[: len(values)])
    ]


def _submitted(answers: Answers) -> Iterator[tuple[str, Any]]:
    return ((question, value) for question, value, status in answers if status == SUBMITTED)


def _unsubmitted(answers: Answers) -> Iterator[LeftOut]:
    return (LeftOut("answers that were not submitted") for *_, status in answers if status != SUBMITTED)


def _is_order(question: str, value: Any, content: Fields, fields: Fields) -> bool:
    if isinstance(value, list):
        return len(value) > 1 and all(_choice(choice, 0)[0] in content for choice in value)
    meta = fields.get("metadata", fields)
    return question == PREFERENCE and isinstance(meta, Mapping) and meta.get("task") == "compare"


def _choice(choice: Any, place: int) -> tuple[str, float]:
    """The field that a choice names, and its place: by its `rank` (Argilla 1), else by its position."""
    if isinstance(choice, dict):
        rank = number_of(choice, "rank", "a ranking")
        return str(choice.get("value")), place if rank is None else rank
    return str(choice), place


def _number(question: str, value: Any) -> float:
    found = number_of({question: value}, question, "an answer")
    if found is None:
        raise BadRow(f"an answer to {question!r} is null")
    return found


def _list(fields: Fields, name: str) -> Sequence[Any]:
    found = fields.get(name) or []
    if not isinstance(found, list):
        raise BadRow(f"{name!r} must be a list, found {describe(found)}")
    return found


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise BadRow(f"{name!r} must be an object, found {describe(value)}")
    return value


def _listed(value: Any, name: str) -> Sequence[Mapping[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise BadRow(f"{name!r} must be a list of {{value, user_id}}, found {describe(value)}")
    return value
