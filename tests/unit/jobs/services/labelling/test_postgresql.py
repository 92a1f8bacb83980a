"""The same store on PostgreSQL. Skipped where Debian's package postgresql or psycopg is missing."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from sqlalchemy import Connection, func, select, text

from benchmarks.labelling.service import POSTGRESQL, postgresql
from jobs.services.labelling import work
from jobs.services.labelling.admin.overview import overview
from jobs.services.labelling.agreement.merging import Electorate
from jobs.services.labelling.agreement.quality import figures
from jobs.services.labelling.answers import Judgement
from jobs.services.labelling.exporting import export
from jobs.services.labelling.items.adding import Wanted, add
from jobs.services.labelling.people import Person
from jobs.services.labelling.shapes import judged
from jobs.services.labelling.shapes.judged import Exported
from jobs.services.labelling.shapes.table import SHAPES
from jobs.services.labelling.store import Store
from jobs.services.labelling.tables import items, judgements
from jobs.services.labelling.waiting.batches import finish
from jobs.services.labelling.web.hosting import command_of, hosting
from orchestrator.errors import CapacityError, ConfigError
from tests.deadlines import scaled
from tests.unit.jobs.services.labelling.filled import candidate, client, fill, invited, person, ranking
from tests.unit.jobs.services.labelling.running import free_port
from tests.unit.jobs.services.labelling.test_hosting import answers, child_of, reached

pytest.importorskip("psycopg", reason="needs psycopg (pip install 'psycopg[binary]')")
pytestmark = pytest.mark.skipif(not POSTGRESQL, reason="needs PostgreSQL (apt-get install postgresql)")
RULES = work.Rules(gold_share=0.0)


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    with postgresql(limit_s=scaled(60)) as url:
        yield url


def label(store: Store, who: Person) -> None:
    """Answers all tasks, each request twice."""
    while True:
        with store.writing() as connection:
            task = work.next_task(connection, who, RULES)
        if task is None:
            return
        body = Judgement.model_validate(ranking(task.id, [1, 2, 3, 4], f"answer-{task.id}"))
        for _ in range(2):
            with store.writing() as connection:
                work.judge(connection, who, body)


async def test_people_label_at_the_same_time_each_item_as_often_as_wanted(database: str, tmp_path: Path) -> None:
    store = Store(database)
    fill(store, num=30, overlap=2)
    labellers = [person(store, f"labeller {number}") for number in range(4)]
    threads = [threading.Thread(target=label, args=(store, who)) for who in labellers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(scaled(60))
    with store.reading() as connection:
        rows = connection.execute(select(judgements.c.item, judgements.c.person)).all()
        assert connection.scalar(select(func.sum(items.c.num_judgements))) == 60
        assert len(figures(connection)) == 4
    assert len(rows) == len(set(rows)) == 60
    with store.reading() as connection:
        undoable = str(work.progress(connection, labellers[0])["last"])
    with store.writing() as connection:
        work.undo(connection, labellers[0], undoable, RULES)
    assert export(store, tmp_path / "out.jsonl", "judgements").num_rows == 60
    export(store, tmp_path / "rankings.jsonl", "rankings")
    async with client(store, invited(store, "ann")) as ann:
        assert 'rlhf_label_missing{kind="rank"} 1.0' in (await ann.get("/metrics")).text
        assert (await ann.post("/api/next", json={})).json()["task"] is None  # the one that is missing is out
        fill(store, num=1, first=1000)
        task = (await ann.post("/api/next", json={})).json()["task"]
        assert (await ann.post("/api/judgements", json=ranking(task["showing"], [1, 1, 1, 1]))).status_code == 200
    second = Store(database)
    with store.served(), pytest.raises(CapacityError), second.served():
        pass
    second.close()
    with pytest.raises(ConfigError, match="pg_dump"):
        store.back_up(tmp_path / "copy.db")
    store.close()


def test_a_look_whether_a_store_is_served_leaves_it_free(database: str) -> None:
    one, other = Store(database), Store(database)
    for store in (one, other, one):
        assert not store.is_served()
    with one.served():
        assert other.is_served() and one.is_served()
        with pytest.raises(CapacityError, match="another service uses"), other.served():
            pass
    assert not other.is_served()
    with other.served():  # though `one` is open, and its pool has its sessions
        assert one.is_served()
    one.close()
    other.close()


def end_claims(store: Store) -> None:
    """Ends the sessions that hold a service's lock, as a restart of the server does."""
    with store.reading() as connection:
        ended = connection.scalars(text("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'"))
        assert ended.all() == [True]


async def test_a_service_that_lost_its_claim_takes_it_again_or_refuses_to_write(database: str) -> None:
    one, other = Store(database), Store(database)
    with one.served():
        end_claims(other)
        token = invited(one, "lea")  # a write
        with pytest.raises(CapacityError, match="another service uses"), other.served():
            pass
        end_claims(other)
        async with client(one, token) as lea:
            with other.served():
                for found in (await lea.post("/api/next", json={}), await lea.get("/healthz")):
                    assert found.status_code == 503 and "another service has taken" in found.json()["detail"]
                fill(other, num=1, first=5000)
            assert (await lea.post("/api/next", json={})).status_code == 200
            assert (await lea.get("/healthz")).status_code == 200
            assert other.is_served()
    assert not other.is_served()
    one.close()
    other.close()


async def test_a_run_serves_the_page_of_a_store_on_postgresql(database: str) -> None:
    store, port, lines = Store(database), free_port(), list[str]()
    async with hosting(store, command_of(database, f"127.0.0.1:{port}", None), lines.append) as hosted:
        await reached(port)
        assert hosted.is_running and store.is_served()
        child_of(psutil.Process().pid).kill()
        await reached(port, up=False)
        await reached(port)
    assert not await answers(port)
    async with asyncio.timeout(scaled(10)):  # the server sees the end of a session a little later
        while store.is_served():  # noqa: ASYNC110  another process ends
            await asyncio.sleep(0.05)
    assert not any("another service has" in line for line in lines)
    store.close()


def test_a_reader_sees_one_state_while_judgements_land(database: str, tmp_path: Path) -> None:
    store = Store(database)
    fill(store, num=3, first=3000, overlap=2)
    label(store, person(store, "hal"))
    late = person(store, "ida")
    with store.reading() as connection:
        before = list(SHAPES["rankings"].rows(connection, Exported()))
        label(store, late)  # a voter that this reader has not seen
        assert list(SHAPES["rankings"].rows(connection, Exported())) == before
    with store.reading() as connection:
        assert list(SHAPES["rankings"].rows(connection, Exported())) != before
    store.close()


def test_an_export_lasts_through_a_judgement_of_somebody_new(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(database)
    fill(store, num=3, first=4000, overlap=3)
    label(store, person(store, "jon"))
    electorate = judged.judges_of

    def slow(connection: Connection) -> Electorate:
        found = electorate(connection)
        label(store, person(store, "kim"))
        return found

    monkeypatch.setattr(judged, "judges_of", slow)
    assert export(store, tmp_path / "out.jsonl", "rankings").num_rows >= 3
    store.close()


def test_texts_are_reviewed_and_batches_finished(database: str) -> None:
    store = Store(database)
    add(store, [candidate(2000, num_replies=0)], Wanted("write", overlap=1, priority=99.0), batch="texts")
    for name, answer in (
        ("eve", {"kind": "write", "text": "Hello."}),
        ("fay", {"kind": "review", "rating": 4, "flags": []}),
        ("gil", {"kind": "review", "rating": None, "flags": ["spam"]}),
    ):
        who = person(store, name)
        with store.writing() as connection:
            task = work.next_task(connection, who, RULES)
            assert task is not None and task.kind == answer["kind"]
            body = {"id": "answer-1", "showing": task.id, "seconds": 1.0, "answer": answer}
            work.judge(connection, who, Judgement.model_validate(body), num_reviews=2)
    with store.writing() as connection:
        finish(connection, "test")
        found = json.loads(json.dumps(overview(connection)))
        assert found["reviews"] == {"waiting": 0, "accepted": 0, "rejected": 1}  # 1 - 1/2 is below 0.6
        by_name = {each["name"]: each for each in found["batches"]}
        assert (by_name["texts"]["missing"], by_name["texts"]["finished"]) == (1, False)
        assert (by_name["test"]["missing"], by_name["test"]["finished"]) == (0, True)
    store.close()
