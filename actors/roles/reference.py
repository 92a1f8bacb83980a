"""The reference: the frozen policy from which the KL penalty measures the distance."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import torch

from actors.learning import distributed, precision
from actors.learning.distributed import Group
from actors.learning.heads import PolicyModel
from actors.learning.packing import MicroBatch, TokenRows
from actors.learning.sharing import can_share
from actors.learning.worker import RankContext, Share, answers
from actors.learning.zero import frozen_config, gather_for_heads
from actors.models.model import load_causal, resolve_model, torch_dtype
from actors.roles.policy import logprobs_table
from orchestrator.config.base import Dtype
from orchestrator.config.sections import ReferenceConfig


class ReferenceWorker:
    """One rank of the reference. Without sharding, ranks are independent."""

    def __init__(self, reference: ReferenceConfig, context: RankContext, group: Group) -> None:
        self.group, self._micro_batch_tokens = group, reference.micro_batch_tokens
        torch.set_num_threads(group.threads)
        precision.settle()
        if reference.sharded:
            distributed.join(group)
        dtype = context.model.compute_dtype
        folder = resolve_model(reference.path or context.model.path, context.cache)
        language_model = load_causal(folder, torch_dtype(dtype), trust_remote_code=context.model.trust_remote_code)
        self._shares_prompts = context.algorithm.compares_samples and can_share(language_model)
        model = PolicyModel(language_model, temperature=context.temperature).eval().requires_grad_(False)
        self._model: Any = _shard(model, dtype) if reference.sharded else model.to(group.device)

    def logprobs(self, table: pa.Table, share: Share | None = None) -> pa.Table:
        """Table of schema.LOGPROBS for a share of a rollout table; see PolicyWorker.logprobs."""
        return logprobs_table(
            table,
            [
                (micro, output[0])
                for micro, output in answers(
                    TokenRows.of_table(table),
                    self._forward,
                    share or Share(self.group.rank, self.group.world_size),
                    micro_batch_tokens=self._micro_batch_tokens,
                    device=self.group.device,
                    shares_prompts=self._shares_prompts,
                )
            ],
        )

    def _forward(self, micro: MicroBatch) -> Any:
        with torch.no_grad():
            return self._model(micro)


def _shard(model: PolicyModel, dtype: Dtype) -> Any:
    gather_for_heads(model)
    engine = distributed.initialize(model=model, config=frozen_config(dtype))
    engine.eval()
    return engine
