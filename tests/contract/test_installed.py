"""Our use of Ray and DeepSpeed, internals included, fits the installed releases, which are those of both locks."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.contract.contract import Contract, users
from tests.contract.fetch import ROOT, locked
from tests.contract.world import OURS, World

SOURCES = ("actors", "benchmarks", "jobs", "orchestrator", "tests/gpu", "tests/k8s")


@pytest.mark.parametrize(
    ("library", "expected"),
    [
        (
            "deepspeed",
            {
                "deepspeed.runtime.engine.DeepSpeedEngine.backward(_, scale_wrt_gas=)",
                "deepspeed.ops.__compatible_ops__",
                "actors.models.safe_loading.SafeCheckpointEngine.load overrides "
                "deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine.TorchCheckpointEngine.load",
            },
        ),
        (
            "ray",
            {
                "ray._raylet.AuthenticationTokenLoader",
                "ray._private.services.canonicalize_bootstrap_address_or_die(_)",
                "ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(_, soft=)",
            },
        ),
    ],
)
def test_all_that_we_use_is_there_and_as_we_use_it(library: str, expected: set[str]) -> None:
    spec = find_spec(library)
    assert spec is not None and spec.origin is not None
    folders = {**dict.fromkeys(OURS, ROOT), library: Path(spec.origin).parents[1]}
    found = Contract(World(folders, installed=[library]), library).check(users(ROOT, SOURCES, library))
    assert not found.problems
    assert expected <= found.uses


@pytest.mark.parametrize("library", ["deepspeed", "ray", "transformers", "torch"])
def test_gpu_machines_get_the_release_that_is_tested(library: str) -> None:
    assert version(library).partition("+")[0] == locked(library)[0]
