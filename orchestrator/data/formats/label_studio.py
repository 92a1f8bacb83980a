"""Tasks of Label Studio with their annotations, as its JSON export has them: {data, annotations: [{result: [...]}]}.

Of each annotation that was not cancelled: results of the tags Ranker, Pairwise, Rating and TextArea.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from orchestrator.data.formats.annotations import PROMPTS, UNRANKED, UNWRITTEN, asked, compared, mean, ranked, rated
from orchestrator.data.formats.format import LeftOut
from orchestrator.data.formats.transcripts import Ranked, Scored, as_reply, with_reply
from orchestrator.data.messages import BadRow, Fields, Messages, is_messages, number_of, required
from orchestrator.data.records import Reply
from orchestrator.data.values import describe, field_names

RANK, NOT_RANKABLE, STRENGTH = "rank", "not_rankable", "strength"
"""Names of the ranking and of the other bucket of a Ranker, and of the Rating beside a Pairwise."""
LEFT, RIGHT = "left", "right"
UNSORTED = "_"  # the bucket of items that nobody moved
_SIDES = (("answer1", "answer2"), ("response_1", "response_2"), ("response1", "response2"), ("text1", "text2"))
Result = Mapping[str, Any]


def studio_rankings(fields: Fields) -> Iterator[Ranked | LeftOut]:
    """The rankings and comparisons of every annotation."""
    data, annotations = _data(fields), _annotations(fields)
    yield from _cancelled(fields)
    is_pair = any(set(sides) <= data.keys() for sides in _SIDES)
    num_found = 0
    for results in annotations:
        rankings = _of(results, "ranker")
        num_found += bool(rankings) or is_pair
        for value in rankings:
            items = _items(data)
            placed = [(float(place), _item(items, name)) for place, name in enumerate(_order(value))]
            yield from ranked(asked(data), placed)
        if is_pair and not rankings:
            yield _pair(data, results)
    if not num_found:
        yield LeftOut(UNRANKED)


def studio_scores(fields: Fields) -> Iterator[Scored | LeftOut]:
    """The mean of the ratings."""
    yield from _cancelled(fields)
    results = [result for found in _annotations(fields) for result in found if result.get("from_name") != STRENGTH]
    ratings = [number_of({"rating": value}, "rating", "a result") for value in _of(results, "rating")]
    score = mean([rating for rating in ratings if rating is not None])
    yield (*rated(_data(fields)), score)


def studio_replies(fields: Fields) -> Iterator[Messages | LeftOut]:
    """The conversation with each written text."""
    yield from _cancelled(fields)
    texts = [text for results in _annotations(fields) for text in _of(results, "textarea", "text")]
    if not texts:
        yield LeftOut(UNWRITTEN)
    for text in texts:
        written = text if isinstance(text, list) else [text]
        yield from (with_reply(asked(_data(fields)), one, "text") for one in written)


def _pair(data: Fields, results: Sequence[Result]) -> Ranked | LeftOut:
    """Without a selection neither side is better."""
    names = next(sides for sides in _SIDES if set(sides) <= data.keys())
    first, second = (as_reply(data[name], name) for name in names)
    selected = next(iter(_of(results, "pairwise", "selected")), None)
    if selected not in (LEFT, RIGHT, None):
        raise BadRow(f"a comparison selects {LEFT} or {RIGHT}, found {selected!r}")
    strengths = _of([result for result in results if result.get("from_name") == STRENGTH], "rating")
    strength = number_of({STRENGTH: next(iter(strengths), None)}, STRENGTH, "a comparison")
    preference = {LEFT: -1.0, RIGHT: 1.0, None: 0.0}[selected] * (strength or 1.0)
    return compared(asked(data), first, second, preference, has_strength=strength is not None)


def _order(value: Any) -> Sequence[str]:
    """Ids of a Ranker's items, best first: of its own column, of the bucket `rank`, or of the only bucket."""
    if isinstance(value, list):
        return list(map(str, value))
    if not isinstance(value, dict):
        raise BadRow(f"a ranking must be a list of ids, or one per bucket, found {describe(value)}")
    buckets = {name: ids for name, ids in value.items() if name != UNSORTED and ids}
    name = RANK if RANK in value or not buckets else next(iter(buckets))
    if name != RANK and len(buckets) > 1:
        raise BadRow(
            f"the ranking has several buckets ({field_names(buckets)}); call the one that is in order {RANK!r}"
        )
    ids = value.get(name) or []
    if not isinstance(ids, list):
        raise BadRow(f"bucket {name!r} must be a list of ids, found {describe(ids)}")
    return list(map(str, ids))


def _items(data: Fields) -> Mapping[str, Reply]:
    """The texts that were ranked: the list of {id, title, body} in the data."""
    for name, value in data.items():
        if name not in PROMPTS and is_messages(value) and all("id" in item for item in value):
            return {str(item["id"]): as_reply(item.get("body") or item.get("title"), name) for item in value}
    raise BadRow(f"no list of {{id, body}} to rank; the fields of its data are: {field_names(data)}")


def _item(items: Mapping[str, Reply], name: str) -> Reply:
    if name not in items:
        raise BadRow(f"the ranking names {name!r}, which is no id of its items")
    return items[name]


def _of(results: Sequence[Result], kind: str, key: str | None = None) -> list[Any]:
    """The values of results of one kind of tag."""
    found = (result.get("value") for result in results if result.get("type") == kind)
    return [value[key or kind] for value in found if isinstance(value, dict) and (key or kind) in value]


def _data(fields: Fields) -> Fields:
    data = required(fields, "data")
    if not isinstance(data, dict):
        raise BadRow(f"'data' must be an object, found {describe(data)}")
    return data


def _annotations(fields: Fields) -> Sequence[Sequence[Result]]:
    """The results of each annotation that was not cancelled."""
    return [_results(each) for each in _every(fields) if not each.get("was_cancelled")]


def _cancelled(fields: Fields) -> Iterator[LeftOut]:
    return (LeftOut("annotations that were cancelled") for each in _every(fields) if each.get("was_cancelled"))


def _every(fields: Fields) -> Sequence[Mapping[str, Any]]:
    found = required(fields, "annotations")
    if found and not is_messages(found):
        raise BadRow(f"'annotations' must be a list of {{result}}, found {describe(found)}")
    return found or []


def _results(annotation: Mapping[str, Any]) -> Sequence[Result]:
    found = annotation.get("result") or []
    if found and not is_messages(found):
        raise BadRow(f"'result' must be a list of {{type, value}}, found {describe(found)}")
    return list(found)
