"""What every request passes before the application sees it, and the headers of every answer (pure ASGI).

- a body is read completely, up to a limit, before it is given on
- a request that changes something must come from the service's own page, or from a program, and hold JSON
- each client has a number of requests per second; who is unknown shares a smaller one by address
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping
from time import monotonic
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 256 * 1024
_SAFE = ("GET", "HEAD")
_NEEDS_TOKEN = "/api/"
_MAX_CLIENTS = 10_000
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "x-frame-options": "DENY",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "cache-control": "no-store",
}


class Buckets:
    """Token buckets by name; the least recently used ones are forgotten.

    Args:
        rate: requests per second.
        burst: requests at once.
    """

    def __init__(self, rate: float, burst: float) -> None:
        self._rate, self._burst = rate, burst
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait_s(self, name: str) -> float:
        """Seconds until `name` may make a request; 0: now."""
        return max(0.0, (1.0 - self._now(name)[0]) / self._rate)

    def take(self, name: str) -> None:
        left, now = self._now(name)
        self._left[name] = max(0.0, left - 1.0), now
        self._left.move_to_end(name)
        if len(self._left) > _MAX_CLIENTS:
            self._left.popitem(last=False)

    def _now(self, name: str) -> tuple[float, float]:
        now = monotonic()
        left, then = self._left.get(name, (self._burst, now))
        return min(self._burst, left + (now - then) * self._rate), now


class Guard:
    """Args:
    rate: requests per second of one labeller, on average.
    """

    def __init__(self, app: ASGIApp, *, rate: float = 20.0) -> None:
        self._app = app
        self._known = Buckets(rate, 5 * rate)
        self._unknown = Buckets(rate, 5 * rate)
        self._seen: OrderedDict[str, None] = OrderedDict()  # clients whose token was accepted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        client = _client(headers)
        address = (scope.get("client") or ("?",))[0]
        is_known = client in self._seen
        buckets, name = (self._known, client) if is_known else (self._unknown, address)
        sending = _with_headers(send)
        if (wait_s := buckets.wait_s(name)) > 0:
            await _refuse(sending, 429, "too many requests; the page sends again by itself.", wait_s)
            return
        buckets.take(name)
        problem = _problem(scope["method"], headers)
        if problem is not None:
            await _refuse(sending, *problem)
            return
        body = await _body(receive)
        if body is None:
            await _refuse(sending, 413, f"the request is longer than {MAX_BODY_BYTES} bytes.")
            return

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start" and client and scope["path"].startswith(_NEEDS_TOKEN):
                self._note(client, message["status"])
            await sending(message)

        await self._app(scope, _replay(body, receive), noting)

    def _note(self, client: str, status: int) -> None:
        if status == 401:
            self._seen.pop(client, None)
        elif status < 400:
            self._seen[client] = None
            self._seen.move_to_end(client)
            if len(self._seen) > _MAX_CLIENTS:
                self._seen.popitem(last=False)


def _client(headers: Mapping[str, str]) -> str:
    """A name for the sender of a token; empty without one."""
    token = headers.get("authorization", "")
    return hashlib.sha256(token.encode("latin-1")).hexdigest() if token else ""


def _problem(method: str, headers: Mapping[str, str]) -> tuple[int, str] | None:
    """Why a request is refused before its body is read."""
    if headers.get("content-length", "0").isdigit() and int(headers.get("content-length", "0")) > MAX_BODY_BYTES:
        return 413, f"the request is longer than {MAX_BODY_BYTES} bytes."
    if method in _SAFE:
        return None
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    if (origin is not None and urlsplit(origin).netloc != headers.get("host")) or site not in (
        None,
        "same-origin",
        "none",
    ):
        return 403, "the request comes from another page than this service's."
    if headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        return 415, "send JSON, with Content-Type: application/json."
    return None


async def _body(receive: Receive) -> bytes | None:
    """The whole body. None: it is too long."""
    found = bytearray()
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            break
        found += message.get("body", b"")
        if len(found) > MAX_BODY_BYTES:
            return None
        more = message.get("more_body", False)
    return bytes(found)


def _replay(body: bytes, receive: Receive) -> Receive:
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            more = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
            message = {**message, "headers": [*message.get("headers", ()), *more]}
        await send(message)

    return sending


async def _refuse(send: Send, status: int, detail: str, wait_s: float = 0.0) -> None:
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    if wait_s:
        headers.append((b"retry-after", str(max(1, round(wait_s))).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"detail": detail}).encode()})
