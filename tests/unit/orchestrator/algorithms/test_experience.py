import numpy as np
import pyarrow as pa
import pytest

from orchestrator import schema
from orchestrator.algorithms.experience import ExperienceSettings, assemble, explained_variance, summarise
from orchestrator.algorithms.grpo import Grpo
from orchestrator.algorithms.ppo import Ppo
from orchestrator.algorithms.rloo import Rloo
from orchestrator.errors import DataError, NonFiniteError
from orchestrator.types import Moments

FLOATS = pa.list_(pa.float32())
LENGTHS = {10: 2, 11: 3, 12: 1}  # response tokens by row
SETTINGS = ExperienceSettings(Ppo(gamma=1.0, lam=1.0), samples_per_prompt=1)


def rollout(finish=("stop", "length", "stop")):
    count = len(LENGTHS)
    columns = {
        "row": list(LENGTHS),
        "prompt_id": ["a"] * count,
        "sample_index": [0] * count,
        "seed": [0] * count,
        "prompt_text": [""] * count,
        "response_text": [""] * count,
        "prompt_tokens": [[1]] * count,
        "response_tokens": [list(range(length)) for length in LENGTHS.values()],
        "learn": [[True] * length for length in LENGTHS.values()],
        "starts": [[]] * count,
        "engine_logprobs": [[-1.0] * length for length in LENGTHS.values()],
        "finish_reason": list(finish),
        "version": [4] * count,
        "meta": ["{}"] * count,
    }
    return pa.table(columns).cast(schema.ROLLOUT)


def logprobs(value, rows=tuple(LENGTHS)):
    lists = pa.array([[value] * LENGTHS[row] for row in rows], FLOATS)
    return pa.table({"row": pa.array(rows, pa.int32()), "logprobs": lists}, schema=schema.LOGPROBS)


def values(value=0.5, bootstrap=2.0, rows=tuple(LENGTHS)):
    lists = pa.array([[value] * LENGTHS[row] for row in rows], FLOATS)
    columns = {"row": pa.array(rows, pa.int32()), "values": lists}
    columns["bootstrap_value"] = pa.array([bootstrap] * len(rows), pa.float32())
    return pa.table(columns, schema=schema.VALUES)


def rewards(scores, rows=tuple(LENGTHS)):
    columns = {
        "row": pa.array(rows, pa.int32()),
        "reward": pa.array(scores, pa.float32()),
        "reward_parts": pa.array([[("style", 0.25)]] * len(rows), pa.map_(pa.string(), pa.float32())),
        "reward_error": pa.array(["grader died" if score is None else None for score in scores]),
        "tokens_cut": pa.array([0] * len(rows), pa.int32()),
    }
    return pa.table(columns, schema=schema.REWARDS)


def run(settings=SETTINGS, *, old=None, ref=None, value=None, reward=None, kl=0.1, table=None):
    return assemble(
        rollout() if table is None else table,
        logprobs=old or [logprobs(-1.0)],
        ref_logprobs=ref or [logprobs(-1.5)],
        values=[values()] if value is None else value,
        rewards=reward or [rewards([1.0, 2.0, 3.0])],
        settings=settings,
        kl_coefficient=kl,
    )


def test_experience_keeps_the_schema_and_the_rollouts_order():
    table, dropped = run()
    assert table.schema.equals(schema.EXPERIENCE)
    assert dropped == 0
    assert table["row"].to_pylist() == [10, 11, 12]


def test_parts_are_joined_by_row_whatever_their_order():
    shuffled = {
        "old": [logprobs(-1.0, (12,)), logprobs(-1.0, (11, 10))],
        "ref": [logprobs(-1.5, (11,)), logprobs(-1.5, (12, 10))],
        "value": [values(rows=(12, 11, 10))],
        "reward": [rewards([3.0, 1.0], (12, 10)), rewards([2.0], (11,))],
    }
    assert run(**shuffled)[0].equals(run()[0])


def test_rollouts_need_not_be_sorted_by_row():
    order = pa.array([2, 0, 1])
    table, _ = run(table=rollout().take(order))
    assert table["row"].to_pylist() == [12, 10, 11]
    assert table.equals(run()[0].take(order).combine_chunks())


def test_token_rewards_carry_the_kl_penalty_and_the_score():
    # k1 = -1 + 1.5 = 0.5 for each token, times -0.1; the score is added to the last token.
    table, _ = run()
    assert table["token_rewards"].to_pylist() == [
        pytest.approx([-0.05, 0.95]),
        pytest.approx([-0.05, -0.05, 1.95]),
        pytest.approx([2.95]),
    ]


def test_without_kl_in_the_reward_only_the_score_is_left():
    table, _ = run(ExperienceSettings(Ppo(kl_estimator="k3-loss"), samples_per_prompt=1))
    assert table["token_rewards"].to_pylist() == [[0.0, 1.0], [0.0, 0.0, 2.0], [3.0]]


def test_only_responses_cut_by_length_are_bootstrapped():
    # gamma = lambda = 1: the last token's return is its reward, plus the bootstrap value 2 if truncated.
    returns = run(kl=0.0)[0]["returns"].to_pylist()
    assert [row[-1] for row in returns] == pytest.approx([1.0, 2.0 + 2.0, 3.0])


def test_a_cut_response_can_be_penalised_instead():
    settings = ExperienceSettings(Ppo(gamma=1.0, lam=1.0, truncated="penalise", truncation_penalty=0.75), 1)
    table, _ = run(settings, kl=0.0)
    assert [row[-1] for row in table["returns"].to_pylist()] == pytest.approx([1.0, 1.25, 3.0])
    assert table["reward"].to_pylist() == [1.0, 2.0, 3.0], "the log contains the original reward"


def test_rewards_are_clipped_before_they_enter_the_token_rewards():
    table, _ = run(ExperienceSettings(Ppo(), samples_per_prompt=1, reward_clip=1.5), kl=0.0)
    assert [row[-1] for row in table["token_rewards"].to_pylist()] == [1.0, 1.5, 1.5]
    assert table["reward"].to_pylist() == [1.0, 2.0, 3.0]


def test_samples_whose_reward_failed_are_left_out_and_counted():
    table, dropped = run(reward=[rewards([1.0, None, 3.0])])
    assert dropped == 1
    assert table["row"].to_pylist() == [10, 12]
    assert [row[-1] for row in table["token_rewards"].to_pylist()] == pytest.approx([0.95, 2.95])


def test_all_rewards_failed():
    table, dropped = run(reward=[rewards([None, None, None])])
    assert (table.num_rows, dropped) == (0, 3)
    assert summarise(table)[0] == Moments()


@pytest.mark.parametrize("rows", [(10, 11), (10, 11, 11), (10, 11, 12, 12)])
def test_a_row_missing_or_double_is_an_error(rows):
    with pytest.raises(DataError, match="reference log-probs"):
        run(ref=[logprobs(-1.0, rows)])


def test_a_list_of_another_length_than_the_response_is_an_error():
    wrong = logprobs(-1.0).set_column(1, "logprobs", pa.array([[-1.0] * 2, [-1.0] * 2, [-1.0]], FLOATS))
    with pytest.raises(DataError, match=r"old_logprobs.*row 11 \(2 items for 3 tokens\)"):
        run(old=[wrong])


def test_numbers_that_are_not_finite_stop_here():
    with pytest.raises(NonFiniteError, match=r"reward.*\[11\]"):
        run(reward=[rewards([1.0, float("nan"), 3.0])])
    with pytest.raises(NonFiniteError, match="values.*row 10, response token 0"):
        run(value=[values(value=float("inf"))])


def test_sums_give_the_steps_metrics():
    moments, sums, extremes = summarise(run()[0])
    assert (sums["samples"], sums["response_tokens"]) == (3, 6)
    assert sums["reward_sum"] == 6.0
    assert sums["reward_squares_sum"] == 14.0
    assert sums["kl_k1_token_sum"] == pytest.approx(6 * 0.5)
    assert sums["kl_k3_token_sum"] == pytest.approx(6 * (np.exp(-0.5) - 1 + 0.5))
    assert sums["mismatch_abs_token_sum"] == 0.0
    assert (sums["truncated_sum"], sums["without_eos_sum"]) == (1, 1)
    assert (sums["reward_part_style_sum"], sums["reward_part_style_count"]) == (0.75, 3)
    assert (extremes["reward_min"], extremes["reward_max"]) == (1.0, 3.0)
    assert (extremes["response_length_min"], extremes["response_length_max"]) == (1, 3)
    assert moments.count == 6


def test_summaries_of_shards_add_up_to_the_summary_of_the_whole():
    table, _ = run()
    parts = [summarise(table.slice(0, 1)), summarise(table.slice(1))]
    moments, sums, _ = summarise(table)
    assert Moments.merge([part[0] for part in parts]).mean == pytest.approx(moments.mean)
    for name, total in sums.items():
        assert sum(part[1].get(name, 0.0) for part in parts) == pytest.approx(total)


def test_explained_variance_is_one_for_perfect_and_zero_for_constant_values():
    table, _ = run(value=[values(value=0.0)])
    perfect = table.set_column(table.column_names.index("values"), "values", table["returns"])
    assert explained_variance(summarise(table)[1]) == pytest.approx(0.0)
    assert explained_variance(summarise(perfect)[1]) == pytest.approx(1.0)


def without_critic(algorithm=Rloo(), **changes):  # noqa: B008  frozen
    """Rows 10 and 11 belong to one prompt, row 12 to the next."""
    return run(ExperienceSettings(algorithm, samples_per_prompt=2), value=[], **changes)


def test_without_a_critic_a_response_is_compared_with_its_prompts_others():
    # Returns: 1 - 2 * 0.05, 2 - 3 * 0.05, 3 - 0.05. The baseline is the other row's return, for the third its own.
    table, _ = without_critic()
    assert table["values"].to_pylist() == [pytest.approx([1.85] * 2), pytest.approx([0.9] * 3), pytest.approx([2.95])]
    assert table["returns"].to_pylist() == [pytest.approx([0.9] * 2), pytest.approx([1.85] * 3), pytest.approx([2.95])]
    advantages = table["advantages"].to_pylist()
    assert advantages == [pytest.approx([-0.95] * 2), pytest.approx([0.95] * 3), pytest.approx([0.0])]


def test_groups_are_told_by_row_whatever_the_order():
    order = pa.array([2, 0, 1])
    table, _ = without_critic(table=rollout().take(order))
    assert table.equals(without_critic()[0].take(order).combine_chunks())


def test_who_is_left_of_a_group_is_compared_with_who_is_left():
    table, dropped = without_critic(Grpo(), reward=[rewards([1.0, None, 3.0])])
    assert dropped == 1
    assert table["advantages"].to_pylist() == [[0.0, 0.0], [0.0]]
    assert without_critic(Grpo(), reward=[rewards([None] * 3)])[0].num_rows == 0


def test_a_cut_response_has_no_value_to_be_bootstrapped_with_where_there_is_no_critic():
    table, _ = without_critic(kl=0.0)
    assert table["returns"].to_pylist()[1] == [2.0] * 3
