"""Formats of replies judged one by one (scores, labels), and published data sets that hold both scores and rankings."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from orchestrator.data.formats import argilla
from orchestrator.data.formats.format import Format, LeftOut, field_sets
from orchestrator.data.formats.instructions import present
from orchestrator.data.formats.label_studio import studio_scores
from orchestrator.data.formats.transcripts import (
    TIE,
    Ranked,
    Scored,
    after_begun,
    as_ranked,
    as_reply,
    waiting,
)
from orchestrator.data.messages import BadRow, Fields, Messages, conversation, is_messages, number_of, required, text_of
from orchestrator.data.records import Message, Reply
from orchestrator.data.values import describe

Labelled = tuple[Messages, Reply, bool]
UNSCORED = "replies without a score"
_HELPSTEER_TURN = re.compile(r"\n*<extra_id_1>(User|Assistant)\n")


def ultrafeedback_scores(fields: Fields) -> Iterator[Scored | LeftOut]:
    """{instruction, completions: [{response, overall_score}]}."""
    messages: Messages = (Message("user", text_of(fields, "instruction")),)
    for index, completion in enumerate(_completions(fields)):
        where = f"completions[{index}]"
        score = number_of(completion, "overall_score", where)
        yield (
            LeftOut(UNSCORED)
            if score is None
            else (messages, as_reply(required(completion, "response"), f"{where}.response"), score)
        )


def ultrafeedback_ranking(fields: Fields) -> Iterator[Ranked | LeftOut]:
    """The completions of a row by their scores; of those with equal scores the first."""
    ranked: dict[float, Reply] = {}
    for found in ultrafeedback_scores(fields):
        if isinstance(found, LeftOut):
            yield found
        elif found[2] in ranked:
            yield LeftOut("replies with the score of another")
        else:
            ranked[found[2]] = found[1]
    messages = (Message("user", text_of(fields, "instruction")),)
    scores = sorted(ranked, reverse=True)
    yield as_ranked(messages, [ranked[score] for score in scores], scores)


def helpsteer_pair(fields: Fields) -> Sequence[Ranked]:
    """HelpSteer3 {context, response1, response2, overall_preference} and the pairs of HelpSteer2 {prompt, response_1,
    response_2, preference_strength}. A negative preference is for the first response; its size is the strength."""
    key = present(fields, "overall_preference", "preference_strength")
    preference = number_of(fields, key, "the row")
    if preference is None:
        raise BadRow(f"{key!r} must be a number, found null")
    if preference == 0:
        raise LeftOut(TIE)
    names = [present(fields, f"response{number}", f"response_{number}") for number in (1, 2)]
    replies = [as_reply(required(fields, name), name) for name in names]
    messages = _asked(fields, "context", "prompt")
    ordered = after_begun(messages, replies if preference < 0 else replies[::-1])
    return [as_ranked(messages, ordered, (abs(preference), 0.0))]


def _scored(fields: Fields) -> Sequence[Scored]:
    score = number_of(fields, present(fields, "score", "rating", "stars"), "the row")
    messages, reply = _answered(fields)
    if score is None:
        raise LeftOut(UNSCORED)
    return [(messages, reply, score)]


def _helpsteer(fields: Fields) -> Sequence[Scored]:
    score = number_of(fields, "helpfulness", "the row")
    messages, reply = _answered(fields)
    if score is None:
        raise LeftOut(UNSCORED)
    return [(messages, reply, score)]


def _kto(fields: Fields) -> Sequence[Labelled]:
    label = required(fields, "label")
    if not isinstance(label, bool):
        raise BadRow(f"'label' must be true or false, found {describe(label)}")
    return [(*_answered(fields), label)]


_ANSWERED = ("user_input completion", "user_input response", "prompt completion", "prompt response")

# In this order: `auto` takes the first that fits.
SCORE_FORMATS: dict[str, Format[Scored]] = {
    "helpsteer": Format(field_sets("prompt response helpfulness"), _helpsteer),
    "ultrafeedback": Format(field_sets("instruction completions"), ultrafeedback_scores),
    "argilla": Format(argilla.fields_of(argilla.RATING), argilla.argilla_scores, id_key=""),
    "label-studio": Format(field_sets("data annotations"), studio_scores, id_key=""),
    "scored": Format(field_sets(*_ANSWERED), _scored),  # Parquet has no field for a null score
}
LABEL_FORMATS: dict[str, Format[Labelled]] = {
    "kto": Format(field_sets(*(f"{fields} label" for fields in _ANSWERED)), _kto),
}


def _answered(fields: Fields) -> tuple[Messages, Reply]:
    messages = _asked(fields, "prompt", "user_input", "messages")
    key = present(fields, "completion", "response")
    (reply,) = after_begun(messages, [as_reply(required(fields, key), key)])
    return messages, reply


def _asked(fields: Fields, *keys: str) -> Messages:
    key = present(fields, *keys)
    value = required(fields, key)
    if isinstance(value, str) and _HELPSTEER_TURN.search(value):
        return waiting(_helpsteer_turns(value, key), key)
    return waiting(conversation(value, key), key)


def _helpsteer_turns(text: str, key: str) -> Messages:
    """The turns of a prompt of HelpSteer2: the first is the user's, the others follow their speaker."""
    first, *rest = _HELPSTEER_TURN.split(text)
    if not first.strip():
        raise BadRow(f"{key!r} is empty before its first <extra_id_1>")
    turns = [Message("user", first)]
    for speaker, words in zip(rest[::2], rest[1::2], strict=True):
        turns.append(Message(speaker.lower(), words))
    return tuple(turns)


def _completions(fields: Fields) -> list[Fields]:
    found = required(fields, "completions")
    if not is_messages(found):
        raise BadRow(f"'completions' must be a list of {{response, overall_score}}, found {describe(found)}")
    return list(found)
