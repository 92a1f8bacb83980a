"""Losses of reward models against rows worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from actors.learning.objectives.losses import ranking_loss
from actors.learning.objectives.reward import REWARD_OBJECTIVES, Judgements, over_heads
from orchestrator.config.losses import REWARD_LOSSES, LogExp, Ordinal, Pairwise, Regression, RewardLoss

SCORES = torch.tensor([2.0, 1.0, 0.0, 0.0, 3.0])
QUALITY = torch.tensor([0.0, -1.0, -2.0, 0.0, -1.0])
GROUP = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0])


def softplus(value: float) -> float:
    return math.log1p(math.exp(value))


def loss(section: RewardLoss, scores: torch.Tensor = SCORES, quality: torch.Tensor = QUALITY) -> float:
    judged = Judgements(quality, GROUP[: len(scores)], strength_B=quality)
    return float(REWARD_OBJECTIVES[section.name](section, scores, judged).loss)


def test_both_tables_have_the_same_names() -> None:
    assert list(REWARD_OBJECTIVES) == list(REWARD_LOSSES)
    assert [section().name for section in REWARD_LOSSES.values()] == list(REWARD_LOSSES)


def test_the_pairwise_loss_is_the_ranking_loss_to_the_bit() -> None:
    assert loss(Pairwise()) == ranking_loss(SCORES, QUALITY, GROUP).loss.item()


def test_log_exp_is_another_name_of_it() -> None:
    for keys in ({}, {"margin": 0.5, "centring": 0.1}):
        assert loss(LogExp(**keys)) == pytest.approx(loss(Pairwise(**keys)), rel=1e-6)


def test_the_margin_grows_with_the_places_between_two_replies() -> None:
    # Differences 1, 2 (two places apart), 1; and -3. Margin ½ a place.
    expected = (2 * softplus(-0.5) + softplus(-1.0)) / 3 + softplus(3.5)
    assert loss(Pairwise(margin=0.5)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("section", [Pairwise(margin=0.5), LogExp(margin=0.5)])
def test_a_margin_of_records_multiplies_that_of_the_config(section: RewardLoss) -> None:
    """-log σ(chosen - rejected - margin), as TRL's RewardTrainer defines it. The record of prompt 0 has scores 3, 3 and
    1; prompt 1 has a pair whose better reply is better by 4."""
    strength = torch.tensor([3.0, 3.0, 1.0, 4.0, 0.0])
    judged = Judgements(QUALITY, GROUP, strength)
    # Differences 1, 2, 1 and -3; margins 0, 1, 1 and 2.
    first = (softplus(-(1 - 0.0)) + softplus(-(2 - 1.0)) + softplus(-(1 - 1.0))) / 3
    found = float(REWARD_OBJECTIVES[section.name](section, SCORES, judged).loss)
    assert found == pytest.approx(first + softplus(3 + 2.0), rel=1e-6)


def test_without_a_margin_of_the_config_records_change_no_bit() -> None:
    judged = Judgements(QUALITY, GROUP, torch.tensor([9.0, 5.0, 1.0, 4.0, 0.0]))
    assert REWARD_OBJECTIVES["pairwise"](Pairwise(), SCORES, judged).loss.item() == loss(Pairwise())


HEADS = torch.stack([SCORES, torch.tensor([0.0, 2.0, 1.0, 1.0, 0.0])], 1)
WEIGHTS = torch.tensor([[1.0, 2.0]] * 3 + [[0.5, 0.0]] * 2)


@pytest.mark.parametrize("section", [Pairwise(), LogExp(margin=0.5, centring=0.1)])
def test_every_head_learns_from_its_own_weights_of_prompts(section: RewardLoss) -> None:
    judged = Judgements(QUALITY, GROUP, QUALITY)
    of_prompt = [
        [float(REWARD_OBJECTIVES[section.name](section, scores[rows], Judgements(*(c[rows] for c in columns))).loss)
         for rows in (slice(3), slice(3, 5))]
        for scores, columns in ((HEADS[:, head], (QUALITY, GROUP, QUALITY)) for head in range(2))
    ]  # fmt: skip
    expected = (1.0 * of_prompt[0][0] + 0.5 * of_prompt[0][1] + 2.0 * of_prompt[1][0]) / 2
    assert float(over_heads(section, HEADS, judged, WEIGHTS).loss) == pytest.approx(expected, rel=1e-6)


def test_heads_of_single_replies_have_weights_too() -> None:
    judged = Judgements(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 1.0]), torch.zeros(2))
    heads, weights = torch.tensor([[1.0, 3.0], [4.5, 2.0]]), torch.tensor([[1.0, 7.0], [2.0, 0.5]])
    terms = over_heads(Regression(), heads, judged, weights)
    assert float(terms.loss) == (4.0 + 2 * 0.25 + 0.0 + 0.5 * 4.0) / 2
    one, two = (over_heads(Ordinal(), heads[i : i + 1], _of(judged, i), torch.ones(1, 2)).loss for i in range(2))
    both = over_heads(Ordinal(), heads, judged, torch.tensor([[1.0, 1.0], [3.0, 3.0]])).loss
    assert float(both) == pytest.approx(float(one + 3 * two), rel=1e-6)


def _of(judged: Judgements, row: int) -> Judgements:
    return Judgements(*(column[row : row + 1] for column in (judged.quality_B, judged.group_B, judged.strength_B)))


def test_metrics_of_heads_are_those_of_their_mean() -> None:
    terms = over_heads(Pairwise(), HEADS, Judgements(QUALITY, GROUP, QUALITY), WEIGHTS)
    alone = REWARD_OBJECTIVES["pairwise"](Pairwise(), HEADS.mean(1), Judgements(QUALITY, GROUP, QUALITY))
    assert {name: float(value) for name, value in terms.sums.items()} == {
        name: float(value) for name, value in alone.sums.items()
    }


def test_centring_adds_the_squared_sum_of_the_scores_of_a_pair() -> None:
    # Sums 3, 2, 1: mean of squares 14/3; and 3² = 9.
    assert loss(Pairwise(centring=0.1)) - loss(Pairwise()) == pytest.approx(0.1 * (14 / 3 + 9), rel=1e-5)


def test_regression_is_the_squared_error() -> None:
    assert loss(Regression(), torch.tensor([1.0, 4.5]), torch.tensor([3.0, 4.0])) == 4.25


def test_a_score_of_zero_is_data() -> None:
    assert loss(Regression(), torch.tensor([2.0]), torch.tensor([0.0])) == 4.0


def test_ordinal_asks_for_the_right_side_of_every_boundary() -> None:
    # 2 of 3 stars, score 2: boundaries 1.5 (above it, right) and 2.5 (below it, right), each half a star away.
    section = Ordinal(lowest=1, highest=3)
    assert loss(section, torch.tensor([2.0]), torch.tensor([2.0])) == pytest.approx(2 * softplus(-0.5), rel=1e-6)
    assert loss(section, torch.tensor([2.0]), torch.tensor([3.0])) == pytest.approx(
        softplus(-0.5) + softplus(0.5), rel=1e-6
    )


def test_ordinal_has_its_lowest_loss_in_the_reply_s_own_bin() -> None:
    section, scores = Ordinal(), torch.linspace(0, 6, 61)
    for stars in (2.0, 3.0, 4.0):
        losses = [loss(section, score[None], torch.tensor([stars])) for score in scores]
        assert abs(scores[losses.index(min(losses))].item() - stars) < 0.5
