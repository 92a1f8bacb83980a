"""How exactly learners compute: one rule for all devices, not the libraries' defaults.

    float32    products in fp32; TF32, which keeps 10 bits of the fraction, is off
    bfloat16   products of bf16 numbers, added in fp32; master weights, moments and gradient sums in fp32

On GPUs operations with several algorithms use one that always gives the same bits, because a run that was killed, and a
replay of its log, must end with the weights of the run.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch


def settle() -> None:
    """Sets the rule for this process. Before the first use of a GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # with other sizes cuBLAS is not deterministic
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def compute_the_same_bits(work: Callable[[], Any]) -> bool:
    """Makes torch use deterministic algorithms, if `work`, which is tried, has them: some models of experts have not.

    Returns:
        Whether it has.
    """
    memory: Any = torch.utils.deterministic
    memory.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        work()
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        torch.use_deterministic_algorithms(True, warn_only=True)
        return False
    return True
