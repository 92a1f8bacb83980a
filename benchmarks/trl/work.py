"""The work of a run, as both sides are told it. Imports neither of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Work:
    """So many equal steps: sample, score under policy, reference and reward, learn.

    Args:
        model: folder of the start policy and of the reference.
        prompts: texts under the chat template, up to where the assistant speaks.
        minibatches: optimizer steps per epoch.
        steps: all steps of the run, those that warm it up included.
    """

    model: str
    prompts: Sequence[str]
    prompts_per_step: int
    samples_per_prompt: int
    max_new_tokens: int
    minibatches: int
    epochs: int
    learning_rate: float
    kl_coefficient: float
    steps: int

    @property
    def samples_per_minibatch(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt // self.minibatches

    @property
    def optimizer_steps(self) -> int:
        """Of one step."""
        return self.minibatches * self.epochs


@dataclass(frozen=True)
class TrlSettings:
    """What TRL's user chooses beyond the work.

    Args:
        masters: "bfloat16": weights and Adam's moments too; "float32": both in fp32.
        autocast: with masters in fp32, compute in bf16; off on machines that multiply fp32 faster.
        micro_batch_samples: samples of one forward and backward pass.
    """

    masters: Literal["bfloat16", "float32"] = "bfloat16"
    autocast: bool = True
    micro_batch_samples: int = 16


@dataclass(frozen=True)
class Measured:
    """One entry per step: its seconds, the part of them in which it sampled, mean response tokens, mean reward; and,
    where they are known, the seconds of its other parts."""

    step_s: Sequence[float]
    generate_s: Sequence[float]
    response_tokens: Sequence[float]
    reward: Sequence[float]
    parts_s: Mapping[str, Sequence[float]] = field(default_factory=dict)
