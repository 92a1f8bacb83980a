"""Our use of vLLM fits the wheel that the lock of GPU machines pins, whose Python files are read and not imported."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import vllm
from vllm.config import VllmConfig

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
    """So what tests on the CPU show of it, they show for GPUs. What vLLM chooses below it differs: the model runner."""
    on_cpu = report(Path(vllm.__file__).parents[1])
    assert not on_cpu.problems
    assert on_cpu.uses == on_gpus.uses
    differ = {name for name, text in on_gpus.definitions.items() if on_cpu.definitions.get(name) != text}
    assert len(on_gpus.definitions) > 30
    assert not differ


def test_each_lock_chooses_another_model_runner() -> None:
    """By the presence of Triton, which the CPU lock leaves out. docs/gpu.md names both."""

    def choice(folder: Path) -> str:
        tree = ast.parse((folder / "vllm/config/vllm.py").read_text(encoding="utf-8"))
        return next(
            ast.unparse(node)
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef) and node.name == "use_v2_model_runner"
        )

    here, there = Path(vllm.__file__).parents[1], python_files("vllm")
    assert choice(here) == choice(there)
    assert "if not HAS_TRITON:" in choice(here)
    assert not VllmConfig().use_v2_model_runner
    for lock, runner, folder in (
        ("cpu.txt", "vllm.v1.worker.cpu_model_runner.CPUModelRunner", here),
        ("gpu.txt", "vllm.v1.worker.gpu.model_runner.GPUModelRunner", there),
    ):
        module, _, name = runner.rpartition(".")
        assert f"class {name}" in (folder / module.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8")
        has_triton = re.search(r"^triton==", (ROOT / "requirements" / lock).read_text(encoding="utf-8"), re.MULTILINE)
        assert bool(has_triton) == (lock == "gpu.txt")
        assert runner in (ROOT / "docs/gpu.md").read_text(encoding="utf-8")
