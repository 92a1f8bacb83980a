"""Our use of vLLM fits the wheel that the lock of GPU machines pins, whose Python files are read and not imported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import vllm

from tests.contract.contract import Contract, Report, users
from tests.contract.fetch import ROOT, locked, python_files
from tests.contract.world import OURS, World

WORKERS = ("vllm.v1.worker.gpu_worker.Worker", "vllm.v1.worker.cpu_worker.CPUWorker")
SOURCES = ("actors", "benchmarks", "jobs", "orchestrator", "tests/gpu")


def report(folder: Path) -> Report:
    folders: Mapping[str, Path] = {**dict.fromkeys(OURS, ROOT), "vllm": folder}
    return Contract(World(MappingProxyType(folders)), "vllm", workers=WORKERS).check(users(ROOT, SOURCES, "vllm"))


@pytest.fixture(scope="module")
def on_gpus() -> Report:
    return report(python_files("vllm"))


def test_both_locks_pin_the_same_vllm() -> None:
    assert vllm.__version__.partition("+")[0] == locked("vllm")[0]


def test_all_that_we_use_of_vllm_is_in_the_gpu_wheel(on_gpus: Report) -> None:
    assert not on_gpus.problems


def test_what_we_use_of_vllm_was_found(on_gpus: Report) -> None:
    """One of each kind: an import, an attribute, a call whose keywords are passed on, an override, a remote call."""
    uses = on_gpus.uses
    assert "vllm.LLM" in uses
    assert "vllm.outputs.CompletionOutput.token_ids" in uses
    assert any(use.startswith("vllm.entrypoints.llm.LLM(") and "max_num_batched_tokens=" in use for use in uses)
    assert any("BucketTransferEngine.receive_weights overrides" in use for use in uses)
    assert any(use.startswith(f"{WORKERS[0]}.init_weight_transfer_engine(") for use in uses)


def test_the_code_that_we_use_is_the_same_on_the_cpu(on_gpus: Report) -> None:
    """So what the tests show on the CPU, they show for the code that runs on a GPU."""
    on_cpu = report(Path(vllm.__file__).parents[1])
    assert not on_cpu.problems
    assert on_cpu.uses == on_gpus.uses
    differ = {name for name, text in on_gpus.definitions.items() if on_cpu.definitions.get(name) != text}
    assert len(on_gpus.definitions) > 30
    assert not differ
