"""GSPO (Zheng 2025): the clipped surrogate with one ratio for a whole response."""

from __future__ import annotations

from torch import Tensor

from actors.learning.objectives.clipped import ClippedObjective
from actors.learning.objectives.losses import LossTerms, bounded, ratio_loss
from actors.learning.objectives.objective import Rows
from actors.learning.packing import row_sums


class GspoObjective(ClippedObjective):
    """The ratio of a response is s = exp(mean over its tokens of new - old) (Zheng 2025, eq. 7). Each token has the
    value s and the gradient of its own log-prob (GSPO-token, eqs. 13 and 14), which is that of eq. 5 where all tokens
    of a response have the same advantage."""

    def surrogate(self, logprobs_N: Tensor, advantages_N: Tensor, rows: Rows, weights_N: Tensor | None) -> LossTerms:
        settings, lengths_B = self.settings, rows.lengths_B
        log_ratio_N = logprobs_N.detach() - rows.columns["old_logprobs"]
        log_ratio_B = bounded(row_sums(log_ratio_N, lengths_B) / lengths_B)
        ratio_N = (log_ratio_B.repeat_interleave(lengths_B) + (logprobs_N - logprobs_N.detach())).exp()
        return ratio_loss(
            ratio_N,
            log_ratio_N,
            advantages_N,
            clip_ratio=settings.clip_ratio,
            clip_ratio_high=settings.clip_ratio_high,
            dual_clip=settings.dual_clip,
            weights_N=weights_N,
        )
