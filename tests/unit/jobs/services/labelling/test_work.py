"""Who gets which task, and what becomes of it: each judgement once, each item as often as wanted."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Row, event, func, select, update

from jobs.services.labelling import work
from jobs.services.labelling.answers import Judgement
from jobs.services.labelling.people import Person
from jobs.services.labelling.refusals import Refused, Unfit, Unknown
from jobs.services.labelling.store import Store, StoreFull
from jobs.services.labelling.tables import items, judgements, showings
from orchestrator.errors import CapacityError, ConfigError, StorageError
from tests.unit.jobs.services.labelling.filled import fill, filled, invited, person, ranking

RULES = work.Rules(lease_s=60, gold_share=0.0)


def take(store: Store, who: Person, rules: work.Rules = RULES) -> Row[Any] | None:
    with store.writing() as connection:
        return work.next_task(connection, who, rules)


def given(store: Store, who: Person, rules: work.Rules = RULES) -> Row[Any]:
    found = take(store, who, rules)
    assert found is not None
    return found


def answer(store: Store, who: Person, showing: str, ranks: list[int | None], identity: str = "answer-1") -> bool:
    with store.writing() as connection:
        return work.judge(connection, who, Judgement.model_validate(ranking(showing, ranks, identity)))


def stored(store: Store) -> list[Row[Any]]:
    with store.reading() as connection:
        return list(connection.execute(select(judgements).order_by(judgements.c.seq)).all())


def undo(store: Store, who: Person, showing: str) -> None:
    with store.writing() as connection:
        work.undo(connection, who, showing, RULES)


def expire(store: Store) -> None:
    with store.writing() as connection:
        connection.execute(update(showings).values(expires_at=time.time() - 1))


def test_an_answer_is_stored_by_reply_and_not_by_place(tmp_path: Path) -> None:
    store = filled(tmp_path, num=1)
    ann = person(store, "ann")
    task = given(store, ann)
    assert sorted(task.order) == [0, 1, 2, 3]
    answer(store, ann, task.id, [2, 7, None, 7])
    found = stored(store)[0]
    by_reply: list[int | None] = [None] * 4
    for place, rank in enumerate([1, 2, None, 2]):  # without gaps
        by_reply[task.order[place]] = rank
    assert found.answer == {"kind": "rank", "ranks": by_reply}
    assert (found.showing, found.seconds) == (task.id, 1.5)


def test_all_orders_are_shown(tmp_path: Path) -> None:
    store = filled(tmp_path, num=40, kind="compare", num_replies=2)
    ann = person(store, "ann")
    orders = set()
    for _ in range(40):
        task = given(store, ann)
        orders.add(tuple(task.order))
        with store.writing() as connection:
            work.skip(connection, ann, task.id)
    assert orders == {(0, 1), (1, 0)}


def test_a_retry_counts_once_and_another_answer_under_its_id_is_refused(tmp_path: Path) -> None:
    store = filled(tmp_path, num=2)
    ann = person(store, "ann")
    task = given(store, ann)
    assert answer(store, ann, task.id, [1, 2, 3, 4])
    assert not answer(store, ann, task.id, [1, 2, 3, 4])
    with pytest.raises(Refused):
        answer(store, ann, task.id, [4, 3, 2, 1])
    with pytest.raises(Refused):
        answer(store, ann, task.id, [4, 3, 2, 1], "answer-2")
    assert len(stored(store)) == 1


def test_the_same_id_of_two_people_are_two_judgements(tmp_path: Path) -> None:
    store = filled(tmp_path, num=1, overlap=2)
    for name in ("ann", "bob"):
        who = person(store, name)
        assert answer(store, who, given(store, who).id, [1, 2, 3, 4])
    assert len(stored(store)) == 2


def test_a_task_stays_with_its_person_through_reloads_and_goes_to_others_when_its_lease_ends(tmp_path: Path) -> None:
    store = filled(tmp_path, num=1)
    ann, bob = person(store, "ann"), person(store, "bob")
    task = given(store, ann)
    assert given(store, ann).id == task.id
    assert take(store, bob) is None
    expire(store)
    assert given(store, bob).item == task.item


def test_a_late_answer_counts_beside_that_of_the_person_who_took_over(tmp_path: Path) -> None:
    store = filled(tmp_path, num=1)
    ann, bob = person(store, "ann"), person(store, "bob")
    late = given(store, ann)
    expire(store)
    answer(store, bob, given(store, bob).id, [1, 2, 3, 4])
    assert take(store, ann) is None  # nothing to do anew
    answer(store, ann, late.id, [1, 2, 3, 4])
    assert {row.person for row in stored(store)} == {ann.id, bob.id}


@pytest.mark.parametrize("overlap", [1, 3])
def test_each_item_is_judged_by_as_many_people_as_wanted(tmp_path: Path, overlap: int) -> None:
    store = filled(tmp_path, num=4, overlap=overlap)
    for who in [person(store, name) for name in ("ann", "bob", "cid", "dan", "eve")]:
        while task := take(store, who):
            answer(store, who, task.id, [1, 2, 3, 4], f"answer-{who.id}-{task.item}")
    found = stored(store)
    assert len(found) == 4 * overlap == len({(row.person, row.item) for row in found})


def test_tasks_that_are_out_count_as_judgements_to_come(tmp_path: Path) -> None:
    store = filled(tmp_path, num=2, overlap=2)
    tasks = [take(store, person(store, name)) for name in ("ann", "bob", "cid", "dan", "eve")]
    taken = [task.item for task in tasks if task is not None]
    assert sorted(taken) == [1, 1, 2, 2] and tasks[4] is None


def test_a_skipped_task_goes_to_others_and_not_back(tmp_path: Path) -> None:
    store = filled(tmp_path, num=1)
    ann, bob = person(store, "ann"), person(store, "bob")
    task = given(store, ann)
    for _ in range(2):  # a retry
        with store.writing() as connection:
            work.skip(connection, ann, task.id)
    assert take(store, ann) is None
    assert given(store, bob).item == task.item


def test_undo_takes_back_the_last_judgement_and_opens_its_task(tmp_path: Path) -> None:
    store = filled(tmp_path, num=3)
    ann = person(store, "ann")
    first = given(store, ann)
    answer(store, ann, first.id, [1, 2, 3, 4], "answer-1")
    second = given(store, ann)
    answer(store, ann, second.id, [1, 2, 3, 4], "answer-2")
    third = given(store, ann)
    with pytest.raises(Refused), store.writing() as connection:
        work.undo(connection, ann, first.id, RULES)
    for _ in range(2):  # a retry
        undo(store, ann, second.id)
    assert given(store, ann).id == second.id
    answer(store, ann, second.id, [4, 3, 2, 1], "answer-3")
    assert given(store, ann).item == third.item
    rows = stored(store)
    assert [row.undone_at is None for row in rows] == [True, False, True]
    with store.reading() as connection:
        assert connection.scalar(select(func.sum(items.c.num_judgements))) == 2
        assert work.progress(connection, ann) == {"done": 2, "left": 1, "last": second.id}


def test_undo_opens_what_was_skipped_and_then_what_was_done_before_it(tmp_path: Path) -> None:
    store = filled(tmp_path, num=3)
    ann = person(store, "ann")
    first = given(store, ann)
    answer(store, ann, first.id, [1, 2, 3, 4], "answer-1")
    second = given(store, ann)
    with store.writing() as connection:
        work.skip(connection, ann, second.id)
    third = given(store, ann)
    undo(store, ann, second.id)
    assert given(store, ann).id == second.id
    with store.reading() as connection:
        assert work.progress(connection, ann) == {"done": 1, "left": 2, "last": first.id}
    undo(store, ann, first.id)
    assert given(store, ann).id == first.id and stored(store)[0].undone_at is not None
    answer(store, ann, first.id, [4, 3, 2, 1], "answer-2")
    assert given(store, ann).item == second.item  # it was taken back before an answer
    with pytest.raises(Refused), store.writing() as connection:
        work.undo(connection, ann, third.id, RULES)


def test_gold_items_come_once_to_each_person_at_their_share_and_need_no_overlap(tmp_path: Path) -> None:
    store = filled(tmp_path, num=200)
    fill(store, num=40, gold=True, first=1000)
    ann = person(store, "ann")
    rules = work.Rules(gold_share=0.1)
    seen = []
    with store.writing() as connection:
        while task := work.next_task(connection, ann, rules):
            seen.append(task.item)
            body = ranking(task.id, [1, 2, 3, 4], f"answer-{task.item}")
            work.judge(connection, ann, Judgement.model_validate(body))
    num_gold = sum(item > 200 for item in seen)
    assert len(seen) == len(set(seen)) == 200 + num_gold
    assert 5 <= num_gold <= 40  # mean 22, standard deviation 4.7


def test_only_what_was_shown_to_somebody_can_be_answered_and_only_as_it_was(tmp_path: Path) -> None:
    store = filled(tmp_path, num=1)
    ann, bob = person(store, "ann"), person(store, "bob")
    task = given(store, ann)
    with pytest.raises(Unknown):
        answer(store, bob, task.id, [1, 2, 3, 4])
    with pytest.raises(Unfit):
        answer(store, ann, task.id, [1, 2, 3])
    wrong = {**ranking(task.id, []), "answer": {"kind": "rate", "rating": 3, "flags": []}}
    with pytest.raises(Unfit), store.writing() as connection:
        work.judge(connection, ann, Judgement.model_validate(wrong))
    assert stored(store) == []


def test_a_full_store_refuses_with_its_name_keeps_what_it_has_and_goes_on(tmp_path: Path) -> None:
    store = filled(tmp_path, num=60)
    ann = person(store, "ann")
    task = given(store, ann)
    answer(store, ann, task.id, [1, 2, 3, 4], "answer-0")

    def limit(connection: Any, pages: int) -> None:
        connection.execute(f"PRAGMA max_page_count={pages}")

    store.engine.dispose()
    with store.reading() as connection:
        pages = int(connection.exec_driver_sql("PRAGMA page_count").scalar_one())
    store.engine.dispose()

    def limited(connection: Any, _: Any) -> None:
        limit(connection, pages)

    event.listen(store.engine, "connect", limited)
    kept = 1
    with pytest.raises(StoreFull, match="labels.db is full"):
        for number in range(1, 60):
            answer(store, ann, given(store, ann).id, [1, 2, 3, 4], f"answer-{number}")
            kept += 1
    assert len(stored(store)) == kept < 60
    event.remove(store.engine, "connect", limited)
    store.engine.dispose()
    answer(store, ann, given(store, ann).id, [1, 2, 3, 4], "answer-x")
    assert len(stored(store)) == kept + 1


def test_a_backup_is_a_whole_store_while_the_store_is_written(tmp_path: Path) -> None:
    store = filled(tmp_path, num=2)
    ann = person(store, "ann")
    answer(store, ann, given(store, ann).id, [1, 2, 3, 4])
    with store.writing() as connection:
        work.next_task(connection, ann, RULES)
        store.back_up(tmp_path / "copy.db")
    copy = Store(str(tmp_path / "copy.db"))
    assert stored(copy) == stored(store)
    assert (tmp_path / "copy.db").stat().st_mode & 0o777 == 0o600


def test_commits_are_synced(tmp_path: Path) -> None:
    store = filled(tmp_path, num=1)
    for transaction in (store.reading, store.writing):
        with transaction() as connection:
            settings = [
                connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "synchronous")
            ]
        assert settings == ["wal", 2]


def test_a_store_is_served_once_and_refused_where_it_is_none(tmp_path: Path) -> None:
    store = filled(tmp_path)
    with store.served():
        with pytest.raises(CapacityError, match="another service"), Store(str(tmp_path / "labels.db")).served():
            pass
    (tmp_path / "text.db").write_text("no database, but a text that is long enough to be read as a header of one")
    with pytest.raises(StorageError, match=r"text\.db is no SQLite file"):
        Store(str(tmp_path / "text.db"))
    with pytest.raises(StorageError, match="give another --store"):
        Store(str(tmp_path / "missing" / "labels.db"))
    for wrong in ("nosuch://x", "sqlite:///x.db", "a b://"):
        with pytest.raises(ConfigError, match="--store"):
            Store(wrong)


def test_the_token_of_a_link_is_nowhere_in_the_store(tmp_path: Path) -> None:
    store = filled(tmp_path)
    token = invited(store, "ann")
    store.close()
    for file in tmp_path.iterdir():
        assert token.encode() not in file.read_bytes()
