"""The API over HTTP: what a labeller gets, and what is refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import event

from jobs.services.labelling import people
from jobs.services.labelling.items.adding import Wanted, add
from jobs.services.labelling.items.sources import Candidate
from jobs.services.labelling.store import Store
from jobs.services.labelling.web.app import Settings, create_app
from jobs.services.labelling.web.guard import MAX_BODY_BYTES, Buckets, Links
from jobs.services.labelling.work import Rules
from tests.unit.jobs.services.labelling.filled import HOST, client, client_of, filled, invited, ranking

SETTINGS = Settings(rules=Rules(gold_share=0.0), guidelines="Be fair.")
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>"


async def task_of(labeller: httpx.AsyncClient) -> dict[str, Any]:
    found: dict[str, Any] = (await labeller.post("/api/next", json={})).json()["task"]
    return found


async def test_a_labeller_gets_tasks_answers_undoes_and_sees_progress(tmp_path: Path) -> None:
    store = filled(tmp_path, num=2)
    async with client(store, invited(store, "ann"), SETTINGS) as ann:
        me = (await ann.get("/api/me")).json()
        assert (me["name"], me["guidelines"], me["done"], me["left"], me["last"]) == ("ann", "Be fair.", 0, 2, None)
        task = await task_of(ann)
        assert task["kind"] == "rank"
        assert task["messages"] == [{"role": "user", "content": "Question 0?"}]
        body = ranking(task["showing"], [1, 2, 3, 4])
        assert (await ann.post("/api/judgements", json=body)).json() == {"id": "answer-1", "new": True}
        assert (await ann.post("/api/judgements", json=body)).json() == {"id": "answer-1", "new": False}
        me = (await ann.get("/api/me")).json()
        assert (me["done"], me["left"], me["last"]) == (1, 1, task["showing"])
        assert (await ann.post("/api/undo", json={"showing": task["showing"]})).status_code == 200
        assert (await task_of(ann))["showing"] == task["showing"]
        assert (await ann.post("/api/skip", json={"showing": task["showing"]})).status_code == 200
        other = await task_of(ann)
        assert other["messages"][0]["content"] == "Question 1?"
        assert (await ann.post("/api/keep", json={"showing": other["showing"]})).status_code == 200


async def test_a_task_does_not_say_where_its_replies_come_from_nor_whether_it_is_gold(tmp_path: Path) -> None:
    store = filled(tmp_path, num=1, gold=True)
    async with client(store, invited(store, "ann"), Settings(rules=Rules(gold_share=1.0))) as ann:
        task = await task_of(ann)
    assert set(task) == {"showing", "kind", "messages", "replies"}
    assert sorted(task["replies"]) == [f"answer {place} to 0" for place in range(4)]


@pytest.fixture
async def two(tmp_path: Path) -> AsyncIterator[tuple[Store, httpx.AsyncClient, httpx.AsyncClient]]:
    """A store, and two labellers of one service."""
    store = filled(tmp_path, num=5)
    app = create_app(store, SETTINGS)
    async with client_of(app, invited(store, "ann")) as ann, client_of(app, invited(store, "bob")) as bob:
        yield store, ann, bob


async def test_nobody_acts_for_another(two: tuple[Store, httpx.AsyncClient, httpx.AsyncClient]) -> None:
    _, ann, bob = two
    task = await task_of(ann)
    await task_of(bob)
    assert (await bob.post("/api/judgements", json=ranking(task["showing"], [1, 2, 3, 4]))).status_code == 404
    assert (await bob.post("/api/skip", json={"showing": task["showing"]})).status_code == 404
    assert (await ann.post("/api/judgements", json=ranking(task["showing"], [1, 2, 3, 4]))).status_code == 200
    assert (await bob.post("/api/undo", json={"showing": task["showing"]})).status_code == 404


async def test_without_a_valid_link_there_is_nothing(two: tuple[Store, httpx.AsyncClient, httpx.AsyncClient]) -> None:
    store, ann, _ = two
    for headers in ({}, {"Authorization": "Bearer nonsense"}, {"Authorization": "Basic YW5uOng="}, {"Cookie": "a=b"}):
        async with client_of(create_app(store, SETTINGS)) as nobody:
            for method, path in (("GET", "/api/me"), ("POST", "/api/next"), ("POST", "/api/judgements")):
                found = await nobody.request(method, path, json={} if method == "POST" else None, headers=headers)
                assert found.status_code == 401 and "ask for a new one" in found.json()["detail"]
    await task_of(ann)
    with store.writing() as connection:
        people.revoke(connection, "ann")
    assert (await ann.post("/api/next", json={})).status_code == 401
    fresh = invited(store, "ann")
    found = await ann.post("/api/next", json={}, headers={"Authorization": f"Bearer {fresh}"})
    assert found.status_code == 200


async def test_a_paused_labeller_keeps_the_begun_task_and_gets_no_other(
    two: tuple[Store, httpx.AsyncClient, httpx.AsyncClient],
) -> None:
    store, ann, _ = two
    task = await task_of(ann)
    with store.writing() as connection:
        people.pause(connection, "ann", paused=True)
    await ann.post("/api/judgements", json=ranking(task["showing"], [1, 2, 3, 4]))
    assert (await ann.post("/api/next", json={})).json() == {"task": None, "paused": True}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://evil.test"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://["}, 403),
        ({"Origin": "http://[::1"}, 403),
        ({"Origin": f"{HOST}.evil.test"}, 403),
        ({"Origin": HOST, "Sec-Fetch-Site": "cross-site"}, 403),
        ({"Origin": HOST, "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
    ],
)
async def test_requests_of_other_pages_are_refused(
    two: tuple[Store, httpx.AsyncClient, httpx.AsyncClient], headers: dict[str, str], status: int
) -> None:
    _, ann, _ = two
    found = await ann.post("/api/next", content=b"{}", headers={"Content-Type": "application/json", **headers})
    assert found.status_code == status
    assert found.json().get("code") == {403: "other_page", 415: "not_json"}.get(status)


async def test_long_bodies_are_refused_with_and_without_a_length(
    two: tuple[Store, httpx.AsyncClient, httpx.AsyncClient],
) -> None:
    _, ann, _ = two
    text = {"id": "answer-1", "showing": "x" * 32, "seconds": 1, "answer": {"kind": "write", "text": "x" * 10_000_000}}
    assert (await ann.post("/api/judgements", json=text)).status_code == 413
    sent = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(1000):
            sent += 65536
            yield b"x" * 65536

    found = await ann.post("/api/judgements", content=chunks(), headers={"Content-Type": "application/json"})
    assert found.json()["code"] == "too_long"
    assert found.status_code == 413 and sent <= MAX_BODY_BYTES + 2 * 65536


@pytest.mark.parametrize(
    "change",
    [
        {"id": "short"},
        {"id": "../../../etc/passwd"},
        {"seconds": -1},
        {"seconds": "NaN"},
        {"person": "bob"},
        {"answer": {"kind": "rank", "ranks": [1, 2, 3, 10]}},
        {"answer": {"kind": "rank", "ranks": [1, 2, 3, 0]}},
        {"answer": {"kind": "rank", "ranks": [1, 2, 3, True]}},
        {"answer": {"kind": "rank", "ranks": [1, 2]}},
        {"answer": {"kind": "compare", "preference": 4}},
        {"answer": {"kind": "compare", "preference": 1}},
        {"answer": {"kind": "rate", "rating": None, "flags": ["no such flag"]}},
        {"answer": {"kind": "write", "text": "a\x00b"}},
        {"answer": {"kind": "write", "text": " \n"}},
        {"answer": {"kind": "nothing"}},
        {"answer": None},
    ],
)
async def test_answers_that_do_not_fit_are_refused(
    two: tuple[Store, httpx.AsyncClient, httpx.AsyncClient], change: dict[str, Any]
) -> None:
    _, ann, _ = two
    body = {**ranking((await task_of(ann))["showing"], [1, 2, 3, 4]), **change}
    found = await ann.post("/api/judgements", json=body)
    assert found.status_code == 422 and found.json()["detail"] and found.json()["code"] in ("invalid", "unfit")
    assert (await ann.get("/api/me")).json()["done"] == 0


@pytest.mark.parametrize("raw", [b"{", b"[" * 100_000, b'{"id": "\xff"}', b'{"id": "\\ud800\\ud800"}', b"\x00"])
async def test_bodies_that_are_no_json_are_refused(
    two: tuple[Store, httpx.AsyncClient, httpx.AsyncClient], raw: bytes
) -> None:
    _, ann, _ = two
    found = await ann.post("/api/judgements", content=raw, headers={"Content-Type": "application/json"})
    assert found.status_code in (400, 422)


@pytest.mark.parametrize(
    "path",
    [
        "/static/../app.py",
        "/static/..%2fapp.py",
        "/static/%2e%2e/app.py",
        "/static//etc/passwd",
        "/static/page.js%00.html",
        "/static/",
        "/labels.db",
        "/docs",
        "/openapi.json",
        "/api/",
    ],
)
async def test_no_path_leads_to_another_file(tmp_path: Path, path: str) -> None:
    app = create_app(filled(tmp_path), SETTINGS)
    status = None

    async def send(message: Any) -> None:
        nonlocal status
        status = message.get("status", status)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    # Given to the application as it is: clients would resolve the dots.
    raw = {"type": "http", "method": "GET", "headers": [], "query_string": b"", "http_version": "1.1", "scheme": "http"}
    scope = {**raw, "path": path.replace("%2f", "/").replace("%2e", ".").replace("%00", "\x00"), "client": ("a", 1)}
    await app({**scope, "raw_path": path.encode(), "server": ("a", 1), "root_path": ""}, receive, send)
    assert status == 404


async def test_the_page_is_served_from_here_alone_and_runs_nothing_else(tmp_path: Path) -> None:
    async with client(filled(tmp_path)) as anyone:
        page = await anyone.get("/")
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "require-trusted-types-for" in policy
        assert page.headers["x-content-type-options"] == "nosniff" and "set-cookie" not in page.headers
        for name in ("page.css", "page.js", "admin.js", "tasks.js", "texts.js", "dom.js", "outbox.js"):
            found = await anyone.get(f"/static/{name}")
            assert found.status_code == 200 and "://" not in found.text, name
            for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
                assert sink not in found.text, f"{name}: {sink}"
        assert "://" not in page.text and "<script>" not in page.text and "style=" not in page.text


async def test_text_of_models_is_data_and_never_part_of_a_page(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "labels.db"))
    message = [{"role": "user", "content": EVIL}]
    add(store, [Candidate("p", message, [], [{"reply": EVIL, "source": {}}], {})], Wanted("rate"), batch="x")
    async with client(store, invited(store, "ann"), SETTINGS) as ann:
        found = await ann.post("/api/next", json={})
        assert found.headers["content-type"] == "application/json"
        assert found.json()["task"]["replies"] == [EVIL]
        assert EVIL not in (await ann.get("/")).text


async def test_too_many_requests_of_one_client_are_refused_and_others_served(
    two: tuple[Store, httpx.AsyncClient, httpx.AsyncClient],
) -> None:
    store, _, _ = two
    app = create_app(store, Settings(rules=SETTINGS.rules, rate=1.0))
    async with client_of(app, invited(store, "ann")) as ann, client_of(app, invited(store, "bob")) as bob:
        found = await asyncio.gather(*(ann.get("/api/me") for _ in range(100)))
        refused = [each for each in found if each.status_code == 429]
        assert len(refused) > 80 and int(refused[0].headers["retry-after"]) >= 1
        assert (await bob.get("/api/me")).status_code == 200
        async with client_of(app) as nobody:  # each with another token, from one address
            for path in ("/api/me", "/healthz"):
                tries = [nobody.get(path, headers={"Authorization": f"Bearer {number}"}) for number in range(100)]
                assert sum(each.status_code == 429 for each in await asyncio.gather(*tries)) > 80
        assert (await bob.get("/api/me")).status_code == 200


async def test_a_flood_of_strangers_blocks_neither_pages_nor_links_even_after_a_restart(
    two: tuple[Store, httpx.AsyncClient, httpx.AsyncClient],
) -> None:
    """All of one address, as behind one router."""
    store, _, _ = two
    token = invited(store, "ann")
    app = create_app(store, SETTINGS)  # has seen nobody
    async with client_of(app) as nobody, client_of(app, token) as ann:
        tries = [nobody.get("/api/me", headers={"Authorization": f"Bearer {number}"}) for number in range(300)]
        assert sum(each.status_code == 429 for each in await asyncio.gather(*tries)) > 150
        assert (await nobody.get("/healthz")).status_code == 429
        assert (await ann.get("/api/me")).status_code == 200
        for path in ("/", *(f"/static/{name}" for name in ("page.js", "page.css", "texts.js"))):
            assert {(await nobody.get(path)).status_code for _ in range(60)} == {200}, path


async def test_a_link_that_is_made_while_strangers_flood_is_known_after_a_second(
    two: tuple[Store, httpx.AsyncClient, httpx.AsyncClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _, _ = two
    now = 100.0
    monkeypatch.setattr("jobs.services.labelling.web.guard.monotonic", lambda: now)
    loads = 0

    def load() -> frozenset[str]:
        nonlocal loads
        loads += 1
        with store.reading() as connection:
            return people.valid_hashes(connection)

    links = Links(load)
    assert not await links.holds("nobody's")
    hashed = people.token_hash(invited(store, "eve"))
    assert not any([await links.holds(hashed) for _ in range(50)]) and loads == 1
    now = 101.0
    assert await links.holds(hashed) and loads == 2
    with store.writing() as connection:
        people.revoke(connection, "eve")
    now = 102.0
    assert not await links.holds("nobody's") and not await links.holds(hashed)


@pytest.mark.parametrize("rate", [0.1, 1.0])
async def test_a_low_rate_still_lets_the_page_begin(
    two: tuple[Store, httpx.AsyncClient, httpx.AsyncClient], rate: float
) -> None:
    store, _, _ = two
    async with client(store, invited(store, "ann"), Settings(rate=rate)) as ann:
        begun = [await ann.get("/"), await ann.get("/static/page.js"), await ann.get("/api/me")]
        begun += [await ann.post("/api/next", json={}) for _ in range(4)]
        assert {each.status_code for each in begun} == {200}
        found = [(await ann.get("/api/me")).status_code for _ in range(40)]
        assert found.count(429) >= 30


async def test_every_answer_is_counted_and_has_the_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled(tmp_path)
    app = create_app(store, Settings(rate=0.1))

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("jobs.services.labelling.work.progress", broken)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    headers = {"Authorization": f"Bearer {invited(store, 'ann')}"}
    async with httpx.AsyncClient(transport=transport, base_url=HOST, headers=headers) as ann:
        found = [
            await ann.get("/api/me"),
            await ann.post("/api/next", json={}, headers={"Origin": "http://["}),
            await ann.post("/api/next", content=b"{}", headers={"Content-Type": "text/plain"}),
            await ann.post("/api/next", content=b"x" * (MAX_BODY_BYTES + 1)),
            await ann.get("/no/such/page"),
            *[await ann.get("/healthz") for _ in range(8)],
        ]
        async with client_of(app) as nobody:
            counted = (await nobody.get("/metrics")).text
    assert [each.status_code for each in found[:5]] == [500, 403, 415, 413, 404]
    assert [each.status_code for each in found[5:]] == [200] * 5 + [429] * 3
    for status, num in ((500, 1), (403, 1), (415, 1), (413, 1), (404, 1), (200, 5), (429, 3)):
        assert f'rlhf_label_requests_total{{status="{status}"}} {float(num)}' in counted
    for each in found:
        assert "default-src 'none'" in each.headers["content-security-policy"], each.status_code
        assert each.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("length", ["\xb2", "9" * 5000, "262145"])
async def test_no_length_of_a_body_is_an_error_of_the_service(tmp_path: Path, length: str) -> None:
    """Given to the application as it is: servers and clients refuse some of them."""
    statuses: list[int] = []

    async def send(message: Any) -> None:
        statuses.extend([message["status"]] if "status" in message else [])

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    headers = [(b"content-length", length.encode("latin-1"))]
    raw = {"type": "http", "method": "GET", "headers": headers, "query_string": b"", "http_version": "1.1"}
    scope = {**raw, "scheme": "http", "path": "/", "raw_path": b"/", "client": ("a", 1), "server": ("a", 1)}
    await create_app(filled(tmp_path), SETTINGS)({**scope, "root_path": ""}, receive, send)
    assert statuses == [200 if length == "\xb2" else 413]


def test_buckets_forget_the_least_recently_used(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("jobs.services.labelling.web.guard.monotonic", lambda: now)
    buckets = Buckets(rate=2.0, burst=2.0)
    for _ in range(2):
        assert buckets.wait_s("a") == 0
        buckets.take("a")
    assert buckets.wait_s("a") == 0.5 and buckets.wait_s("b") == 0
    now = 0.5
    assert buckets.wait_s("a") == 0
    for number in range(20_000):
        buckets.take(str(number))
    assert len(buckets._left) <= 10_000


async def test_a_full_store_is_said_and_loses_nothing(
    two: tuple[Store, httpx.AsyncClient, httpx.AsyncClient],
) -> None:
    store, ann, _ = two
    task = await task_of(ann)
    body = ranking(task["showing"], [1, 2, 3, 4])

    def limited(connection: Any, _: Any) -> None:
        connection.execute("PRAGMA max_page_count=1")  # no new page

    store.engine.dispose()
    event.listen(store.engine, "connect", limited)
    statuses = []
    for number in range(200):
        with_id = {**body, "id": f"answer-{number}"}
        statuses.append((await ann.post("/api/judgements", json=with_id)).status_code)
        if statuses[-1] == 507:
            break
        await ann.post("/api/undo", json={"showing": task["showing"]})
    assert statuses[-1] == 507
    done = (await ann.get("/api/me")).json()["done"]
    event.remove(store.engine, "connect", limited)
    store.engine.dispose()
    found = await ann.post("/api/judgements", json=with_id)
    assert found.json() == {"id": with_id["id"], "new": True}
    assert (await ann.get("/api/me")).json()["done"] == done + 1


async def test_health_and_metrics(two: tuple[Store, httpx.AsyncClient, httpx.AsyncClient]) -> None:
    store, ann, _ = two
    await ann.post("/api/judgements", json=ranking((await task_of(ann))["showing"], [1, 2, 3, 4]))
    assert (await ann.get("/healthz")).json() == {"status": "ok"}
    text = (await ann.get("/metrics")).text
    assert 'rlhf_label_judgements{kind="rank"} 1.0' in text
    assert 'rlhf_label_missing{kind="rank"} 4.0' in text
    with store.writing() as connection:
        admin = people.new_admin(connection)
    closed = create_app(store, Settings(open_metrics=False))
    for token, status in ((None, 401), (invited(store, "cid"), 403), (admin, 200)):
        async with client_of(closed, token) as someone:
            assert (await someone.get("/metrics")).status_code == status
