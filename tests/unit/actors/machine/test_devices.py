"""Whether torch's build, the NVIDIA driver and the devices fit; a process with GPUs does not compute without them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from actors.machine import devices
from actors.machine.devices import Build, Device, compute_device, require_usable, why_no_gpu, why_not_this
from orchestrator.errors import CapacityError

FOR_13 = Build("2.13.0", (13, 0), ("sm_75", "sm_80", "sm_90", "sm_100", "compute_120"))
ON_CPU = Build("2.13.0+cpu", None)


def device(capability: tuple[int, int]) -> Device:
    return Device("a GPU", 80 << 30, 79 << 30, capability, [])


@pytest.mark.parametrize("cuda", [(13, 0), (13, 2), (14, 1)])
def test_a_driver_runs_programs_for_its_major_release_and_for_older_ones(cuda: tuple[int, int]) -> None:
    assert why_no_gpu(FOR_13, cuda, "580.95.05") is None
    assert why_no_gpu(Build("2.13.0", (13, 2)), cuda, "580.95.05") is None


def test_a_driver_that_is_too_old_is_refused_with_the_first_that_is_not() -> None:
    reason = why_no_gpu(FOR_13, (12, 4), "550.54.15")
    assert reason is not None
    assert "torch 2.13.0 is built for CUDA 13.0" in reason
    assert "driver 550.54.15 runs programs for CUDA 12.4 and older" in reason
    assert "Install driver 580 or newer" in reason
    assert "cuda-compat-13-0" in reason


def test_a_missing_driver_and_a_build_for_cpus_are_refused() -> None:
    assert "no NVIDIA driver is visible" in str(why_no_gpu(FOR_13, None, ""))
    assert "driver 580 or newer" in str(why_no_gpu(FOR_13, None, ""))
    assert "requirements/gpu.txt" in str(why_no_gpu(ON_CPU, (13, 0), "580.95.05"))


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9), (9, 0), (10, 3), (12, 0), (13, 0)])
def test_a_device_has_code_of_its_major_release_or_code_to_compile(capability: tuple[int, int]) -> None:
    assert why_not_this(device(capability), FOR_13) is None


@pytest.mark.parametrize("capability", [(7, 0), (11, 0)])
def test_a_device_without_code_is_refused(capability: tuple[int, int]) -> None:
    reason = why_not_this(device(capability), FOR_13)
    assert f"compute capability {capability[0]}.{capability[1]}" in str(reason)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process to which Ray gave a GPU."""
    require_usable.cache_clear()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    return monkeypatch


def test_a_process_with_gpus_that_torch_cant_use_is_refused(given: pytest.MonkeyPatch) -> None:
    given.setattr(devices, "installed_build", lambda: FOR_13)
    given.setattr(devices, "driver_cuda", lambda: (12, 4))
    with pytest.raises(CapacityError, match=r"given the GPUs 3 and can't use them: .* Install driver 580 or newer"):
        compute_device()


def test_a_build_for_cpus_beside_a_driver_is_refused(given: pytest.MonkeyPatch) -> None:
    given.setattr(devices, "installed_build", lambda: ON_CPU)
    given.setattr(devices, "driver_cuda", lambda: (13, 0))
    with pytest.raises(CapacityError, match="build for CPUs"):
        require_usable()


def test_a_driver_on_which_cuda_does_not_start_is_refused(given: pytest.MonkeyPatch) -> None:
    given.setattr(devices, "installed_build", lambda: FOR_13)
    given.setattr(devices, "driver_cuda", lambda: (13, 0))
    given.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CapacityError, match="does not start CUDA"):
        require_usable()


@pytest.mark.parametrize("value", [None, ""])
def test_a_process_without_gpus_computes_on_the_cpu(given: pytest.MonkeyPatch, value: str | None) -> None:
    given.setattr(devices, "installed_build", lambda: FOR_13)
    given.setattr(devices, "driver_cuda", lambda: None)
    given.setattr(torch.cuda, "is_available", lambda: False)
    given.delenv("CUDA_VISIBLE_DEVICES") if value is None else given.setenv("CUDA_VISIBLE_DEVICES", value)
    assert compute_device() == torch.device("cpu")


def test_gpus_that_exist_only_in_name_are_let_pass(given: pytest.MonkeyPatch) -> None:
    given.setattr(devices, "installed_build", lambda: ON_CPU)
    given.setattr(devices, "driver_cuda", lambda: None)
    given.setattr(torch.cuda, "is_available", lambda: False)
    assert compute_device() == torch.device("cpu")


def test_the_drivers_release_is_read_from_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "version"
    file.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\nGCC version:  gcc 12.2.0\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(devices, "_KERNEL_MODULE", file)
    assert devices.driver_release() == "580.95.05"
    monkeypatch.setattr(devices, "_KERNEL_MODULE", tmp_path / "none")
    assert devices.driver_release() == "of unknown release"
