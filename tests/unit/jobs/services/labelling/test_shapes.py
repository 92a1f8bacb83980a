"""Judgements in the shapes of others: what a reader finds is what was judged, and what a shape lacks is counted."""

from __future__ import annotations

import itertools
import json
import operator
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.services.labelling.agreement.copies import Voters
from jobs.services.labelling.agreement.merging import Electorate, weight
from jobs.services.labelling.exporting import export
from jobs.services.labelling.items.adding import Wanted, add
from jobs.services.labelling.items.sources import from_file
from jobs.services.labelling.shapes import published
from jobs.services.labelling.shapes.argilla import UNORDERED, argilla
from jobs.services.labelling.shapes.judged import Exported, Judged
from jobs.services.labelling.shapes.label_studio import TIED, label_studio
from jobs.services.labelling.shapes.oasst import UNLABELLED
from jobs.services.labelling.shapes.table import SHAPES
from jobs.services.labelling.store import Store
from orchestrator.data.formats.format import LeftOut
from orchestrator.data.kinds import KINDS
from orchestrator.errors import DataError
from tests.unit.jobs.services.labelling.filled import candidate, filled
from tests.unit.jobs.services.labelling.test_exporting import judged, rank, rows

PIECES = ("a", "b c", "ü", "道", "\n", "\n\n", " ", "Human:", "\n\nAssistant:", "<extra_id_1>", "User\n", '"', "\u2028")
texts = st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map("".join).filter(str.strip)
replies = st.lists(texts, min_size=2, max_size=5, unique_by=str.strip)
TURN = re.compile(r"(^|\n\n)(Human|Assistant):|<extra_id_1>")


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, str]]:
    turns = draw(st.lists(texts, min_size=1, max_size=5).filter(lambda found: len(found) % 2))
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(turns)]


def item(kind: str, messages: Sequence[Any], answers: Sequence[str], given: Sequence[Any]) -> Judged:
    """A judged item without a store."""
    row: Any = SimpleNamespace(
        id=1,
        key="0" * 64,
        prompt_id="p",
        kind=kind,
        messages=messages,
        tools=[],
        replies=[{"reply": text, "source": {"model": f"m{place}"}} for place, text in enumerate(answers)],
        source={"file": "x"},
    )
    people = [
        SimpleNamespace(
            person=n, name=f"p{n}", client_id=f"c{n}", answer={"kind": kind, **each}, made_at=n, seconds=2.0
        )
        for n, each in enumerate(given)
    ]
    weights = {n: 0.6 + n / 100 for n in range(len(people))}
    return Judged(row, people, Electorate(Voters({}, {}), weights))


@st.composite
def ranked(draw: st.DrawFn) -> Judged:
    answers = draw(replies)
    one = st.lists(st.none() | st.integers(1, 3), min_size=len(answers), max_size=len(answers))
    given = draw(st.lists(one, min_size=1, max_size=3))
    return item("rank", draw(conversations()), answers, [{"ranks": ranks} for ranks in given])


@st.composite
def compared(draw: st.DrawFn) -> Judged:
    answers = draw(st.lists(texts, min_size=2, max_size=2, unique_by=str.strip))
    given = draw(st.lists(st.integers(-3, 3), min_size=1, max_size=3))
    return item("compare", draw(conversations()), answers, [{"preference": one} for one in given])


@st.composite
def rated(draw: st.DrawFn) -> Judged:
    flags = st.lists(st.sampled_from(["rude", "spam"]), unique=True)
    one = st.fixed_dictionaries({"rating": st.integers(1, 5) | st.none(), "flags": flags})
    given = draw(st.lists(one, min_size=1, max_size=3))
    return item("rate", draw(conversations()), [draw(texts)], given)


def read(made: Sequence[Any], kind: str, format: str) -> tuple[list[Any], Counter[str]]:
    records, left_out = [], Counter[str]()
    for row in json.loads(json.dumps(made)):
        for found in KINDS[kind].records(row, KINDS[kind].formats[format]):
            if isinstance(found, LeftOut):
                left_out[str(found)] += 1
            else:
                records.append(found[0])
    return records, left_out


def written(write: Any, found: Judged) -> tuple[list[Any], Exported]:
    report = Exported()
    try:
        return list(write(found, report)), report
    except LeftOut as reason:
        report.left_out[str(reason)] += 1
        return [], report


def stripped(messages: Sequence[Any]) -> list[tuple[str, str]]:
    return [
        (each["role"], each["content"].strip()) if isinstance(each, dict) else (each.role, each.content.strip())
        for each in messages
    ]


def merged(found: Judged) -> float:
    """Mean strength by weights; 0 on another side than the majority's."""
    weights = [weight(found.judges.reliability[row.person]) for row in found.given]
    given = [row.answer["preference"] for row in found.given]
    mean = sum(map(operator.mul, weights, given)) / sum(weights)
    majority = sum(w * ((one > 0) - (one < 0)) for w, one in zip(weights, given, strict=True))
    return float(mean) if mean * majority > 0 else 0.0


@settings(max_examples=60, deadline=None)
@given(ranked() | compared())
def test_hh_rlhf_holds_the_merged_order(found: Judged) -> None:
    made, report = written(published.hh_rlhf, found)
    if not made:
        (reason,) = report.left_out
        everything = [*(turn["content"] for turn in found.item.messages), *found.replies()]
        assert reason == "without a preference" or any(TURN.search(text.strip()) for text in everything)
        return
    records, _ = read(made, "preferences", "hh-rlhf")
    texts = [text.strip() for text in found.replies()]
    assert [tuple(record.replies) for record in records] == [
        (texts[better], texts[worse]) for better, worse in sorted(found.order())
    ]
    assert all(stripped(record.messages) == stripped(found.item.messages) for record in records)
    if found.item.kind == "compare":
        assert records[0].scores == pytest.approx((abs(merged(found)), 0.0), abs=1e-4)


@settings(max_examples=40, deadline=None)
@given(ranked() | compared())
def test_arena_has_a_vote_of_each_person_on_each_pair(found: Judged) -> None:
    made, report = written(published.arena_votes, found)
    records, left_out = read([row for row in made if row["winner"].startswith("model")], "preferences", "arena")
    expected = Counter[tuple[str, str]]()
    half = strong = ties = 0
    for row in found.given:
        if found.item.kind == "compare":
            preference = row.answer["preference"]
            strong, ties = strong + (abs(preference) > 1), ties + (preference == 0)
            expected.update([tuple(found.replies()[:: 1 if preference < 0 else -1])] if preference else [])
            continue
        for (i, a), (j, b) in itertools.combinations(enumerate(row.answer["ranks"]), 2):
            half += (a is None) != (b is None)
            ties += a == b
            if a is not None and b is not None and a != b:
                expected[tuple(found.replies()[n] for n in ((i, j) if a < b else (j, i)))] += 1
    assert Counter(tuple(record.replies) for record in records) == expected and not left_out
    assert sum(row["winner"].startswith("tie") for row in made) == ties
    assert report.left_out == +Counter({published.HALF_RANKED: half, published.STRENGTHS: strong})


def strict(ranks: Sequence[int | None]) -> bool:
    return None not in ranks and len(set(ranks)) == len(ranks)


@settings(max_examples=40, deadline=None)
@given(ranked(), st.booleans())
def test_argilla_holds_strict_rankings(found: Judged, as_columns: bool) -> None:
    made, report = written(argilla, found)
    kept = [row.answer["ranks"] for row in found.given if strict(row.answer["ranks"])]
    assert report.left_out[UNORDERED] == len(found.given) - len(kept)
    if as_columns:
        made = [
            {**row["fields"], f"{name}.responses": [one["value"] for one in given]}
            for row in made
            for name, given in row["responses"].items()
        ]
    records, _ = read(made, "preferences", "argilla")
    best_first = [[text for _, text in sorted(zip(ranks, found.replies(), strict=True))] for ranks in kept]
    assert [list(record.replies) for record in records] == best_first
    assert all(stripped(record.messages) == stripped(found.item.messages) for record in records)


@settings(max_examples=40, deadline=None)
@given(ranked())
def test_label_studio_holds_rankings_without_ties(found: Judged) -> None:
    made, report = written(label_studio, found)
    ranked = [[rank for rank in row.answer["ranks"] if rank is not None] for row in found.given]
    kept = [row.answer["ranks"] for row, one in zip(found.given, ranked, strict=True) if len(set(one)) == len(one)]
    assert report.left_out[TIED] == len(found.given) - len(kept)
    records, _ = read(made, "preferences", "label-studio")
    orders = [
        [text for rank, text in sorted((r, t) for r, t in zip(ranks, found.replies(), strict=True) if r is not None)]
        for ranks in kept
    ]
    assert [list(record.replies) for record in records] == [order for order in orders if len(order) > 1]


@settings(max_examples=60, deadline=None)
@given(compared())
def test_comparisons_keep_their_strength(found: Judged) -> None:
    first, second = found.replies()
    expected = [
        ((first, second) if one < 0 else (second, first), (float(abs(one)), 0.0))
        for one in (row.answer["preference"] for row in found.given)
        if one
    ]
    for write, format in ((argilla, "argilla"), (label_studio, "label-studio")):
        records, left_out = read(written(write, found)[0], "preferences", format)
        assert [(record.replies, record.scores) for record in records] == expected
        assert left_out["with equal replies"] == len(found.given) - len(expected)
    (row,), _ = written(published.helpsteer3, found)
    assert [one["score"] for one in row["individual_preference"]] == [r.answer["preference"] for r in found.given]
    mean = merged(found)
    assert row["overall_preference"] == pytest.approx(mean, abs=1e-4)
    if row["overall_preference"]:
        (record,), _ = read([row], "preferences", "helpsteer")
        assert record.replies == ((first, second) if mean < 0 else (second, first))
        assert record.scores == pytest.approx((abs(mean), 0.0), abs=1e-4)


@settings(max_examples=40, deadline=None)
@given(rated())
def test_ratings_keep_their_mean(found: Judged) -> None:
    ratings = [row.answer["rating"] for row in found.given if row.answer["rating"] is not None]
    mean = sum(ratings) / len(ratings) if ratings else None
    num_flags = sum(len(row.answer["flags"]) for row in found.given)
    made, report = written(published.helpsteer2, found)
    everything = [*(turn["content"] for turn in found.item.messages), *found.replies()]
    if made:
        (record,), _ = read(made, "scores", "helpsteer")
        assert record.score == pytest.approx((mean or 0.0) - 1) and record.reply == found.replies()[0]
        assert stripped(record.messages) == stripped(found.item.messages)
        assert report.left_out == +Counter({published.FLAGS: num_flags})
    else:
        assert mean is None or any(TURN.search(text) for text in everything)
    for write, format in ((argilla, "argilla"), (label_studio, "label-studio")):
        answered = [row for row in found.given if row.answer["rating"] is not None or row.answer["flags"]]
        records, _ = read(written(write, found)[0], "scores", format) if answered and ratings else ([], None)
        assert [record.score for record in records] == ([pytest.approx(mean)] if ratings else [])


CHAT = [{"role": "user", "content": "Why?"}]


@pytest.mark.parametrize("write", [published.hh_rlhf, published.arena_votes, argilla, label_studio])
def test_more_than_text_is_left_out(write: Any) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    for messages, answers in (
        ([*CHAT, call, {"role": "tool", "content": "1"}], ["a", "b"]),
        (CHAT, ["a", {"role": "assistant", "content": "b", "reasoning_content": "c"}]),
    ):
        made, report = written(write, item("rank", messages, answers, [{"ranks": [1, 2]}]))  # type: ignore[arg-type]
        (reason,) = report.left_out
        assert made == [] and reason.startswith("with more than text in ")


@pytest.mark.parametrize("write", [published.hh_rlhf, published.arena_votes])
def test_conversations_that_are_no_exchange_are_left_out(write: Any) -> None:
    for messages in ([{"role": "system", "content": "x"}, *CHAT], [*CHAT, {"role": "assistant", "content": "So"}]):
        made, report = written(write, item("rank", messages, ["a", "b"], [{"ranks": [1, 2]}]))
        assert made == [] and list(report.left_out) == [
            "with a system message, a begun reply, or one speaker twice in a row"
        ]


def test_every_shape_leaves_a_file_that_is_read_and_says_what_it_lacks(tmp_path: Path) -> None:
    """One store with tasks of all kinds, in every shape; then the other way, as items to judge."""
    store = filled(tmp_path, num=2)
    for number, kind in ((10, "compare"), (20, "rate"), (30, "write")):
        add(store, [candidate(number, num_replies=2)], Wanted(kind, 1, 0), batch="x")
    judged(
        store,
        "ann",
        [
            rank(2, 1, 3, 4),
            rank(1, 1, 2, None),
            {"kind": "compare", "preference": 2},
            {"kind": "rate", "rating": 4, "flags": ["rude"]},
            {"kind": "rate", "rating": 2, "flags": []},
            {"kind": "write", "text": "Mine."},
        ],
    )
    readers = {
        "oasst": ("preferences", "oasst", 4, {UNLABELLED: 1}),
        "hh-rlhf": ("preferences", "hh-rlhf", 9, tasks_to("rate", 2) | tasks_to("write", 1)),
        "ultrafeedback": ("scores", "ultrafeedback", 2, {published.FLAGS: 1}),
        "helpsteer2": ("scores", "helpsteer", 2, {published.FLAGS: 1}),
        "helpsteer3": ("preferences", "helpsteer", 1, tasks_to("rank", 2)),
        "arena": ("preferences", "arena", 9, {published.STRENGTHS: 1, published.HALF_RANKED: 3}),
        "argilla": ("preferences", "argilla", 2, {UNORDERED: 1}),
        "label-studio": ("preferences", "label-studio", 2, {TIED: 1}),
    }
    assert {*readers, "rankings", "scores", "demonstrations", "prompts", "judgements"} == set(SHAPES)
    for shape, (kind, format, num, lacks) in readers.items():
        out = tmp_path / f"{shape}.json"
        report = export(store, out, shape)
        assert {reason.format(shape): num for reason, num in lacks.items()}.items() <= report.left_out.items(), shape
        second = Store(str(tmp_path / f"{shape}.db"))
        wanted = Wanted("rank" if kind == "preferences" else "rate", overlap_share=0)
        heard: list[str] = []
        added = add(second, from_file(out, format, kind, heard.append), wanted, batch=shape)
        assert added.num_new + added.num_known == num, shape
    demonstrations = [
        [record.messages[-1].content for record in from_json(tmp_path / f"{shape}.json", shape)]
        for shape in ("argilla", "label-studio")
    ]
    assert demonstrations == [["Mine."], ["Mine."]]


def tasks_to(kind: str, num: int) -> dict[str, int]:
    return {f"tasks to {kind}, which {{}} does not hold": num}


def from_json(path: Path, format: str) -> list[Any]:
    return read(json.loads(path.read_text()), "demonstrations", format)[0]


def test_exported_files_have_the_published_forms(tmp_path: Path) -> None:
    store = filled(tmp_path, num=1, num_replies=2)
    judged(store, "ann", [rank(2, 1)])
    for shape in ("argilla", "label-studio", "arena", "hh-rlhf"):
        export(store, tmp_path / shape, shape)
    (record,) = json.loads((tmp_path / "argilla").read_text())
    assert list(record) == ["id", "fields", "metadata", "suggestions", "responses", "vectors", "_server_id"]
    assert record["fields"] == {
        "chat": [{"role": "user", "content": "Question 0?"}],
        "response_1": "answer 0 to 0",
        "response_2": "answer 1 to 0",
    }
    (answer,) = record["responses"]["ranking"]
    assert answer["value"] == ["response_2", "response_1"] and answer["status"] == "submitted"
    (task,) = json.loads((tmp_path / "label-studio").read_text())
    assert task["annotations"][0]["result"] == [
        {
            "id": "rank-0",
            "from_name": "rank",
            "to_name": "items",
            "type": "ranker",
            "value": {"ranker": {"rank": ["2", "1"], "not_rankable": []}},
        }
    ]
    (vote,) = rows(tmp_path / "arena")
    assert (vote["winner"], vote["judge"], vote["model_a"]) == ("model_b", "ann", "my-run/sample@3")
    (pair,) = rows(tmp_path / "hh-rlhf")
    assert pair["chosen"] == "\n\nHuman: Question 0?\n\nAssistant: answer 1 to 0"


def test_a_shape_without_rows_names_the_reason(tmp_path: Path) -> None:
    store = filled(tmp_path, num=1)
    judged(store, "ann", [rank(1, 2, 2, 3)])
    with pytest.raises(DataError, match=r"make argilla; 1 rankings with ties or .*; 1 without a judgement that this"):
        export(store, tmp_path / "out.json", "argilla")
    with pytest.raises(DataError, match=r"make ultrafeedback; 1 tasks to rank, which ultrafeedback does not hold"):
        export(store, tmp_path / "out.json", "ultrafeedback")
