"""Preference losses against rows worked out by hand, and what does not change them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from actors.learning.objectives.preference import (
    PREFERENCE_OBJECTIVES,
    BatchNumbers,
    Replies,
    kto_kl,
    mismatched,
    replies_of,
)
from actors.learning.packing import MicroBatch
from orchestrator.config.losses import PREFERENCE_LOSSES, Cpo, Dpo, Ipo, Kto, Orpo, PreferenceLoss, Simpo


def softplus(value: float) -> float:
    """-log σ(-value)"""
    return math.log1p(math.exp(value))


def replies(
    logprob: Sequence[float],
    reference: Sequence[float] | None = None,
    num_tokens: Sequence[int] | None = None,
    quality: Sequence[float] | None = None,
    group: Sequence[int] | None = None,
) -> Replies:
    """Two replies to one prompt, the better one first, unless it is said otherwise."""
    size = len(logprob)
    return Replies(
        logprob_B=torch.tensor(logprob, requires_grad=True),
        reference_B=torch.tensor(reference or [0.0] * size),
        num_tokens_B=torch.tensor([float(number) for number in num_tokens or [1] * size]),
        nll_B=-torch.tensor(logprob),
        quality_B=torch.tensor([float(value) for value in quality or [1 - place for place in range(size)]]),
        group_B=torch.tensor(group or [0] * size),
    )


def loss(section: PreferenceLoss, found: Replies, batch: BatchNumbers | None = None) -> dict[str, Any]:
    objective = PREFERENCE_OBJECTIVES[section.name]
    terms = objective.terms(section, objective.reward(section, found), found, batch or BatchNumbers())
    return {"loss": terms.loss.item(), **{name: float(value) for name, value in terms.sums.items()}}


PAIR = replies([-3.0, -6.0], reference=[-4.0, -5.0], num_tokens=[2, 4])


def test_both_tables_have_the_same_names() -> None:
    assert list(PREFERENCE_OBJECTIVES) == list(PREFERENCE_LOSSES)
    assert [section().name for section in PREFERENCE_LOSSES.values()] == list(PREFERENCE_LOSSES)


def test_dpo() -> None:
    # log-ratios 1 and -1, β = 0.5: rewards ½ and -½, margin 1.
    found = loss(Dpo(beta=0.5), PAIR)
    assert found["loss"] == pytest.approx(softplus(-1))
    assert (found["compared"], found["correct"], found["margin"]) == (1, 1, 1)


def test_dpo_with_smoothed_labels() -> None:
    assert loss(Dpo(beta=0.5, label_smoothing=0.1), PAIR)["loss"] == pytest.approx(
        0.9 * softplus(-1) + 0.1 * softplus(1)
    )


def test_ipo_averages_log_ratios_over_tokens() -> None:
    # ½ - (-¼) = ¾; 1 / (2 · 0.25) = 2.
    assert loss(Ipo(beta=0.25), PAIR)["loss"] == pytest.approx((0.75 - 2) ** 2)


def test_simpo_averages_log_probs_over_tokens_and_asks_for_a_margin() -> None:
    # Means -1.5 and -1.5: margin 0, less γ.
    assert loss(Simpo(beta=2.0, gamma=0.5), PAIR)["loss"] == pytest.approx(softplus(0.5))
    assert loss(Simpo(beta=2.0, gamma=0.0), replies([-1.0, -6.0], num_tokens=[2, 4]))["loss"] == pytest.approx(
        softplus(-2)
    )


def test_cpo_adds_the_cross_entropy_of_the_best_reply() -> None:
    # β margin 3 · 0.1; 3 nats on 2 tokens of one prompt: 1.5 per token.
    batch = BatchNumbers(prompts_per_token=1 / 2)
    assert loss(Cpo(), PAIR, batch)["loss"] == pytest.approx(softplus(-0.3) + 1.5)
    assert loss(Cpo(nll_weight=0.5), PAIR, batch)["loss"] == pytest.approx(softplus(-0.3) + 0.75)
    assert loss(Cpo(nll_weight=0.0), PAIR)["loss"] == pytest.approx(softplus(-0.3))


def test_orpo_compares_odds_of_mean_log_probs() -> None:
    # p = ½ and ¼ per token: odds 1 and 1/3, ratio 3, σ(log 3) = ¾.
    found = replies([2 * math.log(1 / 2), 4 * math.log(1 / 4)], num_tokens=[2, 4])
    batch = BatchNumbers(prompts_per_token=1 / 2)
    assert loss(Orpo(beta=0.2), found, batch)["loss"] == pytest.approx(-0.2 * math.log(3 / 4) + math.log(2))


def test_orpo_stays_finite_where_a_reply_is_certain() -> None:
    found = replies([0.0, -4.0])
    section, objective = Orpo(), PREFERENCE_OBJECTIVES["orpo"]
    terms = objective.terms(section, objective.reward(section, found), found, BatchNumbers())
    terms.loss.backward()
    assert torch.isfinite(terms.loss)
    assert found.logprob_B.grad is not None and torch.isfinite(found.logprob_B.grad).all()


def test_kto_weighs_desirable_and_undesirable_replies_against_the_kl() -> None:
    # β = 0.5, z = 2. Desirable, log-ratio 4: 1 - σ(1). Undesirable, log-ratio 0: 1 - σ(1). Weights 3 and 1.
    found = replies([-1.0, -5.0], reference=[-5.0, -5.0], quality=[1, 0], group=[0, 1])
    terms = loss(Kto(beta=0.5, desirable_weight=3.0), found, BatchNumbers(kl=2.0))
    missed = 1 - 1 / (1 + math.exp(-1))
    assert terms["loss"] == pytest.approx(4 * missed)
    assert (terms["compared"], terms["correct"], terms["margin"]) == (2, 2, 2)


def test_the_kl_of_kto_is_that_of_replies_to_the_prompt_before_and_never_negative() -> None:
    assert mismatched([7, 3, 5]) == [(7, 5), (3, 7), (5, 3)]
    assert mismatched([4]) == [(4, 4)]
    assert kto_kl(torch.tensor([-1.0, -4.0]), torch.tensor([-3.0, -3.0])) == 0.5
    assert kto_kl(torch.tensor([-4.0]), torch.tensor([-3.0])) == 0.0


def test_all_pairs_of_a_ranking_make_one_term() -> None:
    # Rewards 2, 1, 0 (β = 1) and one pair of another prompt: margins 1, 2, 1; and 1.
    found = replies([2.0, 1.0, 0.0, 1.0, 0.0], quality=[0, -1, -2, 0, -1], group=[0, 0, 0, 1, 1])
    assert loss(Dpo(beta=1.0), found)["loss"] == pytest.approx((2 * softplus(-1) + softplus(-2)) / 3 + softplus(-1))


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_micro_batches_add_up_to_the_batch(name: str) -> None:
    random = torch.Generator().manual_seed(0)
    logprob, reference = (-8 * torch.rand(8, generator=random) for _ in range(2))
    group, quality = [0, 0, 1, 1, 1, 2, 2, 2], [0, -1, 0, -1, -2, 0, -1, -2]
    batch, section = BatchNumbers(prompts_per_token=0.3, kl=0.2), PREFERENCE_LOSSES[name]()

    def of(rows: slice) -> float:
        found = replies(
            logprob[rows].tolist(), reference[rows].tolist(), [3, 5, 2, 7, 4, 1, 6, 2][rows], quality[rows], group[rows]
        )
        return float(loss(section, found, batch)["loss"])

    assert of(slice(0, 2)) + of(slice(2, 8)) == pytest.approx(of(slice(0, 8)), rel=1e-6)


def micro_batch(columns: dict[str, torch.Tensor], lengths: Sequence[int]) -> MicroBatch:
    nothing = torch.zeros(0, dtype=torch.int64)
    return MicroBatch((0, 1), nothing, nothing, nothing, nothing, torch.tensor(lengths), columns)


def test_a_reply_is_its_learned_tokens_without_those_of_the_prompt() -> None:
    columns = {
        "quality": torch.tensor([0.0, -1.0]),
        "group": torch.tensor([4.0, 4.0]),
        "reference": torch.tensor([-1.0, -2.0]),
        "reply": torch.tensor([0.0, 1.0, 1.0, 1.0]),
    }
    found = replies_of(torch.tensor([-1.0, -2.0, -4.0, -8.0]), micro_batch(columns, [3, 1]))
    assert found.logprob_B.tolist() == [-6, -8]
    assert found.num_tokens_B.tolist() == [2, 1]
    assert found.nll_B.tolist() == [7, 8]
    assert found.reference_B.tolist() == [-1, -2]


def test_without_a_reference_it_counts_as_zero() -> None:
    columns = {"quality": torch.zeros(2), "group": torch.zeros(2)}
    found = replies_of(torch.tensor([-1.0, -2.0, -4.0]), micro_batch(columns, [1, 2]))
    assert found.reference_B.tolist() == [0, 0]
    assert found.logprob_B.tolist() == [-1, -6]
