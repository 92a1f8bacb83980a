"""How fast this machine multiplies matrices in bf16 and in fp32, measured once per kind of machine and then cached.

Without bf16 instructions a CPU multiplies bf16 up to a hundred times slower than fp32, with them up to ten times
faster. Which instructions the libraries use also depends on the environment, so the CPU's name does not decide.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from time import thread_time

import torch
from pydantic import TypeAdapter, ValidationError

from orchestrator.config.base import Dtype
from orchestrator.data.inputs import at_home
from orchestrator.errors import ConfigError, RlhfError
from orchestrator.run.storage import write_json

FOLDER = "machines"
# Rows of a projection in a small model, × 576 × 1536: from a product that takes 10 ms with emulated bf16 to one
# that takes as long on a core with 1 TFLOP/s.
ROWS = (8, 64, 512, 4096)
LONG_S = 0.004
HOPELESS = 3.0
ROUNDS = 4
# These variables determine which kernels torch, oneDNN and MKL may use.
SWITCHES = (
    "ATEN_CPU_CAPABILITY",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
)
_DTYPES: Mapping[Dtype, torch.dtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_KIND_FIELDS = ("model name", "flags", "Features", "CPU implementer", "CPU part")  # of /proc/cpuinfo, x86 and aarch64


@dataclass(frozen=True)
class Speed:
    """Matrix products of one machine.

    Args:
        kind: the machine in words, such as "AMD EPYC 7R13, AVX2, 2 threads".
        threads: cores that this process may use.
        bfloat16, float32: FLOP/s over all of them.
    """

    kind: str
    threads: int
    bfloat16: float
    float32: float

    @property
    def dtype(self) -> Dtype:
        """The faster type; bf16 if both are equally fast, because it takes half the memory."""
        return "bfloat16" if self.bfloat16 >= self.float32 else "float32"

    def per_core(self, dtype: Dtype) -> float:
        """FLOP/s of one core."""
        return (self.bfloat16 if dtype == "bfloat16" else self.float32) / self.threads

    def describe(self) -> str:
        return f"{self.kind}: bf16 {self.bfloat16 / 1e9:.0f} GFLOP/s, fp32 {self.float32 / 1e9:.0f}"


_SPEED = TypeAdapter(Speed)


def machine_speed(cache: Path) -> Speed:
    """This machine's speed, from `cache` if a machine of its kind was measured before."""
    kind = _kind()
    name = hashlib.sha256(json.dumps(kind, sort_keys=True).encode()).hexdigest()[:16]
    path = at_home(cache, "run.cache", ConfigError) / FOLDER / f"{name}.json"
    with suppress(OSError, ValidationError):  # no such file, or a damaged one: measured again
        return _SPEED.validate_json(path.read_bytes())
    speed = Speed(_in_words(kind), _num_threads(), **measure())
    with suppress(RlhfError, OSError):  # without a cache every start pays for the measurement
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(speed))
    return speed


def measure() -> dict[Dtype, float]:
    """FLOP/s of each type: the best of several alternating products; faster machines get larger products.

    Measures the CPU time of one thread, which hardly depends on other load of the machine, and multiplies by the
    number of cores. A type that is HOPELESS times slower than the other is not measured further.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        best: dict[Dtype, float] = {}
        racing = list(_DTYPES)
        for rows in ROWS:
            products = {dtype: _product(rows, dtype) for dtype in racing}
            rounds = [{dtype: product() for dtype, product in products.items()} for _ in range(ROUNDS)]
            best |= {dtype: _flops(rows) / min(found[dtype] for found in rounds) for dtype in racing}
            racing = [dtype for dtype in racing if best[dtype] * HOPELESS > max(best.values())]
            if _flops(rows) / max(best.values()) > LONG_S:
                break
        return {dtype: flops * _num_threads() for dtype, flops in best.items()}
    finally:
        torch.set_num_threads(threads)


def _flops(rows: int) -> float:
    return 2.0 * rows * 576 * 1536


def _product(rows: int, dtype: Dtype) -> Callable[[], float]:
    """A function that multiplies and returns its seconds. Makes the first product, which prepares kernels, here."""
    left = torch.ones(rows, 576, dtype=_DTYPES[dtype])
    right = torch.ones(576, 1536, dtype=_DTYPES[dtype])
    torch.mm(left, right)

    def timed() -> float:
        started = thread_time()
        torch.mm(left, right)
        return thread_time() - started

    return timed


def _num_threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _kind() -> dict[str, object]:
    """Everything that affects the speed of a product, except load."""
    processor: dict[str, str] = {}
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        pairs = (line.partition(":")[::2] for line in lines)
        for key, value in ((key.strip(), value.strip()) for key, value in pairs):
            if key in _KIND_FIELDS:
                processor.setdefault(key, value)
    return {
        "processor": processor or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "switches": {name: os.environ[name] for name in SWITCHES if name in os.environ},
        "threads": _num_threads(),
        "torch": torch.__version__,
    }


def _in_words(kind: Mapping[str, object]) -> str:
    processor = kind["processor"]
    name = processor.get("model name") if isinstance(processor, dict) else processor
    return f"{name or kind['architecture']}, {kind['capability']}, {kind['threads']} threads"
