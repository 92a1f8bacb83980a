"""The trainer's side of a publish: the policy sends its weights bucket by bucket."""

from __future__ import annotations

from collections.abc import Iterator

from actors.roles.policy import PolicyWorker
from actors.weights.manifest import Bucket, WeightHeader, pack, plan
from orchestrator.errors import PublishError


class PublishingPolicy(PolicyWorker):
    """A policy rank that can publish. All ranks make the same calls, because ZeRO-3 gathers each tensor together."""

    _buckets: Iterator[Bucket] | None = None

    def begin_publish(self, bucket_bytes: int) -> WeightHeader:
        """Restarts with the current weights, without gathering them yet."""
        header = plan(self.learner.weight_specs(), bucket_bytes)
        self._buckets = pack(header, self.full_weights())
        return header

    def next_bucket(self) -> Bucket | None:
        """The next bucket, on rank 0; other ranks only take part in the collectives.

        Raises:
            PublishError: there are no more buckets.
        """
        bucket = next(self._buckets, None) if self._buckets else None
        if bucket is None:
            raise PublishError("no bucket is left; call begin_publish first.")
        return bucket if self.group.rank == 0 else None
