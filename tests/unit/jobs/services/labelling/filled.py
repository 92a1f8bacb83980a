"""Stores with items, and an HTTP client of the application in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx

from jobs.services.labelling import people
from jobs.services.labelling.items.adding import Wanted, add
from jobs.services.labelling.items.sources import Candidate
from jobs.services.labelling.people import Person, person_of
from jobs.services.labelling.store import Store
from jobs.services.labelling.web.app import Settings, create_app

HOST = "http://labels.test"


def candidate(number: int = 0, *, num_replies: int = 4, scores: bool = False) -> Candidate:
    return Candidate(
        f"prompt-{number}",
        [{"role": "user", "content": f"Question {number}?"}],
        [],
        [
            {"reply": f"answer {place} to {number}", "source": {"sample_index": place, "version": 3}}
            for place in range(num_replies)
        ],
        {"run": "my-run", "stage": "sample", "step": None, "sampling": {"temperature": 0.7}},
        [float(num_replies - place) for place in range(num_replies)] if scores else (),
    )


def filled(
    folder: Path, *, num: int = 3, kind: str = "rank", overlap: int = 1, gold: bool = False, num_replies: int = 4
) -> Store:
    store = Store(str(folder / "labels.db"))
    fill(store, num=num, kind=kind, overlap=overlap, gold=gold, num_replies=num_replies)
    return store


def fill(
    store: Store,
    *,
    num: int = 3,
    kind: str = "rank",
    overlap: int = 1,
    gold: bool = False,
    num_replies: int = 4,
    first: int = 0,
) -> None:
    found = (candidate(first + number, num_replies=num_replies, scores=gold) for number in range(num))
    add(store, found, Wanted(kind, overlap, 1.0, gold), batch="test")


def invited(store: Store, name: str) -> str:
    with store.writing() as connection:
        return people.invite(connection, name)


def person(store: Store, name: str) -> Person:
    token = invited(store, name)
    with store.reading() as connection:
        found = person_of(connection, token)
    assert found is not None
    return found


def client(store: Store, token: str | None = None, settings: Settings | None = None) -> httpx.AsyncClient:
    return client_of(create_app(store, settings or Settings()), token)


def client_of(app: Any, token: str | None = None) -> httpx.AsyncClient:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=HOST, headers=headers)


def ranking(showing: str, ranks: list[int | None], identity: str = "answer-1") -> dict[str, Any]:
    return {"id": identity, "showing": showing, "seconds": 1.5, "answer": {"kind": "rank", "ranks": ranks}}
