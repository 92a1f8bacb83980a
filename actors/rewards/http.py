"""Rewards from an endpoint.

POST {"samples": [{"prompt": text, "response": text, "meta": object}, ...]}
->   {"rewards": [number or null, ...]}     as many, in order; null: this sample could not be scored
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import httpx
import pyarrow as pa

from actors.rewards import Score, is_number, samples
from orchestrator.errors import ConfigError, RewardError

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0
_TOO_MANY_REQUESTS = 429


class HttpReward:
    """Args:
        url: http:// or https://.
        timeout_s: time to connect, and for each pause in sending or receiving.
        retries: further tries after a refused or lost connection, a time-out, a 5xx or a 429.
        first_pause_s: pause before the second try; doubles up to half a minute.

    Raises:
        ConfigError: not an http address.
    """

    def __init__(self, url: str, *, timeout_s: float, retries: int, first_pause_s: float = _FIRST_PAUSE_S) -> None:
        try:
            address = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise ConfigError(f"reward.http.url={url!r} is no address: {error}.") from None
        if address.scheme not in ("http", "https") or not address.host:
            raise ConfigError(f"reward.http.url={url!r} must start with http:// or https:// and a host.")
        self._url, self._retries, self._first_pause_s = url, retries, first_pause_s
        self._client = httpx.Client(timeout=timeout_s)

    def scores(self, table: pa.Table) -> list[Score]:
        """Raises RewardError naming the address and the cause when the endpoint gives no usable answer."""
        body = {"samples": [asdict(sample) for sample in samples(table)]}
        rewards = self._rewards(self._post(body), table.num_rows)
        return [_score(reward) for reward in rewards]

    def _post(self, body: dict[str, Any]) -> httpx.Response:
        for attempt in range(self._retries + 1):
            if attempt:
                time.sleep(min(self._first_pause_s * 2 ** (attempt - 1), _LONGEST_PAUSE_S))
            try:
                response = self._client.post(self._url, json=body)
            except httpx.RequestError as error:
                cause = f"{type(error).__name__}: {error}"
                continue
            if response.is_success:
                return response
            cause = f"HTTP {response.status_code} {response.reason_phrase}: {response.text[:200]!r}"
            if not response.is_server_error and response.status_code != _TOO_MANY_REQUESTS:
                raise RewardError(f"reward endpoint {self._url} refused the request ({cause}). Check the address.")
        raise RewardError(
            f"reward endpoint {self._url} gave no answer in {self._retries + 1} tries; the last one: {cause}. Check "
            "that it runs and can be reached from the reward workers, or raise reward.http.retries or timeout_s."
        )

    def _rewards(self, response: httpx.Response, count: int) -> list[Any]:
        try:
            answer = response.json()
        except ValueError:
            raise RewardError(f"reward endpoint {self._url} answered no JSON: {response.text[:200]!r}.") from None
        rewards = answer.get("rewards") if isinstance(answer, dict) else None
        if not isinstance(rewards, list) or len(rewards) != count:
            found = f"{len(rewards)} rewards" if isinstance(rewards, list) else repr(answer)[:200]
            raise RewardError(
                f"reward endpoint {self._url} must answer {{'rewards': [...]}} with {count} items, one per sample; it "
                f"answered {found}."
            )
        return rewards


def _score(reward: Any) -> Score:
    if reward is None:
        return Score(None, error="the reward endpoint answered null")
    if not is_number(reward):
        return Score(None, error=f"the reward endpoint answered {str(reward)[:80]!r}, not a finite number")
    return Score(float(reward), {"http": float(reward)})
