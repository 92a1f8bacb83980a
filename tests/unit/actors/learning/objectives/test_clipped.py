"""What the clipped objective can switch on, by hand, and that the loss does not depend on micro-batches."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from actors.learning.objectives.corrections import correction
from actors.learning.objectives.kl import KL_LOSSES
from actors.learning.objectives.losses import LossTerms, policy_loss
from actors.learning.objectives.objective import LearnJob, Rows
from actors.learning.objectives.table import objective_of
from orchestrator.algorithms.algorithm import Algorithm
from orchestrator.algorithms.table import ALGORITHMS

JOB = LearnJob(step=0, advantage_mean=0.0, advantage_std=1.0, kl_coefficient=0.5, seed=0)
LENGTHS = [2, 1, 3]  # rows of the hand-worked examples


def algorithm(name: str = "grpo", **keys: Any) -> Algorithm:
    return ALGORITHMS[name].model_validate(keys)


def rows(columns: dict[str, Tensor], lengths: list[int], *, mean_length: float, max_new_tokens: int = 4) -> Rows:
    return Rows(columns, torch.tensor(lengths), mean_length, max_new_tokens)


def terms(settings: Algorithm, new: list[float], *, lengths: list[int] = LENGTHS, **columns: list[float]) -> LossTerms:
    """Of a minibatch of these rows; columns that are not given are zero."""
    flat = {
        name: torch.tensor(columns.get(name, [0.0] * len(new)))
        for name in ("old_logprobs", "ref_logprobs", "engine_logprobs", "advantages")
    }
    read = rows(flat, lengths, mean_length=len(new) / len(lengths))
    return objective_of(settings).policy_terms(torch.tensor(new), torch.zeros(len(new)), read, JOB)


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        # Advantages 1, 3 | 5 | 2, 2, 5 and ratios 1; the sums are divided by 6 tokens.
        ("token", 18 / 6),
        ("sample", (2 + 5 + 3) / 3),
        ("constant", (4 + 5 + 9) / 4 / 3),
    ],
)
def test_aggregations(aggregation: str, expected: float) -> None:
    settings = algorithm(aggregation=aggregation, kl_estimator="k1-loss", kl_coefficient=0.5, entropy_coefficient=0.25)
    found = terms(settings, [0.0] * 6, advantages=[1.0, 3.0, 5.0, 2.0, 2.0, 5.0])
    assert found.loss.item() / 6 == pytest.approx(-expected)
    # KL and entropy are aggregated in the same way.
    kl = terms(settings, [0.0] * 6, ref_logprobs=[-1.0, -3.0, -5.0, -2.0, -2.0, -5.0])
    assert kl.loss.item() / 6 == pytest.approx(0.5 * expected)


def test_clip_higher_and_dual_clip() -> None:
    ratio, advantages = torch.tensor([1.25, 1.5, 4.0, 10.0]), torch.tensor([1.0, 1.0, -1.0, -2.0])
    arguments = (ratio.log(), torch.zeros(4), advantages)
    # min(r A, 1.28 A) for A > 0; r A = -4 and -20 for A < 0, the latter at least 3 A
    plain = policy_loss(*arguments, clip_ratio=0.2, clip_ratio_high=0.28)
    assert plain.loss.item() == pytest.approx(-(1.25 + 1.28 - 4 - 20), rel=1e-6)
    dual = policy_loss(*arguments, clip_ratio=0.2, dual_clip=3.0)
    assert dual.loss.item() == pytest.approx(-(1.2 + 1.2 - 3 - 6), rel=1e-6)
    assert dual.sums["dual_clip_fraction"].item() == 2
    assert dual.sums["clip_fraction"].item() == 4


def test_the_exponent_of_the_ratio_is_bounded_and_counted() -> None:
    new = torch.tensor([30.0, -30.0, 0.0], requires_grad=True)
    found = policy_loss(new, torch.zeros(3), torch.tensor([-1.0, -1.0, 1.0]), clip_ratio=0.2)
    assert found.loss.item() == pytest.approx(math.exp(20.0) + 0.8 - 1.0, rel=1e-6)
    assert found.sums["ratio_bounded_fraction"].item() == 2
    found.loss.backward()
    assert new.grad is not None and new.grad.tolist() == [0.0, 0.0, -1.0]


def test_gspo_has_one_ratio_for_a_response() -> None:
    # Means of new - old: ln 2 / 2 in the first row, 0 in the second: ratios √2 and 1, clipped at 1.1.
    new = [math.log(2.0), 0.0, 0.0]
    settings = algorithm("gspo", clip_ratio=0.1, clip_ratio_high=0.1, aggregation="token")
    found = terms(settings, new, lengths=[2, 1], advantages=[1.0, 1.0, 1.0])
    assert found.loss.item() == pytest.approx(-(1.1 + 1.1 + 1.0), rel=1e-6)
    assert found.maxima["ratio_max"].item() == pytest.approx(2**0.5, rel=1e-6)
    found = terms(settings, new, lengths=[2, 1], advantages=[-1.0, -1.0, 1.0])
    assert found.loss.item() == pytest.approx(2 * 2**0.5 - 1.0, rel=1e-6)


def test_gspo_has_the_dual_clip_of_a_response() -> None:
    # Means of new - old: ln 16 / 2 and 0: ratios 4 and 1; the first row's surrogate is at least 3 A.
    settings = algorithm("gspo", dual_clip=3.0, aggregation="token")
    found = terms(settings, [math.log(16.0), 0.0, 0.0], lengths=[2, 1], advantages=[-1.0, -2.0, -1.0])
    assert found.loss.item() == pytest.approx(3.0 + 6.0 + 1.0, rel=1e-6)
    assert found.sums["dual_clip_fraction"].item() == 2


def test_cispo_learns_from_clipped_tokens_too() -> None:
    new = torch.tensor([math.log(8.0), math.log(0.5)], requires_grad=True)
    columns = {"old_logprobs": torch.zeros(2), "engine_logprobs": torch.zeros(2), "ref_logprobs": torch.zeros(2)}
    columns["advantages"] = torch.tensor([1.0, -2.0])
    read = rows(columns, [2], mean_length=2.0)
    found = objective_of(algorithm("cispo", clip_ratio_high=4.0)).policy_terms(new, torch.zeros(2), read, JOB)
    assert found.loss.item() == pytest.approx(-(5.0 * math.log(8.0) - 2.0 * 0.5 * math.log(0.5)), rel=1e-6)
    found.loss.backward()
    assert new.grad is not None and new.grad.tolist() == pytest.approx([-5.0, 1.0])


@pytest.mark.parametrize(
    ("estimator", "value", "slope"),
    # new = -1, ref = -1 - ln 2, old = -1 - ln 3: log-ratio ln 2, p_new / p_old = 3, k3 = ½ - 1 + ln 2
    [
        ("k1-loss", math.log(2), 1.0),
        ("k2-loss", math.log(2) ** 2 / 2, math.log(2)),
        ("k3-loss", math.log(2) - 0.5, 0.5),
        ("unbiased-loss", 3 * (math.log(2) - 0.5), 3 * math.log(2)),
    ],
)
def test_estimates_of_the_kl_and_their_gradients(estimator: str, value: float, slope: float) -> None:
    new = torch.tensor([-1.0], requires_grad=True)
    found = KL_LOSSES[estimator](new, torch.tensor([-1.0 - math.log(2)]), torch.tensor([-1.0 - math.log(3)]))
    found.sum().backward()
    assert found.item() == pytest.approx(value, rel=1e-5)
    assert new.grad is not None and new.grad.item() == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize(
    ("estimator", "is_exact"), [("k1-loss", False), ("k2-loss", True), ("k3-loss", False), ("unbiased-loss", True)]
)
def test_which_gradients_are_those_of_the_kl(estimator: str, is_exact: bool) -> None:
    """In expectation over the tokens of the old policy, which is the current one, except for the unbiased form."""
    logits = torch.tensor([0.3, -0.5, 0.9], requires_grad=True)
    ref = torch.tensor([0.1, 0.6, -0.2]).log_softmax(0)
    old = logits.detach().log_softmax(0)
    if estimator == "unbiased-loss":
        old = torch.tensor([-0.4, 0.2, 0.1]).log_softmax(0)
    new = logits.log_softmax(0)
    (found,) = torch.autograd.grad((old.exp() * KL_LOSSES[estimator](new, ref, old)).sum(), logits, retain_graph=True)
    (true,) = torch.autograd.grad((new.exp() * (new - ref)).sum(), logits)
    assert torch.allclose(found, true, atol=1e-6) == is_exact


ENGINE = [0.0, -math.log(4), math.log(2), 0.0, 0.0, 0.0]  # with old = 0 the ratios are 1, 4 | ½ | 1, 1, 1


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"importance_cap": 2.0}, [1, 2, 0.5, 1, 1, 1]),
        ({"importance_cap": 2.0, "importance_floor": 0.8}, [1, 2, 0.8, 1, 1, 1]),
        ({"importance_cap": 2.0, "importance_floor": 0.8, "importance_mode": "mask"}, [1, 0, 0, 1, 1, 1]),
        ({"importance_cap": 3.0, "importance_level": "sequence"}, [3, 3, 0.5, 1, 1, 1]),
        ({"importance_cap": 3.0, "importance_level": "sequence", "importance_mode": "mask"}, [0, 0, 0.5, 1, 1, 1]),
        ({"gate": "ratio", "gate_min": 0.6, "gate_max": 3.0}, [1, 0, 0, 1, 1, 1]),
        # The geometric mean of the first row is 2.
        ({"gate": "ratio", "gate_over": "seq-mean", "gate_max": 2.1}, [1, 1, 1, 1, 1, 1]),
        ({"gate": "ratio", "gate_over": "seq-mean", "gate_min": 0.6, "gate_max": 1.9}, [0, 0, 0, 1, 1, 1]),
        ({"gate": "ratio", "gate_over": "seq-sum", "gate_max": 3.9}, [0, 0, 1, 1, 1, 1]),
        # k2 of ln 4 is 0.961, of ln ½ 0.240
        ({"gate": "k2", "gate_max": 0.9}, [1, 0, 1, 1, 1, 1]),
        ({"gate": "k2", "gate_over": "seq-max", "gate_max": 0.9}, [0, 0, 1, 1, 1, 1]),
        ({"gate": "k3", "gate_max": 1.0, "importance_cap": 9.0}, [1, 0, 0.5, 1, 1, 1]),
    ],
)
def test_corrections_of_what_separates_learner_and_engine(keys: dict[str, Any], expected: list[float]) -> None:
    found = correction(algorithm(**keys), torch.zeros(6), torch.tensor(ENGINE), torch.tensor(LENGTHS))
    assert found is not None and found.weights_N.tolist() == pytest.approx(expected)
    if "gate" in keys:
        assert found.sums["gate_closed_fraction"].item() == sum(weight == 0 for weight in expected)


@pytest.mark.parametrize(("gate", "bound"), [("tv", 0.25), ("binary-kl", 0.1438)])
def test_divergences_of_this_token_or_another_one(gate: str, bound: float) -> None:
    # p_engine = ½, p_learner = ¼: |½ - ¼|, and ½ ln 2 + ½ ln ⅔ = 0.1438
    old, engine = torch.tensor([math.log(0.25)]), torch.tensor([math.log(0.5)])
    for factor, is_open in ((1.01, True), (0.99, False)):
        found = correction(algorithm(gate=gate, gate_max=factor * bound), old, engine, torch.tensor([1]))
        assert found is not None and bool(found.weights_N.item()) is is_open


def test_by_default_nothing_is_weighted() -> None:
    assert correction(algorithm(), torch.zeros(6), torch.tensor(ENGINE), torch.tensor(LENGTHS)) is None


SWITCHED_ON: tuple[dict[str, Any], ...] = (
    {"aggregation": "sample", "gate": "k3", "gate_over": "seq-mean", "gate_max": 0.3, "kl_estimator": "unbiased-loss"},
    {"aggregation": "constant", "importance_cap": 2.0, "importance_level": "sequence", "kl_estimator": "k2-loss"},
    {"dual_clip": 3.0, "importance_cap": 2.0, "importance_floor": 0.5, "importance_mode": "mask"},
)


@pytest.mark.parametrize("keys", SWITCHED_ON)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_micro_batches_add_up(name: str, keys: dict[str, Any]) -> None:
    """Rows of any prompts, in any micro-batches, have the gradient of one micro-batch."""
    generator = torch.Generator().manual_seed(5)
    lengths = [3, 1, 7, 2, 5]
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    names = ("old_logprobs", "ref_logprobs", "engine_logprobs")
    columns = {column: -torch.rand(18, generator=generator) - 0.2 for column in names}
    columns["advantages"] = torch.randn(18, generator=generator)
    new = (columns["old_logprobs"] + 0.3 * torch.randn(18, generator=generator)).requires_grad_()
    objective = objective_of(algorithm(name, entropy_coefficient=0.1, **keys))

    def gradient(parts: list[list[int]]) -> Tensor:
        loss = torch.zeros(())
        for part in parts:
            index = torch.cat([torch.arange(starts[row], starts[row + 1]) for row in part])
            chosen = {column: values[index] for column, values in columns.items()}
            read = rows(chosen, [lengths[row] for row in part], mean_length=18 / 5, max_new_tokens=8)
            loss = loss + objective.policy_terms(new[index], new[index].exp(), read, JOB).loss
        (found,) = torch.autograd.grad(loss, new)
        return found

    whole = gradient([[0, 1, 2, 3, 4]])
    assert whole.abs().max() > 1e-3
    torch.testing.assert_close(gradient([[3], [0, 4], [2, 1]]), whole, rtol=1e-5, atol=1e-6)
