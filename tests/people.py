"""Simulated people who judge over a labelling service's HTTP interface: a gold score with noise.

What somebody answers depends on their name and on the texts, never on the time or on the order of the tasks.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from actors.rewards.gold import vader_positivity
from jobs.services.labelling import people
from jobs.services.labelling.store import Store
from tests.deadlines import scaled

Gold = Callable[[str, str, dict[str, Any]], float]


class Labeller(threading.Thread):
    """Claims tasks and answers them until `end`. A request that gets no answer is sent again, and every fifth judgement
    is sent twice.

    Attributes:
        answered: number of tasks whose judgement was confirmed.
        failures: requests without an answer.
    """

    def __init__(
        self, name: str, address: str, token: str, *, gold: Gold, noise_std: float, pause_s: float = 0.0
    ) -> None:
        super().__init__(name=name, daemon=True)
        self._client = httpx.Client(base_url=address, headers={"Authorization": f"Bearer {token}"}, timeout=scaled(20))
        self._gold, self._noise_std, self._pause_s = gold, noise_std, pause_s
        self._ended = threading.Event()
        self.answered = self.failures = 0

    def run(self) -> None:
        number = 0
        while not self._ended.is_set():
            task = self._post("/api/next", {}).get("task")
            if task is None:
                self._ended.wait(0.2)
                continue
            ranks = ranks_of(self.name, task["messages"], task["replies"], gold=self._gold, noise_std=self._noise_std)
            answer = {"kind": "rank", "ranks": ranks}
            body = {"id": f"{self.name}-{random.getrandbits(64):016x}", "showing": task["showing"], "seconds": 1.0}
            number += 1
            for _ in range(1 + (number % 5 == 0)):
                self._post("/api/judgements", {**body, "answer": answer})
            self.answered += 1
            self._ended.wait(self._pause_s)

    def end(self) -> None:
        self._ended.set()
        self.join()
        self._client.close()

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        while not self._ended.is_set():
            try:
                answer = self._client.post(path, json=body)
            except httpx.HTTPError:
                self.failures += 1
                self._ended.wait(0.1)
                continue
            if answer.status_code == 429 or answer.status_code >= 500:
                self._ended.wait(0.2)
                continue
            found: dict[str, Any] = answer.raise_for_status().json()
            return found
        return {}


def ranks_of(
    name: str, messages: Sequence[dict[str, Any]], replies: Sequence[str], *, gold: Gold, noise_std: float
) -> list[int]:
    """The rank of each reply, 1 is the best."""
    prompt = messages[-1]["content"]
    noisy = [
        gold(prompt, reply, {}) + random.Random("\x1f".join((name, str(messages), reply))).gauss(0.0, noise_std)
        for reply in replies
    ]
    order = sorted(range(len(replies)), key=lambda place: (-noisy[place], replies[place]))
    return [order.index(place) + 1 for place in range(len(replies))]


@contextmanager
def labellers(
    store: Path,
    address: str,
    names: Sequence[str],
    *,
    gold: Gold = vader_positivity,
    noise_std: float = 0.1,
    pause_s: float = 0.0,
) -> Iterator[list[Labeller]]:
    """People at work, who wait for the service while it is away. They get new links."""
    with_store = Store(str(store))
    with with_store.writing() as connection:
        tokens = {name: people.invite(connection, name) for name in names}
    with_store.close()
    found = [
        Labeller(name, address, token, gold=gold, noise_std=noise_std, pause_s=pause_s)
        for name, token in tokens.items()
    ]
    for each in found:
        each.start()
    try:
        yield found
    finally:
        for each in found:
            each.end()


def until(holds: Callable[[], object], *, within_s: float, what: str) -> None:
    """Waits until `holds()` is true."""
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not within {within_s:.0f} s"
        time.sleep(0.05)
