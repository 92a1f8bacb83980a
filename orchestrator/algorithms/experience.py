"""Turns a shard's scores into experience: join, token rewards, advantages, and the sums behind the step metrics.

Shapes: R rows; N = response tokens of all rows, concatenated; L = learned tokens among them (column `learn`); R1 =
R + 1 offsets.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from orchestrator import schema
from orchestrator.algorithms import kl
from orchestrator.algorithms.advantages import Doubles, Floats, Offsets, Responses
from orchestrator.algorithms.algorithm import Algorithm
from orchestrator.algorithms.shaping import clipped, shaped_rewards, token_rewards_rows
from orchestrator.algorithms.standardising import WeightedPart, squares_key, weighted_sum
from orchestrator.errors import DataError, NonFiniteError
from orchestrator.types import GREEDY, Moments, PromptGroup

Mask = npt.NDArray[np.bool_]

TRUNCATED = "length"  # finish_reason of a response without EOS


@dataclass(frozen=True)
class ExperienceSettings:
    """Args:
    reward_clip: clips the sequence reward to ± this before token rewards are computed.
    samples_per_prompt: number of consecutive rows of a step that share a prompt, with a greedy one if the algorithm
        draws it.
    max_new_tokens: longest response, in tokens.
    sources: of a weighted reward, if one of them is standardised. Learning then uses their sum instead of the reward.
    earlier: moments of running sources over earlier steps.
    """

    algorithm: Algorithm
    samples_per_prompt: int
    reward_clip: float | None = None
    max_new_tokens: int = 0
    sources: Sequence[WeightedPart] = ()
    earlier: Mapping[str, Moments] = field(default_factory=dict)

    def group_of(self, table: pa.Table) -> Offsets:
        """The number of each row's prompt in its step."""
        group_R: Offsets = table["row"].to_numpy().astype(np.int64) // self.samples_per_prompt
        return group_R


def groups_of(rollout: pa.Table, rewards: Sequence[pa.Table], settings: ExperienceSettings) -> list[PromptGroup]:
    """The groups of a shard in ascending order, by the rewards before any penalty; or by those parts of them that the
    algorithm compares or that learning standardises.

    Args:
        rewards: as for `assemble`.
    """
    table = _aligned("rewards", rewards, rollout["row"].to_numpy())
    is_valid_R = table["reward"].is_valid().to_numpy()
    valid = table.filter(pa.array(is_valid_R))
    rewards_V = valid["reward"].to_numpy().astype(np.float64)
    names = settings.algorithm.reward_parts or [source.name for source in settings.sources]
    parts = _parts(valid["reward_parts"], names, valid["row"])
    compared = list(parts.values()) or [clipped(rewards_V, settings.reward_clip)]
    group_R, prompt_ids = settings.group_of(rollout), rollout["prompt_id"]
    group_V = group_R[is_valid_R]
    found = []
    for number, first in zip(*(array.tolist() for array in np.unique(group_R, return_index=True)), strict=True):
        is_in_V = group_V == number
        mean = float(rewards_V[is_in_V].mean()) if is_in_V.any() else None
        is_mixed = any(len(np.unique(column_V[is_in_V])) > 1 for column_V in compared)
        found.append(PromptGroup(number, prompt_ids[first].as_py(), mean, is_mixed))
    return found


def assemble(
    rollout: pa.Table,
    *,
    logprobs: Sequence[pa.Table],
    ref_logprobs: Sequence[pa.Table],
    values: Sequence[pa.Table],
    rewards: Sequence[pa.Table],
    settings: ExperienceSettings,
    kl_coefficient: float,
    groups: Collection[int] | None = None,
) -> tuple[pa.Table, int]:
    """Joins a shard's scores and computes token rewards, advantages and returns.

    Args:
        rollout: table of schema.ROLLOUT.
        logprobs, ref_logprobs, values, rewards: parts (in any order) that together contain each row once. Without a
            critic `values` is empty; the output's `values`
            are then baselines and `returns` are whole
            returns or returns-to-go.
        groups: numbers of the prompts that are learned from; None: all.

    Returns:
        (table of schema.EXPERIENCE in the rollout's row order, number of rows, of all prompts, that can't be learned
        from because scoring failed, of the row or of its greedy baseline, or because they have no learned tokens).
        Computed columns are 0 at tokens that are not learned.

    Raises:
        DataError: a row is missing or duplicated, or the length of a list differs from its response.
        NonFiniteError: a reward, log-prob or value is NaN or infinite; names the rows.
    """
    rows = rollout["row"].to_numpy()
    columns = {
        "old_logprobs": _aligned("policy log-probs", logprobs, rows)["logprobs"],
        "ref_logprobs": _aligned("reference log-probs", ref_logprobs, rows)["logprobs"],
    }
    reward_table = _aligned("rewards", rewards, rows)
    _check_lengths("learn", rollout["learn"], rollout["row"], _offsets(rollout["response_tokens"]))
    used_R = reward_table["reward"]
    if settings.sources:
        used_R = _standardised(reward_table, settings.sources, settings.earlier)
    usable_R, shaped_R, greedy_R = _rewards_of_rows(rollout, used_R, settings)
    keep_R = usable_R if groups is None else usable_R & np.isin(settings.group_of(rollout), list(groups))
    keep, final_R, greedy_rewards_R = pa.array(keep_R), shaped_R[keep_R], greedy_R[keep_R]
    table = rollout.select(schema.ROLLOUT.names).filter(keep)
    columns = {name: column.filter(keep) for name, column in columns.items()}
    reward_table = reward_table.filter(keep)

    offsets_R1 = _offsets(table["response_tokens"])
    learn_N, learned_R1 = _learned(table)
    columns["engine_logprobs"] = table["engine_logprobs"]
    flat = {name: _flat(name, column, table["row"], offsets_R1, learn_N) for name, column in columns.items()}
    reward_R = reward_table["reward"].to_numpy()
    _check_rows_finite("reward", reward_R, table["row"])
    truncated_R = _truncated(table)
    algorithm = settings.algorithm
    coefficient, estimator = (kl_coefficient, algorithm.kl_estimator[:2]) if algorithm.kl_in_reward else (0.0, "k1")
    old_L, ref_L = (flat[name][learn_N] for name in ("old_logprobs", "ref_logprobs"))
    token_rewards_L = token_rewards_rows(final_R, old_L, ref_L, learned_R1, coefficient, estimator)
    values_L = last_values_R = np.zeros(0, np.float32)
    if algorithm.needs_critic:
        value_table = _aligned("values", values, rows).filter(keep)
        bootstrapped_R = truncated_R & (algorithm.truncated == "bootstrap")
        last_values_R = _last_values(value_table["bootstrap_value"].to_numpy(), bootstrapped_R, table["row"])
        values_L = _flat("values", value_table["values"], table["row"], offsets_R1, learn_N)[learn_N]
    group_R = settings.group_of(table)
    parts = _parts(reward_table["reward_parts"], algorithm.reward_parts, table["row"])
    shaping_R = final_R - reward_R if parts else np.zeros(0)
    found = algorithm.advantages(
        Responses(token_rewards_L, learned_R1, group_R, values_L, last_values_R, greedy_rewards_R, parts, shaping_R)
    )
    learned = {
        "token_rewards": token_rewards_L,
        "values": found.values_N,
        "advantages": found.advantages_N,
        "returns": found.returns_N,
    }
    computed = flat | {name: _placed(column_L, learn_N) for name, column_L in learned.items()}
    arrays: dict[str, Any] = {name: table[name] for name in schema.ROLLOUT.names}
    arrays |= {name: _lists(flat_N, offsets_R1) for name, flat_N in computed.items()}
    arrays |= {name: reward_table[name] for name in ("reward", "reward_parts")}
    experience = pa.table([arrays[name] for name in schema.EXPERIENCE.names], schema=schema.EXPERIENCE)
    return experience.combine_chunks(), int((_is_sampled(rollout) & ~usable_R).sum())


def summarise(table: pa.Table, running: Sequence[str] = ()) -> tuple[Moments, Mapping[str, float], Mapping[str, float]]:
    """Moments of a shard's advantages, and named sums and extremes, which can be merged over shards.

    Keys that end in `_token_sum` are sums over learned tokens; divide by `response_tokens`. Other keys that end in
    `_sum` are sums over samples; divide by `samples`. `reward_part_<name>_sum` is a sum over the samples that have the
    part; `_count` is their number.

    Args:
        running: parts whose sums of squares are needed, too.
    """
    learn_N, learned_R1 = _learned(table)
    flat = {
        name: table[name].combine_chunks().flatten().to_numpy()[learn_N].astype(np.float64)
        for name in ("old_logprobs", "ref_logprobs", "engine_logprobs", "values", "returns", "advantages")
    }
    lengths_R = np.diff(learned_R1).astype(np.float64)
    reward_R = table["reward"].to_numpy().astype(np.float64)
    old_N, engine_N = flat["old_logprobs"], flat["engine_logprobs"]
    mismatch_N = np.abs(old_N - engine_N)
    reference_k1_N = kl.k1(old_N, flat["ref_logprobs"])
    residual_N = flat["returns"] - flat["values"]
    truncated = float(pc.sum(pc.equal(table["finish_reason"], TRUNCATED)).as_py() or 0)
    sums = {
        "samples": float(table.num_rows),
        "response_tokens": float(lengths_R.sum()),
        "response_length_squares_sum": float((lengths_R**2).sum()),
        "truncated_sum": truncated,
        "without_eos_sum": float(table.num_rows) - float(pc.sum(pc.equal(table["finish_reason"], "stop")).as_py() or 0),
        "reward_sum": float(reward_R.sum()),
        "reward_squares_sum": float((reward_R**2).sum()),
        "kl_k1_token_sum": float(reference_k1_N.sum()),
        "kl_k3_token_sum": float(kl.k3(old_N, flat["ref_logprobs"]).sum()),
        "kl_beyond_bound_token_sum": float((np.abs(reference_k1_N) > kl.LOG_RATIO_BOUND).sum()),
        "mismatch_abs_token_sum": float(mismatch_N.sum()),
        "mismatch_k3_token_sum": float(kl.k3(engine_N, old_N).sum()),
        "logprob_token_sum": float(old_N.sum()),
        "value_token_sum": float(flat["values"].sum()),
        "return_token_sum": float(flat["returns"].sum()),
        "return_squares_token_sum": float((flat["returns"] ** 2).sum()),
        "residual_token_sum": float(residual_N.sum()),
        "residual_squares_token_sum": float((residual_N**2).sum()),
        **_reward_part_sums(table["reward_parts"], running),
    }
    if later_turns := _num_later_turns(learn_N, _offsets(table["learn"])):
        sums["later_turns_sum"] = float(later_turns)
    extremes: dict[str, float] = {}
    for name, array in {
        "reward": reward_R,
        "response_length": lengths_R,
        "mismatch_abs": mismatch_N,
        "advantage": flat["advantages"],
    }.items():
        if len(array):
            extremes |= {f"{name}_min": float(array.min()), f"{name}_max": float(array.max())}
    advantages_N = flat["advantages"]
    moments = Moments(len(advantages_N), float(advantages_N.sum()), float((advantages_N**2).sum()))
    return moments, sums, extremes


def explained_variance(sums: Mapping[str, float]) -> float:
    """1 - Var(returns - values) / Var(returns) over response tokens, from merged sums; 0 if returns are constant."""
    count = sums["response_tokens"]
    if not count:
        return 0.0
    variance = sums["return_squares_token_sum"] / count - (sums["return_token_sum"] / count) ** 2
    unexplained = sums["residual_squares_token_sum"] / count - (sums["residual_token_sum"] / count) ** 2
    return 1.0 - unexplained / variance if variance > 0.0 else 0.0


def _standardised(
    rewards: pa.Table, sources: Sequence[WeightedPart], earlier: Mapping[str, Moments]
) -> pa.ChunkedArray:
    """The rewards that learning uses instead of those of the table; null where those are."""
    is_valid = rewards["reward"].is_valid()
    valid = rewards.filter(is_valid)
    names = [source.name for source in sources]
    parts = _parts(valid["reward_parts"], names, valid["row"])
    total_R = np.full(rewards.num_rows, math.nan)
    if valid.num_rows:
        total_R[is_valid.to_numpy()] = weighted_sum(parts, sources, earlier)
    return pa.chunked_array([pa.array(total_R, from_pandas=True)])  # NaN becomes null


def _is_sampled(rollout: pa.Table) -> Mask:
    """The rows that are no greedy baselines."""
    sampled_R: Mask = rollout["sample_index"].to_numpy() != GREEDY
    return sampled_R


def _rewards_of_rows(
    rollout: pa.Table, rewards: pa.ChunkedArray, settings: ExperienceSettings
) -> tuple[Mask, Doubles, Doubles]:
    """(rows that can be learned from; the shaped rewards; those of the prompts' greedy rows, NaN without one)"""
    learned_R = np.diff(_learned(rollout)[1])
    final_R = shaped_rewards(
        rewards.to_numpy(),
        _truncated(rollout),
        learned_R,
        settings.algorithm,
        reward_clip=settings.reward_clip,
        max_new_tokens=settings.max_new_tokens,
    )
    usable_R = _is_sampled(rollout) & rewards.is_valid().to_numpy() & (learned_R > 0)
    if not settings.algorithm.greedy_samples:
        return usable_R, final_R, np.full(len(final_R), math.nan)
    group_R, greedy_R = settings.group_of(rollout), rollout["sample_index"].to_numpy() == GREEDY
    scored_R = greedy_R & rewards.is_valid().to_numpy()
    _check_rows_finite("reward", final_R[scored_R], rollout["row"].filter(pa.array(scored_R)))
    found = dict(zip(group_R[scored_R].tolist(), final_R[scored_R].tolist(), strict=True))
    greedy_rewards_R = np.array([found.get(group, math.nan) for group in group_R.tolist()])
    return usable_R & np.isfinite(greedy_rewards_R), final_R, greedy_rewards_R


def _truncated(table: pa.Table) -> Mask:
    truncated_R: Mask = pc.equal(table["finish_reason"], TRUNCATED).to_numpy()
    return truncated_R


def _last_values(bootstrap_R: Floats, bootstrapped_R: Mask, rows: pa.ChunkedArray) -> Floats:
    """The critic's value after the last token of each bootstrapped response; 0 for other responses."""
    _check_rows_finite("bootstrap_value", bootstrap_R, rows)
    last_values_R: Floats = np.where(bootstrapped_R, bootstrap_R, 0.0).astype(np.float32)
    return last_values_R


def _aligned(what: str, parts: Sequence[pa.Table], rows: npt.NDArray[np.int32]) -> pa.Table:
    table = pa.concat_tables(parts)
    found = table["row"].to_numpy()
    if len(found) != len(rows) or not np.array_equal(np.sort(found), np.sort(rows)):
        missing = sorted(set(rows.tolist()) - set(found.tolist()))
        raise DataError(
            f"{what}: got {len(found)} rows for {len(rows)} samples (missing rows {missing[:8]}); "
            "a scorer must return each row exactly once."
        )
    position_of_row = np.empty(len(rows), dtype=np.int64)
    position_of_row[np.argsort(rows, kind="stable")] = np.argsort(found, kind="stable")
    return table.take(pa.array(position_of_row))


def _lengths(lists: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    lengths_R: npt.NDArray[np.int64] = pc.list_value_length(lists).to_numpy().astype(np.int64)
    return lengths_R


def _offsets(lists: pa.ChunkedArray) -> Offsets:
    return np.concatenate([[0], np.cumsum(_lengths(lists))]).astype(np.int64)


def _learned(table: pa.Table) -> tuple[Mask, Offsets]:
    """(learn_N, offsets of the learned tokens of each row)"""
    learn_N: Mask = table["learn"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    num_before_N1 = np.concatenate([[0], np.cumsum(learn_N)]).astype(np.int64)
    return learn_N, num_before_N1[_offsets(table["learn"])]


def _num_later_turns(learn_N: Mask, offsets_R1: Offsets) -> int:
    """The number of learned runs that follow tokens of an environment in their row."""
    begins_N = learn_N.copy()
    begins_N[1:] &= ~learn_N[:-1]
    begins_N[offsets_R1[:-1][np.diff(offsets_R1) > 0]] = False
    return int(np.count_nonzero(begins_N))


def _placed(values_L: Floats, learn_N: Mask) -> Floats:
    """Expands values of learned tokens to all tokens; the others get 0."""
    values_N = np.zeros(len(learn_N), np.float32)
    values_N[learn_N] = values_L
    return values_N


def _flat(name: str, lists: pa.ChunkedArray, rows: pa.ChunkedArray, offsets_R1: Offsets, learn_N: Mask) -> Floats:
    """Concatenates the lists. Each must be as long as its response and finite at learned tokens."""
    _check_lengths(name, lists, rows, offsets_R1)
    flat_N: Floats = lists.combine_chunks().flatten().to_numpy()
    wrong_N = np.flatnonzero(learn_N & ~np.isfinite(flat_N))
    if len(wrong_N):
        first = int(wrong_N[0])
        row = int(np.searchsorted(offsets_R1, first, side="right")) - 1
        raise NonFiniteError(
            f"{name}: {len(wrong_N)} values are NaN or infinite, first in row {rows[row].as_py()}, response token "
            f"{first - int(offsets_R1[row])}."
        )
    return flat_N


def _check_lengths(name: str, lists: pa.ChunkedArray, rows: pa.ChunkedArray, offsets_R1: Offsets) -> None:
    lengths_R = _lengths(lists)
    wrong = np.flatnonzero(lengths_R != np.diff(offsets_R1))
    if len(wrong):
        raise DataError(
            f"{name}: {len(wrong)} lists differ in length from their response, first in row "
            f"{rows[int(wrong[0])].as_py()} ({lengths_R[wrong[0]]} items for {np.diff(offsets_R1)[wrong[0]]} tokens)."
        )


def _check_rows_finite(name: str, values_R: Floats, rows: pa.ChunkedArray) -> None:
    wrong = np.flatnonzero(~np.isfinite(values_R))
    if len(wrong):
        raise NonFiniteError(f"{name} is NaN or infinite in rows {[rows[int(i)].as_py() for i in wrong[:8]]}.")


def _lists(flat_N: Floats, offsets_R1: Offsets) -> pa.ListArray:
    offsets = pa.array(offsets_R1.astype(np.int32))
    return pa.ListArray.from_arrays(offsets, pa.array(flat_N, pa.float32()))


def _parts(parts: pa.ChunkedArray, names: Sequence[str], rows: pa.ChunkedArray) -> dict[str, Doubles]:
    """Of every row, the parts of its reward with these names. Raises DataError: a row lacks one."""
    if not names:
        return {}
    found = [dict(pairs or ()) for pairs in parts.to_pylist()]
    for number, there in enumerate(found):
        for name in names:
            if there.get(name) is None:
                raise DataError(
                    f"row {rows[number].as_py()}: its reward has no part {name!r}; it has "
                    f"{', '.join(map(repr, sorted(there))) or 'none'}. Correct algorithm.part_weights, or let the "
                    "reward return that part for every sample."
                )
    return {name: np.array([there[name] for there in found], dtype=np.float64) for name in names}


def _reward_part_sums(parts: pa.ChunkedArray, running: Sequence[str]) -> dict[str, float]:
    maps = parts.combine_chunks()
    names = maps.keys.to_numpy(zero_copy_only=False)
    scores = maps.items.to_numpy(zero_copy_only=False).astype(np.float64)
    sums: dict[str, float] = {}
    for name in sorted(set(names.tolist())):
        chosen = scores[names == name]
        sums[f"reward_part_{name}_sum"] = float(chosen.sum())
        sums[f"reward_part_{name}_count"] = float(len(chosen))
        if name in running:
            sums[squares_key(name)] = float((chosen**2).sum())
    return sums
