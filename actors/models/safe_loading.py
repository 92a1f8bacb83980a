"""Reads DeepSpeed's checkpoint files without running code from pickles.

A checkpoint may come from a mirror or from another user. DeepSpeed loads its files as plain pickles, which
can run arbitrary code. This module loads only tensors, plain values and three of DeepSpeed's classes.
"""

from __future__ import annotations

import pickle
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from orchestrator.errors import StorageError

# Everything that DeepSpeed 0.19 writes except tensors and plain values, in all stages.
_DEEPSPEED_CLASSES = [LossScaler, ZeroStageEnum, fragment_address]


class SafeCheckpointEngine(TorchCheckpointEngine):
    """Writes like DeepSpeed, but loads only data.

    Remove this when DeepSpeed loads with weights_only.
    """

    def load(self, path: str, map_location: Any = None) -> Any:
        """Raises StorageError if the file holds anything else."""
        try:
            with torch.serialization.safe_globals(_DEEPSPEED_CLASSES):
                return torch.load(path, map_location=map_location, weights_only=True)
        except pickle.UnpicklingError as error:
            reason = str(error).partition("\n")[0][:300]
            raise StorageError(
                f"{path} holds more than weights and optimizer states, so it was not loaded: {reason} Restore the "
                "checkpoint from a copy that you trust, or delete it."
            ) from None
