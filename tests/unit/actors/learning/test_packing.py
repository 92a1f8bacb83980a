"""Micro-batches of learned tokens: other tokens are in the input, but not in targets, columns, lengths or losses."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch

from actors.learning.objectives.objective import LearnJob
from actors.learning.objectives.table import objective_of
from actors.learning.packing import MicroBatch, TokenRows
from orchestrator.algorithms.grpo import Grpo
from orchestrator.algorithms.ppo import Ppo
from tests.numerics.samples import rows_of

CPU = torch.device("cpu")
PROMPTS = [[1, 2, 3], [1, 2, 3], [4]]
RESPONSES = [[10, 11, 12, 13], [20, 21], [30, 31, 32]]
LEARN = [[True, False, False, True], [False, True], [True, True, True]]
ALL = [[True] * len(row) for row in RESPONSES]
COLUMNS = ("old_logprobs", "ref_logprobs", "engine_logprobs", "advantages", "values", "returns")
JOB = LearnJob(step=0, advantage_mean=0.0, advantage_std=1.0, kl_coefficient=0.1, seed=0)


def table(learn: list[list[bool]], *, filler: float = 0.0) -> pa.Table:
    """Columns with arbitrary numbers at learned tokens and `filler` at the others."""
    floats = pa.list_(pa.float32())

    def numbers(seed: int) -> pa.Array:
        generator = np.random.default_rng(seed)
        rows = [generator.normal(size=len(row)) for row in RESPONSES]
        return pa.array([np.where(marks, row, filler) for row, marks in zip(rows, learn, strict=True)], floats)

    tokens = pa.list_(pa.int32())
    columns = {"prompt_tokens": pa.array(PROMPTS, tokens), "response_tokens": pa.array(RESPONSES, tokens)}
    columns["learn"] = pa.array(learn, pa.list_(pa.bool_()))
    return pa.table({**columns, **{name: numbers(seed) for seed, name in enumerate(COLUMNS)}})


def packed(learn: list[list[bool]], *, filler: float = 0.0, lines: list[tuple[int, ...]] | None = None) -> MicroBatch:
    rows = TokenRows.of_table(table(learn, filler=filler), COLUMNS, learned_only=True)
    return rows.pack_lines(lines or [(0,), (1,), (2,)], CPU)


def test_only_learned_tokens_are_targets_and_all_are_input() -> None:
    micro = packed(LEARN)
    assert micro.input_ids_BT.tolist() == [[1, 2, 3, 10, 11, 12, 13], [1, 2, 3, 20, 21, 0, 0], [4, 30, 31, 32, 0, 0, 0]]
    assert micro.targets_N.tolist() == [10, 13, 21, 30, 31, 32]
    # Token n is chosen one position before it: 2 and 5 of the first line, 7 + 3 of the second, 14 + (0, 1, 2) of the
    # third.
    assert micro.state_index_N.tolist() == [2, 5, 10, 14, 15, 16]
    assert micro.lengths_B.tolist() == [2, 1, 3]
    assert micro.last_index_B.tolist() == [6, 11, 17], "it is the response's end, learned or not"
    assert {name: len(column) for name, column in micro.columns.items()} == dict.fromkeys(COLUMNS, 6)


def test_responses_that_share_their_prompt_keep_their_places() -> None:
    micro = packed(LEARN, lines=[(0, 1), (2,)])
    assert micro.input_ids_BT.tolist() == [[1, 2, 3, 10, 11, 12, 13, 20, 21], [4, 30, 31, 32, 0, 0, 0, 0, 0]]
    assert micro.targets_N.tolist() == [10, 13, 21, 30, 31, 32]
    assert micro.state_index_N.tolist() == [2, 5, 7, 9, 10, 11]


def test_all_learned_is_the_same_as_not_asking() -> None:
    found = packed(ALL)
    plain = TokenRows.of_table(table(ALL), COLUMNS).pack_lines([(0,), (1,), (2,)], CPU)
    for name in ("input_ids_BT", "state_index_N", "targets_N", "last_index_B", "lengths_B"):
        one, other = getattr(found, name), getattr(plain, name)
        assert torch.equal(one, other) and one.dtype == other.dtype, name
    assert all(torch.equal(found.columns[name], plain.columns[name]) for name in COLUMNS)
    assert TokenRows.of_table(table(LEARN)).learned_lengths.tolist() == [4, 2, 3], "scorers score every token"


def test_lengths_and_columns_of_a_table_count_learned_tokens() -> None:
    rows = TokenRows.of_table(table(LEARN), COLUMNS, learned_only=True)
    assert rows.learned_lengths.tolist() == [2, 1, 3]
    assert rows.response_lengths.tolist() == [4, 2, 3], "the length of a forward does not change"
    assert len(rows.token_column("returns")) == 6
    assert [rows.line_length(line) for line in [(0,), (0, 1)]] == [7, 9]


@pytest.mark.parametrize("filler", [1e9, float("nan")])
@pytest.mark.parametrize(
    "algorithm", [Ppo(importance_cap=2.0, kl_estimator="k3-loss", entropy_coefficient=0.1), Grpo()]
)
def test_no_loss_reads_a_token_that_is_not_learned_from(algorithm: Ppo | Grpo, filler: float) -> None:
    objective = objective_of(algorithm)
    log_probs, entropy, values = (torch.randn(6, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    plain, filled = packed(LEARN), packed(LEARN, filler=filler)
    one, other = (objective.policy_terms(log_probs, entropy, rows_of(micro), JOB) for micro in (plain, filled))
    assert torch.isfinite(one.loss) and torch.equal(one.loss, other.loss)
    assert {name: float(value) for name, value in one.sums.items()} == {
        name: float(value) for name, value in other.sums.items()
    }
    if algorithm.needs_critic:
        one, other = (objective.critic_terms(values, micro.columns) for micro in (plain, filled))
        assert torch.isfinite(one.loss) and torch.equal(one.loss, other.loss)


def test_the_surrogate_by_hand() -> None:
    # Ratios 1 everywhere: the loss is minus the sum of the learned tokens' advantages.
    micro = packed([[True, False, False, False], [False, True], [False] * 2 + [True]], filler=1e6)
    advantages = micro.columns["advantages"]
    assert advantages.shape == (3,)
    terms = objective_of(Grpo()).policy_terms(micro.columns["old_logprobs"], torch.zeros(3), rows_of(micro), JOB)
    assert terms.loss.item() == pytest.approx(-float(advantages.sum()))
