"""`python -m benchmarks.algorithms`: every algorithm with every form of the KL on a problem whose optimum is known.

The problem: four prompts, each answered with one token of six, which has a fixed reward. The policy is a table of
logits. Advantages, token rewards and losses are those of runs; the optimizer is Adam with a rate that falls to 0. Each
run is compared with the optimum of its own objective, see `optimum`. Draws docs/algorithms.svg.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import typer
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from torch import Tensor

from actors.learning.objectives.objective import LearnJob, Rows
from actors.learning.objectives.table import objective_of
from jobs.command import say
from orchestrator.algorithms.advantages import Advantages, Responses
from orchestrator.algorithms.algorithm import Algorithm
from orchestrator.algorithms.shaping import token_rewards_rows
from orchestrator.algorithms.table import ALGORITHMS
from orchestrator.types import Moments

Table = npt.NDArray[np.float64]  # (prompts, tokens)

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "algorithms.svg"
PROMPTS, TOKENS, SAMPLES = 4, 6, 64
STEPS, RATE, BETA = 80, 0.1, 0.4
FORMS = ("k1-reward", "k2-reward", "k3-reward", "k1-loss", "k2-loss", "k3-loss", "unbiased-loss", "none")
WITHOUT_OPTIMUM = ("k2-reward", "k3-reward")
PART = "all"  # the one part of the reward
TOLERANCE = 0.08  # of the distance at the end


@dataclass(frozen=True)
class Problem:
    """Args:
    rewards, reference: reward and log-prob of each token after each prompt.
    """

    rewards: Table
    reference: Table

    @staticmethod
    def seeded(seed: int = 0) -> Problem:
        generator = np.random.default_rng(seed)
        rewards = generator.permuted(np.tile(np.linspace(0.0, 1.0, TOKENS), (PROMPTS, 1)), axis=1)
        return Problem(rewards, _log_softmax(0.5 * generator.normal(size=(PROMPTS, TOKENS))))


def settings(name: str, form: str) -> Algorithm:
    """Two epochs, so that ratios differ from 1 and are clipped."""
    keys: dict[str, Any] = {"epochs": 2, "overlong_fraction": 0.0}
    if name == "gspo":  # its own range is for the geometric mean over a long response
        keys |= {"clip_ratio": 0.2, "clip_ratio_high": 0.2}
    if name == "gdpo":
        keys |= {"part_weights": {PART: 1.0}}
    keys |= {"kl_coefficient": 0.0} if form == "none" else {"kl_coefficient": BETA, "kl_estimator": form}
    return ALGORITHMS[name].model_validate(keys)


def forms_of(name: str) -> list[str]:
    """The forms of the KL that an algorithm takes."""
    return [form for form in FORMS if name != "gdpo" or not form.endswith("-reward")]


def train(name: str, form: str, problem: Problem, *, steps: int = STEPS, seed: int = 0) -> list[Table]:
    """The policy, as probabilities, before the first step and after each."""
    algorithm = settings(name, form)
    logits = torch.tensor(problem.reference, dtype=torch.float32).requires_grad_()
    values = torch.zeros(PROMPTS).requires_grad_()
    optimizer = torch.optim.Adam([logits, values], lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    generator = torch.Generator().manual_seed(seed)
    policies = [_probabilities(logits)]
    for step in range(steps):
        samples = _sample(algorithm, problem, logits, values, generator)
        for _ in range(algorithm.epochs):
            optimizer.zero_grad()
            _loss(algorithm, samples, logits, values, step).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        schedule.step()
        policies.append(_probabilities(logits))
    return policies


@dataclass(frozen=True)
class Samples:
    """One row per sample, and one token per row."""

    prompt_R: Tensor
    token_R: Tensor
    columns: Mapping[str, Tensor]
    moments: Moments


def _sample(
    algorithm: Algorithm, problem: Problem, logits: Tensor, values: Tensor, generator: torch.Generator
) -> Samples:
    """Samples a step and computes its advantages as a recorder does. Prompts are left out as dynamic sampling would."""
    logprobs = logits.detach().log_softmax(-1)
    tokens = torch.multinomial(logprobs.exp(), SAMPLES, replacement=True, generator=generator)
    rewards = torch.tensor(problem.rewards).gather(1, tokens).numpy()
    kept = torch.arange(PROMPTS)
    if algorithm.filter_rounds is not None:
        mixed = torch.from_numpy(rewards.min(1) < rewards.max(1))
        kept = kept[mixed] if mixed.any() else kept
    prompt_R, token_R = kept.repeat_interleave(SAMPLES), tokens[kept].flatten()
    old_R = logprobs[prompt_R, token_R]
    ref_R = torch.tensor(problem.reference, dtype=torch.float32)[prompt_R, token_R]
    offsets_R1 = np.arange(len(prompt_R) + 1)
    coefficient = algorithm.kl_coefficient if algorithm.kl_in_reward else 0.0
    estimator = algorithm.kl_estimator[:2] if algorithm.kl_in_reward else "k1"
    rewards_R = rewards[kept.numpy()].ravel()
    token_rewards_R = token_rewards_rows(rewards_R, old_R.numpy(), ref_R.numpy(), offsets_R1, coefficient, estimator)
    greedy_P = problem.rewards[np.arange(PROMPTS), logprobs.argmax(1).numpy()]
    found = algorithm.advantages(
        Responses(
            token_rewards_R,
            offsets_R1,
            prompt_R.numpy(),
            values.detach()[prompt_R].numpy(),
            np.zeros(len(prompt_R), np.float32),
            greedy_P[prompt_R.numpy()],
            {PART: rewards_R},
            np.zeros(len(prompt_R)),
        )
    )
    columns = {"old_logprobs": old_R, "ref_logprobs": ref_R, "engine_logprobs": old_R}
    columns |= {name: torch.from_numpy(getattr(found, f"{name}_N")) for name in ("advantages", "values", "returns")}
    return Samples(prompt_R, token_R, columns, _moments(found))


def _moments(found: Advantages) -> Moments:
    doubles_N = found.advantages_N.astype(np.float64)
    return Moments(len(doubles_N), float(doubles_N.sum()), float((doubles_N**2).sum()))


def _loss(algorithm: Algorithm, samples: Samples, logits: Tensor, values: Tensor, step: int) -> Tensor:
    """Policy's and critic's loss of a step."""
    prompt_R, columns = samples.prompt_R, samples.columns
    logprobs_RV = logits[prompt_R].log_softmax(-1)
    entropy_R = -(logprobs_RV.exp() * logprobs_RV).sum(-1)
    rows = Rows(columns, torch.ones(len(prompt_R), dtype=torch.int64), mean_length=1.0, max_new_tokens=1)
    job = LearnJob(step, samples.moments.mean, samples.moments.std, algorithm.kl_coefficient, seed=0)
    objective = objective_of(algorithm)
    logprobs_R = logprobs_RV.gather(1, samples.token_R[:, None])[:, 0]
    loss = objective.policy_terms(logprobs_R, entropy_R, rows, job).loss
    if algorithm.needs_critic:
        loss = loss + objective.critic_terms(values[prompt_R], columns).loss
    return loss / len(prompt_R)


def optimum(name: str, form: str, problem: Problem) -> Table:
    """The policy at which the expected gradient is 0, as probabilities.

    Advantages are (r - b) / σ: without division σ = 1, else the deviation of the rewards in the prompt, or in all
    prompts together. With β the weight of the KL:

        k1-reward                p ∝ q exp(r / β), whatever σ: there the shaped rewards are all the same
        k2-loss, unbiased-loss   p ∝ q exp(r / (β σ))
        k3-loss                  p = β q / (λ - r / σ), the optimum with KL(q || p)
        k1-loss, none            the token with the highest reward
        k2-reward, k3-reward     none: a token that is less likely than under q is penalised too, and the more the less
                                 likely it gets. For comparison, that of k1-reward
    """
    rewards, log_q = problem.rewards, problem.reference
    if form.endswith("-reward"):
        return _softmax(log_q + rewards / BETA)
    if form in {"k1-loss", "none"}:
        return np.where(rewards == rewards.max(1, keepdims=True), 1.0, 0.0)
    solve = _forward_optimum if form == "k3-loss" else lambda scaled, log_q: _softmax(log_q + scaled / BETA)
    policy = np.exp(log_q)
    for _ in range(500):  # σ depends on the policy
        policy = 0.5 * policy + 0.5 * solve(rewards / _deviation(name, rewards, policy), log_q)
    return policy


def _deviation(name: str, rewards: Table, policy: Table) -> Table:
    means = (policy * rewards).sum(1, keepdims=True)
    within = (policy * (rewards - means) ** 2).sum(1, keepdims=True)
    if name in {"ppo", "reinforce++-baseline"}:
        within = within.mean(keepdims=True)
    elif name == "reinforce++":
        within = within.mean(keepdims=True) + means.var()
    elif name in {"rloo", "remax", "dr-grpo"}:
        within = np.ones((1, 1))
    deviation: Table = np.sqrt(within)
    return deviation


def _forward_optimum(rewards: Table, log_q: Table) -> Table:
    """The p of largest Σ p r - β KL(q || p): bisects for λ, at which p sums to 1."""
    low, high = rewards.max(1, keepdims=True), rewards.max(1, keepdims=True) + BETA
    for _ in range(100):
        middle = 0.5 * (low + high)
        is_above = (BETA * np.exp(log_q) / (middle - rewards)).sum(1, keepdims=True) > 1.0
        low, high = np.where(is_above, middle, low), np.where(is_above, high, middle)
    policy: Table = BETA * np.exp(log_q) / (high - rewards)
    return policy


def distance(policy: Table, other: Table) -> float:
    """Total variation, of the prompt where it is largest."""
    return float(0.5 * np.abs(policy - other).sum(1).max())


def _probabilities(logits: Tensor) -> Table:
    policy: Table = logits.detach().double().softmax(-1).numpy()
    return policy


def _log_softmax(logits: Table) -> Table:
    shifted = logits - logits.max(1, keepdims=True)
    logprobs: Table = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return logprobs


def _softmax(logits: Table) -> Table:
    policy: Table = np.exp(_log_softmax(logits))
    return policy


def draw(curves: Mapping[str, Mapping[str, list[float]]], path: Path) -> None:
    """Args: curves: form of the KL -> algorithm -> distance from the optimum at each step."""
    with rc_context({"svg.hashsalt": "algorithms", "svg.fonttype": "none", "font.size": 9.0}):
        figure = Figure(figsize=(12, 5.6), layout="constrained")
        FigureCanvasSVG(figure)
        panels = figure.subplots(2, 4, sharex=True, sharey=True)
        for axes, (form, of_form) in zip(panels.flat, curves.items(), strict=True):
            for name, values in of_form.items():
                axes.plot(values, lw=1.1, label=name)
            axes.axhline(TOLERANCE, color="0.6", lw=0.8, ls="--")
            title = "no KL" if form == "none" else f"{form} (no optimum)" if form in WITHOUT_OPTIMUM else form
            axes.set(title=title, yscale="log", ylim=(3e-3, 1.0))
        figure.supxlabel("step")
        figure.supylabel("distance from the optimum (total variation)")
        figure.legend(*panels.flat[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    # One line per curve, and two decimals.
    path.write_text(re.sub(r"(\.\d\d)\d+", r"\1", re.sub(r" *\n(?=L )", " ", buffer.getvalue())), encoding="utf-8")


def main(
    steps: Annotated[int, typer.Option(help="Steps of each run.")] = STEPS,
    seed: Annotated[int, typer.Option(help="Seed of all samples.")] = 0,
    picture: Annotated[Path, typer.Option(help="SVG file.")] = PICTURE,
) -> None:
    """Runs all, shows the distances at the end, and draws the picture. Exit code 1: one is above the tolerance."""
    torch.set_num_threads(1)
    problem = Problem.seeded()
    curves: dict[str, dict[str, list[float]]] = {}
    say(f"{'':22}" + "".join(f"{form:>15}" for form in FORMS))
    for name in ALGORITHMS:
        for form in forms_of(name):
            policies = train(name, form, problem, steps=steps, seed=seed)
            best = optimum(name, form, problem)
            curves.setdefault(form, {})[name] = [distance(policy, best) for policy in policies]
        ends = [f"{curves[form][name][-1]:.3f}" if form in forms_of(name) else "" for form in FORMS]
        say(f"{name:22}" + "".join(f"{end:>15}" for end in ends))
    draw(curves, picture)
    checked = [of_form for form, of_form in curves.items() if form not in WITHOUT_OPTIMUM]
    worst = max(values[-1] for of_form in checked for values in of_form.values())
    raise typer.Exit(int(worst > TOLERANCE))


if __name__ == "__main__":
    typer.run(main)
