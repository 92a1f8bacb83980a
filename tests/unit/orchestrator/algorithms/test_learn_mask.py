"""Tokens that are not learned, such as an environment's, affect only the input.

Tests compare responses that contain such tokens with the same responses without them, or with hand-worked numbers.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from orchestrator import schema
from orchestrator.algorithms.algorithm import Algorithm
from orchestrator.algorithms.experience import ExperienceSettings, assemble, summarise
from orchestrator.algorithms.grpo import Grpo
from orchestrator.algorithms.ppo import Ppo
from orchestrator.algorithms.rloo import Rloo
from orchestrator.algorithms.summary import merge_metrics
from orchestrator.errors import DataError, NonFiniteError
from orchestrator.types import ShardRecord
from tests.unit.orchestrator.algorithms.test_experience import rewards, run

# Two samples. Tokens 0, 3 and 4 of the first and all of the second are the policy's; the first is truncated.
LEARN = [[True, False, False, True, True, False], [True, True]]
OLD = [[-1.0, -9.0, -9.0, -1.5, -2.0, -9.0], [-1.0, -1.0]]
REF = [[-1.5, -1.0, -1.0, -1.0, -2.5, -1.0], [-2.0, -1.0]]
ENGINE = [[-1.0, 0.0, 0.0, -1.25, -2.0, 0.0], [-1.0, -1.5]]
VALUES = [[0.5, 7.0, 7.0, 1.0, 2.0, 7.0], [0.25, 0.5]]
ALGORITHMS = (Ppo(gamma=0.5, lam=0.5), Grpo(), Rloo())
FLOATS = pa.list_(pa.float32())
COMPUTED = ("token_rewards", "values", "advantages", "returns")


def shard(
    learn: list[list[bool]], *, algorithm: Algorithm, old: list[list[float]] = OLD, filler: float | None = None
) -> pa.Table:
    """The experience of the two samples; `filler` replaces the models' outputs at tokens that are not learned."""

    def lists(numbers: list[list[float]]) -> pa.Array:
        rows = [
            [n if chosen or filler is None else filler for n, chosen in zip(row, marks, strict=True)]
            for row, marks in zip(numbers, learn, strict=True)
        ]
        return pa.array(rows, FLOATS)

    rows = pa.array([0, 1], pa.int32())
    columns = {
        "row": rows,
        "prompt_id": ["p", "p"],
        "sample_index": [0, 1],
        "seed": [0, 1],
        "prompt_text": ["", ""],
        "response_text": ["", ""],
        "prompt_tokens": [[1], [1]],
        "response_tokens": [list(range(len(row))) for row in learn],
        "learn": learn,
        "starts": [[], []],
        "engine_logprobs": lists(ENGINE),
        "finish_reason": ["length", "stop"],
        "version": [0, 0],
        "meta": ["{}", "{}"],
    }
    table, dropped = assemble(
        pa.table(columns).cast(schema.ROLLOUT),
        logprobs=[pa.table({"row": rows, "logprobs": lists(old)}, schema=schema.LOGPROBS)],
        ref_logprobs=[pa.table({"row": rows, "logprobs": lists(REF)}, schema=schema.LOGPROBS)],
        values=[
            pa.table(
                {"row": rows, "values": lists(VALUES), "bootstrap_value": pa.array([8.0, 8.0], pa.float32())},
                schema=schema.VALUES,
            )
        ],
        rewards=[rewards([4.0, 1.0], (0, 1))],
        settings=ExperienceSettings(algorithm, samples_per_prompt=2),
        kl_coefficient=0.1,
    )
    assert dropped == 0
    return table


def without(table: pa.Table) -> pa.Table:
    """The same responses without other than learned tokens."""
    others = ("prompt_tokens", "starts")
    lists = [field.name for field in table.schema if pa.types.is_list(field.type) and field.name not in others]
    marks = table["learn"].to_pylist()
    for name in lists:
        kept = [
            [item for item, chosen in zip(row, mark, strict=True) if chosen]
            for row, mark in zip(table[name].to_pylist(), marks, strict=True)
        ]
        index = table.schema.get_field_index(name)
        table = table.set_column(index, table.schema.field(index), pa.array(kept, table.schema.field(index).type))
    return table


def flat(table: pa.Table, name: str) -> npt.NDArray[np.float32]:
    column: npt.NDArray[np.float32] = table[name].combine_chunks().flatten().to_numpy()
    return column


def test_gae_goes_from_each_learned_token_to_the_next() -> None:
    # Token rewards -0.1 * (old - ref), plus 4 for the last learned token: -0.05, 0.05, -0.05 + 4 = 3.95.
    # V = 0.5, 1, 2, then 8.
    # gamma 0.5, lambda 0.5: delta_4 = 3.95 + 0.5*8 - 2 = 5.95; delta_3 = 0.05 + 0.5*2 - 1 = 0.05;
    # delta_0 = -0.05 + 0.5*1 - 0.5 = -0.05. A_4 = 5.95; A_3 = 0.05 + 0.25*5.95 = 1.5375; A_0 = -0.05 + 0.25*1.5375
    table = shard(LEARN, algorithm=Ppo(gamma=0.5, lam=0.5))
    assert table["token_rewards"].to_pylist()[0] == pytest.approx([-0.05, 0.0, 0.0, 0.05, 3.95, 0.0])
    assert table["advantages"].to_pylist()[0] == pytest.approx([0.334375, 0.0, 0.0, 1.5375, 5.95, 0.0])
    assert table["returns"].to_pylist()[0] == pytest.approx([0.834375, 0.0, 0.0, 2.5375, 7.95, 0.0])
    assert table["values"].to_pylist()[0] == [0.5, 0.0, 0.0, 1.0, 2.0, 0.0]


def test_without_a_critic_the_return_is_of_the_learned_tokens() -> None:
    # Returns: -0.05 + 0.05 + 3.95 = 3.95, and -0.1 + 0 + 1 = 0.9; each is the baseline of the other.
    table = shard(LEARN, algorithm=Rloo())
    assert table["advantages"].to_pylist() == [
        pytest.approx([3.05, 0.0, 0.0, 3.05, 3.05, 0.0]),
        pytest.approx([-3.05, -3.05]),
    ]


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: algorithm.name)
def test_learned_tokens_have_the_same_bits_as_without_the_others(algorithm: Algorithm) -> None:
    table = shard(LEARN, algorithm=algorithm)
    short = without(table)
    again = run_short(short, algorithm)
    for name in COMPUTED:
        assert flat(short, name).tobytes() == flat(again, name).tobytes(), name
    moments, sums, extremes = summarise(table)
    turns = {"later_turns_sum": 1.0}
    assert (moments, sums, extremes) == (summarise(short)[0], {**summarise(short)[1], **turns}, summarise(short)[2])


def run_short(short: pa.Table, algorithm: Algorithm) -> pa.Table:
    rows = short["row"]
    values = pa.array([[v for v, m in zip(r, k, strict=True) if m] for r, k in zip(VALUES, LEARN, strict=True)], FLOATS)
    bootstrap = pa.array([8.0, 8.0], pa.float32())
    return assemble(
        short.select(schema.ROLLOUT.names),
        logprobs=[pa.table({"row": rows, "logprobs": short["old_logprobs"]}, schema=schema.LOGPROBS)],
        ref_logprobs=[pa.table({"row": rows, "logprobs": short["ref_logprobs"]}, schema=schema.LOGPROBS)],
        values=[pa.table({"row": rows, "values": values, "bootstrap_value": bootstrap}, schema=schema.VALUES)],
        rewards=[rewards([4.0, 1.0], (0, 1))],
        settings=ExperienceSettings(algorithm, samples_per_prompt=2),
        kl_coefficient=0.1,
    )[0]


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: algorithm.name)
@pytest.mark.parametrize("filler", [123.0, float("nan"), float("-inf")])
def test_what_models_say_about_other_tokens_changes_nothing(algorithm: Algorithm, filler: float) -> None:
    table, other = shard(LEARN, algorithm=algorithm), shard(LEARN, algorithm=algorithm, filler=filler)
    for name in COMPUTED:
        assert flat(table, name).tobytes() == flat(other, name).tobytes(), name
    assert summarise(table) == summarise(other)


def test_a_number_that_is_not_finite_stops_only_where_it_is_learned_from() -> None:
    broken = [[*OLD[0][:3], float("nan"), *OLD[0][4:]], OLD[1]]
    with pytest.raises(NonFiniteError, match="old_logprobs: 1 values.*row 0, response token 3"):
        shard(LEARN, algorithm=Ppo(), old=broken)


def test_lengths_and_statistics_count_learned_tokens() -> None:
    moments, sums, extremes = summarise(shard(LEARN, algorithm=Rloo()))
    assert (moments.count, sums["response_tokens"], sums["samples"]) == (5, 5.0, 2.0)
    assert (extremes["response_length_min"], extremes["response_length_max"]) == (2.0, 3.0)
    assert sums["kl_k1_token_sum"] == pytest.approx(0.5 - 0.5 + 0.5 + 1.0)
    assert sums["mismatch_abs_token_sum"] == pytest.approx(0.25 + 0.5)
    record = ShardRecord("a", "b", 1, 2, 0, 5, moments, sums, extremes)
    metrics = merge_metrics([record])
    assert (metrics["response/length_mean"], metrics["tokens/generated"]) == (2.5, 5.0)
    assert metrics["response/turns_mean"] == 1.5


def test_turns_are_counted_within_rows() -> None:
    """A row that begins with a learned token after one that ends with another is no later turn of its own."""
    marks = [[True, False, True, False, True, False], [True, True]]
    assert summarise(shard(marks, algorithm=Rloo()))[1]["later_turns_sum"] == 2.0
    assert "later_turns_sum" not in summarise(shard([[True] * 6, [True] * 2], algorithm=Rloo()))[1]


def test_a_response_of_which_nothing_is_learned_is_left_out() -> None:
    table, _ = run()
    marks = pa.array([[False] * 2, [True] * 3, [True]], pa.list_(pa.bool_()))
    rollout = table.select(schema.ROLLOUT.names)
    index = rollout.schema.get_field_index("learn")
    found, dropped = run(table=rollout.set_column(index, rollout.schema.field(index), marks))
    assert (found["row"].to_pylist(), dropped) == ([11, 12], 1)


def test_marks_of_another_length_than_the_response_are_an_error() -> None:
    table, _ = run()
    rollout = table.select(schema.ROLLOUT.names)
    index = rollout.schema.get_field_index("learn")
    marks = pa.array([[True] * 2, [True] * 2, [True]], pa.list_(pa.bool_()))
    with pytest.raises(DataError, match=r"learn: 1 lists .* row 11 \(2 items for 3 tokens\)"):
        run(table=rollout.set_column(index, rollout.schema.field(index), marks))


@pytest.mark.parametrize("missing", [["learn"], ["starts"], ["learn", "starts"]])
def test_a_log_from_before_a_column_is_read_as_all_learned_and_in_one_segment(missing: list[str]) -> None:
    table, _ = run()
    old = table.drop_columns(missing)
    assert schema.with_all_columns(old).equals(table) and schema.with_all_columns(table) is table
    assert schema.with_all_columns(pa.concat_tables([old, old.slice(0, 0), old])).equals(
        pa.concat_tables([table, table])
    )
    assert schema.with_all_columns(old).schema.equals(schema.EXPERIENCE)
