from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray

from tests.deadlines import scaled
from tests.tiny import tiny_llama

SCENARIO_S = scaled(150)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a Ray cluster of two CPUs."""
    folder = Path("/tmp") / f"pl{os.getpid()}"
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        _temp_dir=str(folder),
        log_to_driver=False,
        object_store_memory=100_000_000,
    )
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def apart() -> Iterator[Callable[..., Any]]:
    """Runs a function of engine_scenarios in a fresh process that the tests of one module share."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:

        def run(scenario: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
            return pool.submit(scenario, *arguments, **options).result(timeout=SCENARIO_S)

        yield run
        # Each engine takes seconds to shut down, and this process is no longer needed.
        pool.submit(os._exit, 0)
