"""The work of a run, for both sides. Imports neither of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Work:
    """A number of equal steps: sample, score with policy, reference and reward, learn.

    Args:
        model: folder of the initial policy and of the reference.
        prompts: texts in the chat template, including the generation prompt.
        minibatches: optimizer steps per epoch.
        steps: steps of the run, including warm-up.
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
    """Settings of TRL.

    Args:
        masters: type of weights and of Adam's moments, "bfloat16" or "float32".
        autocast: with fp32 masters, compute in bf16; off on machines that are faster in fp32.
        micro_batch_samples: samples of one forward and backward pass.
        lora_rank: rank of peft's adapters on all linear layers, alpha 32; 0: all weights learn.
    """

    masters: Literal["bfloat16", "float32"] = "bfloat16"
    autocast: bool = True
    micro_batch_samples: int = 16
    lora_rank: int = 0


@dataclass(frozen=True)
class Measured:
    """One entry per step: its seconds, its sampling seconds, mean response tokens, mean reward and, if known, the
    seconds of its other parts."""

    step_s: Sequence[float]
    generate_s: Sequence[float]
    response_tokens: Sequence[float]
    reward: Sequence[float]
    parts_s: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Training:
    """A training without rollouts in fp32, of one epoch.

    Args:
        kind: sft, reward_model or preference.
        model, scorer: folder of the start model, and of the same with a scalar head.
        padding: token that never ends a transcript.
        rows: tokens in the order in which they are learned, under TRL's names.
        rates: learning rate of every optimizer step.
    """

    kind: str
    model: str
    scorer: str
    padding: int
    rows: Sequence[Mapping[str, Sequence[int]]]
    records_per_batch: int
    rates: Sequence[float]


@dataclass(frozen=True)
class TrainingMeasured:
    """Loss and seconds of every optimizer step."""

    loss: Sequence[float]
    step_s: Sequence[float]
