"""Deadlines of tests: written for two recent, quiet cores and scaled on slower or busier machines.

The factor is measured once per pytest session, from a fixed amount of work and the machine's load, and passed to child
processes through the environment. RLHF_TEST_PATIENCE=3 sets it manually.
"""

from __future__ import annotations

import os
from functools import cache
from time import perf_counter

import numpy as np

from orchestrator.config.sections import DeadlinesConfig

VARIABLE = "RLHF_TEST_PATIENCE"
LARGEST = 10.0
QUIET_PROBE_S = 0.03  # one core of a Xeon with AMX, quiet
MIN_FACTOR = 1.5  # load may increase later


def scaled(quiet_s: float) -> float:
    """Scales a deadline that is ample on a quiet machine to this machine."""
    return quiet_s * patience()


def of_a_run() -> dict[str, float]:
    """The config section `deadlines` for runs of tests: the defaults, scaled to this machine."""
    return {name: scaled(seconds) for name, seconds in DeadlinesConfig().model_dump().items()}


@cache
def patience() -> float:
    """The factor by which this machine, under its current load, may be slower than a quiet one; at least 1."""
    given = os.environ.get(VARIABLE)
    if given is None:
        given = os.environ[VARIABLE] = f"{_measured():.2f}"
    return max(1.0, float(given))


def _measured() -> float:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    waiting = os.getloadavg()[0] / cores
    slower = min(_probe_s() for _ in range(3)) / QUIET_PROBE_S
    return min(LARGEST, max(MIN_FACTOR, slower * max(1.0, waiting)))


def _probe_s() -> float:
    """Interpreter work and small matrix products, typical of the suite; about 0.05 s."""
    started = perf_counter()
    counts: dict[int, int] = {}
    for number in range(200_000):
        counts[number % 997] = counts.get(number % 997, 0) + number
    vector = np.ones((64, 64), np.float32)
    for _ in range(200):
        vector = vector @ vector / 64
    return perf_counter() - started
