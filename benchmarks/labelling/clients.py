"""Simulated labellers as HTTP clients of a service. Each asks for a task, ranks the replies and sends the answer."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import httpx

from benchmarks.labelling.minds import Mind

_HALF_OF_PACED = 0.5  # of the time between two judgements


@dataclass
class Times:
    """Seconds of requests by path, and when each judgement was confirmed."""

    requests: dict[str, list[float]] = field(default_factory=lambda: {"next": [], "judgements": []})
    confirmed: list[float] = field(default_factory=list)

    def per_second(self) -> float:
        return (len(self.confirmed) - 1) / (max(self.confirmed) - min(self.confirmed))


async def label(
    address: str,
    tokens: Mapping[str, str],
    minds: Sequence[Mind],
    scores: Sequence[Sequence[float]],
    *,
    every_s: float = 0.0,
    limit: int | None = None,
) -> Times:
    """All labellers at once, until there are no tasks, or each has given `limit` judgements.

    Args:
        tokens: by name of the mind.
        scores: true ones by item; a reply's text ends with the numbers of its item and itself.
        every_s: seconds between two judgements of a labeller; 0: as fast as the service.
    """
    times = Times()
    await asyncio.gather(
        *(
            _label(address, tokens[mind.name], mind, scores, times, every_s, number * every_s / len(minds), limit)
            for number, mind in enumerate(minds)
        )
    )
    return times


async def _label(
    address: str,
    token: str,
    mind: Mind,
    scores: Sequence[Sequence[float]],
    times: Times,
    every_s: float,
    delay_s: float,
    limit: int | None,
) -> None:
    headers = {"Authorization": f"Bearer {token}"}
    count, started = 0, perf_counter() + delay_s
    async with httpx.AsyncClient(base_url=address, headers=headers, timeout=60.0) as client:
        while limit is None or count < limit:
            await asyncio.sleep(max(0.0, started + count * every_s - perf_counter()))
            task = (await _send(client, "next", {}, times))["task"]
            if task is None:
                return
            await asyncio.sleep(_HALF_OF_PACED * every_s)
            body = {
                "id": f"answer-{task['showing']}",
                "showing": task["showing"],
                "seconds": every_s,
                "answer": {"kind": "rank", "ranks": _ranks(mind, task["replies"], scores)},
            }
            await _send(client, "judgements", body, times)
            times.confirmed.append(perf_counter())
            count += 1


async def _send(client: httpx.AsyncClient, path: str, body: Any, times: Times) -> Any:
    started = perf_counter()
    answer = await client.post(f"/api/{path}", json=body)
    times.requests[path].append(perf_counter() - started)
    answer.raise_for_status()
    return answer.json()


def _ranks(mind: Mind, replies: Sequence[str], scores: Sequence[Sequence[float]]) -> list[int]:
    """By place."""
    numbers = [reply.split()[-2:] for reply in replies]
    item, order = int(numbers[0][0]), [int(reply) for _, reply in numbers]
    ranks = mind.ranks(item, scores[item], order)
    return [ranks[reply] for reply in order]


def reply_text(item: int, reply: int) -> str:
    return f"An answer of some length, as a model may give it, to question {item} {reply}"
