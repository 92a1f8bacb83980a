"""Rewards from an HTTP endpoint.

POST {"samples": [{"prompt": text, "response": text, "meta": object}, ...]}
->   {"rewards": [number or null, ...]}     one per sample, in order; null: the sample could not be scored

Responses are limited in time and in size, before and after decompression.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import re
import zlib
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import Any

import httpx
import pyarrow as pa

from actors.rewards import RewardContext, Score, samples
from actors.rewards.rule_process import finite_number
from orchestrator.config.rewards import HttpRewardConfig
from orchestrator.data.inputs import read_text
from orchestrator.errors import ConfigError, RewardError

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0
_TOO_MANY_REQUESTS = 429
_ANSWER_BYTES, _SAMPLE_BYTES = 1 << 20, 1 << 10
_TOKEN = re.compile(r"[!-~]+")
_ANY_ZLIB = 47  # zlib's wbits: gzip or zlib, by its header


class HttpReward:
    """Uses the proxy of the environment except for loopback addresses. Reads the token for each request, so it may
    change. Retries after a refused or lost connection, a time-out, a 5xx or a 429.

    Args:
        total_s: time limit of all tries and pauses.
        first_pause_s: pause before the second try; doubles up to 30 s.

    Raises:
        ConfigError: the URL is not an http address, or `token_from` yields no token.
    """

    def __init__(
        self, reward: HttpRewardConfig, *, total_s: float = 480.0, first_pause_s: float = _FIRST_PAUSE_S
    ) -> None:
        url = reward.url
        try:
            address = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise ConfigError(f"reward.url={url!r} is not a URL: {error}.") from None
        if address.scheme not in ("http", "https") or not address.host:
            raise ConfigError(f"reward.url={url!r} must start with http:// or https:// and a host.")
        self._url, self._retries, self._first_pause_s = url, reward.retries, first_pause_s
        self._timeout_s, self._total_s = reward.timeout_s, total_s
        self._token_from = reward.token_from
        self._headers()
        self._context = httpx.create_ssl_context()
        self._uses_proxies = not _is_loopback(address.host)

    def scores(self, table: pa.Table) -> list[Score]:
        """Raises RewardError, which names the address and the cause, if the endpoint returns no usable answer."""
        # Not serialised by httpx, which rejects NaN and lone surrogates in metadata.
        body = json.dumps({"samples": [asdict(sample) for sample in samples(table)]}).encode()
        answer = asyncio.run(self._post(body, _ANSWER_BYTES + _SAMPLE_BYTES * table.num_rows))
        return [_score(reward) for reward in self._rewards(answer, table.num_rows)]

    async def _post(self, body: bytes, most_bytes: int) -> bytes:
        until = monotonic() + self._total_s
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
                raise RewardError(f"reward endpoint {self._url} refused the request ({cause}). Check the address.")
        raise RewardError(
            f"reward endpoint {self._url} gave no answer in {tries} tries; the last one: {cause}. Check that "
            "it runs and is reachable from the reward replicas, or raise reward.retries or timeout_s."
        )

    async def _once(self, body: bytes, most_bytes: int) -> tuple[httpx.Response, bytes]:
        async with (
            httpx.AsyncClient(timeout=self._timeout_s, verify=self._context, trust_env=self._uses_proxies) as client,
            client.stream("POST", self._url, content=body, headers=self._headers()) as response,
        ):
            encoding = response.headers.get("content-encoding", "identity").strip().lower()
            if encoding not in ("identity", "gzip", "x-gzip", "deflate"):
                raise RewardError(
                    f"reward endpoint {self._url} compresses its answer with {encoding[:40]!r}, but the request asked "
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
                        f"reward endpoint {self._url} answered more than {most_bytes} bytes, HTTP "
                        f"{response.status_code}: {_shown(answer)}. Expected one number per sample."
                    )
            return response, answer

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        return headers | ({"Authorization": f"Bearer {_token(self._token_from)}"} if self._token_from else {})

    def _rewards(self, text: bytes, count: int) -> list[Any]:
        try:
            # parse_int: json.loads would fail on integers of more than 4300 digits.
            answer = json.loads(text, parse_int=float, object_pairs_hook=_unambiguous)
        except (ValueError, RecursionError) as error:
            fault = f" ({error})" if isinstance(error, _TwiceError) else ""
            raise RewardError(f"reward endpoint {self._url} did not answer JSON{fault}: {_shown(text)}.") from None
        rewards = answer.get("rewards") if isinstance(answer, dict) else None
        if not isinstance(rewards, list) or len(rewards) != count:
            found = f"{len(rewards)} rewards" if isinstance(rewards, list) else repr(answer)[:200]
            raise RewardError(
                f"reward endpoint {self._url} must answer {{'rewards': [...]}} with {count} items, one per sample; "
                f"got {found}."
            )
        return rewards


def build(reward: HttpRewardConfig, context: RewardContext) -> HttpReward:
    return HttpReward(reward, total_s=context.total_s)


def _token(source: str) -> str:
    kind, _, name = source.partition(":")
    if kind == "env":
        token = os.environ.get(name, "")
    else:
        token = read_text(Path(name), f"reward.token_from={source}", ConfigError)
    if not _TOKEN.fullmatch(token.strip()):
        raise ConfigError(
            f"reward.token_from={source} yields no token (one line of printable characters) on this node. Set the "
            "variable, or write the file, on the nodes of the reward replicas."
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


def _score(reward: Any) -> Score:
    if reward is None:
        return Score(None, error="the reward endpoint answered null")
    number = finite_number(reward)
    if number is None:
        return Score(None, error=f"the reward endpoint answered {str(reward)[:80]!r}, not a finite number")
    return Score(number, {"http": number})
