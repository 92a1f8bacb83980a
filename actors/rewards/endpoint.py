"""A client of one HTTP endpoint that answers JSON. Responses are limited in time and in size, before and after
decompression."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import re
import zlib
from pathlib import Path
from time import monotonic
from typing import Any

import httpx

from orchestrator.config.rewards import EndpointConfig
from orchestrator.data.inputs import read_text
from orchestrator.errors import ConfigError, RewardError

FIRST_PAUSE_S = 0.5
ANSWER_BYTES = 1 << 20
_LONGEST_PAUSE_S = 30.0
_TOO_MANY_REQUESTS = 429
_ABOUT_THE_BODY = (400, 413, 422)  # the statuses of a request that is too long, for example
_TOKEN = re.compile(r"[!-~]+")
_ANY_ZLIB = 47  # zlib's wbits: gzip or zlib, by its header


class RequestRefusedError(RewardError):
    """The endpoint refuses the content of one request; others may succeed."""


class Endpoint:
    """Uses the proxy of the environment except for loopback addresses. Reads the token for each request, so it may
    change. Retries after a refused or lost connection, a time-out, a 5xx or a 429.

    Args:
        section: its section in the config, for messages.
        path: appended to the path of the URL, if it does not end with it.
        first_pause_s: pause before the second try; doubles up to 30 s.

    Raises:
        ConfigError: the URL is not an http address, or `token_from` yields no token.
    """

    def __init__(
        self, endpoint: EndpointConfig, *, section: str = "reward", path: str = "", first_pause_s: float = FIRST_PAUSE_S
    ) -> None:
        url, self._section = endpoint.url, section
        try:
            address = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise ConfigError(f"{section}.url={url!r} is not a URL: {error}.") from None
        if address.scheme not in ("http", "https") or not address.host:
            raise ConfigError(f"{section}.url={url!r} must start with http:// or https:// and a host.")
        if path:
            address = address.copy_with(path=address.path.rstrip("/").removesuffix(path) + path)
        self.url, self._retries, self._first_pause_s = str(address) if path else url, endpoint.retries, first_pause_s
        self._timeout_s, self._token_from = endpoint.timeout_s, endpoint.token_from
        self._headers()
        self._context = httpx.create_ssl_context()
        self._uses_proxies = not _is_loopback(address.host)

    async def ask(self, question: Any, until: float, most_bytes: int = ANSWER_BYTES) -> Any:
        """The answer to a question, both as JSON.

        Args:
            until: deadline of all tries and pauses on the monotonic clock.

        Raises:
            RewardError: no answer, or none that can be used; names the address and the cause.
        """
        # Not serialised by httpx, which rejects NaN and lone surrogates in metadata.
        text = await self._post(json.dumps(question).encode(), until, most_bytes)
        try:
            # parse_int: json.loads would fail on integers of more than 4300 digits.
            return json.loads(text, parse_int=float, object_pairs_hook=_unambiguous)
        except (ValueError, RecursionError) as error:
            fault = f" ({error})" if isinstance(error, _TwiceError) else ""
            raise RewardError(f"reward endpoint {self.url} did not answer JSON{fault}: {_shown(text)}.") from None

    async def _post(self, body: bytes, until: float, most_bytes: int) -> bytes:
        tries = 0
        while True:
            pause = min(self._first_pause_s * 2 ** (tries - 1), _LONGEST_PAUSE_S) if tries else 0.0
            if tries > self._retries or (tries and monotonic() + pause >= until):
                break
            await asyncio.sleep(pause)
            tries += 1
            try:
                async with asyncio.timeout(min(self._timeout_s, until - monotonic())):
                    status, answer = await self._once(body, most_bytes)
            except TimeoutError:
                cause = f"ReadTimeout: no complete answer within {self._timeout_s:g} s"
                continue
            except httpx.RequestError as error:
                cause = f"{type(error).__name__}: {error}"
                continue
            if status.is_success:
                return answer
            cause = f"HTTP {status.status_code} {status.reason_phrase}: {_shown(answer)}"
            if status.has_redirect_location:
                cause = f"HTTP {status.status_code}, redirect to {status.headers['location'][:200]!r}"
            if not status.is_server_error and status.status_code != _TOO_MANY_REQUESTS:
                refused = RequestRefusedError if status.status_code in _ABOUT_THE_BODY else RewardError
                raise refused(f"reward endpoint {self.url} refused the request ({cause}). Check the address.")
        raise RewardError(
            f"reward endpoint {self.url} gave no answer in {tries} tries; the last one: {cause}. Check that "
            f"it runs and is reachable from this node, or raise {self._section}.retries or timeout_s."
        )

    async def _once(self, body: bytes, most_bytes: int) -> tuple[httpx.Response, bytes]:
        async with (
            httpx.AsyncClient(timeout=self._timeout_s, verify=self._context, trust_env=self._uses_proxies) as client,
            client.stream("POST", self.url, content=body, headers=self._headers()) as response,
        ):
            encoding = response.headers.get("content-encoding", "identity").strip().lower()
            if encoding not in ("identity", "gzip", "x-gzip", "deflate"):
                raise RewardError(
                    f"reward endpoint {self.url} compresses its answer with {encoding[:40]!r}, but the request asked "
                    "for none. Turn compression off, or use gzip."
                )
            unpacker = None if encoding == "identity" else zlib.decompressobj(_ANY_ZLIB)
            answer = b""
            async for chunk in response.aiter_raw():
                try:
                    answer += chunk if unpacker is None else unpacker.decompress(chunk, most_bytes + 1 - len(answer))
                except zlib.error as error:
                    raise httpx.DecodingError(str(error)) from None
                if len(answer) > most_bytes:
                    raise RewardError(
                        f"reward endpoint {self.url} answered more than {most_bytes} bytes, HTTP "
                        f"{response.status_code}: {_shown(answer)}. Expected a short answer."
                    )
            return response, answer

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        return headers | (
            {"Authorization": f"Bearer {_token(self._token_from, self._section)}"} if self._token_from else {}
        )


def _token(source: str, section: str) -> str:
    kind, _, name = source.partition(":")
    if kind == "env":
        token = os.environ.get(name, "")
    else:
        token = read_text(Path(name), f"{section}.token_from={source}", ConfigError)
    if not _TOKEN.fullmatch(token.strip()):
        raise ConfigError(
            f"{section}.token_from={source} yields no token (one line of printable characters) on this node. Set the "
            "variable, or write the file, on every node that sends requests."
        )
    return token.strip()


class _TwiceError(ValueError):
    pass


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _TwiceError("an object with a duplicate key")
    return found


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None) or address
    return bool(mapped.is_loopback or mapped.is_unspecified)


def _shown(text: bytes) -> str:
    return repr(text[:200].decode("utf-8", errors="replace"))
