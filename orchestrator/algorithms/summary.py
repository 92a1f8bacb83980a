"""Merges the sums and extremes of a step's shards into the step's metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from orchestrator.algorithms.experience import explained_variance
from orchestrator.types import Metrics, Moments, ShardRecord


def merge_metrics(records: Sequence[ShardRecord]) -> Metrics:
    """Metrics of one step's experience (names: metrics.py). Independent of the division into shards."""
    sums = merge_sums([record.sums for record in records])
    extremes = _merge_extremes([record.extremes for record in records])
    advantages = Moments.merge([record.advantage_moments for record in records])
    samples, tokens = sums["samples"] or 1.0, sums["response_tokens"] or 1.0
    failed = float(sum(record.num_dropped for record in records))
    metrics = {
        "reward/mean": sums["reward_sum"] / samples,
        "reward/std": _std(sums["reward_sum"], sums["reward_squares_sum"], samples),
        "reward/min": extremes.get("reward_min", 0.0),
        "reward/max": extremes.get("reward_max", 0.0),
        "reward/failed": failed,
        "reward/failed_fraction": failed / (failed + samples + sums.get("samples_left_out", 0.0)),
        "reward/cut": sums.get("reward_cut_sum", 0.0),
        "kl/per_response": sums["kl_k1_token_sum"] / samples,
        "kl/per_token": sums["kl_k1_token_sum"] / tokens,
        "kl/per_token_k3": sums["kl_k3_token_sum"] / tokens,
        "kl/beyond_bound": sums.get("kl_beyond_bound_token_sum", 0.0) / tokens,
        "response/length_mean": tokens / samples,
        "response/length_std": _std(tokens, sums["response_length_squares_sum"], samples),
        "response/length_min": extremes.get("response_length_min", 0.0),
        "response/length_max": extremes.get("response_length_max", 0.0),
        "response/cut_by_length": sums["truncated_sum"] / samples,
        "response/without_eos": sums["without_eos_sum"] / samples,
        "engine/mismatch": sums["mismatch_abs_token_sum"] / tokens,
        "engine/mismatch_max": extremes.get("mismatch_abs_max", 0.0),
        "engine/mismatch_k3": sums["mismatch_k3_token_sum"] / tokens,
        "advantage/mean": advantages.mean,
        "advantage/std": advantages.std,
        "advantage/min": extremes.get("advantage_min", 0.0),
        "advantage/max": extremes.get("advantage_max", 0.0),
        "critic/explained_variance": explained_variance(sums),
        "tokens/generated": sums["response_tokens"],
    }
    if "prompts_sampled" in sums:
        metrics["filter/prompts_sampled"] = sums["prompts_sampled"]
        metrics["filter/prompts_kept"] = sums["prompts_kept"]
    if "later_turns_sum" in sums:
        metrics["response/turns_mean"] = 1.0 + sums["later_turns_sum"] / samples
    return {**metrics, **_reward_parts(sums)}


def merge_sums(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = sorted({name for part in parts for name in part})
    return {name: math.fsum(part.get(name, 0.0) for part in parts) for name in names}


def _merge_extremes(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = {name for part in parts for name in part}
    pick = {name: min if name.endswith("_min") else max for name in names}
    return {name: pick[name](part[name] for part in parts if name in part) for name in names}


def _std(total: float, total_squares: float, count: float) -> float:
    return Moments(int(count), total, total_squares).std


def _reward_parts(sums: Mapping[str, float]) -> dict[str, float]:
    prefix, suffix = "reward_part_", "_count"
    names = [name[len(prefix) : -len(suffix)] for name in sums if name.startswith(prefix) and name.endswith(suffix)]
    return {
        f"reward/part/{name}": sums[f"{prefix}{name}_sum"] / sums[f"{prefix}{name}_count"]
        for name in names
        if sums[f"{prefix}{name}_count"]
    }
