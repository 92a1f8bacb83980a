"""The number of tasks that are left for somebody is that of the items that they would be given."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from sqlalchemy import func, select, update

from jobs.services.labelling import work
from jobs.services.labelling.answers import Judgement
from jobs.services.labelling.people import Person
from jobs.services.labelling.store import Store
from jobs.services.labelling.tables import items, showings
from jobs.services.labelling.waiting.batches import finish
from tests.unit.jobs.services.labelling.filled import fill, filled, person, ranking

RULES = work.Rules(lease_s=60, gold_share=0.3, num_reviews=2)
WRITING = {"kind": "write", "text": "An answer of my own."}


@pytest.mark.parametrize("seed", range(3))
def test_what_is_left_is_what_would_be_given(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    store = filled(tmp_path, num=4, kind="write", num_replies=0)
    fill(store, num=6, first=4)
    fill(store, num=6, overlap=3, first=10)
    fill(store, num=3, gold=True, first=16)
    crowd = [person(store, name) for name in ("ann", "bob", "cyd", "dan")]
    for number in range(60):
        act(store, draw, draw.choice(crowd), f"answer-{number}")
        if number == 45:
            with store.writing() as connection:
                finish(connection, "test")
        for who in crowd if number % 3 == 0 else ():
            assert left(store, who) == given_out(store, who)


def act(store: Store, draw: random.Random, who: Person, identity: str) -> None:
    """Takes a task, and answers, skips or keeps it, or lets it expire."""
    with store.writing() as connection:
        task = work.next_task(connection, who, RULES)
        if task is None:
            return
        kind = draw.choice(["answer", "answer", "answer", "skip", "keep", "expire"])
        if kind == "skip":
            work.skip(connection, who, task.id)
        elif kind == "expire":
            connection.execute(update(showings).where(showings.c.id == task.id).values(expires_at=time.time() - 1))
        elif kind == "answer":
            answer = ranking(task.id, [1, 2, 3, 4], identity)
            if task.kind == "write":
                answer["answer"] = WRITING
            elif task.kind == "review":
                answer["answer"] = {"kind": "review", "rating": 4, "flags": []}
            work.judge(connection, who, Judgement.model_validate(answer), num_reviews=RULES.num_reviews)


def left(store: Store, who: Person) -> int:
    with store.reading() as connection:
        return int(work.progress(connection, who)["left"])


def given_out(store: Store, who: Person) -> int:
    with store.reading() as connection:
        found = connection.scalar(select(func.count()).select_from(items).where(work._for(who, time.time())))
    return int(found or 0)
