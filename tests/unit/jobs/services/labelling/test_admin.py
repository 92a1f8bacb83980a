"""The admin's API: figures, links, batches and exports, for the admin alone."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from jobs.services.labelling import people
from jobs.services.labelling.items.adding import key_of
from jobs.services.labelling.store import Store
from jobs.services.labelling.waiting.batches import close, open_batch
from jobs.services.labelling.web.app import Settings, create_app
from jobs.services.labelling.work import Rules
from tests.unit.jobs.services.labelling.filled import candidate, client, client_of, fill, filled, invited, ranking

SETTINGS = Settings(rules=Rules(gold_share=0.0))
ROUTES = [
    ("GET", "/api/admin/overview", None),
    ("GET", "/api/admin/export/judgements", None),
    ("POST", "/api/admin/invite", {"name": "eve"}),
    ("POST", "/api/admin/revoke", {"name": "ann"}),
    ("POST", "/api/admin/pause", {"name": "ann", "paused": True}),
    ("POST", "/api/admin/finish", {"batch": "test", "finished": True}),
]


def admin_of(store: Store) -> str:
    with store.writing() as connection:
        return people.new_admin(connection)


async def judge(labeller: httpx.AsyncClient, ranks: Sequence[int | None]) -> None:
    task = (await labeller.post("/api/next", json={})).json()["task"]
    by_place = [ranks[int(text.split()[1])] for text in task["replies"]]  # "answer 2 to 0"
    done = await labeller.post("/api/judgements", json=ranking(task["showing"], by_place))
    assert done.status_code == 200


@pytest.mark.parametrize(("method", "path", "body"), ROUTES)
async def test_only_the_admin_may(tmp_path: Path, method: str, path: str, body: Any) -> None:
    store = filled(tmp_path)
    ann, admin = invited(store, "ann"), admin_of(store)
    for token, status in ((None, 401), ("nonsense", 401), (ann, 403)):
        async with client(store, token, SETTINGS) as someone:
            assert (await someone.request(method, path, json=body)).status_code == status
    async with client(store, admin, SETTINGS) as admin_client:
        forged = await admin_client.request(method, path, json=body, headers={"Origin": "http://evil.test"})
        assert forged.status_code == (
            200 if method == "GET" and "overview" in path else 422 if method == "GET" else 403
        )


async def test_the_overview_has_the_figures_of_people_kinds_and_batches(tmp_path: Path) -> None:
    store = filled(tmp_path, num=1, overlap=3)
    fill(store, num=2, kind="write", num_replies=0, first=10)
    app = create_app(store, SETTINGS)
    for name, ranks in (("ann", [1, 2, 3, 4]), ("bob", [1, 2, 4, 3])):
        async with client_of(app, invited(store, name)) as labeller:
            await judge(labeller, ranks)
    async with client_of(app, admin_of(store)) as admin:
        assert (await admin.get("/api/me")).json()["role"] == "admin"
        found = (await admin.get("/api/admin/overview")).json()
        ann, bob = found["people"]
        assert (ann["name"], ann["num"], ann["seconds"], ann["spam"]) == ("ann", 1, 1.5, 0.0)
        assert ann["with_others"] == bob["with_others"] == pytest.approx(2 / 3)
        assert (ann["paused"], ann["revoked"]) == (False, False)
        assert found["kinds"] == [
            {"name": "rank", "items": 1, "judgements": 2, "missing": 1, "alpha": {"value": 0.825, "num_items": 1}},
            {"name": "write", "items": 2, "judgements": 0, "missing": 2, "alpha": None},
        ]
        numbers = {"items": 3, "judgements": 2, "missing": 3}
        assert found["batches"] == [{"name": "test", **numbers, "finished": False, "over": False}]
        assert found["reviews"] == {"waiting": 0, "accepted": 0, "rejected": 0}


async def test_the_admin_invites_pauses_revokes_and_finishes(tmp_path: Path) -> None:
    store = filled(tmp_path)
    app = create_app(store, SETTINGS)
    async with client_of(app, admin_of(store)) as admin:

        async def change(path: str, **body: Any) -> httpx.Response:
            return await admin.post(f"/api/admin/{path}", json=body)

        token = (await change("invite", name="ann")).json()["token"]
        async with client_of(app, token) as ann:
            await change("pause", name="ann", paused=True)
            assert (await ann.post("/api/next", json={})).json() == {"task": None, "paused": True}
            await change("pause", name="ann", paused=False)
            await change("finish", batch="test", finished=True)
            assert (await ann.post("/api/next", json={})).json() == {"task": None, "paused": False}
            await change("finish", batch="test", finished=False)
            assert (await ann.post("/api/next", json={})).json()["task"]
            await change("revoke", name="ann")
            assert (await ann.post("/api/next", json={})).status_code == 401
        assert [each["revoked"] for each in (await admin.get("/api/admin/overview")).json()["people"]] == [True]
        for path, body, code in (
            ("invite", {"name": "admin"}, "name"),
            ("invite", {"name": " "}, "name"),
            ("revoke", {"name": "nobody"}, "name"),
            ("pause", {"name": "nobody", "paused": True}, "name"),
            ("finish", {"batch": "nothing", "finished": True}, "no_batch"),
            ("finish", {"batch": "nothing", "finished": "perhaps"}, "invalid"),
        ):
            refused = await change(path, **body)
            assert refused.status_code == 422 and refused.json()["detail"] and refused.json()["code"] == code


async def test_a_run_that_waits_has_a_line_with_its_own_numbers_whoever_added_its_items_first(tmp_path: Path) -> None:
    store = filled(tmp_path, num=3)
    with store.writing() as connection:
        for run, asked in (("one/people", range(2)), ("two/people", range(1, 4))):
            found = {key_of("rank", candidate(number), range(4)): 1 + (number == 1) for number in asked}
            open_batch(connection, run, found, opened_at=0.0)
    fill(store, num=1, first=3)
    app = create_app(store, SETTINGS)
    async with client_of(app, invited(store, "ann")) as ann, client_of(app, admin_of(store)) as admin:

        async def lines() -> dict[str, Any]:
            found = (await admin.get("/api/admin/overview")).json()["batches"]
            return {each.pop("name"): tuple(each.values()) for each in found}

        await judge(ann, [1, 2, 3, 4])  # of item 0
        assert await lines() == {
            "test": (4, 1, 4, False, False),
            "one/people": (2, 1, 2, False, False),
            "two/people": (2, 0, 3, False, False),
        }
        for run in ("one/people", "two/people", "test"):
            finished = await admin.post("/api/admin/finish", json={"batch": run, "finished": True})
            assert finished.status_code == 200
        assert {line[2:] for line in (await lines()).values()} == {(0, True, False)}
        assert (await ann.post("/api/next", json={})).json()["task"] is None
        with store.writing() as connection:
            close(connection, "one/people", "an admin finished the batch")
        assert (await lines())["one/people"] == (2, 1, 0, True, True)
        refused = await admin.post("/api/admin/finish", json={"batch": "one/people", "finished": False})
        assert refused.status_code == 422 and "any more: an admin finished the batch" in refused.json()["detail"]


async def test_an_export_is_a_file_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    store = filled(tmp_path, num=1)
    app = create_app(store, SETTINGS)
    async with client_of(app, invited(store, "ann")) as ann, client_of(app, admin_of(store)) as admin:
        nothing = await admin.get("/api/admin/export/rankings")
        assert nothing.status_code == 422 and nothing.json()["code"] == "no_export"
        assert "no judgements that make rankings" in nothing.json()["detail"]
        await judge(ann, [1, 2, 3, 4])
        found = await admin.get("/api/admin/export/rankings")
        assert found.headers["content-disposition"] == 'attachment; filename="rankings.jsonl"'
        assert [f"answer {place} to 0" for place in range(4)] == found.json()["replies"]
        assert found.headers["content-type"] == "application/x-ndjson"
        for shape in ("argilla", "label-studio"):  # one array, which is no line of JSONL
            found = await admin.get(f"/api/admin/export/{shape}")
            assert found.headers["content-disposition"] == f'attachment; filename="{shape}.json"'
            assert found.headers["content-type"] == "application/json" and len(found.json()) == 1
        for path in ("no-such-shape", "..%2f..%2fetc%2fpasswd"):
            assert (await admin.get(f"/api/admin/export/{path}")).status_code in (404, 422)
    assert list((tmp_path / "temporary").iterdir()) == []
