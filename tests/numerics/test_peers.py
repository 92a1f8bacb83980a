"""Advantages, losses and their gradients equal those of verl 0.9.1 and OpenRLHF 0.11.2 on random ragged batches.

Differences that are meant are in docs/algorithms.md; where one is a known factor, it is undone here.
"""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.learning.objectives.corrections import importance_weights, is_open
from actors.learning.objectives.losses import value_loss, whiten
from actors.learning.objectives.objective import LearnJob, Rows
from actors.learning.objectives.table import objective_of
from orchestrator.algorithms.advantages import Responses
from orchestrator.algorithms.algorithm import Algorithm
from orchestrator.algorithms.shaping import shaped_rewards
from orchestrator.algorithms.table import ALGORITHMS
from orchestrator.types import Moments
from tests.deadlines import scaled
from tests.peers.batch import (
    MAX_NEW_TOKENS,
    PART_WEIGHTS,
    SAMPLES_PER_PROMPT,
    SEEDS,
    Batch,
    Results,
    batch,
    differentiated,
    laid_end_to_end,
    on_last,
    parts_of,
)
from tests.peers.wheels import fetch

UNCAPPED = 1e9
GRPO_EPSILON = 1e-4  # OpenRLHF's is 1e-9; verl's is a parameter
CLIPS = {"clip": {}, "clip-higher": {"clip_ratio_high": 0.28}, "dual-clip": {"dual_clip": 3.0}}
AGGREGATIONS = ("token", "sample", "constant")


def algorithm(name: str, **keys: object) -> Algorithm:
    return ALGORITHMS[name].model_validate(keys)


def rows_of(data: Batch, *, per_row: bool = False) -> Rows:
    mask_BT = data["mask_BT"]
    lengths_B = mask_BT.sum(1).long()
    names = {"old_logprobs": "old_BT", "ref_logprobs": "ref_BT", "engine_logprobs": "engine_BT"}
    columns = {name: laid_end_to_end(data[key], mask_BT) for name, key in names.items()}
    advantages_BT = data["row_advantages_B"][:, None].expand_as(mask_BT) if per_row else data["advantages_BT"]
    columns["advantages"] = laid_end_to_end(advantages_BT, mask_BT)
    return Rows(columns, lengths_B, float(lengths_B.sum()) / len(lengths_B), MAX_NEW_TOKENS)


def loss_of(settings: Algorithm, data: Batch, rows: Rows, *, at: str = "new_BT", kl: float = 0.0) -> list[Tensor]:
    """The loss of a minibatch of these rows, and its gradient."""
    job = LearnJob(step=0, advantage_mean=0.0, advantage_std=1.0, kl_coefficient=kl, seed=0)
    num_tokens = float(rows.lengths_B.sum())

    def loss(new_BT: Tensor) -> Tensor:
        new_N = laid_end_to_end(new_BT, data["mask_BT"])
        return objective_of(settings).policy_terms(new_N, torch.zeros_like(new_N), rows, job).loss / num_tokens

    return list(differentiated(loss, data[at], data["mask_BT"]))


def losses(data: Batch) -> Results:
    rows, whole_rows = rows_of(data), rows_of(data, per_row=True)
    found: Results = {}
    for (name, clip), aggregation in itertools.product(CLIPS.items(), AGGREGATIONS):
        found[f"loss {name} {aggregation}"] = loss_of(algorithm("grpo", aggregation=aggregation, **clip), data, rows)
    for aggregation in AGGREGATIONS:
        near = {"aggregation": aggregation, "clip_ratio": 0.01, "clip_ratio_high": 0.02}
        found[f"loss gspo {aggregation}"] = loss_of(algorithm("gspo", **near), data, whole_rows)
        wide = {"aggregation": aggregation, "clip_ratio": 0.2, "clip_ratio_high": 0.28}
        found[f"loss cispo {aggregation}"] = loss_of(algorithm("cispo", **wide), data, rows)
    return found


def values(data: Batch, clip_value: float | None) -> list[Tensor]:
    mask_BT = data["mask_BT"]

    def loss(values_BT: Tensor) -> Tensor:
        flat = [laid_end_to_end(part, mask_BT) for part in (values_BT, data["old_values_BT"], data["returns_BT"])]
        return value_loss(*flat, clip_value=clip_value).loss / mask_BT.sum()

    return list(differentiated(loss, data["values_BT"], mask_BT))


def kl(data: Batch, estimator: str, at: str = "near_BT") -> list[Tensor]:
    rows = rows_of(data)
    rows.columns["advantages"].zero_()  # type: ignore[attr-defined]
    return loss_of(algorithm("grpo", kl_estimator=f"{estimator}-loss"), data, rows, at=at, kl=1.0)


def verl_corrections(data: Batch) -> Results:
    rows = rows_of(data)
    old_N, engine_N = rows.columns["old_logprobs"], rows.columns["engine_logprobs"]
    found: Results = {}
    for level, mode in itertools.product(("token", "sequence"), ("truncate", "mask")):
        keys = {"importance_level": level, "importance_mode": mode, "importance_cap": 1.3}
        keys |= {"importance_floor": 0.8} if mode == "mask" else {}
        settings = algorithm("grpo", **keys)
        weights_N = importance_weights(settings, old_N - engine_N, rows.lengths_B)
        found[f"weights {level} {mode}"] = [weights_N, *loss_of(settings, data, rows)]
    for over, statistic in itertools.product(("token", "seq_mean", "seq_sum", "seq_max"), ("k1", "k2", "k3")):
        if (over, statistic) == ("seq_max", "k1"):
            continue
        bounds = {"gate_min": 0.9, "gate_max": 1.1} if statistic == "k1" else {"gate_max": 0.05}
        gate = {"gate": "ratio" if statistic == "k1" else statistic, "gate_over": over.replace("_", "-")}
        open_N = is_open(algorithm("grpo", **gate, **bounds), old_N, engine_N, rows.lengths_B)
        found[f"gate {over}_{statistic}"] = [open_N.float()]
    return found


def openrlhf_corrections(data: Batch) -> Results:
    rows = rows_of(data)
    band = {"importance_floor": 0.8, "importance_cap": 1.3}
    cases: dict[str, dict[str, object]] = {
        "token clip ratio": band,
        "token mask ratio": {**band, "importance_mode": "mask"},
        "seq mask ratio": {"gate": "ratio", "gate_over": "seq-mean", "gate_min": 0.9, "gate_max": 1.1},
    }
    for (level, over), gate in itertools.product({"token": "token", "seq": "seq-mean"}.items(), ("binary_kl", "tv")):
        cases[f"{level} mask {gate}"] = {"gate": gate.replace("_", "-"), "gate_over": over, "gate_max": 0.02}
    return {
        f"corrected {name}": loss_of(algorithm("grpo", **{"importance_cap": UNCAPPED, **keys}), data, rows)
        for name, keys in cases.items()
    }


def responses(data: Batch, token_rewards_BT: Tensor) -> Responses:
    mask_BT = data["mask_BT"]
    lengths_B = mask_BT.sum(1).long().numpy()
    return Responses(
        laid_end_to_end(token_rewards_BT, mask_BT).numpy(),
        np.concatenate([[0], np.cumsum(lengths_B)]),
        np.arange(len(mask_BT)) // SAMPLES_PER_PROMPT,
        laid_end_to_end(data["old_values_BT"], mask_BT).numpy(),
        np.zeros(len(mask_BT), np.float32),
        data["greedy_B"].double().numpy(),
    )


def advantages(name: str, found: Responses, **keys: object) -> tuple[Tensor, Tensor]:
    """(advantages as they enter the loss, returns)"""
    settings = algorithm(name, **keys)
    computed = settings.advantages(found)
    flat_N = torch.from_numpy(computed.advantages_N)
    if settings.whitens:
        doubles_N = computed.advantages_N.astype(np.float64)
        moments = Moments(len(doubles_N), float(doubles_N.sum()), float((doubles_N**2).sum()))
        flat_N = whiten(flat_N, moments.mean, moments.std)
    return flat_N, torch.from_numpy(computed.returns_N)


def verl_advantages(data: Batch, whole: Batch) -> Results:
    rewards_BT = on_last(data["rewards_B"], data["mask_BT"]) + 0.1 * data["values_BT"] * data["mask_BT"]
    found = responses(data, rewards_BT)
    names = ("grpo", "dr-grpo", "rloo", "reinforce++", "reinforce++-baseline", "remax")
    without = {f"advantages {name}": [advantages(name, found)[0]] for name in names}
    parts = {name: part_B.double().numpy() for name, part_B in parts_of(whole).items()}
    in_parts = replace(responses(whole, whole["values_BT"]), parts=parts, shaping_R=np.zeros(len(whole["mask_BT"])))
    return {
        **without,
        "advantages ppo": [*advantages("ppo", found, gamma=0.9, lam=0.8)],
        "advantages gdpo": [advantages("gdpo", in_parts, part_weights=PART_WEIGHTS)[0]],
    }


def openrlhf_advantages(data: Batch) -> Results:
    mask_BT = data["mask_BT"]
    names = {"gae": "ppo", "reinforce": "reinforce++", "rloo": "rloo", "reinforce_baseline": "reinforce++-baseline"}
    names |= {"group_norm": "grpo", "dr_grpo": "dr-grpo"}
    found: Results = {}
    for (theirs, name), overlong in itertools.product(names.items(), (None, 4)):
        keys: dict[str, object] = {"gamma": 0.9, "lam": 0.8} if name == "ppo" else {}
        settings = algorithm(name, overlong_fraction=(overlong or 0) / MAX_NEW_TOKENS, truncation_penalty=0.7)
        rewards_B = shaped_rewards(
            data["rewards_B"].numpy(),
            np.zeros(len(mask_BT), np.bool_),
            mask_BT.sum(1).long().numpy(),
            settings,
            reward_clip=None,
            max_new_tokens=MAX_NEW_TOKENS,
        )
        rewards_BT = on_last(torch.from_numpy(rewards_B).float(), mask_BT)
        advantages_N, returns_N = advantages(name, responses(data, rewards_BT), **keys)
        if settings.whitens:  # theirs divides by the deviation with n, ours with n - 1
            count = len(advantages_N)
            advantages_N = advantages_N * math.sqrt(count / (count - 1))
        if name == "grpo":
            std_B = torch.from_numpy(rewards_B).reshape(-1, SAMPLES_PER_PROMPT).std(1).repeat_interleave(4)
            std_N = std_B.repeat_interleave(mask_BT.sum(1).long())
            advantages_N = advantages_N * ((std_N + GRPO_EPSILON) / std_N)
        found[f"advantages {theirs} {overlong}"] = [advantages_N, returns_N][: 2 if name == "ppo" else 1]
    return found


@cache
def ours(seed: int) -> Results:
    data, whole = batch(seed, gaps=True), batch(seed, gaps=False)
    common = losses(data)
    verl = {
        **common,
        "value": values(data, 0.2),
        **verl_corrections(data),
        **{f"kl {estimator}": kl(data, estimator) for estimator in ("k1", "k2", "k3")},
        # verl keeps the value of k3 with the gradient of k2; where the policy is the old one, that is the same.
        "kl k3+": kl(data, "unbiased", at="old_BT"),
        **verl_advantages(data, whole),
    }
    dual_gspo = algorithm("gspo", clip_ratio=0.01, clip_ratio_high=0.02, dual_clip=1.05)
    openrlhf = {
        **{name: found for name, found in common.items() if "constant" not in name and "cispo" not in name},
        "loss gspo dual-clip": loss_of(dual_gspo, data, rows_of(data, per_row=True)),
        **{f"value {clip}": values(data, clip) for clip in (0.2, None)},
        **openrlhf_corrections(data),
        **{f"kl {estimator}": kl(data, estimator) for estimator in ("k1", "k2", "k3")},
        # The gradient alone: OpenRLHF's value is k3 without the ratio.
        "kl unbiased": kl(data, "unbiased")[1:],
        **openrlhf_advantages(whole),
    }
    del openrlhf["loss gspo token"]
    return {f"verl {name}": found for name, found in verl.items()} | {
        f"openrlhf {name}": found for name, found in openrlhf.items()
    }


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Results:
    try:
        fetch()
    except (OSError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"the wheels of verl and OpenRLHF are not there: {error}")
    file = tmp_path_factory.mktemp("peers") / "results.pt"
    command = [sys.executable, "-W", "ignore", "-m", "tests.peers.compute", str(file)]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=scaled(300), check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: Results = torch.load(file)
    return found


@pytest.mark.parametrize("name", ours(0))
def test_equals_the_peer(peers: Results, name: str) -> None:
    for seed in SEEDS:
        mine, theirs = ours(seed)[name], peers[f"{name} {seed}"]
        theirs = theirs[-len(mine) :] if "kl unbiased" in name else theirs[: len(mine)]
        for one, other in zip(mine, theirs, strict=True):
            assert one.shape == other.shape
            scale = max(1.0, float(other.abs().max()))
            assert float((one - other).abs().max()) <= 1e-5 * scale


def test_nothing_that_was_computed_is_left_out(peers: Results) -> None:
    assert {name.rpartition(" ")[0] for name in peers} == set(ours(0))
