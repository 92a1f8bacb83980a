"""Rollout tables for tests of rewards."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from orchestrator import schema


def rollout_table(
    responses: Sequence[str],
    *,
    prompt: str = "Why?",
    metas: Sequence[Mapping[str, Any]] | None = None,
    prompt_tokens: Sequence[Sequence[int]] | None = None,
    response_tokens: Sequence[Sequence[int]] | None = None,
) -> pa.Table:
    count = len(responses)
    columns = {
        "row": list(range(10, 10 + count)),
        "prompt_id": ["p"] * count,
        "sample_index": list(range(count)),
        "seed": [0] * count,
        "prompt_text": [prompt] * count,
        "response_text": list(responses),
        "prompt_tokens": prompt_tokens or [[5]] * count,
        "response_tokens": response_tokens or [[0]] * count,
        "learn": [[True] * len(tokens) for tokens in response_tokens or [[0]] * count],
        "starts": [[]] * count,
        "engine_logprobs": [[-1.0]] * count,
        "finish_reason": ["stop"] * count,
        "version": [0] * count,
        "meta": [json.dumps(meta) for meta in (metas or [{}] * count)],
    }
    return pa.table(columns, schema=schema.ROLLOUT)
