"""CISPO (MiniMax 2025): the policy gradient, weighted with the clipped ratio."""

from __future__ import annotations

from torch import Tensor

from actors.learning.objectives.clipped import ClippedObjective
from actors.learning.objectives.losses import LossTerms, bounded, clipped, surrogate_terms
from actors.learning.objectives.objective import Rows


class CispoObjective(ClippedObjective):
    """-clip(r, 1 - ε, 1 + ε_high) A log p, without a gradient through the ratio r = exp(new - old) (MiniMax 2025, eqs.
    4 and 5)."""

    def surrogate(self, logprobs_N: Tensor, advantages_N: Tensor, rows: Rows, weights_N: Tensor | None) -> LossTerms:
        settings = self.settings
        log_ratio_N = logprobs_N.detach() - rows.columns["old_logprobs"]
        ratio_N = bounded(log_ratio_N).exp()
        clipped_N = clipped(ratio_N, settings.clip_ratio, settings.clip_ratio_high)
        surrogate_N = clipped_N * advantages_N * logprobs_N
        return surrogate_terms(surrogate_N, ratio_N, clipped_N, log_ratio_N, weights_N)
