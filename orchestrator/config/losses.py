"""The losses of the stages preference and reward_model. Their torch halves are in actors/learning/objectives/, in
preference.py and reward.py, under the same names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from orchestrator.config.base import NonNegativeNumber, PositiveNumber, Section

Judgement = Literal["rankings", "labels", "scores"]
"""What a loss learns from: ranked replies, single replies with a label, or single replies with a score."""
LabelSmoothing = Annotated[float, Field(ge=0.0, lt=0.5)]


class PreferenceLoss(Section):
    """The keys of every preference loss.

    `needs_reference`: whether it compares with the log-probs of the model before training.
    `judgement`: what it learns from.
    """

    needs_reference: ClassVar[bool] = False
    judgement: ClassVar[Judgement] = "rankings"

    name: str = ""
    """The loss, of orchestrator/config/losses.py."""
    beta: PositiveNumber = 0.1
    """Scale of the implicit reward: a higher one keeps the policy nearer to its reference (ipo: tau; orpo: lambda, the
    weight of the odds ratio)."""


class PairLoss(PreferenceLoss):
    """The keys of every loss of pairs of a better and a worse reply."""

    nll_weight: NonNegativeNumber = 0.0
    """Weight of the cross-entropy of the best replies, a mean over all their tokens in the batch."""


class Dpo(PairLoss):
    """Direct preference optimisation (Rafailov 2023)."""

    needs_reference: ClassVar[bool] = True

    name: Literal["dpo"] = "dpo"
    label_smoothing: LabelSmoothing = 0.0
    """Share of pairs whose order is taken to be wrong (Mitchell 2023, conservative DPO)."""


class Ipo(PairLoss):
    """Identity preference optimisation (Azar 2023), with log-ratios averaged over the tokens of a reply."""

    needs_reference: ClassVar[bool] = True

    name: Literal["ipo"] = "ipo"


class Simpo(PairLoss):
    """Simple preference optimisation (Meng 2024): no reference, mean log-probs."""

    name: Literal["simpo"] = "simpo"
    beta: PositiveNumber = 2.0
    """Scale of the implicit reward, a reply's mean log-prob."""
    gamma: NonNegativeNumber = 1.0
    """Margin by which the better reply's implicit reward should be higher."""


class Orpo(PairLoss):
    """Odds ratio preference optimisation (Hong 2024): cross-entropy of the best reply, and no reference."""

    name: Literal["orpo"] = "orpo"
    nll_weight: NonNegativeNumber = 1.0
    """Weight of the cross-entropy of the best replies, a mean over all their tokens in the batch."""
    nll_of_prompt: bool = True
    """Whether the cross-entropy also counts the tokens of the prompt, as in the authors' code and in TRL."""


class Cpo(PairLoss):
    """Contrastive preference optimisation (Xu 2024): DPO without reference, and cross-entropy of the best reply."""

    name: Literal["cpo"] = "cpo"
    nll_weight: NonNegativeNumber = 1.0
    """Weight of the cross-entropy of the best replies, a mean over all their tokens in the batch."""
    label_smoothing: LabelSmoothing = 0.0
    """Share of pairs whose order is taken to be wrong."""


class Kto(PreferenceLoss):
    """Kahneman-Tversky optimisation (Ethayarajh 2024): single replies, each labelled desirable or not."""

    needs_reference: ClassVar[bool] = True
    judgement: ClassVar[Judgement] = "labels"

    name: Literal["kto"] = "kto"
    desirable_weight: PositiveNumber = 1.0
    """Weight of the loss of desirable replies. Where the labels are uneven, its ratio to the other weight should be
    between 1 and 4/3 times that of undesirable to desirable replies."""
    undesirable_weight: PositiveNumber = 1.0
    """Weight of the loss of undesirable replies."""


PREFERENCE_LOSSES: Mapping[str, type[PreferenceLoss]] = {
    "dpo": Dpo,
    "ipo": Ipo,
    "simpo": Simpo,
    "orpo": Orpo,
    "cpo": Cpo,
    "kto": Kto,
}


class RewardLoss(Section):
    """The keys of every loss of a reward model.

    `judgement`: what it learns from.
    """

    judgement: ClassVar[Judgement] = "rankings"

    name: str = ""
    """The loss, of orchestrator/config/losses.py."""


class RankedScores(RewardLoss):
    """The keys of every loss of pairs of scores."""

    margin: NonNegativeNumber = 0.0
    """Difference of scores asked for between neighbours of a ranking (Touvron 2023), twice as much two places apart.
    Where a record says how much better a reply is (docs/data.md), it is times that difference instead."""
    centring: NonNegativeNumber = 0.0
    """Weight of the squared sum of a pair's scores, which keeps scores near zero (Eisenstein 2023); 0.01 is usual."""


class Pairwise(RankedScores):
    """All pairs of ranked replies: log-sigmoid of the difference of their scores (Ouyang 2022)."""

    name: Literal["pairwise"] = "pairwise"


class LogExp(RankedScores):
    """log(1 + exp(worse - better)), as Bai 2022 writes the pairwise loss. It is the same function."""

    name: Literal["log-exp"] = "log-exp"


class Regression(RewardLoss):
    """Squared error between a reply's score and the score that people gave it."""

    judgement: ClassVar[Judgement] = "scores"

    name: Literal["regression"] = "regression"


class Ordinal(RewardLoss):
    """Stars as bins: one logistic loss per boundary between two of them (Rennie 2005, all thresholds). A score is
    about a number of stars."""

    judgement: ClassVar[Judgement] = "scores"

    name: Literal["ordinal"] = "ordinal"
    lowest: int = 1
    """Fewest stars."""
    highest: int = 5
    """Most stars."""


REWARD_LOSSES: Mapping[str, type[RewardLoss]] = {
    "pairwise": Pairwise,
    "log-exp": LogExp,
    "regression": Regression,
    "ordinal": Ordinal,
}
