"""NVIDIA's GPUs as this process sees them, and whether torch can use them.

torch reports a driver that is too old, or none, as "no GPU", and computes on the CPU. A process that was given GPUs
must not do that, so it asks here.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from orchestrator.errors import CapacityError

Release = tuple[int, int]
# A driver runs programs for every release of CUDA with the major number that it was made for, and for older ones.
# First releases of drivers: NVIDIA, CUDA Compatibility, "Minor Version Compatibility", table 1.
FIRST_DRIVER = {11: "450", 12: "525", 13: "580"}
_KERNEL_MODULE = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Device:
    """Args:
    capability: CUDA's compute capability, (9, 0) for an H100.
    peers: numbers of the devices of this process whose memory it can access directly.
    """

    name: str
    total_bytes: int
    free_bytes: int
    capability: Release
    peers: Sequence[int]


@dataclass(frozen=True)
class Build:
    """What the installed torch is made for.

    Args:
        cuda: None: for CPUs.
        kernels: its GPU code: sm_90 runs on devices of that major number from 9.0 on, compute_90 on all from 9.0 on.
            Empty if no device can be used.
    """

    torch: str
    cuda: Release | None
    kernels: Sequence[str] = ()


def installed_build() -> Build:
    cuda = torch.version.cuda
    return Build(str(torch.__version__), _release(cuda) if cuda else None, tuple(torch.cuda.get_arch_list()))


def driver_cuda() -> Release | None:
    """The newest release of CUDA whose programs the driver runs. None: this process sees no driver."""
    with suppress(OSError, AttributeError):
        number = ctypes.c_int()
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number)) == 0:
            return number.value // 1000, number.value % 1000 // 10
    return None


def driver_release() -> str:
    """The release of the driver, such as "580.95.05"; "of unknown release" if the kernel does not tell."""
    with suppress(OSError):
        found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", _KERNEL_MODULE.read_text(encoding="utf-8"))
        if found:
            return found[0]
    return "of unknown release"


def why_no_gpu(build: Build, cuda: Release | None, release: str) -> str | None:
    """Why torch can use no GPU here, with the way out. None: build and driver fit.

    Args:
        cuda, release: of the driver, see `driver_cuda` and `driver_release`.
    """
    if build.cuda is None:
        return (
            f"torch {build.torch} is a build for CPUs. Install the packages of requirements/gpu.txt there, or use the "
            "image that is built with PROFILE=gpu."
        )
    needs = f"torch {build.torch} is built for CUDA {_text(build.cuda)}"
    first = FIRST_DRIVER.get(build.cuda[0])
    update = f"driver {first} or newer" if first else f"a driver for CUDA {build.cuda[0]}"
    if cuda is None:
        return (
            f"{needs}, and no NVIDIA driver is visible (libcuda.so.1). Install {update} on the node, and run its "
            "containers with NVIDIA's runtime (on Kubernetes: the device plugin)."
        )
    if cuda[0] < build.cuda[0]:
        return (
            f"{needs}, and the NVIDIA driver {release} runs programs for CUDA {_text(cuda)} and older. Install "
            f"{update} on the node; for data-center GPUs NVIDIA's package cuda-compat-{build.cuda[0]}-{build.cuda[1]} "
            "in the image is enough."
        )
    return None


def why_not_this(device: Device, build: Build) -> str | None:
    """Why torch has no code for a device. None: it has."""
    if build.cuda is None or not build.kernels or _has_code(device.capability, build.kernels):
        return None
    return (
        f"{device.name} has compute capability {_text(device.capability)}, and torch {build.torch} has code for "
        f"{', '.join(build.kernels)} only. Use newer GPUs."
    )


def _has_code(capability: Release, kernels: Sequence[str]) -> bool:
    for kernel in kernels:
        kind, _, digits = kernel.rstrip("abcdefghijklmnopqrstuvwxyz").partition("_")
        built = int(digits[:-1]), int(digits[-1])
        if kind == "compute" and built <= capability:
            return True
        if kind == "sm" and built[0] == capability[0] and built <= capability:
            return True
    return False


def visible_devices() -> list[Device]:
    """The GPUs that torch can use in this process. Starts CUDA in it."""
    if not torch.cuda.is_available():
        return []
    numbers = range(torch.cuda.device_count())
    devices = []
    for number in numbers:
        free, total = torch.cuda.mem_get_info(number)
        peers = [other for other in numbers if other != number and torch.cuda.can_device_access_peer(number, other)]
        capability = torch.cuda.get_device_capability(number)
        devices.append(Device(torch.cuda.get_device_name(number), total, free, capability, peers))
    return devices


def why_none_here() -> str | None:
    """Why this process can use no GPU, with the way out. None: it can."""
    if torch.cuda.is_available():
        return None
    build, cuda, release = installed_build(), driver_cuda(), driver_release()
    return why_no_gpu(build, cuda, release) or (
        f"torch {build.torch} does not start CUDA on the NVIDIA driver {release}. Look at `nvidia-smi` and at the "
        "kernel's log on the node."
    )


@cache
def require_usable() -> None:
    """Checks that a process to which Ray gave GPUs computes on them.

    A CPU build of torch on a machine without a driver passes: that is a cluster whose GPUs exist only in name, as in
    tests.

    Raises:
        CapacityError: torch can't use the GPUs.
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not given or torch.cuda.is_available():
        return
    build, cuda = installed_build(), driver_cuda()
    if build.cuda is None and cuda is None:
        return
    raise CapacityError(f"this actor was given the GPUs {given} and can't use them: {why_none_here()}")


def compute_device() -> torch.device:
    """The device on which this process computes: its current GPU, without GPUs the CPU.

    Raises:
        CapacityError: see require_usable.
    """
    require_usable()
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _release(text: str) -> Release:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def _text(release: Release) -> str:
    return f"{release[0]}.{release[1]}"
