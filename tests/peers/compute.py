"""`python -m tests.peers.compute FILE`: the peers' advantages, losses and gradients of the batches, by name.

Names: peer, what, options. Values are lists of tensors.
"""

from __future__ import annotations

import itertools
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
from tests.peers.wheels import load

NO_DUAL_CLIP = 1e9
AGGREGATIONS = {
    "token": "token-mean",
    "sample": "seq-mean-token-mean",
    "constant": "seq-mean-token-sum-norm",
}


def main(file: str) -> None:
    found: Results = {}
    for seed in SEEDS:
        for name, values in {**verl(seed), **openrlhf(seed)}.items():
            found[f"{name} {seed}"] = [value.float() for value in values]
    torch.save(found, file)


def verl(seed: int) -> Results:
    core = load("verl.trainer.ppo.core_algos")
    corrections = load("verl.trainer.ppo.rollout_corr_helper")
    data, whole = batch(seed, gaps=True), batch(seed, gaps=False)
    return {
        **_verl_losses(core, data),
        **_verl_corrections(core, corrections, data),
        **_verl_kl(core, data),
        **_verl_advantages(core, data, whole),
    }


def _verl_loss(core: Any, kind: str, data: Batch, aggregation: str, *, weights_BT: Any = None, **clip: Any) -> Any:
    settings = {"clip_ratio_c": NO_DUAL_CLIP, **clip}
    config = core.ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **settings)
    advantages_BT = data["advantages_BT"]
    if kind == "gspo":
        advantages_BT = data["row_advantages_B"][:, None].expand_as(advantages_BT)
    function = core.get_policy_loss_fn(kind)

    def loss(new_BT: Tensor) -> Tensor:
        found: Tensor = function(
            old_log_prob=data["old_BT"],
            log_prob=new_BT,
            advantages=advantages_BT,
            response_mask=data["mask_BT"],
            loss_agg_mode=AGGREGATIONS[aggregation],
            config=config,
            rollout_is_weights=weights_BT,
        )[0]
        return found

    return list(differentiated(loss, data["new_BT"], data["mask_BT"]))


def _verl_losses(core: Any, data: Batch) -> Results:
    found: Results = {}
    clips = {
        "clip": {"clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.2},
        "clip-higher": {"clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.28},
        "dual-clip": {"clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "clip_ratio_c": 3.0},
    }
    for (name, clip), aggregation in itertools.product(clips.items(), AGGREGATIONS):
        found[f"verl loss {name} {aggregation}"] = _verl_loss(core, "vanilla", data, aggregation, **clip)
    near = {"clip_ratio": 0.01, "clip_ratio_low": 0.01, "clip_ratio_high": 0.02}
    for aggregation in AGGREGATIONS:
        found[f"verl loss gspo {aggregation}"] = _verl_loss(core, "gspo", data, aggregation, **near)
        found[f"verl loss cispo {aggregation}"] = _verl_loss(core, "cispo", data, aggregation, **clips["clip-higher"])

    def value_loss(values_BT: Tensor) -> Tensor:
        loss: Tensor = core.compute_value_loss(
            values_BT, data["returns_BT"], data["old_values_BT"], data["mask_BT"], cliprange_value=0.2
        )[0]
        return loss

    found["verl value"] = list(differentiated(value_loss, data["values_BT"], data["mask_BT"]))
    return found


def _verl_corrections(core: Any, corrections: Any, data: Batch) -> Results:
    found: Results = {}
    log_ratio_BT, mask_BT = data["old_BT"] - data["engine_BT"], data["mask_BT"]
    for level, bounds in itertools.product(("token", "sequence"), (1.3, "0.8_1.3")):
        weights_BT, _ = corrections.compute_rollout_correction_weights(log_ratio_BT, mask_BT, level, bounds)
        clip = {"clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.2}
        mode = "truncate" if bounds == 1.3 else "mask"
        loss = _verl_loss(core, "vanilla", data, "token", weights_BT=weights_BT, **clip)
        found[f"verl weights {level} {mode}"] = [laid_end_to_end(weights_BT, mask_BT), *loss]
    for option in sorted(corrections.SUPPORTED_ROLLOUT_RS_OPTIONS):
        # verl's bounds of k1 are those of p_engine / p_learner.
        bounds = f"{1 / 1.1}_{1 / 0.9}" if option.endswith("k1") else 0.05
        kept_BT, _ = corrections.compute_rollout_rejection_mask(log_ratio_BT, mask_BT, option, bounds)
        found[f"verl gate {option}"] = [laid_end_to_end(kept_BT, mask_BT)]
    return found


def _verl_kl(core: Any, data: Batch) -> Results:
    found: Results = {}
    for estimator in ("k1", "k2", "k3", "k3+"):
        at_BT = data["old_BT"] if estimator == "k3+" else data["near_BT"]

        def loss(new_BT: Tensor, estimator: str = estimator) -> Tensor:
            kl_BT = core.kl_penalty(new_BT, data["ref_BT"], estimator)
            mean: Tensor = core.agg_loss(kl_BT, data["mask_BT"], "token-mean")
            return mean

        found[f"verl kl {estimator}"] = list(differentiated(loss, at_BT, data["mask_BT"]))
    return found


def _verl_advantages(core: Any, data: Batch, whole: Batch) -> Results:
    mask_BT = data["mask_BT"]
    index = np.arange(len(mask_BT)) // SAMPLES_PER_PROMPT
    rewards_BT = on_last(data["rewards_B"], mask_BT) + 0.1 * data["values_BT"] * mask_BT
    common = {"token_level_rewards": rewards_BT, "response_mask": mask_BT}
    gae = {"token_level_rewards": rewards_BT, "values": data["old_values_BT"], "response_mask": mask_BT}
    calls: dict[str, tuple[Any, dict[str, Any]]] = {
        "grpo": (core.compute_grpo_outcome_advantage, {"index": index, "epsilon": 1e-4}),
        "dr-grpo": (core.compute_grpo_outcome_advantage, {"index": index, "norm_adv_by_std_in_grpo": False}),
        "rloo": (core.compute_rloo_outcome_advantage, {"index": index}),
        "reinforce++": (
            core.compute_reinforce_plus_plus_outcome_advantage,
            {"config": SimpleNamespace(gamma=1.0)},
        ),
        "reinforce++-baseline": (core.compute_reinforce_plus_plus_baseline_outcome_advantage, {"index": index}),
        "remax": (core.compute_remax_outcome_advantage, {"reward_baselines": data["greedy_B"]}),
    }
    gdpo = {
        "config": {"gdpo_reward_keys": list(PART_WEIGHTS), "gdpo_reward_weights": list(PART_WEIGHTS.values())},
        "non_tensor_batch": {name: part_B.numpy() for name, part_B in parts_of(whole).items()},
        "batch": {"prompts": mask_BT[:, :0], "attention_mask": whole["mask_BT"].long()},
        "epsilon": 1e-4,
    }
    whole_mask = {"token_level_rewards": rewards_BT, "response_mask": whole["mask_BT"]}
    found: Results = {}
    gdpo_BT = core.compute_gdpo_outcome_advantage(**whole_mask, index=index, **gdpo)[0]
    found["verl advantages gdpo"] = [laid_end_to_end(gdpo_BT, whole["mask_BT"])]
    for name, (function, more) in calls.items():
        advantages_BT = function(**{key: value.clone() for key, value in common.items()}, **more)[0]
        found[f"verl advantages {name}"] = [laid_end_to_end(advantages_BT, mask_BT)]
    parts = core.compute_gae_advantage_return(**gae, gamma=0.9, lam=0.8)
    found["verl advantages ppo"] = [laid_end_to_end(part_BT, mask_BT) for part_BT in parts]
    return found


def openrlhf(seed: int) -> Results:
    losses, utils = load("openrlhf.models.loss"), load("openrlhf.models.utils")
    maker = load("openrlhf.trainer.ppo_utils.experience_maker")
    data, whole = batch(seed, gaps=True), batch(seed, gaps=False)
    return {
        **_openrlhf_losses(losses, data),
        **_openrlhf_kl(utils, losses, data),
        **_openrlhf_advantages(maker, whole),
    }


def _openrlhf_losses(losses: Any, data: Batch) -> Results:
    mask_BT = data["mask_BT"]

    def measured(per_token: bool, *, advantages_BT: Tensor = data["advantages_BT"], **options: Any) -> list[Tensor]:
        policy_loss = losses.PolicyLoss(token_level_loss=per_token, **options)

        def loss(new_BT: Tensor) -> Tensor:
            value: Tensor = policy_loss(new_BT, data["old_BT"], advantages_BT, mask_BT, data["engine_BT"])[0]
            return value

        return list(differentiated(loss, data["new_BT"], mask_BT))

    found: Results = {}
    clips: dict[str, dict[str, float]] = {
        "clip": {},
        "clip-higher": {"clip_eps_high": 0.28},
        "dual-clip": {"dual_clip": 3.0},
    }
    for (name, clip), aggregation in itertools.product(clips.items(), ("token", "sample")):
        found[f"openrlhf loss {name} {aggregation}"] = measured(aggregation == "token", **clip)
    rows_BT = data["row_advantages_B"][:, None].expand_as(mask_BT)
    near = {"policy_loss_type": "gspo", "clip_eps_low": 0.01, "clip_eps_high": 0.02}
    found["openrlhf loss gspo sample"] = measured(False, advantages_BT=rows_BT, **near)
    found["openrlhf loss gspo dual-clip"] = measured(False, advantages_BT=rows_BT, **near, dual_clip=1.05)
    options = [
        ("token", "clip", "ratio", [0.8, 1.3]),
        ("token", "mask", "ratio", [0.8, 1.3]),
        ("seq", "mask", "ratio", [0.9, 1.1]),
    ]
    options += [(level, "mask", gate, [0.0, 0.02]) for level in ("token", "seq") for gate in ("binary_kl", "tv")]
    for level, mode, gate, bounds in options:
        keys = {"level": level, "mode": mode, "gating": gate, "threshold": bounds}
        found[f"openrlhf corrected {level} {mode} {gate}"] = measured(
            True, **{f"is_correction_{key}": value for key, value in keys.items()}
        )
    for clip_eps in (0.2, None):
        critic = losses.ValueLoss(clip_eps=clip_eps)

        def value_loss(values_BT: Tensor, critic: Any = critic) -> Tensor:
            loss: Tensor = critic(values_BT, data["old_values_BT"], data["returns_BT"], mask_BT)
            return loss

        found[f"openrlhf value {clip_eps}"] = list(differentiated(value_loss, data["values_BT"], mask_BT))
    return found


def _openrlhf_kl(utils: Any, losses: Any, data: Batch) -> Results:
    found: Results = {}
    for estimator, unbiased in [("k1", False), ("k2", False), ("k3", False), ("k3", True)]:

        def loss(new_BT: Tensor, estimator: str = estimator, unbiased: bool = unbiased) -> Tensor:
            kl_BT = utils.compute_approx_kl(new_BT, data["ref_BT"], data["old_BT"], estimator, unbiased)
            mean: Tensor = losses.aggregate_loss(kl_BT, data["mask_BT"])
            return mean

        name = "unbiased" if unbiased else estimator
        found[f"openrlhf kl {name}"] = list(differentiated(loss, data["near_BT"], data["mask_BT"]))
    return found


def _openrlhf_advantages(maker: Any, data: Batch) -> Results:
    mask_BT = data["mask_BT"]
    found: Results = {}
    names = ("gae", "reinforce", "rloo", "reinforce_baseline", "group_norm", "dr_grpo")
    for estimator, overlong in itertools.product(names, (None, 4)):
        algo = {"estimator": estimator, "gamma": 0.9 if estimator == "gae" else 1.0, "lambd": 0.8, "no_std_norm": False}
        penalties = {"clip_range": None, "overlong_buffer_len": overlong, "overlong_penalty_factor": 0.7}
        rollout = {"n_samples_per_prompt": SAMPLES_PER_PROMPT, "max_new_tokens": MAX_NEW_TOKENS}
        experience = SimpleNamespace(
            rewards=data["rewards_B"].clone(),
            index=list(range(len(mask_BT))),
            info={},
            kl=torch.zeros_like(mask_BT),
            action_mask=mask_BT,
            values=data["old_values_BT"].clone(),
            response_length=mask_BT.sum(1),
            truncated=None,
        )
        made = maker.RemoteExperienceMaker.__new__(maker.RemoteExperienceMaker)
        made.advantage_estimator, made.kl_ctl = estimator, SimpleNamespace(value=0.0)
        made.args = SimpleNamespace(
            algo=SimpleNamespace(advantage=SimpleNamespace(**algo)),
            reward=SimpleNamespace(**penalties),
            rollout=SimpleNamespace(**rollout),
        )
        made.strategy = SimpleNamespace(args=made.args)
        made.compute_advantages_and_returns([experience])
        parts = [laid_end_to_end(part_BT, mask_BT) for part_BT in (experience.advantages, experience.returns)]
        found[f"openrlhf advantages {estimator} {overlong}"] = parts
    return found


if __name__ == "__main__":
    main(sys.argv[1])
