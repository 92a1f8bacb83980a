"""What DeepSpeed gets: its configuration (Rajbhandari 2020, ZeRO) and the optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from actors.learning.distributed import deepspeed
from orchestrator.config.base import Dtype
from orchestrator.config.sections import LearnerConfig
from orchestrator.planning.memory import ZERO_BUCKET

PERSISTENT_ELEMENTS = 100_000
"""Stage 3 keeps smaller parameters whole on every rank: gathering them costs more than their memory. DeepSpeed's own
number."""


def engine_config(config: LearnerConfig, dtype: Dtype, stage: int) -> dict[str, Any]:
    """DeepSpeed's configuration of a learner."""
    engine: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": dtype == "bfloat16"},
        "gradient_clipping": 0.0 if stage == 0 and dtype == "float32" else config.max_grad_norm,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": torch.cuda.is_available(),
            "reduce_bucket_size": ZERO_BUCKET,
            "allgather_bucket_size": ZERO_BUCKET,
            "stage3_param_persistence_threshold": PERSISTENT_ELEMENTS,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    settings = engine["zero_optimization"]
    if config.offload_optimizer:
        settings["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if stage == 3:
        settings["zero_hpz_partition_size"] = config.zero_hpz_partition_size
    if stage:
        engine["data_types"] = {"grad_accum_dtype": "fp32"}
    if stage == 1:
        # Otherwise gradients accumulated in fp32 are rounded to bf16 for communication, even on a single rank.
        engine["communication_data_type"] = "fp32"
    return engine


def frozen_config(dtype: Dtype) -> dict[str, Any]:
    """DeepSpeed's configuration of a model that does not learn, in parts on all ranks."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": PERSISTENT_ELEMENTS},
    }


def gather_for_heads(model: nn.Module) -> None:
    """Makes stage 3 gather what a head reads of another module's parameters."""
    head: Any = getattr(model, "head", None)
    for parameter in getattr(head, "read", ()):
        deepspeed.zero.register_external_parameter(head, parameter)


def optimizer_of(model: nn.Module, config: LearnerConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov 2019) of all that learns. The same one updates in host memory: torch's fused kernel needs no
    compiler there, unlike DeepSpeed's."""
    return torch.optim.AdamW(
        _parameter_groups(model, config.weight_decay),
        lr=config.learning_rate,
        betas=config.adam_betas,
        fused=True,  # on CPUs too: otherwise each step allocates three temporaries as large as the master weights
    )


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Excludes norms and biases from weight decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not weight_decay:
        return [{"params": parameters, "weight_decay": 0.0}]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
