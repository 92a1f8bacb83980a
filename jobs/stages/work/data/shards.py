"""Work of a stage in shards: finished ones are kept next to its artifact, so that an attempt continues."""

from __future__ import annotations

import shutil
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from actors.groups.group import ActorGroup
from orchestrator.concurrency import together
from orchestrator.config.config import Config
from orchestrator.run.lineage import config_digest
from orchestrator.run.storage import replacing, writing


class ShardFiles:
    """Parquet files of finished shards of one artifact. Deletes the work of another config.

    All methods raise StorageError.
    """

    def __init__(self, config: Config, output: Path) -> None:
        self._output = output
        self._work = output.with_name(f".{output.name}.work")
        self._folder = self._work / config_digest(config)[:16]
        with writing(self._work):
            for other in self._work.glob("*"):
                if other != self._folder:
                    shutil.rmtree(other, ignore_errors=True)
            self._folder.mkdir(parents=True, exist_ok=True)

    def missing(self, count: int) -> list[int]:
        if self._output.exists():
            return []
        return [number for number in range(count) if not self._path(number).exists()]

    def write(self, number: int, table: pa.Table) -> None:
        with replacing(self._path(number)) as temporary:
            pq.write_table(table, temporary, compression="zstd")

    def finish(self, count: int) -> pa.Table:
        """Writes all shards to the artifact, in order, and returns them."""
        if self._output.exists():
            return pq.read_table(self._output)
        table = pa.concat_tables(pq.read_table(self._path(number)) for number in range(count))
        with replacing(self._output) as temporary:
            pq.write_table(table, temporary, compression="zstd")
        shutil.rmtree(self._work, ignore_errors=True)
        return table

    def _path(self, number: int) -> Path:
        return self._folder / f"shard-{number:06d}.parquet"


async def spread(group: ActorGroup, numbers: Sequence[int], work: Callable[[int, int], Awaitable[None]]) -> None:
    """Assigns the next number to each free replica: `work(replica, number)`."""
    pending = iter(numbers)

    async def drive(replica: int) -> None:
        for number in pending:
            await work(replica, number)

    await together(drive(replica) for replica in range(len(group)))
