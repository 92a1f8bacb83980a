"""A Ray cluster of one test module, on this machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray


@contextmanager
def local_ray(prefix: str, *, num_cpus: int = 2) -> Iterator[str]:
    """Its address.

    Args:
        prefix: of the folder under /tmp; Ray's socket paths must be short.
    """
    temporary = Path("/tmp") / f"{prefix}{os.getpid()}"
    ray.init(
        num_cpus=num_cpus,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=200_000_000,
        _temp_dir=str(temporary),
    )
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()
        shutil.rmtree(temporary, ignore_errors=True)
