"""Synthetic experience for the tiny models: tables of the real schema, seeded, with very different row lengths."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from actors.learning.objectives.objective import Rows
from actors.learning.packing import MicroBatch
from orchestrator import schema

LENGTHS = [(3, 9), (12, 30), (2, 1), (5, 14), (7, 4), (4, 22), (9, 3), (6, 6)]  # (prompt, response) tokens


def rows_of(micro: MicroBatch, *, mean_length: float = 1.0, max_new_tokens: int = 16) -> Rows:
    """What an objective reads of a micro-batch."""
    return Rows(micro.columns, micro.lengths_B, mean_length, max_new_tokens)


def rollout(lengths: Sequence[tuple[int, int]] = LENGTHS, *, seed: int = 0, vocabulary: int = 377) -> pa.Table:
    rng = np.random.default_rng(seed)
    prompts, responses = ([rng.integers(0, vocabulary, row[side]) for row in lengths] for side in (0, 1))
    count = len(lengths)
    columns = {
        "row": range(count),
        "prompt_id": [f"p{i}" for i in range(count)],
        "sample_index": [0] * count,
        "seed": range(count),
        "prompt_text": [""] * count,
        "response_text": [""] * count,
        "prompt_tokens": [tokens.tolist() for tokens in prompts],
        "response_tokens": [tokens.tolist() for tokens in responses],
        "learn": [[True] * row[1] for row in lengths],
        "starts": [[]] * count,
        "engine_logprobs": [rng.normal(-5, 1, row[1]).tolist() for row in lengths],
        "finish_reason": ["stop", "length"] * (count // 2) + ["stop"] * (count % 2),
        "version": [0] * count,
        "meta": ["{}"] * count,
    }
    return pa.table({name: pa.array(list(values)) for name, values in columns.items()}).cast(schema.ROLLOUT)


def experience(
    lengths: Sequence[tuple[int, int]] = LENGTHS, *, seed: int = 0, old_logprobs: pa.ListArray | None = None
) -> pa.Table:
    """EXPERIENCE with realistic random numbers; `old_logprobs` replaces the random ones."""
    table = rollout(lengths, seed=seed)
    rng = np.random.default_rng(seed + 1)

    def lists(mean: float) -> pa.Array:
        return pa.array([rng.normal(mean, 0.5, row[1]).tolist() for row in lengths], pa.list_(pa.float32()))

    added = {
        "old_logprobs": lists(-5.9) if old_logprobs is None else old_logprobs,
        "ref_logprobs": lists(-5.9),
        "values": lists(0.0),
        "reward": pa.array(rng.normal(size=len(lengths)), pa.float32()),
        "reward_parts": pa.array([[("score", 1.0)]] * len(lengths), pa.map_(pa.string(), pa.float32())),
        "token_rewards": lists(0.0),
        "advantages": lists(0.0),
        "returns": lists(0.5),
    }
    columns = {name: table[name] for name in table.column_names} | added
    return pa.table([columns[name] for name in schema.EXPERIENCE.names], schema=schema.EXPERIENCE)
