"""A service that is killed while judgements are sent: each that was confirmed is there, and each is there once."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import httpx
from sqlalchemy import select

from jobs.services.labelling.tables import judgements
from tests.deadlines import scaled
from tests.unit.jobs.services.labelling.filled import filled, invited, ranking
from tests.unit.jobs.services.labelling.running import free_port, service, until_healthy

NUM_JUDGEMENTS, NUM_KILLS, NUM_LABELLERS = 150, 3, 3


class Labeller(threading.Thread):
    """Answers tasks until there are none, and sends everything again until there is a reply, as the page does."""

    def __init__(self, port: int, token: str) -> None:
        super().__init__(daemon=True)
        self.confirmed: list[str] = []
        self._client = httpx.Client(
            base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {token}"}, timeout=scaled(20)
        )

    def run(self) -> None:
        with self._client:
            while task := self.sent("/api/next", {})["task"]:
                identity = f"answer-{task['showing']}"
                self.sent("/api/judgements", ranking(task["showing"], [1, 2, 3, 4], identity))
                self.confirmed.append(identity)

    def sent(self, path: str, body: object) -> dict[str, dict[str, str]]:
        while True:
            try:
                found = self._client.post(path, json=body)
            except httpx.TransportError:
                time.sleep(0.02)
                continue
            assert found.status_code == 200, found.text
            return dict(found.json())


def test_no_judgement_is_lost_or_counted_twice_when_the_service_is_killed(tmp_path: Path) -> None:
    store = filled(tmp_path, num=NUM_JUDGEMENTS)
    tokens = [invited(store, f"labeller {number}") for number in range(NUM_LABELLERS)]
    port = free_port()
    labellers = [Labeller(port, token) for token in tokens]
    kills = 0
    while kills <= NUM_KILLS:
        with service(tmp_path / "labels.db", port) as process:
            until_healthy(port, process)
            if kills == 0:
                for labeller in labellers:
                    labeller.start()
            if kills == NUM_KILLS:
                for labeller in labellers:
                    labeller.join(scaled(60))
                    assert not labeller.is_alive()
                process.send_signal(signal.SIGTERM)
                assert process.wait(scaled(20)) == 0
            else:
                target = (kills + 1) * NUM_JUDGEMENTS // (NUM_KILLS + 1)
                while sum(len(labeller.confirmed) for labeller in labellers) < target:
                    assert any(labeller.is_alive() for labeller in labellers)
                    time.sleep(0.002)
                process.kill()
                process.wait()
        kills += 1
    with store.reading() as connection:
        rows = connection.execute(select(judgements.c.client_id, judgements.c.item)).all()
    confirmed = [identity for labeller in labellers for identity in labeller.confirmed]
    assert sorted(row.client_id for row in rows) == sorted(confirmed)
    assert len(confirmed) == len({row.item for row in rows}) == NUM_JUDGEMENTS
