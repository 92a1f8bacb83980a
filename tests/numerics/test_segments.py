"""A row of several segments is computed and learned as its segments are, each in a row of its own."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from actors.learning.objectives.objective import LearnJob
from actors.learning.packing import TokenRows
from actors.roles.critic import CriticWorker
from actors.roles.policy import PolicyWorker
from orchestrator.algorithms.grpo import Grpo
from orchestrator.config.sections import CriticConfig, PolicyConfig
from tests.numerics.ranks import context, group
from tests.numerics.samples import experience
from tests.tiny import tiny_llama, tiny_scorer

LENGTHS = [(7, 31), (5, 9), (7, 24), (4, 1)]
STARTS = [[6, 19], [], [11], []]
JOB = LearnJob(step=0, advantage_mean=0.0, advantage_std=1.0, kl_coefficient=0.0, seed=1)
LISTS = (
    "response_tokens",
    "learn",
    "engine_logprobs",
    "old_logprobs",
    "ref_logprobs",
    "values",
    "advantages",
    "returns",
)


def marks(response: int, starts: list[int]) -> list[bool]:
    """Each segment learns its last three tokens, the first of a row also its first."""
    edges = [0, *starts, response]
    return [any(end - 3 <= place < end for _, end in pairwise(edges)) or place == 0 for place in range(response)]


def rows_in_segments() -> pa.Table:
    table = experience(LENGTHS)
    learn = [marks(response, starts) for (_, response), starts in zip(LENGTHS, STARTS, strict=True)]
    table = table.set_column(table.schema.get_field_index("learn"), "learn", pa.array(learn, pa.list_(pa.bool_())))
    return table.set_column(table.schema.get_field_index("starts"), "starts", pa.array(STARTS, pa.list_(pa.int32())))


def segments_in_rows(table: pa.Table) -> pa.Table:
    """Every segment as a row: a later one has its first two tokens as prompt."""
    found: list[dict[str, Any]] = []
    for row in table.to_pylist():
        edges = [0, *row["starts"], len(row["response_tokens"])]
        for start, end in pairwise(edges):
            lead = 2 if start else 0
            own = {name: row[name][start + lead : end] for name in LISTS}
            prompt = row["response_tokens"][start : start + lead] if start else row["prompt_tokens"]
            found.append({**row, **own, "prompt_tokens": prompt, "starts": [], "row": len(found)})
    return pa.Table.from_pylist(found, schema=table.schema)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {"policy": tiny_llama(folder / "causal"), "critic": tiny_scorer(folder / "scorer")}


def learned(table: pa.Table, values: pa.Table, name: str) -> np.ndarray:
    rows = values.sort_by("row")[name].to_pylist()
    pairs = zip(table["learn"].to_pylist(), rows, strict=True)
    return np.array([value for learn, row in pairs for value, mark in zip(row, learn, strict=True) if mark])


@pytest.mark.parametrize("tokens", [40, 1000])
def test_log_probs_and_values_are_those_of_separate_rows(folders: dict[str, Path], tokens: int) -> None:
    table = rows_in_segments()
    apart = segments_in_rows(table)
    around = context(folders["policy"], Grpo(), dtype="float32")
    policy = PolicyWorker(PolicyConfig(micro_batch_tokens=tokens), around, group())
    assert policy.shares_prompts
    found = policy.logprobs(table)
    assert [len(row) for row in found.sort_by("row")["logprobs"].to_pylist()] == [size for _, size in LENGTHS]
    expected = learned(apart, policy.logprobs(apart), "logprobs")
    np.testing.assert_allclose(learned(table, found, "logprobs"), expected, atol=2e-5)
    around = context(folders["critic"], Grpo(), dtype="float32")
    critic = CriticWorker(CriticConfig(path=str(folders["critic"]), micro_batch_tokens=tokens), around, group())
    values = critic.values(table).sort_by("row")
    np.testing.assert_allclose(
        learned(table, values, "values"), learned(apart, critic.values(apart), "values"), atol=2e-5
    )
    last = critic.values(apart).sort_by("row")["bootstrap_value"].to_numpy()
    np.testing.assert_allclose(values["bootstrap_value"].to_numpy(), last[[2, 3, 5, 6]], atol=2e-5)


def test_an_update_is_that_of_separate_rows(folders: dict[str, Path]) -> None:
    """With a loss that is a mean over tokens; the other kinds count an episode as one sample."""
    algorithm = Grpo(aggregation="token", epochs=1, minibatches=1)
    weights = []
    for table in (rows_in_segments(), segments_in_rows(rows_in_segments())):
        around = context(folders["policy"], algorithm, dtype="float32", total_optimizer_steps=1)
        worker = PolicyWorker(PolicyConfig(learning_rate=1e-2, micro_batch_tokens=200), around, group())
        worker.learn([table], JOB)
        weights.append(torch.cat([tensor.flatten() for _, tensor in worker.full_weights()]))
    start = torch.cat([tensor.flatten() for _, tensor in PolicyWorker(
        PolicyConfig(micro_batch_tokens=200), context(folders["policy"], algorithm, dtype="float32"), group()
    ).full_weights()])  # fmt: skip
    moved, apart = weights[0] - start, weights[1] - start
    assert float((moved - apart).norm()) < 1e-2 * float(apart.norm())


def test_a_row_of_several_segments_counts_with_its_padding_and_shares_no_line() -> None:
    rows = TokenRows.of_table(rows_in_segments(), learned_only=True, shares_prompts=True)
    assert rows.line_length([0]) == 3 * 13 and rows.line_length([1]) == 14 and rows.line_length([2]) == 2 * 18
    assert rows.lines(range(4)) == [(0,), (1,), (2,), (3,)]
    micro = rows.pack([0, 1, 2, 3], torch.device("cpu"))
    assert micro.input_ids_BT.shape == (3 + 1 + 2 + 1, 18)
    assert micro.lengths_B.tolist() == [10, 4, 7, 1]
    assert rows.take([2, 0]).line_length([0]) == 2 * 18
