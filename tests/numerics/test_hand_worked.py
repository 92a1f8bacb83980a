"""Hand-worked tables: all numbers below follow from the formulas in the comments, not from the code."""

import itertools
import math

import numpy as np
import pytest
import torch

from actors.learning.objectives.corrections import importance_weights
from actors.learning.objectives.kl import KL_LOSSES
from actors.learning.objectives.losses import (
    policy_loss,
    ranking_loss,
    sft_loss,
    value_loss,
    whiten,
)
from orchestrator.algorithms import kl
from orchestrator.algorithms.grpo import Grpo, grpo
from orchestrator.algorithms.ppo import gae, gae_rows
from orchestrator.algorithms.rloo import rloo
from orchestrator.algorithms.shaping import token_rewards
from orchestrator.training.schedule import learning_rate


def f32(*numbers):
    return np.array(numbers, dtype=np.float32)


def test_gae_of_a_response_that_ended_by_eos():
    # gamma 0.5, lambda 0.5. delta_2 = 4 - 2 = 2; delta_1 = 0 + 0.5*2 - 1 = 0; delta_0 = 1 + 0.5*1 - 3 = -1.5
    # A_2 = 2; A_1 = 0 + 0.25*2 = 0.5; A_0 = -1.5 + 0.25*0.5 = -1.375. R = A + V
    advantages, returns = gae(f32(1, 0, 4), f32(3, 1, 2), 0.0, 0.5, 0.5)
    np.testing.assert_allclose(advantages, [-1.375, 0.5, 2.0], rtol=1e-7)
    np.testing.assert_allclose(returns, [1.625, 1.5, 4.0], rtol=1e-7)
    assert advantages.dtype == returns.dtype == np.float32


def test_gae_of_a_response_that_was_cut_uses_the_bootstrap_value():
    # delta_2 = 4 + 0.5*8 - 2 = 6; A_2 = 6; A_1 = 0 + 0.25*6 = 1.5; A_0 = -1.5 + 0.25*1.5 = -1.125
    advantages, _ = gae(f32(1, 0, 4), f32(3, 1, 2), 8.0, 0.5, 0.5)
    np.testing.assert_allclose(advantages, [-1.125, 1.5, 6.0], rtol=1e-7)


def test_gae_with_gamma_and_lambda_one_is_the_return_to_go_minus_the_value():
    advantages, returns = gae(f32(1, 2, 3), f32(10, 20, 30), 0.0, 1.0, 1.0)
    np.testing.assert_allclose(returns, [6, 5, 3], rtol=1e-6)
    np.testing.assert_allclose(advantages, [-4, -15, -27], rtol=1e-6)


def test_gae_of_many_rows_equals_gae_of_each():
    rng = np.random.default_rng(5)
    lengths = [3, 1, 7, 0, 4, 7]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    rewards, values = (rng.normal(size=offsets[-1]).astype(np.float32) for _ in range(2))
    bootstrap = rng.normal(size=len(lengths)).astype(np.float32)
    advantages, returns = gae_rows(rewards, values, offsets, bootstrap, 0.9, 0.8)
    for i, (start, end) in enumerate(itertools.pairwise(offsets)):
        expected = 0.0
        for t in reversed(range(start, end)):
            following = bootstrap[i] if t == end - 1 else values[t + 1]
            expected = rewards[t] + 0.9 * following - values[t] + 0.9 * 0.8 * expected
            assert advantages[t] == pytest.approx(expected, rel=1e-5, abs=1e-6)
            assert returns[t] == pytest.approx(expected + values[t], rel=1e-5, abs=1e-6)


def test_grpo_divides_by_the_deviation_of_the_group():
    # Group 7: 1, 2, 3, mean 2, std 1 (n - 1); group 4: 5, 5, std 0; group 9: one sample.
    advantages, baselines = grpo(np.array([1.0, 5, 2, 5, 3, 8]), np.array([7, 4, 7, 4, 7, 9]))
    np.testing.assert_allclose(advantages, [-1 / 1.0001, 0, 0, 0, 1 / 1.0001, 0], rtol=1e-12)
    np.testing.assert_allclose(baselines, [2, 5, 2, 5, 2, 8], rtol=1e-12)


def test_rloo_leaves_the_sample_itself_out():
    # For 1, 2, 6 the means of the others are 4, 3.5, 1.5; a group of one has no others.
    advantages, baselines = rloo(np.array([1.0, 8, 2, 6]), np.array([0, 1, 0, 0]))
    np.testing.assert_allclose(baselines, [4, 8, 3.5, 1.5], rtol=1e-12)
    np.testing.assert_allclose(advantages, [-3, 0, -1.5, 4.5], rtol=1e-12)


def test_token_rewards_put_the_score_on_the_last_token_and_k1_on_every_token():
    # -0.1 * (old - ref): -0.1*(-1+2) = -0.1; -0.1*(-3+1) = 0.2; last one + 5
    rewards = token_rewards(5.0, f32(-1, -3, -2), f32(-2, -1, -2), 0.1)
    np.testing.assert_allclose(rewards, [-0.1, 0.2, 5.0], rtol=1e-6)


def test_kl_estimators():
    # log p = ln 0.5, log q = ln 0.25: k1 = ln 2, k2 = (ln 2)² / 2, k3 = 1/2 - 1 + ln 2
    p, q = f32(math.log(0.5)), f32(math.log(0.25))
    assert kl.k1(p, q)[0] == pytest.approx(math.log(2), rel=1e-6)
    assert kl.k2(p, q)[0] == pytest.approx(math.log(2) ** 2 / 2, rel=1e-6)
    assert kl.k3(p, q)[0] == pytest.approx(-0.5 + math.log(2), rel=1e-6)
    assert kl.k3(q, p)[0] == pytest.approx(2 - 1 - math.log(2), rel=1e-6)
    k3 = KL_LOSSES["k3-loss"](torch.tensor(p), torch.tensor(q), torch.tensor(p))
    assert float(k3) == pytest.approx(-0.5 + math.log(2), rel=1e-6)


def test_k1_and_k3_estimate_the_true_kl():
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.5, 0.25, 0.25])
    true = float((p * np.log(p / q)).sum())
    for estimator in (kl.k1, kl.k3):  # expectation under p, exactly
        assert float((p * estimator(np.log(p), np.log(q))).sum()) == pytest.approx(true, rel=1e-12)


def test_the_adaptive_controller_moves_by_at_most_a_fifth_per_horizon():
    # error clipped to 0.2: 1 * (1 + 0.2 * 100/1000) = 1.02; to -0.2: 0.98; 10 % over target: 1 + 0.1*0.1 = 1.01
    settings = {"target": 2.0, "horizon_samples": 1000, "num_samples": 100}
    assert kl.adapted_coefficient(1.0, 50.0, **settings) == pytest.approx(1.02)
    assert kl.adapted_coefficient(1.0, 0.0, **settings) == pytest.approx(0.98)
    assert kl.adapted_coefficient(1.0, 2.2, **settings) == pytest.approx(1.01)
    assert kl.adapted_coefficient(1.0, 2.0, **settings) == 1.0


def test_whitening():
    # mean 3, sample std 2: (1 - 3)/2, (3 - 3)/2, (5 - 3)/2
    np.testing.assert_allclose(whiten(torch.tensor([1.0, 3.0, 5.0]), 3.0, 2.0), [-1, 0, 1], rtol=1e-6)


def test_learning_rates():
    common = {"peak": 1.0, "warmup_optimizer_steps": 3, "total_optimizer_steps": 13}
    for schedule in ("constant", "linear", "cosine"):
        warm = [learning_rate(step, schedule=schedule, **common) for step in range(4)]
        assert warm == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert learning_rate(8, schedule="linear", **common) == pytest.approx(0.5)
    assert learning_rate(8, schedule="cosine", **common) == pytest.approx(0.5)
    assert learning_rate(5, schedule="cosine", **common) == pytest.approx(0.5 * (1 + math.cos(math.pi / 5)))
    assert learning_rate(13, schedule="linear", **common) == learning_rate(99, schedule="cosine", **common) == 0.0
    assert learning_rate(99, schedule="constant", **common) == 1.0


def test_clipped_policy_loss():
    # eps 0.2; ratios 1.5, 0.5, 1.5, 0.5, 1.1 with A = +1, +1, -1, -1, +2
    # min(rA, clip(r)A): min(1.5, 1.2) = 1.2; min(.5, .8) = .5; min(-1.5, -1.2) = -1.5; min(-.5, -.8) = -.8; 2.2
    ratio = torch.tensor([1.5, 0.5, 1.5, 0.5, 1.1])
    logprobs = (torch.full((5,), -2.0) + ratio.log()).requires_grad_()
    old, advantages = torch.full((5,), -2.0), torch.tensor([1.0, 1.0, -1.0, -1.0, 2.0])
    terms = policy_loss(logprobs, old, advantages, clip_ratio=0.2)
    assert terms.loss.item() == pytest.approx(-(1.2 + 0.5 - 1.5 - 0.8 + 2.2), rel=1e-5)
    terms.loss.backward()
    # The gradient of r A with respect to log p is r A if the minimum is the unclipped term, else 0.
    assert logprobs.grad.tolist() == pytest.approx([0.0, -0.5, 1.5, 0.0, -2.2], rel=1e-5, abs=1e-6)
    assert terms.sums["clip_fraction"].item() == 4
    assert terms.maxima["ratio_max"].item() == pytest.approx(1.5, rel=1e-6)
    k3 = sum(r - 1 - math.log(r) for r in (1.5, 0.5, 1.5, 0.5, 1.1))
    assert terms.sums["approx_kl"].item() == pytest.approx(k3, rel=1e-4)


def test_truncated_importance_weights_scale_the_surrogate():
    # exp(old - engine): exp(0) = 1, exp(ln 4) = 4 capped at 2, exp(-ln 2) = 0.5
    old = torch.tensor([-1.0, -1.0, -1.0])
    weights = importance_weights(Grpo(importance_cap=2.0), torch.tensor([0.0, math.log(4), -math.log(2)]), None)
    assert weights.tolist() == pytest.approx([1.0, 2.0, 0.5], rel=1e-6)
    terms = policy_loss(old, old, torch.tensor([1.0, 10.0, 100.0]), clip_ratio=0.2, weights_N=weights)
    assert terms.loss.item() == pytest.approx(-(1 + 20 + 50), rel=1e-6)


def test_clipped_value_loss():
    # c = 0.5; V = 3, 1, 0.2; V_old = 1, 1, 0; R = 2, 2, 0. clipped V = 1.5, 1, 0.2
    # max((3-2)², (1.5-2)²) = 1; max(1, 1) = 1; max(.04, .04) = .04; half the sum = 1.02
    values, old, returns = torch.tensor([3.0, 1.0, 0.2]), torch.tensor([1.0, 1.0, 0.0]), torch.tensor([2.0, 2.0, 0.0])
    assert value_loss(values, old, returns, clip_value=0.5).loss.item() == pytest.approx(1.02, rel=1e-6)
    # V = 2 from V_old = 0 with R = 2: clipped to 0.5, (0.5 - 2)² = 2.25 > 0: the pessimistic value counts.
    one = value_loss(torch.tensor([2.0]), torch.tensor([0.0]), torch.tensor([2.0]), clip_value=0.5)
    assert one.loss.item() == pytest.approx(1.125)
    assert one.sums["clip_fraction"].item() == 1
    assert value_loss(values, old, returns, clip_value=None).loss.item() == pytest.approx(0.5 * 2.04, rel=1e-6)


def test_ranking_loss_averages_over_the_pairs_of_a_prompt_and_sums_over_prompts():
    # Prompt 0: scores 2 > 1 > 0, three pairs with margins 1, 2, 1; prompt 1: scores 0, 3, the better one is lower.
    def loss(margin):
        return math.log1p(math.exp(-margin))

    terms = ranking_loss(
        torch.tensor([2.0, 1.0, 0.0, 0.0, 3.0]), torch.tensor([3, 2, 1, 9, 8]), torch.tensor([0, 0, 0, 1, 1])
    )
    assert terms.loss.item() == pytest.approx((2 * loss(1) + loss(2)) / 3 + loss(-3), rel=1e-6)
    assert (terms.sums["pairs"].item(), terms.sums["correct_pairs"].item()) == (4, 3)


def test_ties_make_no_pair():
    terms = ranking_loss(torch.tensor([1.0, 2.0]), torch.tensor([5, 5]), torch.tensor([0, 0]))
    assert terms.loss.item() == 0.0
    assert terms.sums["pairs"].item() == 0


def test_sft_loss_counts_masked_tokens_only():
    terms = sft_loss(torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([0.0, 1.0, 1.0]))
    assert terms.loss.item() == 6.0
    assert terms.sums["tokens"].item() == 2.0
