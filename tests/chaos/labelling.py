"""`python -m tests.chaos.labelling [--judgements 1000] [--kills 20] [--labellers 4]`: kills a labelling service while
people send judgements. Each that was confirmed must be there, and each must be there once."""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
from rich.console import Console
from sqlalchemy import func, select

from jobs.services.labelling.store import Store
from jobs.services.labelling.tables import items, judgements
from tests.deadlines import scaled
from tests.unit.jobs.services.labelling.filled import filled, invited, ranking
from tests.unit.jobs.services.labelling.running import free_port, service, until_healthy

console = Console(width=120)


class Labeller(threading.Thread):
    """Answers tasks until there are none, and sends everything again until there is a reply, as the page does."""

    def __init__(self, port: int, token: str) -> None:
        super().__init__(daemon=True)
        self.confirmed: list[str] = []
        self.num_retries = 0
        self.num_repeated = 0  # confirmed as stored before: the service had died between the commit and its reply
        self._client = httpx.Client(
            base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {token}"}, timeout=scaled(20)
        )

    def run(self) -> None:
        with self._client:
            while task := self.sent("/api/next", {})["task"]:
                identity = f"answer-{task['showing']}"
                reply = self.sent("/api/judgements", ranking(task["showing"], [1, 2, 3, 4], identity))
                self.num_repeated += not reply["new"]
                self.confirmed.append(identity)

    def sent(self, path: str, body: object) -> dict[str, dict[str, str]]:
        while True:
            try:
                found = self._client.post(path, json=body)
            except httpx.TransportError:
                self.num_retries += 1
                time.sleep(0.02)
                continue
            assert found.status_code == 200, found.text
            return dict(found.json())


@dataclass(frozen=True)
class Outcome:
    """Args:
    confirmed: ids of judgements, by those who sent them.
    stored: ids and items of judgements in the store.
    num_counted: judgements by the counts of the items.
    """

    confirmed: Sequence[str]
    stored: Sequence[tuple[str, int]]
    num_counted: int
    num_retries: int
    num_repeated: int

    def is_each_there_once(self, num_judgements: int) -> bool:
        return (
            sorted(identity for identity, _ in self.stored) == sorted(self.confirmed)
            and len({item for _, item in self.stored}) == len(self.confirmed) == self.num_counted == num_judgements
        )


def killed(folder: Path, num_judgements: int, num_kills: int, num_labellers: int) -> Outcome:
    """As many judgements, during which the service is killed, and at the end stopped."""
    store = filled(folder, num=num_judgements)
    port, draw = free_port(), random.Random(num_kills)
    labellers = [Labeller(port, invited(store, f"labeller {number}")) for number in range(num_labellers)]
    for kill in range(num_kills + 1):
        with service(folder / "labels.db", port) as process:
            until_healthy(port, process)
            if kill == 0:
                for labeller in labellers:
                    labeller.start()
            if kill < num_kills:
                wait_for(labellers, (kill + 1) * num_judgements // (num_kills + 1))
                time.sleep(draw.uniform(0, 0.02))  # any moment of a request
                process.kill()
                process.wait()
            else:
                for labeller in labellers:
                    labeller.join(scaled(60 + num_judgements / 10))
                    assert not labeller.is_alive()
                process.send_signal(signal.SIGTERM)
                assert process.wait(scaled(20)) == 0
    return outcome(store, labellers)


def wait_for(labellers: Sequence[Labeller], num_confirmed: int) -> None:
    while sum(len(labeller.confirmed) for labeller in labellers) < num_confirmed:
        assert any(labeller.is_alive() for labeller in labellers)
        time.sleep(0.002)


def outcome(store: Store, labellers: Sequence[Labeller]) -> Outcome:
    with store.reading() as connection:
        rows = connection.execute(select(judgements.c.client_id, judgements.c.item)).all()
        num_counted = connection.scalar(select(func.sum(items.c.num_judgements)))
    return Outcome(
        [identity for labeller in labellers for identity in labeller.confirmed],
        [(row.client_id, row.item) for row in rows],
        int(num_counted or 0),
        sum(labeller.num_retries for labeller in labellers),
        sum(labeller.num_repeated for labeller in labellers),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--judgements", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--labellers", type=int, default=4)
    arguments = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="labels-") as folder:
        found = killed(Path(folder), arguments.judgements, arguments.kills, arguments.labellers)
    is_good = found.is_each_there_once(arguments.judgements)
    console.print(
        f"{arguments.kills} kills, {time.monotonic() - started:.0f} s: {len(found.confirmed)} judgements confirmed, "
        f"{len(found.stored)} stored, of {len({item for _, item in found.stored})} items; {found.num_retries} requests "
        f"were sent again, {found.num_repeated} of them had been stored before"
    )
    console.print(f"each there once: {is_good}")
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
