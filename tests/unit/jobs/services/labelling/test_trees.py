"""Trees of messages: in and out unchanged, and out with what was judged."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from jobs.services.labelling import work
from jobs.services.labelling.answers import Judgement
from jobs.services.labelling.exporting import export
from jobs.services.labelling.items.adding import Wanted, add
from jobs.services.labelling.items.sources import from_file
from jobs.services.labelling.store import Store
from jobs.services.labelling.tables import items
from orchestrator.errors import DataError
from tests.unit.jobs.services.labelling.filled import candidate, filled, person
from tests.unit.jobs.services.labelling.test_exporting import judged, rank, rows

PUBLISHED = Path(__file__).parents[6] / "shared" / "data" / "oasst-trees-en.jsonl.gz"


def node(name: str, role: str, *below: Any, **fields: Any) -> dict[str, Any]:
    return {
        "message_id": name,
        "text": f"text of {name}",
        "role": role,
        "deleted": False,
        **fields,
        "replies": [*below],
    }


def tree(name: str = "t", **fields: Any) -> dict[str, Any]:
    """Three replies to the root, one of which has a ranked pair below."""
    below = node("q", "prompter", node("e", "assistant", rank=0), node("f", "assistant", rank=1))
    answers = (node("a", "assistant", below), node("b", "assistant", rank=0), node("c", "assistant", rank=1))
    root = node("r", "prompter", *answers, lang="en", emojis={"+1": 3})
    return {"message_tree_id": name, "tree_state": "ready_for_export", "prompt": root, **fields}


def write(path: Path, *trees: Any) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in trees))
    return path


def store_of(file: Path, kind: str = "rank", place: str = "labels.db") -> Store:
    store = Store(str(file.parent / place))
    add(store, from_file(file, "auto", None), Wanted(kind, overlap_share=0.0), batch=file.name)
    return store


def exported(store: Store, path: Path) -> bytes:
    export(store, path, "oasst")
    return path.read_bytes()


def messages_of(trees: list[Any]) -> dict[str, Any]:
    waiting, found = [one["prompt"] for one in trees], {}
    while waiting:
        one = waiting.pop()
        found[one["message_id"]] = one
        waiting += one["replies"]
    return found


def counts(lines: bytes) -> Counter[str]:
    trees = [json.loads(line) for line in lines.splitlines()]
    messages = messages_of(trees).values()
    named = Counter(f"rank {one['rank']}" for one in messages if one.get("rank") is not None)
    labels = Counter(label for one in messages for label in one.get("labels") or ())
    return Counter({"trees": len(trees), "messages": len(messages)}) + named + labels


@pytest.mark.skipif(not PUBLISHED.exists(), reason=f"{PUBLISHED} is absent: it holds published trees")
def test_published_trees_come_out_byte_for_byte(tmp_path: Path) -> None:
    before = gzip.decompress(PUBLISHED.read_bytes())
    file = tmp_path / "trees.jsonl.gz"
    file.write_bytes(PUBLISHED.read_bytes())
    store = store_of(file)
    after = exported(store, tmp_path / "out.jsonl")
    assert after == before
    assert counts(after)["trees"] == 60 and counts(after)["messages"] == 684
    assert sum(num for name, num in counts(after).items() if name.startswith("rank ")) == 371
    with store.reading() as connection:
        assert len(connection.scalars(select(items.c.id)).all()) > 60


@pytest.mark.skipif(not PUBLISHED.exists(), reason=f"{PUBLISHED} is absent: it holds published trees")
def test_judged_trees_come_out_and_in_and_out_byte_for_byte(tmp_path: Path) -> None:
    store = store_of(published_copy(tmp_path))
    judged(store, "ann", [lambda task: rank(*reversed(range(1, len(task.order) + 1)))] * 40)
    first = exported(store, tmp_path / "out.jsonl")
    again = exported(store_of(tmp_path / "out.jsonl", place="second.db"), tmp_path / "again.jsonl")
    assert again == first and first != gzip.decompress(PUBLISHED.read_bytes())
    assert counts(first)["messages"] == 684


def published_copy(folder: Path) -> Path:
    file = folder / "trees.jsonl.gz"
    file.write_bytes(PUBLISHED.read_bytes())
    return file


def test_judgements_come_out_as_ranks(tmp_path: Path) -> None:
    store = store_of(write(tmp_path / "trees.jsonl", tree()))
    judged(store, "ann", [rank(2, 2, 1), rank(2, None)])
    export(store, tmp_path / "out.jsonl", "oasst")
    found = messages_of(rows(tmp_path / "out.jsonl"))
    assert {name: found[name].get("rank") for name in "abc"} == {"a": 1, "b": 1, "c": 0}  # a tie has one rank
    assert [found[name].get("rank") for name in "ef"] == [0, 1]  # one rank alone orders nothing
    assert list(found["a"])[-2:] == ["rank", "replies"]


def test_every_reply_can_be_judged_also_without_a_rank(tmp_path: Path) -> None:
    store = store_of(write(tmp_path / "trees.jsonl", tree()))
    with store.reading() as connection:
        found = connection.execute(select(items).order_by(items.c.id)).all()
    assert [[each["source"]["message"] for each in item.replies] for item in found] == [["a", "b", "c"], ["e", "f"]]
    assert [item.source["message"] for item in found] == ["r", "q"]
    assert [message["content"] for message in found[1].messages] == ["text of r", "text of a", "text of q"]
    gold = Store(str(tmp_path / "gold.db"))
    added = add(gold, from_file(tmp_path / "trees.jsonl", "oasst", None), Wanted("rank", gold=True), batch="x")
    assert (added.num_new, added.num_unfit) == (1, 1)  # of the other one a rank is unknown
    with gold.reading() as connection:
        assert connection.scalar(select(items.c.gold)) == {"kind": "rank", "ranks": [1, 2]}


def test_ratings_come_out_as_labels_and_texts_as_messages(tmp_path: Path) -> None:
    known = {"quality": {"value": 1.0, "count": 1}, "humor": {"value": 0.5, "count": 2}}
    root = node("r", "prompter", node("a", "assistant", labels=known))
    file = write(tmp_path / "trees.jsonl", {"message_tree_id": "t", "prompt": root})
    store = store_of(file, "rate")
    judged(store, "ann", [{"kind": "rate", "rating": 2, "flags": ["spam", "rude"]}])
    add(store, from_file(file, "auto", None), Wanted("write", overlap_share=0.0), batch="x")
    judged(store, "bob", [{"kind": "write", "text": "Mine."}])
    report = export(store, tmp_path / "out.jsonl", "oasst")
    assert report.left_out == {"flags, for which oasst has no label": 1}
    found = messages_of(rows(tmp_path / "out.jsonl"))
    assert found["a"]["labels"]["quality"] == {"value": 0.625, "count": 2}
    assert found["a"]["labels"]["humor"] == known["humor"]
    assert [found["a"]["labels"][name]["value"] for name in ("spam", "pii", "lang_mismatch")] == [1.0, 0.0, 0.0]
    (mine,) = (one for one in found.values() if one["text"] == "Mine.")
    assert (mine["parent_id"], mine["role"], mine["synthetic"]) == ("r", "assistant", False)
    first = (tmp_path / "out.jsonl").read_bytes()
    assert exported(store, tmp_path / "again.jsonl") == first  # names are made of content
    assert exported(store_of(tmp_path / "out.jsonl", place="second.db"), tmp_path / "third.jsonl") == first


def test_other_items_become_trees_that_come_in_and_out(tmp_path: Path) -> None:
    store = filled(tmp_path, num=3)
    judged(store, "ann", [rank(2, 1, 3, None), rank(1, 2, 3, 4)])
    first = exported(store, tmp_path / "out.jsonl")
    found = rows(tmp_path / "out.jsonl")
    assert [reply.get("rank") for reply in found[0]["prompt"]["replies"]] == [1, 0, 2, None]
    assert (
        found[0]["prompt"]["text"] == "Question 0?"
        and found[0]["prompt"]["replies"][0]["model_name"] == "my-run/sample@3"
    )
    second = store_of(tmp_path / "out.jsonl", place="second.db")
    assert exported(second, tmp_path / "again.jsonl") == first
    assert len(found) == 2


def answered(store: Store, name: str) -> None:
    """All tasks that are left for a new person."""
    who, number = person(store, name), 0
    with store.writing() as connection:
        while (task := work.next_task(connection, who, work.Rules(gold_share=0.0))) is not None:
            number += 1
            answers: dict[str, dict[str, Any]] = {
                "rank": {"ranks": [1 + index for index in task.order]},
                "rate": {"rating": 3, "flags": ["spam"]},
                "write": {"text": f"{name} writes {number}."},
            }
            answer = {"kind": task.kind, **answers[task.kind]}
            body = {"id": f"answer-{number}", "showing": task.id, "seconds": 1.0, "answer": answer}
            work.judge(connection, who, Judgement.model_validate(body))


def test_an_export_that_is_added_to_its_own_store_changes_nothing(tmp_path: Path) -> None:
    store = filled(tmp_path, num=2)
    for kind in ("rate", "write"):
        add(store, [candidate(0), candidate(7)], Wanted(kind, 2, 1.0), batch="more")
    file = write(tmp_path / "trees.jsonl", tree())
    add(store, from_file(file, "auto", None), Wanted("write", 2, 1.0), batch="trees")
    answered(store, "ann")
    first = exported(store, tmp_path / "out.jsonl")
    assert len({row["message_tree_id"] for row in rows(tmp_path / "out.jsonl")}) == 4
    for kind in ("rank", "rate", "write"):
        add(store, from_file(tmp_path / "out.jsonl", "oasst", None), Wanted(kind, 2, 1.0), batch="again")
    assert exported(store, tmp_path / "again.jsonl") == first
    answered(store, "bob")  # what is judged after that is in it once too
    second = exported(store, tmp_path / "second.jsonl")
    add(store, from_file(tmp_path / "second.jsonl", "oasst", None), Wanted("rank"), batch="third")
    assert exported(store, tmp_path / "third.jsonl") == second != first
    for found in rows(tmp_path / "third.jsonl"):
        texts = [message["text"] for message in messages_of([found]).values()]
        assert len(texts) == len(set(texts))
        labels = [label for one in messages_of([found]).values() for label in one.get("labels", {}).values()]
        assert {label["count"] for label in labels} <= {1, 2}


def test_replies_of_others_to_an_export_stay_in_it(tmp_path: Path) -> None:
    store = filled(tmp_path, num=1)
    judged(store, "ann", [rank(1, 2, 3, 4)])
    exported(store, tmp_path / "out.jsonl")
    (found,) = rows(tmp_path / "out.jsonl")
    found["prompt"]["replies"].append(node("new", "assistant"))
    found["prompt"]["replies"][0]["replies"].append(node("below", "prompter", node("end", "assistant")))
    add(store, from_file(write(tmp_path / "more.jsonl", found), "auto", None), Wanted("rank"), batch="x")
    assert exported(store, tmp_path / "again.jsonl") == (tmp_path / "more.jsonl").read_bytes()


def test_tables_of_messages_become_trees(tmp_path: Path) -> None:
    table = [
        {"message_tree_id": "t", "message_id": "r", "parent_id": None, "text": "x", "role": "prompter"},
        {"message_tree_id": "t", "message_id": "a", "parent_id": "r", "text": "y", "role": "assistant", "rank": 0},
        {"message_tree_id": "t", "message_id": "b", "parent_id": "r", "text": "z", "role": "assistant", "rank": 1},
    ]
    store = store_of(write(tmp_path / "messages.jsonl", *table))
    exported(store, tmp_path / "out.jsonl")
    (found,) = rows(tmp_path / "out.jsonl")
    assert [reply["message_id"] for reply in found["prompt"]["replies"]] == ["a", "b"]


def test_trees_that_have_no_place_for_judgements_are_refused(tmp_path: Path) -> None:
    twice = tree()
    twice["prompt"]["replies"][1]["message_id"] = "a"
    with pytest.raises(DataError, match="message_id 'a' is in its tree twice"):
        store_of(write(tmp_path / "trees.jsonl", twice))
    lost = tree()
    del lost["prompt"]["replies"][1]["message_id"]
    with pytest.raises(DataError, match="field 'message_id' is missing"):
        store_of(write(tmp_path / "trees.jsonl", lost))


def test_a_tree_stays_as_it_came_first(tmp_path: Path) -> None:
    file = write(tmp_path / "trees.jsonl", tree())
    store = store_of(file)
    before = exported(store, tmp_path / "out.jsonl")
    store_of(write(file, tree(origin="elsewhere")))
    assert exported(store, tmp_path / "out.jsonl") == before == (json.dumps(tree()) + "\n").encode()


texts = st.text(min_size=1).filter(str.strip)
others = st.dictionaries(
    st.sampled_from(["lang", "review_count", "synthetic", "model_name", "emojis", "labels", "rank"]),
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False, allow_infinity=False) | texts,
    max_size=3,
)


@st.composite
def forests(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Trees with any fields beside those that have a meaning."""
    number = 0

    def grown(role: str, depth: int) -> dict[str, Any]:
        nonlocal number
        number += 1
        name, num_below = f"m{number}", draw(st.integers(0, 3 - depth))
        below = [grown({"prompter": "assistant", "assistant": "prompter"}[role], depth + 1) for _ in range(num_below)]
        fields = {**draw(others), "text": draw(texts), "role": role, "message_id": name}
        fields |= {"deleted": True} if depth and draw(st.integers(0, 9)) == 0 else {}
        is_bare = draw(st.booleans())
        return fields if is_bare and not below else {**fields, "replies": below}

    return [{"message_tree_id": f"t{n}", "prompt": grown("prompter", 0)} for n in range(draw(st.integers(1, 4)))]


@settings(max_examples=10, deadline=None)
@given(forest=forests())
def test_any_tree_comes_out_as_it_came_in(forest: list[Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("forest")
    file = write(folder / "trees.jsonl", *forest)
    assert exported(store_of(file), folder / "out.jsonl") == file.read_bytes()
