"""Attempts against a real service over HTTP. The table in docs/labelling.md says how each is answered."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import httpx
import pytest

from jobs.services.labelling import people
from jobs.services.labelling.items.adding import Wanted, add
from jobs.services.labelling.items.sources import Candidate
from tests.deadlines import scaled
from tests.unit.jobs.services.labelling.filled import filled, invited, ranking
from tests.unit.jobs.services.labelling.running import free_port, service, until_healthy

DOCUMENT = Path(__file__).resolve().parents[5] / "docs" / "labelling.md"
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)></textarea>\u2028{{7*7}}"
RATE, FLOOD = 20.0, 1000
AT_ONCE = 8  # requests of a flood
JSON = {"Content-Type": "application/json"}

Answer = tuple[int, str]


class Target:
    """A service with some labellers."""

    def __init__(self, port: int, tokens: Mapping[str, str]) -> None:
        self.port, self.tokens = port, tokens
        self.address = f"http://127.0.0.1:{port}"

    def asked(self, method: str, path: str, name: str | None = "ann", **more: Any) -> httpx.Response:
        headers = {**more.pop("headers", {})}
        if name is not None:
            headers["Authorization"] = f"Bearer {self.tokens.get(name, name)}"
        return httpx.request(method, self.address + path, headers=headers, timeout=scaled(20), **more)

    def posted(self, path: str, body: Any, name: str | None = "ann", **headers: str) -> httpx.Response:
        return self.asked("POST", path, name, content=json.dumps(body), headers={**JSON, **headers})

    def sent(self, request: bytes) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and body of the answer. The service may close the connection before it has read all."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=scaled(20)) as link:
            with suppress(BrokenPipeError, ConnectionResetError):
                link.sendall(request)
            response = HTTPResponse(link)
            response.begin()
            return response.status, dict(response.headers), response.read()

    def line(self, line: str, *headers: str) -> Answer:
        """The answer to a GET with this request line."""
        more = "".join(f"{header}\r\n" for header in (f"Host: 127.0.0.1:{self.port}", *headers))
        status, _, body = self.sent(f"{line}\r\n{more}\r\n".encode("latin-1"))
        return status, detail(body)

    def is_well(self) -> bool:
        return self.posted("/api/next", {}, "ann").status_code == 200


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    folder = tmp_path_factory.mktemp("attempts")
    store = filled(folder, num=50)
    evil = Candidate("p", [{"role": "user", "content": EVIL}], [], [{"reply": EVIL, "source": {}}], {})
    add(store, [evil], Wanted("rate", priority=1), batch="evil")
    tokens = {name: invited(store, name) for name in ("eve", "ann", "bob", "cid", "dan")}
    with store.writing() as connection:
        people.revoke(connection, "cid")
    store.close()
    port = free_port()
    with service(folder / "labels.db", port, rate=RATE) as process:
        until_healthy(port, process)
        found = Target(port, tokens)
        found.posted("/api/next", {}, "eve")  # the first task is the evil one
        yield found
        assert process.poll() is None


def answer(response: httpx.Response) -> Answer:
    return response.status_code, detail(response.content)


def detail(body: bytes) -> str:
    try:
        return str(json.loads(body)["detail"])
    except (ValueError, KeyError, TypeError):
        return body.decode("utf-8", "replace")


def anothers_task(target: Target) -> Iterator[Answer]:
    showing = target.posted("/api/next", {}, "ann").json()["task"]["showing"]
    yield answer(target.posted("/api/judgements", ranking(showing, [1, 2, 3, 4]), "bob"))
    yield answer(target.posted("/api/skip", {"showing": showing}, "bob"))


def anothers_judgement(target: Target) -> Iterator[Answer]:
    showing = target.posted("/api/next", {}, "ann").json()["task"]["showing"]
    assert target.posted("/api/judgements", ranking(showing, [1, 2, 3, 4], "of-ann-1")).status_code == 200
    yield answer(target.posted("/api/undo", {"showing": showing}, "bob"))


def invalid_links(target: Target) -> Iterator[Answer]:
    for headers in ({}, {"Authorization": "Basic YW5uOng="}, {"Cookie": f"token={target.tokens['ann']}"}):
        yield answer(target.posted("/api/next", {}, None, **headers))
    for token in (target.tokens["cid"], "invented", target.tokens["ann"] + "x"):
        yield answer(target.posted("/api/next", {}, token))
    yield answer(target.asked("GET", f"/api/me?token={target.tokens['ann']}", None))
    for value in ("Bearer", "Bearer \xe9\xff", f"Bearer {'x' * 30_000}"):
        yield target.line("GET /api/me HTTP/1.1", f"Authorization: {value}")


def forged_origins(target: Target) -> Iterator[Answer]:
    for origin in (
        "http://evil.test",
        "null",
        f"{target.address}.evil.test",
        f"http://127.0.0.1:{target.port + 1}",
        "",
    ):
        yield answer(target.posted("/api/next", {}, Origin=origin))
    for site in ("cross-site", "same-site"):
        yield answer(target.posted("/api/next", {}, **{"Origin": target.address, "Sec-Fetch-Site": site}))


def forms(target: Target) -> Iterator[Answer]:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        yield answer(target.asked("POST", "/api/next", content=b"{}", headers={"Content-Type": kind}))


def scripts(target: Target) -> Iterator[Answer]:
    found = target.posted("/api/next", {}, "eve")
    task = found.json()["task"]
    assert task["replies"] == [EVIL] and task["messages"][0]["content"] == EVIL
    assert found.headers["content-type"] == "application/json"
    assert found.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in found.headers["content-security-policy"]
    yield found.status_code, ""


def long_answers(target: Target) -> Iterator[Answer]:
    start = (
        f"POST /api/judgements HTTP/1.1\r\nHost: 127.0.0.1:{target.port}\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {target.tokens['bob']}\r\n"
    ).encode()
    text = b'{"text": "' + b"x" * 10_000_000 + b'"}'
    with_length = b"Content-Length: %d\r\n\r\n" % len(text)
    chunk = b"%x\r\n%s\r\n" % (1_000_000, b"x" * 1_000_000)
    for request in (
        start + with_length,  # before the body is sent
        start + with_length + text,
        start + b"Transfer-Encoding: chunked\r\n\r\n" + 10 * chunk + b"0\r\n\r\n",
    ):
        status, _, body = target.sent(request)
        yield status, detail(body)


def long_headers(target: Target) -> Iterator[Answer]:
    yield target.line("GET /api/me HTTP/1.1", f"Authorization: Bearer {'x' * 10_000_000}")
    yield target.line("GET /api/me HTTP/1.1", *(f"X-{number}: {'x' * 1000}" for number in range(10_000)))


def paths(target: Target) -> Iterator[Answer]:
    for path in (
        "/static/../app.py",
        "/static/../../labels.db",
        "/static/%2e%2e/app.py",
        "/static/..%2fapp.py",
        "/static/..%5capp.py",
        "/static/%252e%252e%252fapp.py",
        "/static//etc/passwd",
        "/static/%2fetc%2fpasswd",
        "/static/page.js%00.html",
        "/static/%00",
        "//etc/passwd",
        "/../../../../etc/passwd",
        "etc/passwd",
        "/labels.db",
        "/docs",
        "/openapi.json",
        "/api/../labels.db",
        "/%c0%ae%c0%ae/etc/passwd",
        f"http://127.0.0.1:{target.port}/static/../app.py",
        "http://evil.test/labels.db",
        "file:///etc/passwd",
    ):
        yield target.line(f"GET {path} HTTP/1.1")


def no_http(target: Target) -> Iterator[Answer]:
    for line in ("GET /static/page.js\x00 HTTP/1.1", "GET /a b HTTP/1.1", "NONSENSE", "\x16\x03\x01"):
        yield target.line(line)
    yield target.line("GET / HTTP/1.1", "Bad Header\x00: x")


def flood(target: Target, name: str | None, path: str) -> Iterator[Answer]:
    """As many requests as fast as possible; yields the refused ones, which are all but those of the burst."""
    assert target.asked("GET", "/api/me", "ann").status_code == 200

    def request(number: int) -> bytes:
        forged = f"X-Forwarded-For: 10.0.{number // 256}.{number % 256}"
        more = forged if name is None else f"Authorization: Bearer {target.tokens[name]}"
        return f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{target.port}\r\n{more}\r\n\r\n".encode()

    started = time.monotonic()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = list(pool.map(lambda number: target.sent(request(number)), range(FLOOD)))
        assert target.asked("GET", "/api/me", "ann").status_code == 200  # others are served
    refused = [each for each in found if each[0] == 429]
    # Requests that arrive together are let in before the first of them is counted.
    assert FLOOD - len(refused) <= (5 + time.monotonic() - started) * RATE + AT_ONCE
    for status, headers, body in refused:
        assert int(headers["retry-after"]) >= 1
        assert json.loads(body)["code"] == "too_many"
        yield status, detail(body)


def flood_of_a_labeller(target: Target) -> Iterator[Answer]:
    return flood(target, "dan", "/api/me")


def flood_of_strangers(target: Target) -> Iterator[Answer]:
    return flood(target, None, "/healthz")


# As in the document; floods come last, for they use up what an address may ask.
ATTEMPTS: Mapping[str, Callable[[Target], Iterator[Answer]]] = {
    "a task that somebody else got": anothers_task,
    "undoing somebody else's judgement": anothers_judgement,
    "a revoked link, an invented one, none, a token in a cookie or in the address": invalid_links,
    "a forged `Origin`, a request of another web page": forged_origins,
    "a form of another web page": forms,
    "HTML and scripts in prompts and replies": scripts,
    "an answer of 10 MB, with and without its length": long_answers,
    "10 MB of headers": long_headers,
    "paths: `..`, `%2e%2e`, `%2f`, `%00`, absolute addresses": paths,
    "what is no HTTP": no_http,
    "1,000 requests a second of one labeller": flood_of_a_labeller,
    "1,000 requests a second without a link, each with another `X-Forwarded-For`": flood_of_strangers,
}


def documented() -> dict[str, str]:
    section = DOCUMENT.read_text(encoding="utf-8").partition("| attempt | answer |")[2].partition("\n\n")[0]
    return dict(re.findall(r"^\| (.+) \| (\d.+) \|$", section, re.MULTILINE))


def test_the_document_lists_all_attempts() -> None:
    assert list(documented()) == list(ATTEMPTS)


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_an_attempt_is_answered_as_documented_and_the_service_lives(target: Target, attempt: str) -> None:
    status, _, text = documented()[attempt].partition(": ")
    found = list(ATTEMPTS[attempt](target))
    assert found
    assert [
        each for each in found if str(each[0]) != status[:3] or not each[1].startswith(text.partition(";")[0])
    ] == []
    assert target.is_well()
