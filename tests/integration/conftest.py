from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

from tests.deadlines import scaled

SCENARIO_S = scaled(150)


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
