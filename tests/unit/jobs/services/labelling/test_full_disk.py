"""A store on a disk that becomes full between judgements. Needs root, to mount a small disk."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select

from jobs.services.labelling.store import Store
from jobs.services.labelling.tables import judgements
from tests.deadlines import scaled
from tests.unit.jobs.services.labelling.filled import fill, invited, ranking
from tests.unit.jobs.services.labelling.running import free_port, service, until_healthy


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "labels", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs root, and the right to mount a disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def occupied(disk: Path) -> Path:
    """A file that takes all that is free."""
    filler = disk / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as stream:
        while True:
            stream.write(b"x" * 4096)
    return filler


class Ann:
    def __init__(self, port: int, token: str) -> None:
        headers = {"Authorization": f"Bearer {token}"}
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=scaled(20))

    def task(self) -> dict[str, Any]:
        """An answer to the next task."""
        showing = self.sent("/api/next", {}).json()["task"]["showing"]
        return ranking(showing, [1, 2, 3, 4], f"answer-{showing}")

    def sent(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return self._client.post(path, json=body)

    def num_done(self) -> int:
        return int(self._client.get("/api/me").json()["done"])


def test_a_full_disk_is_said_loses_nothing_and_work_continues_when_there_is_room(disk: Path) -> None:
    file = disk / "labels.db"
    with closing(Store(str(file))) as store:
        fill(store, num=100)
        token = invited(store, "ann")
    port = free_port()
    ann = Ann(port, token)
    with service(file, port) as process:
        until_healthy(port, process)
        bodies = [ann.task()]
        assert ann.sent("/api/judgements", bodies[0]).status_code == 200
        bodies.append(ann.task())
        filler = occupied(disk)
        for _ in range(3):
            refused = ann.sent("/api/judgements", bodies[1])
            assert refused.status_code == 507
            assert refused.json()["detail"] == f"{file} is full; free space on its disk."
        assert ann.sent("/api/next", {}).status_code == 507
        assert ann.num_done() == 1
    with service(file, port) as process:  # it was killed, and starts on the full disk
        until_healthy(port, process)
        assert ann.sent("/api/judgements", bodies[1]).status_code == 507
        assert ann.num_done() == 1
        filler.unlink()
        assert ann.sent("/api/judgements", bodies[1]).json()["new"]
        bodies.append(ann.task())
        assert ann.sent("/api/judgements", bodies[2]).json()["new"]
    with closing(Store(str(file))) as store, store.reading() as connection:
        stored = connection.scalars(select(judgements.c.client_id).order_by(judgements.c.seq))
        assert list(stored) == [body["id"] for body in bodies]
