"""Advantages, penalties and groups by hand: all numbers follow from the formulas in the comments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from orchestrator.algorithms.advantages import Responses
from orchestrator.algorithms.algorithm import Algorithm
from orchestrator.algorithms.experience import ExperienceSettings, assemble, groups_of
from orchestrator.algorithms.shaping import overlong_share, shaped_rewards, token_rewards
from orchestrator.algorithms.standardising import WeightedPart
from orchestrator.algorithms.table import ALGORITHMS
from orchestrator.config.sections import RlConfig, RolloutConfig
from orchestrator.errors import DataError, NonFiniteError
from orchestrator.types import GREEDY, PromptGroup
from tests.unit.orchestrator.algorithms.test_experience import logprobs, rewards, rollout, run


def algorithm(name: str, **keys: Any) -> Algorithm:
    return ALGORITHMS[name].model_validate(keys)


def advantages(name: str, **keys: Any) -> list[float]:
    """Of two prompts: responses of 2, 1, 1 and 2 tokens, with the returns 1, 3, 5 and 5."""
    responses = Responses(
        np.array([0.5, 0.5, 3.0, 5.0, -1.0, 6.0], np.float32),
        np.array([0, 2, 3, 4, 6]),
        np.array([7, 7, 9, 9]),
        np.zeros(6, np.float32),
        np.zeros(4, np.float32),
        np.array([2.0, 2.0, 4.0, 4.0]),
    )
    found: list[float] = algorithm(name, **keys).advantages(responses).advantages_N.tolist()
    return found


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo", "cispo"])
def test_group_relative_advantages_divide_by_the_deviation(name: str) -> None:
    # Group 7: 1 and 3, mean 2, deviation √2. Group 9: 5 and 5.
    one = 1 / (2**0.5 + 1e-4)
    assert advantages(name) == pytest.approx([-one, -one, one, 0, 0, 0])
    assert advantages(name, divide_by_std=False) == pytest.approx([-1, -1, 1, 0, 0, 0])


@pytest.mark.parametrize("name", ["dr-grpo", "reinforce++-baseline"])
def test_without_the_deviation_only_the_mean_is_subtracted(name: str) -> None:
    assert advantages(name) == pytest.approx([-1, -1, 1, 0, 0, 0])


def in_parts(**keys: Any) -> Algorithm:
    return algorithm("gdpo", part_weights={"answer": 1.0, "style": 0.5}, **keys)


def test_gdpo_compares_each_part_of_the_reward_on_its_own() -> None:
    responses = Responses(
        np.zeros(6, np.float32),
        np.array([0, 2, 3, 4, 6]),
        np.array([7, 7, 9, 9]),
        np.zeros(6, np.float32),
        np.zeros(4, np.float32),
        parts={"answer": np.array([1.0, 3.0, 5.0, 5.0]), "style": np.array([100.0, 0.0, 0.0, 0.0])},
        shaping_R=np.array([0.0, 0.0, 0.0, -1.0]),
    )
    # Group 7: answers are 1 and 3, deviation √2, styles 100 and 0, deviation √5000. Group 9: one is penalised by 1.
    one, style, penalty = 1 / (2**0.5 + 1e-4), 50 / (5000**0.5 + 1e-4), 0.5 / (0.5**0.5 + 1e-4)
    first = -one + 0.5 * style
    expected = [first, first, -first, penalty, -penalty, -penalty]
    assert in_parts().advantages(responses).advantages_N.tolist() == pytest.approx(expected)
    plain = in_parts(divide_by_std=False).advantages(responses).advantages_N.tolist()
    assert plain == pytest.approx([24, 24, -24, 0.5, -0.5, -0.5])


def test_parts_come_from_the_rewards_and_each_row_must_have_them() -> None:
    settings = ExperienceSettings(algorithm("gdpo", part_weights={"style": 1.0}), samples_per_prompt=1)
    table, _ = run(settings, value=[])
    assert not any(value for row in table["advantages"].to_pylist() for value in row)
    missing = ExperienceSettings(in_parts(), samples_per_prompt=1)
    with pytest.raises(DataError, match="row 10: its reward has no part 'answer'; it has 'style'.*part_weights"):
        run(missing, value=[])


@pytest.mark.parametrize(
    ("keys", "problem"),
    [({}, "needs their names"), ({"part_weights": {"a": 1.0}, "kl_estimator": "k1-reward"}, "puts the KL into the")],
)
def test_gdpo_without_parts_or_with_the_kl_in_the_reward_is_refused(keys: dict[str, Any], problem: str) -> None:
    found = algorithm("gdpo", **keys).contradictions(RlConfig(samples_per_prompt=4), RolloutConfig())
    assert any(problem in message for message in found)


def test_reinforce_plus_plus_sums_the_rewards_from_each_token_on() -> None:
    assert advantages("reinforce++") == pytest.approx([1.0, 0.5, 3.0, 5.0, 5.0, 6.0])


def test_remax_subtracts_the_reward_of_the_greedy_response() -> None:
    assert advantages("remax") == pytest.approx([-1.0, -1.5, 1.0, 1.0, 1.0, 2.0])


def test_only_some_algorithms_whiten() -> None:
    whitening = [name for name in ALGORITHMS if algorithm(name).whitens]
    assert whitening == ["ppo", "gdpo", "reinforce++", "reinforce++-baseline"]


def test_the_overlong_penalty_grows_within_the_buffer() -> None:
    # The last 4 of 10 tokens: none up to 6, a quarter for each token more.
    share = overlong_share(np.array([1, 6, 7, 9, 10]), max_new_tokens=10, overlong_fraction=0.4)
    assert share.tolist() == pytest.approx([0, 0, 0.25, 0.75, 1])
    found = shaped_rewards(
        np.array([5.0, 0.5, 1.0], np.float32),
        np.array([False, False, True]),
        np.array([6, 8, 10]),
        algorithm("dapo", truncated="penalise", truncation_penalty=2.0, overlong_fraction=0.4),
        reward_clip=3.0,
        max_new_tokens=10,
    )
    assert found.tolist() == pytest.approx([3.0, 0.5 - 1.0, 1.0 - 2.0 - 2.0])


@pytest.mark.parametrize(
    ("estimator", "expected"),
    # log p - log q = ½: k1 = ½, k2 = ⅛, k3 = exp(-½) - 1 + ½; times -0.1
    [("k1", -0.05), ("k2", -0.0125), ("k3", -0.1 * (np.exp(-0.5) - 0.5))],
)
def test_the_kl_in_the_reward_is_that_of_the_estimator(estimator: str, expected: float) -> None:
    found = token_rewards(2.0, np.array([-1.0, -1.0]), np.array([-1.5, -1.5]), 0.1, estimator)
    assert found.tolist() == pytest.approx([expected, 2.0 + expected])
    table, _ = run(ExperienceSettings(algorithm("rloo", kl_estimator=f"{estimator}-reward"), samples_per_prompt=1))
    assert table["token_rewards"].to_pylist()[0] == pytest.approx([expected, 1.0 + expected])


def test_the_exponent_of_k3_is_bounded() -> None:
    found = token_rewards(0.0, np.array([-100.0]), np.array([-1.0]), 1.0, "k3")
    assert found.tolist() == pytest.approx([-(np.exp(20.0) - 21.0)])


def greedy(table: pa.Table, marked: list[int]) -> pa.Table:
    """The table with these rows as greedy samples."""
    index = [GREEDY if row in marked else 0 for row in table["row"].to_pylist()]
    place = table.schema.get_field_index("sample_index")
    return table.set_column(place, table.schema.field(place), pa.array(index, pa.int32()))


REMAX = ExperienceSettings(algorithm("remax", kl_estimator="k3-loss"), samples_per_prompt=3)


def test_greedy_rows_are_baselines_and_are_not_learned_from() -> None:
    # Rows 10, 11 and 12 are two prompts: row // 3 = 3, 3 and 4.
    table = greedy(rollout(), [11, 12])
    found, dropped = run(REMAX, table=table)
    assert (found["row"].to_pylist(), dropped) == ([10], 0)
    assert found["advantages"].to_pylist() == [pytest.approx([1.0 - 2.0] * 2)]
    assert found["values"].to_pylist() == [pytest.approx([2.0] * 2)]


def test_without_its_baseline_a_sample_is_dropped_and_counted() -> None:
    found, dropped = run(REMAX, table=greedy(rollout(), [11, 12]), reward=[rewards([1.0, None, 3.0])])
    assert (found.num_rows, dropped) == (0, 1)
    with pytest.raises(NonFiniteError, match=r"rows \[11\]"):
        run(REMAX, table=greedy(rollout(), [11, 12]), reward=[rewards([1.0, float("nan"), 3.0])])


def test_of_prompts_that_are_left_out_only_failed_samples_are_counted() -> None:
    settings = ExperienceSettings(algorithm("grpo"), samples_per_prompt=2)  # rows 10 and 11 are prompt 5, row 12 is 6
    from_all, _ = run(settings)
    found, dropped = _assembled(settings, groups=[5])
    assert (found["row"].to_pylist(), dropped) == ([10, 11], 1)
    assert _assembled(settings, groups=[])[1] == 1
    assert found.equals(from_all.slice(0, 2).combine_chunks())


def _assembled(settings: ExperienceSettings, groups: list[int]) -> tuple[pa.Table, int]:
    return assemble(
        rollout(),
        logprobs=[logprobs(-1.0)],
        ref_logprobs=[logprobs(-1.5)],
        values=[],
        rewards=[rewards([1.0, 2.0, None])],
        settings=settings,
        kl_coefficient=0.1,
        groups=groups,
    )


def test_groups_say_whether_their_rewards_differ() -> None:
    settings = ExperienceSettings(algorithm("dapo"), samples_per_prompt=2)
    assert groups_of(rollout(), [rewards([1.0, 2.0, 3.0])], settings) == [
        PromptGroup(5, "a", 1.5, is_mixed=True),
        PromptGroup(6, "a", 3.0, is_mixed=False),
    ]
    assert groups_of(rollout(), [rewards([1.0, None, None])], settings) == [
        PromptGroup(5, "a", 1.0, is_mixed=False),
        PromptGroup(6, "a", None, is_mixed=False),
    ]


def test_groups_differ_by_what_the_algorithm_compares() -> None:
    """Rewards of 1 that are 1 + 0 and 0 + 1, and rewards of 1 and 2 with equal parts."""
    table = rewards([1.0, 1.0, None])
    parts = [[("answer", 1.0), ("style", 0.0)], [("answer", 0.0), ("style", 1.0)], []]
    place = table.schema.get_field_index("reward_parts")
    differing = table.set_column(place, table.schema.field(place), pa.array(parts, table.schema.field(place).type))
    standardised = [WeightedPart("answer", 1.0, "shard"), WeightedPart("style", 1.0)]
    for settings in (
        ExperienceSettings(in_parts(), samples_per_prompt=2),
        ExperienceSettings(algorithm("dapo"), samples_per_prompt=2, sources=standardised),
    ):
        assert [group.is_mixed for group in groups_of(rollout(), [differing], settings)] == [True, False]
    by_style = ExperienceSettings(algorithm("gdpo", part_weights={"style": 1.0}), samples_per_prompt=2)
    assert [group.is_mixed for group in groups_of(rollout(), [rewards([1.0, 2.0, 3.0])], by_style)] == [False, False]
    clipped = ExperienceSettings(algorithm("dapo"), samples_per_prompt=2, reward_clip=0.5)
    assert [group.is_mixed for group in groups_of(rollout(), [rewards([1.0, 2.0, 3.0])], clipped)] == [False, False]
    by_reward = ExperienceSettings(algorithm("dapo"), samples_per_prompt=2)
    assert [group.is_mixed for group in groups_of(rollout(), [differing], by_reward)] == [False, False]


def complaints(name: str, rl: dict[str, int] | None = None, **keys: Any) -> Iterator[str]:
    sections = RlConfig.model_validate({"samples_per_prompt": 4, **(rl or {})}), RolloutConfig()
    return iter(list(algorithm(name, **keys).contradictions(*sections)))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"importance_floor": 0.5}, "needs a higher algorithm.importance_cap, got None"),
        ({"importance_floor": 2.0, "importance_cap": 2.0}, "needs a higher algorithm.importance_cap, got 2"),
        ({"gate": "k3"}, "algorithm.gate=k3 needs algorithm.gate_max. Set it, for example to 0.1"),
        ({"gate": "ratio", "gate_min": 2.0, "gate_max": 1.0}, "nothing would be learned"),
        ({"gate": "tv", "gate_min": 0.1, "gate_max": 0.2}, "Remove gate_min, or set algorithm.gate=ratio"),
        ({"gate": "ratio", "gate_over": "seq-max", "gate_max": 2.0}, "needs a divergence that has no sign"),
        ({"importance_mode": "mask"}, "algorithm.importance_mode=mask needs algorithm.importance_cap"),
        ({"importance_level": "sequence"}, "algorithm.importance_level=sequence needs algorithm.importance_cap"),
        ({"gate_max": 2.0}, "algorithm.gate_max=2.0 needs algorithm.gate, which is null"),
        ({"gate_min": 0.5}, "algorithm.gate_min=0.5 needs algorithm.gate, which is null"),
        ({"gate_over": "seq-mean"}, "algorithm.gate_over=seq-mean needs algorithm.gate, which is null"),
    ],
)
def test_corrections_that_contradict_are_refused_with_the_way_out(keys: dict[str, Any], message: str) -> None:
    assert message in next(complaints("grpo", **keys))


@pytest.mark.parametrize("name", ["dr-grpo", "dapo", "cispo"])
def test_a_controller_of_no_penalty_is_refused(name: str) -> None:
    assert "is 0 and stays 0" in next(complaints(name, adaptive_kl_target=6.0))
    assert not list(complaints(name, adaptive_kl_target=6.0, kl_coefficient=0.05))


def test_a_dual_clip_of_ratios_that_are_clipped_anyway_is_refused() -> None:
    assert "algorithm.name='cispo' clips whatever the sign" in next(complaints("cispo", dual_clip=3.0))
    assert not list(complaints("gspo", dual_clip=3.0))


@pytest.mark.parametrize("name", ["ppo", "reinforce++", "remax"])
def test_dynamic_sampling_needs_groups(name: str) -> None:
    found = list(complaints(name, filter_rounds=1, rl={"samples_per_prompt": 3}))
    assert found and "does not. Set algorithm.filter_rounds=null" in found[0]


def test_remax_needs_one_sample_of_a_prompt_and_whole_groups_in_a_shard() -> None:
    assert not list(complaints("remax", rl={"samples_per_prompt": 1}))
    assert "would split the 5 samples of a prompt, which algorithm.name='remax' compares (one of them greedy)" in next(
        complaints("remax")
    )


def test_a_gate_is_enough_for_stale_samples() -> None:
    assert not list(complaints("grpo", rl={"max_staleness": 1}, gate="ratio", gate_max=2.0))
    assert "needs algorithm.importance_cap" in next(complaints("grpo", rl={"max_staleness": 1}))
