"""vLLM samples on a GPU as its contract says. Its model runner there is another than on CPUs, so nothing that tests
show of sampling on the CPU holds for it."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.types import Sampling
from tests.gpu import scenarios
from tests.integration.engine_scenarios import reference_logprobs, served_llama, shard

Apart = Callable[..., Any]
CLOSE = 0.02  # mean difference of log-probs in bf16 from those in fp32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served_llama(tmp_path_factory.mktemp("llama") / "model", tied=True, dtype=torch.bfloat16)


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_log_probs_of_samples_are_those_of_transformers_at_the_sampling_temperature(
    apart: Apart, folder: Path, temperature: float
) -> None:
    request = shard(sampling=Sampling(temperature=temperature, max_new_tokens=24))
    (rows,) = apart(scenarios.sampled, folder, [request])
    told = np.concatenate([row["engine_logprobs"] for row in rows])
    at = {each: np.concatenate(reference_logprobs(folder, rows, each)) for each in (temperature, 1.0)}
    assert np.abs(told - at[temperature]).mean() < CLOSE
    assert np.abs(told - at[1.0]).mean() > 2 * CLOSE


def test_equal_seeds_give_equal_samples_in_any_order(apart: Apart, folder: Path) -> None:
    request = shard(sampling=Sampling(temperature=1.3, max_new_tokens=24))
    shuffled = dataclasses.replace(request, requests=random.Random(1).sample(list(request.requests), 12))
    first, again, reordered = apart(scenarios.sampled, folder, [request, request, shuffled])
    assert first == again == reordered
    assert len({tuple(row["response_tokens"]) for row in first}) > 6
