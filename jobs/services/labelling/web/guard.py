"""What every request passes before the application sees it, and the headers of every answer (pure ASGI).

- a body is read completely, up to a limit, before it is given on
- a request that changes something must come from the service's own page, or from a program, and hold JSON
- each person has a number of requests per second; requests without a valid link share one by the address of
  the connection, whatever a header says: those that come through one proxy are one client. Files of the
  page are not counted: to send one is as cheap as to refuse it, and a page that lacks one is blank
- every answer is counted, also those that are given here
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from time import monotonic, perf_counter
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobs.services.labelling.people import token_hash
from jobs.services.labelling.refusals import Code
from jobs.services.labelling.web.meters import Meters
from orchestrator.errors import StorageError

MAX_BODY_BYTES = 256 * 1024
_MAX_DIGITS = 15  # of a body's length
_SAFE = ("GET", "HEAD")
_API, _FILES = "/api/", "/static/"
_MAX_CLIENTS = 10_000
_BURST_S, _LEAST_BURST = 5.0, 10.0  # a page that is opened asks a few things at once, however low the rate is
_FRESH_S = 1.0
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

Problem = tuple[int, Code, str]  # status, code and words of a refusal
_TOO_LONG: Problem = 413, "too_long", f"the request is longer than {MAX_BODY_BYTES} bytes."


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


class Links:
    """The valid links, as the store has them. Who they are is known before a request is let in, so nobody without a
    link uses up what the owner of one may ask, also just after a start.

    Args:
        load: hashes of all valid tokens.
    """

    def __init__(self, load: Callable[[], Collection[str]]) -> None:
        self._load = load
        self._valid: Collection[str] = ()
        self._loaded_at = -_FRESH_S
        self._lock = asyncio.Lock()

    async def holds(self, hashed: str) -> bool:
        """Whether a token is valid. Links that are made or ended elsewhere are seen after a second."""
        if hashed not in self._valid and monotonic() - self._loaded_at >= _FRESH_S:
            async with self._lock:
                if monotonic() - self._loaded_at >= _FRESH_S:
                    with suppress(StorageError):  # the answer to the request will say so
                        self._valid = await asyncio.to_thread(self._load)
                    self._loaded_at = monotonic()
        return hashed in self._valid


class Guard:
    """Args:
    rate: requests per second of one labeller, on average.
    """

    def __init__(self, app: ASGIApp, links: Links, meters: Meters, *, rate: float) -> None:
        burst = max(_BURST_S * rate, _LEAST_BURST)
        self._app, self._links, self._meters = app, links, meters
        self._known, self._unknown = Buckets(rate, burst), Buckets(rate, burst)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        sending = self._sending(send)
        if not _is_of_page(scope) and (wait_s := await self._wait_s(scope, headers)) > 0:
            await _refuse(sending, 429, "too_many", "too many requests; the page sends again by itself.", wait_s)
            return
        problem = _problem(scope["method"], headers)
        if problem is not None:
            await _refuse(sending, *problem)
            return
        body = await _body(receive)
        if body is None:
            await _refuse(sending, *_TOO_LONG)
            return
        started = perf_counter()
        await self._app(scope, _replay(body, receive), sending)
        if scope["path"].startswith(_API):
            self._meters.seconds.observe(perf_counter() - started)

    async def _wait_s(self, scope: Scope, headers: Mapping[str, str]) -> float:
        """Seconds until the sender may make this request; 0: it is let in, and counted."""
        token = token_of(headers.get("authorization", ""))
        hashed = token_hash(token) if token else ""
        is_known = bool(token) and await self._links.holds(hashed)
        address = (scope.get("client") or ("?",))[0]
        buckets, name = (self._known, hashed) if is_known else (self._unknown, address)
        wait_s = buckets.wait_s(name)
        if not wait_s:
            buckets.take(name)
        return wait_s

    def _sending(self, send: Send) -> Send:
        """Counts the answer, and adds the headers that all have."""

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._meters.requests.labels(str(message["status"])).inc()
                more = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", ()), *more]}
            await send(message)

        return sending


def token_of(authorization: str) -> str:
    """The token in a header `Authorization`; empty: there is none."""
    scheme, _, token = authorization.partition(" ")
    return token if scheme.lower() == "bearer" else ""


def _is_of_page(scope: Scope) -> bool:
    return scope["method"] in _SAFE and (scope["path"] == "/" or scope["path"].startswith(_FILES))


def _problem(method: str, headers: Mapping[str, str]) -> Problem | None:
    """Why a request is refused before its body is read."""
    length = headers.get("content-length", "0")
    if length.isdecimal() and (len(length) > _MAX_DIGITS or int(length) > MAX_BODY_BYTES):
        return _TOO_LONG
    if method in _SAFE:
        return None
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    if (origin is not None and _host_of(origin) != headers.get("host")) or site not in (None, "same-origin", "none"):
        return 403, "other_page", "the request comes from another page than this service's."
    if headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        return 415, "not_json", "send JSON, with Content-Type: application/json."
    return None


def _host_of(origin: str) -> str:
    try:
        return urlsplit(origin).netloc
    except ValueError:  # "http://["
        return ""


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


async def _refuse(send: Send, status: int, code: Code, detail: str, wait_s: float = 0.0) -> None:
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    if wait_s:
        headers.append((b"retry-after", str(max(1, round(wait_s))).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"detail": detail, "code": code}).encode()})
