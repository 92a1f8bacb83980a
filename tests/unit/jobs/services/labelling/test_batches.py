"""Batches that somebody waits for: what is missing of them, and how they end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.services.labelling import people, work
from jobs.services.labelling.answers import Judgement
from jobs.services.labelling.items.adding import Wanted, add
from jobs.services.labelling.people import Person
from jobs.services.labelling.store import Store
from jobs.services.labelling.waiting import batches
from jobs.services.labelling.waiting.batches import Progress
from jobs.services.labelling.waiting.frozen import (
    agreement,
    joined,
    judged_items,
    read_items,
    write_items,
    write_rankings,
)
from orchestrator.errors import DataError, StorageError
from tests.unit.jobs.services.labelling.filled import candidate, fill, person

RULES = work.Rules(gold_share=0.0)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "labels.db"))


def ask(store: Store, name: str, numbers: range, *, overlap: int = 1) -> dict[str, int]:
    added = add(store, map(candidate, numbers), Wanted("rank", overlap, 1.0), batch=name)
    with store.writing() as connection:
        batches.open_batch(connection, name, added.overlaps, opened_at=100.0)
    return dict(added.overlaps)


def progress(store: Store, name: str) -> Progress:
    with store.reading() as connection:
        found = batches.progress(connection, name)
    assert found is not None
    return found


def missing(store: Store, name: str) -> tuple[int, int]:
    found = progress(store, name)
    return found.num_judgements, found.num_missing


def task_of(store: Store, who: Person) -> Any:
    with store.writing() as connection:
        return work.next_task(connection, who, RULES)


def answer(store: Store, who: Person, task: Any, ranks: tuple[int, ...] = (1, 2, 3, 4)) -> None:
    by_place = [ranks[index] for index in task.order]
    body = {"id": f"answer-{task.id}", "showing": task.id, "seconds": 1.0}
    with store.writing() as connection:
        work.judge(connection, who, Judgement.model_validate({**body, "answer": {"kind": "rank", "ranks": by_place}}))


def items(store: Store, keys: dict[str, int]) -> list[Any]:
    with store.reading() as connection:
        return joined([], judged_items(connection, list(keys)))


def test_what_is_missing_is_counted_and_falls_with_every_judgement(store: Store) -> None:
    ask(store, "run/people", range(3), overlap=2)
    ann, bob = person(store, "ann"), person(store, "bob")
    assert missing(store, "run/people") == (0, 6)
    for who in (ann, bob):
        answer(store, who, task_of(store, who))
    assert missing(store, "run/people") == (2, 4)
    found = progress(store, "run/people")
    assert (found.num_items, found.num_people, found.most_overlap) == (3, 2, 2)
    with store.writing() as connection:
        people.pause(connection, "bob", paused=True)
    assert progress(store, "run/people").num_people == 1
    with store.reading() as connection:
        assert batches.progress(connection, "no such") is None


def test_a_closed_batch_asks_for_nothing_more_and_takes_late_answers(store: Store) -> None:
    keys = ask(store, "run/people", range(3))
    ann, bob = person(store, "ann"), person(store, "bob")
    answer(store, ann, task_of(store, ann))
    late = task_of(store, ann)
    with store.writing() as connection:
        batches.close(connection, "run/people", "over")
    assert missing(store, "run/people") == (1, 0) and progress(store, "run/people").closed_by == "over"
    assert task_of(store, bob) is None
    before = items(store, keys)
    answer(store, ann, late)
    assert sum(len(item.judgements) for item in before) == 1
    assert sum(len(item.judgements) for item in items(store, keys)) == 2


def test_an_item_that_was_judged_for_one_batch_counts_in_another_one(store: Store) -> None:
    ask(store, "first/people", range(2))
    ann = person(store, "ann")
    answer(store, ann, task_of(store, ann))
    with store.writing() as connection:
        batches.close(connection, "first/people", "over")
    ask(store, "second/people", range(3))
    assert missing(store, "second/people") == (1, 2), "what a closed batch withdrew is asked for again"
    with store.writing() as connection:
        batches.close(connection, "first/people", "again")
    assert missing(store, "second/people") == (1, 2), "an open batch keeps what it shares with a closed one"


def test_gold_items_are_in_no_batch(store: Store) -> None:
    fill(store, num=2, gold=True)
    ask(store, "run/people", range(3))
    assert progress(store, "run/people").num_items == 1


def test_an_admin_finishes_a_batch_that_is_open_and_takes_it_back(store: Store) -> None:
    ask(store, "run/people", range(2))
    for is_finished in (True, False):
        with store.writing() as connection:
            batches.finish(connection, "run/people", is_finished=is_finished)
        assert progress(store, "run/people").is_finished is is_finished
    with store.writing() as connection, pytest.raises(DataError, match=r"'run/peple'; there are: run/people"):
        batches.finish(connection, "run/peple")
    with store.writing() as connection:
        batches.close(connection, "run/people", "all that were asked for")
        with pytest.raises(DataError, match=r"'run/people' any more: all that were asked for\."):
            batches.finish(connection, "run/people")
        with pytest.raises(DataError, match=r"'run/peple'; there is none"):
            batches.finish(connection, "run/peple")


def test_a_finished_batch_gives_out_nothing_that_an_earlier_round_had_asked_for_first(store: Store) -> None:
    ask(store, "run/people-1", range(2))
    with store.writing() as connection:
        batches.close(connection, "run/people-1", "over")
    ask(store, "run/people-2", range(2))
    ann = person(store, "ann")
    assert task_of(store, ann) is not None
    with store.writing() as connection:
        batches.finish(connection, "run/people-2")
    assert task_of(store, person(store, "bob")) is None


def test_what_a_batch_no_longer_asks_for_is_withdrawn_but_not_from_others(store: Store) -> None:
    fill(store, num=1)  # by hand
    ask(store, "run/people", range(4))
    ask(store, "run/people", range(3, 5))
    with store.reading() as connection:
        found = {row.name: row.missing for row in batches.listed(connection)}
    assert found == {"run/people": 2, "test": 1}
    with store.writing() as connection:
        batches.close(connection, "run/people", "over")
    ann = person(store, "ann")
    task = task_of(store, ann)
    assert task.messages[0]["content"] == "Question 0?"
    answer(store, ann, task)
    assert task_of(store, ann) is None


def test_the_file_of_judgements_does_not_depend_on_who_came_first(tmp_path: Path) -> None:
    written = []
    for order in (("ann", "bob"), ("bob", "ann")):
        folder = tmp_path / order[0]
        folder.mkdir()
        store = Store(str(folder / "labels.db"))
        keys = ask(store, "run/people", range(4), overlap=2)
        named = {name: person(store, name) for name in ("ann", "bob")}
        for name in order:
            for _ in range(4):
                task = task_of(store, named[name])
                first_two = (1, 2) if name == "ann" or task.messages[0]["content"] < "Question 2" else (2, 1)
                answer(store, named[name], task, (*first_two, 3, 4))
        found = items(store, keys)
        assert agreement(found) == pytest.approx(1 - 2 / 24)
        write_items(folder / "judgements.jsonl", found)
        assert read_items(folder / "judgements.jsonl") == found
        report = write_rankings(folder / "people.jsonl", found)
        assert report.num_items == 4
        written.append((folder / "people.jsonl").read_text())
    assert written[0] == written[1]


def test_a_later_judgement_of_the_same_person_replaces_the_earlier_one(store: Store) -> None:
    keys = ask(store, "run/people", range(1))
    ann = person(store, "ann")
    task = task_of(store, ann)
    answer(store, ann, task)
    earlier = items(store, keys)
    with store.writing() as connection:
        work.undo(connection, ann, task.id, RULES)
    assert joined(earlier, items(store, keys))[0].judgements == earlier[0].judgements, "what was frozen stays"
    body = {"id": "answer-again", "showing": task.id, "seconds": 1.0}
    with store.writing() as connection:
        ranks = {"kind": "rank", "ranks": [4, 3, 2, 1]}
        work.judge(connection, ann, Judgement.model_validate({**body, "answer": ranks}))
    (item,) = joined(earlier, items(store, keys))
    assert [judgement["id"] for judgement in item.judgements] == ["answer-again"]


def test_judgements_that_prefer_nothing_are_refused_and_damage_is_told(store: Store, tmp_path: Path) -> None:
    keys = ask(store, "run/people", range(1))
    ann = person(store, "ann")
    answer(store, ann, task_of(store, ann), (1, 1, 1, 1))
    with pytest.raises(DataError, match="1 judgements of people prefer no reply"):
        write_rankings(tmp_path / "people.jsonl", items(store, keys))
    assert not (tmp_path / "people.jsonl").exists()
    (tmp_path / "judgements.jsonl").write_text(json.dumps({"key": "x"}) + "\n")
    with pytest.raises(StorageError, match=r"judgements\.jsonl is damaged"):
        read_items(tmp_path / "judgements.jsonl")
