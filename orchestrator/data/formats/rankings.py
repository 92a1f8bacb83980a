"""Formats of preferences: a row -> a prompt and its replies, best first. A new one is a function and a line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from orchestrator.data.formats import argilla
from orchestrator.data.formats.arena import arena_pair
from orchestrator.data.formats.feedback import helpsteer_pair, ultrafeedback_ranking
from orchestrator.data.formats.format import Format, field_sets
from orchestrator.data.formats.label_studio import studio_rankings
from orchestrator.data.formats.oasst import OASST_FIELDS, oasst_rankings, trees
from orchestrator.data.formats.transcripts import (
    Ranked,
    after_begun,
    as_ranked,
    as_reply,
    conversations,
    hh_transcripts,
    is_conversation,
    pair,
    waiting,
)
from orchestrator.data.messages import (
    BadRow,
    Fields,
    conversation,
    number_of,
    required,
)
from orchestrator.data.values import describe


def _ranking(fields: Fields) -> Iterable[Ranked]:
    """{prompt | messages, replies: best first, scores?}. A reply that occurs twice keeps its better rank.

    `continued: true` says that replies to a begun turn never repeat its beginning.
    """
    key = "messages" if "messages" in fields else "prompt"
    replies = [as_reply(value, "replies") for value in _listed(required(fields, "replies"), "replies")]
    if len(replies) < 2:
        raise BadRow(f"'replies' must hold at least two replies, best first; found {len(replies)}")
    messages = waiting(conversation(required(fields, key), key), key)
    scores = _scores(fields, len(replies))
    return [as_ranked(messages, replies if fields.get("continued") is True else after_begun(messages, replies), scores)]


def _pairwise(fields: Fields) -> Iterable[Ranked]:
    """{prompt | context, chosen, rejected}: texts, lists of texts (each chosen beats each rejected), or messages.

    Messages are the reply alone, the turns after the prompt, or the whole conversation including the prompt.
    """
    key = "context" if "prompt" not in fields and "context" in fields else "prompt"
    chosen, rejected = required(fields, "chosen"), required(fields, "rejected")
    scores = _pair_scores(fields)
    if not (is_conversation(chosen) or is_conversation(rejected)):
        messages = waiting(conversation(required(fields, key), key), key)
        good, bad = ([as_reply(v, k) for v in _listed(fields[k], k)] for k in ("chosen", "rejected"))
        return [as_ranked(messages, after_begun(messages, (better, worse)), scores) for better in good for worse in bad]
    return [pair(*conversations(fields, key), scores)]


def _hh_pair(fields: Fields) -> Iterable[Ranked]:
    found = pair(*hh_transcripts(fields), _pair_scores(fields))
    if found[0][-1].role == "assistant":
        raise BadRow("'chosen' and 'rejected' end with two consecutive turns of the assistant")
    return [found]


def _scores(fields: Fields, num_replies: int) -> Sequence[float]:
    """`scores`, one per reply; or `margin`, the difference of neighbours. Empty: the row has neither.

    Raises:
        BadRow: not numbers, or they contradict the order of the replies.
    """
    value = fields.get("scores")
    if value is None:
        margin = _margin(fields)
        return () if margin is None else [margin * place for place in reversed(range(num_replies))]
    if not isinstance(value, list) or len(value) != num_replies:
        raise BadRow(f"'scores' must be a list of {num_replies} numbers, one per reply, found {describe(value)}")
    found = [number_of({"score": item}, "score", f"scores[{index}]") for index, item in enumerate(value)]
    return _falling(found, "scores")


def _pair_scores(fields: Fields) -> Sequence[float]:
    """The same of a pair: `margin`, or `score_chosen` and `score_rejected`."""
    margin = _margin(fields)
    if margin is not None:
        return margin, 0.0
    found = [number_of(fields, key, "the row") for key in ("score_chosen", "score_rejected")]
    return () if None in found else _falling(found, "score_chosen and score_rejected")


def _margin(fields: Fields) -> float | None:
    margin = number_of(fields, "margin", "the row")
    if margin is not None and margin < 0:
        raise BadRow(f"'margin' must not be negative, because the better reply is named; found {margin:g}")
    return margin


def _falling(scores: Sequence[float | None], name: str) -> Sequence[float]:
    known = [score for score in scores if score is not None]
    if len(known) < len(scores):
        raise BadRow(f"{name}: one of them is null; give a number for every reply, or none")
    for better, worse in pairwise(known):
        if better < worse:
            raise BadRow(f"{name} contradict the order: {better:g} of a reply that is ranked above one with {worse:g}")
    return known


def _listed(value: Any, key: str) -> Sequence[Any]:
    replies = [value] if isinstance(value, str | dict) else value
    if not isinstance(replies, list) or not replies:
        raise BadRow(f"{key!r} must be text or a list of texts, found {describe(value)}")
    return replies


# In this order: `auto` takes the first that fits.
RANKING_FORMATS: dict[str, Format[Ranked]] = {
    "ranking": Format(field_sets("replies"), _ranking),
    "pairwise": Format(field_sets("prompt chosen rejected", "context chosen rejected"), _pairwise),
    "hh-rlhf": Format(field_sets("chosen rejected"), _hh_pair),
    "oasst": Format(OASST_FIELDS, oasst_rankings, gather=trees),
    "ultrafeedback": Format(field_sets("instruction completions"), ultrafeedback_ranking),
    "helpsteer": Format(
        field_sets(
            "context response1 response2 overall_preference", "prompt response_1 response_2 preference_strength"
        ),
        helpsteer_pair,
    ),
    # Their ids name records and votes; a prompt's is its content, which keeps its records on one side of a split.
    "arena": Format(field_sets("conversation_a conversation_b winner"), arena_pair, id_key=""),
    "argilla": Format(argilla.fields_of(argilla.RANKING), argilla.argilla_rankings, id_key=""),
    "label-studio": Format(field_sets("data annotations"), studio_rankings, id_key=""),
}
