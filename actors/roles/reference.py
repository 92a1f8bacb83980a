"""The reference: the frozen policy whose log-probs the KL penalty compares with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import torch

from actors.learning import distributed
from actors.learning.distributed import Group
from actors.learning.heads import PolicyModel
from actors.learning.model import load_causal, resolve_model
from actors.learning.packing import MicroBatch, TokenRows
from actors.learning.sharing import can_share
from actors.learning.worker import Share, answers
from actors.roles.policy import logprobs_table


@dataclass(frozen=True)
class ReferenceSettings:
    """Args:
    model: folder or name, see resolve_model; `cache_dir` holds converted models.
    sharded: one model over all ranks (ZeRO-3) instead of one in each.
    shares_prompts: the prompt of neighbouring samples is computed once, where the model can.
    """

    model: str
    cache_dir: Path
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    temperature: float = 1.0
    sharded: bool = False
    micro_batch_tokens: int = 4096
    shares_prompts: bool = False
    trust_remote_code: bool = False


class ReferenceWorker:
    """One rank of the reference. Without sharding the ranks know nothing of each other."""

    def __init__(self, settings: ReferenceSettings, group: Group) -> None:
        self.settings, self.group = settings, group
        torch.set_num_threads(group.threads)
        if settings.sharded:
            distributed.join(group)
        dtype = torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
        folder = resolve_model(settings.model, settings.cache_dir)
        language_model = load_causal(folder, dtype, trust_remote_code=settings.trust_remote_code)
        self._shares_prompts = settings.shares_prompts and can_share(language_model)
        model = PolicyModel(language_model, temperature=settings.temperature).eval().requires_grad_(False)
        self._model: Any = _shard(model, settings.dtype) if settings.sharded else model.to(group.device)

    def logprobs(self, table: pa.Table, share: Share | None = None) -> pa.Table:
        """Table of schema.LOGPROBS for a share of a rollout table; see PolicyWorker.logprobs."""
        return logprobs_table(
            table,
            [
                (micro, output[0])
                for micro, output in answers(
                    TokenRows(table),
                    self._forward,
                    share or Share(self.group.rank, self.group.world_size),
                    micro_batch_tokens=self.settings.micro_batch_tokens,
                    device=self.group.device,
                    shares_prompts=self._shares_prompts,
                )
            ],
        )

    def _forward(self, micro: MicroBatch) -> Any:
        with torch.no_grad():
            return self._model(micro)


def _shard(model: PolicyModel, dtype: str) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_optimization": {"stage": 3},
    }
    engine = distributed.initialize(model=model, config=config)
    engine.eval()
    return engine
