"""Where the bytes of a learner are in each part of a step: on its device, or on the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from orchestrator.config.base import Dtype
from orchestrator.planning.memory import BYTES_OF, effective_zero_stage

Phase = Literal["learn", "score", "rest"]
_MOMENTS, _MASTERS, _SUMS = 8, 4, 4  # bytes per parameter that learns, in fp32: Adam's two moments, gradients' sums


@dataclass(frozen=True)
class LearnerStates:
    """Bytes of one rank between its micro-batches.

    Args:
        weights: what a forward reads; with zero_hpz_partition_size the second copy, too.
        states: what only an update needs and the device holds: gradients, and moments and master weights unless they
            are offloaded.
        offloaded: what the host always holds.
    """

    weights: float
    states: float
    offloaded: float = 0.0

    def on_device(self, phase: Phase) -> float:
        """In scoring and publishing after Learner.rest(keeps_weights=True), and in other roles' turns after rest()."""
        return {"learn": self.weights + self.states, "score": self.weights, "rest": 0.0}[phase]

    def on_host(self, phase: Phase) -> float:
        return self.offloaded + self.weights + self.states - self.on_device(phase)


def learner_states(
    learned: float,
    frozen: float = 0.0,
    *,
    dtype: Dtype,
    zero_stage: int,
    ranks: int,
    offloads: bool = False,
    secondary: int = 1,
) -> LearnerStates:
    """The bytes of a policy or a critic under ZeRO (Rajbhandari 2020, section 3).

    Args:
        learned, frozen: numbers of parameters; with adapters, theirs and the model's.
        offloads: learner.offload_optimizer.
        secondary: learner.zero_hpz_partition_size.
    """
    held = BYTES_OF[dtype]
    stage = effective_zero_stage(zero_stage, dtype=dtype, ranks=ranks, offloads=offloads)
    whole = learned + frozen
    weights = held * whole / (ranks if stage == 3 else 1)
    if stage == 3 and secondary > 1:
        weights += held * whole / secondary
    gradients = held * learned / (ranks if stage >= 2 else 1)
    sums = (_SUMS if dtype == "bfloat16" and stage else 0) * learned / (ranks if stage >= 2 else 1)
    masters = _MASTERS if dtype == "bfloat16" or stage else 0
    update = (_MOMENTS + masters) * learned / (ranks if stage else 1)
    if offloads:
        return LearnerStates(weights, gradients, sums + update)
    return LearnerStates(weights, gradients + sums + update)
