from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator import schema
from orchestrator.types import GREEDY, Prompt, SampleRequest, Sampling, ShardRequest
from tests.integration import engine_scenarios as scenarios
from tests.tiny import tiny_tokenizer

Apart = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenarios.served_llama(tmp_path_factory.mktemp("llama") / "model", tied=True, dtype=torch.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_shard_gives_the_same_bits_again_in_any_order_and_after_another(
    apart: Apart, folder: Path, dtype: str
) -> None:
    request = scenarios.shard(sampling=Sampling(max_new_tokens=24))
    shuffled = dataclasses.replace(
        request, requests=random.Random(1).sample(list(request.requests), len(request.requests))
    )
    other = scenarios.shard(sampling=Sampling(max_new_tokens=24), num_samples=5)
    first, again, reordered, _, last = apart(
        scenarios.samples_of_one_engine, folder, [request, request, shuffled, other, request], dtype=dtype
    )
    fresh = apart(scenarios.samples_of_one_engine, folder, [request], dtype=dtype)[0]
    for table, _ in (again, reordered, last, fresh):
        assert table.equals(first[0])


def long_shard(*, step: int) -> ShardRequest:
    """Four samples of each of two prompts, with two and one full blocks of a CPU engine."""
    prompts = [
        Prompt(f"p{number}", "text", ((np.arange(length) * 7 + number) % 300 + 20).astype(np.int32), {})
        for number, length in enumerate((300, 200))
    ]
    requests = [SampleRequest(row, prompts[row // 4], row % 4, 50 + row) for row in range(8)]
    return ShardRequest(step, 0, requests, Sampling(max_new_tokens=24))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_samples_that_share_the_cache_of_their_prompt_are_the_same_bits_and_outlive_no_publish(
    apart: Apart, folder: Path, tmp_path: Path, dtype: str
) -> None:
    weights = scenarios.read_weights(folder)
    changed = scenarios.perturbed(weights, list(weights), seed=1)
    other = scenarios.saved_beside(folder, changed, tmp_path / "other")
    requests = [long_shard(step=1), long_shard(step=2)]
    expected, none = apart(scenarios.prefixes_shared, folder, requests, other, prefix_caching=False, dtype=dtype)
    found, cached = apart(scenarios.prefixes_shared, folder, requests, other, prefix_caching=True, dtype=dtype)
    assert none == [0, 0, 0]
    assert cached == [3 * (256 + 128)] * 3, "only samples of the same shard share"
    assert [table.to_pylist() for table in found] == [table.to_pylist() for table in expected]
    assert found[1]["response_tokens"] != found[2]["response_tokens"], "other weights must sample otherwise"


def test_a_table_holds_what_was_asked_and_what_was_sampled(apart: Apart, folder: Path) -> None:
    request = scenarios.shard(sampling=Sampling(max_new_tokens=90), num_samples=32)
    table, numbers = apart(scenarios.samples_of_a_used_engine, folder, request)
    assert table.schema.equals(schema.ROLLOUT)
    rows = table.to_pylist()
    for row, asked in zip(rows, request.requests, strict=True):
        assert (row["row"], row["sample_index"], row["seed"]) == (asked.row, asked.sample_index, asked.seed)
        assert row["prompt_tokens"] == asked.prompt.tokens.tolist()
        meta = json.loads(row["meta"])
        assert meta == {"answer": asked.row, "raw_response": meta["raw_response"]}
        assert meta["raw_response"] == row["response_text"] + ("<|im_end|>" if row["finish_reason"] == "stop" else "")
        assert row["version"] == 0
        assert len(row["engine_logprobs"]) == len(row["response_tokens"])
        assert all(value <= 0 for value in row["engine_logprobs"])
        stopped = row["response_tokens"][-1] == 0
        assert row["finish_reason"] == ("stop" if stopped else "length")
        assert 0 not in row["response_tokens"][:-1]
        assert stopped or len(row["response_tokens"]) == 90
        assert "<|im_end|>" not in row["response_text"]
    assert {row["finish_reason"] for row in rows} == {"stop", "length"}
    assert numbers["num_samples"] == 32
    assert numbers["num_prompt_tokens"] == sum(len(row["prompt_tokens"]) for row in rows)
    assert numbers["num_response_tokens"] == sum(len(row["response_tokens"]) for row in rows)
    assert len({tuple(row["response_tokens"]) for row in rows}) > 24


def test_the_engine_stops_at_the_closing_and_at_every_eos(apart: Apart, folder: Path, tmp_path: Path) -> None:
    """A base model with ChatML: EOS is `</s>` (3) in its tokenizer and `<s>` (2) in config.json; the closing is 0."""
    base = Path(shutil.copytree(folder, tmp_path / "base"))
    tiny_tokenizer(eos_token="</s>").save_pretrained(base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "eos_token_id": [2, 3]}))
    (base / "generation_config.json").unlink()
    request = scenarios.shard(sampling=Sampling(max_new_tokens=90), num_samples=32)
    table, _ = apart(scenarios.samples_of_one_engine, base, [request])[0]
    for row in table.to_pylist():
        *before, last = row["response_tokens"]
        assert not {0, 2, 3} & set(before)
        assert row["finish_reason"] == ("stop" if last in (0, 2, 3) else "length")
        written = tiny_tokenizer().decode(before if last in (0, 2, 3) else [*before, last])
        assert row["response_text"] == written
    assert "stop" in table["finish_reason"].to_pylist()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_logprobs_are_those_of_the_model_at_the_sampling_temperature(
    apart: Apart, folder: Path, temperature: float
) -> None:
    """The folder's generation_config sets top_k=2, top_p=0.5; if it were used, log-probs would differ."""
    request = scenarios.shard(sampling=Sampling(temperature=temperature, max_new_tokens=24))
    table, _ = apart(scenarios.samples_of_a_used_engine, folder, request)
    rows = table.to_pylist()
    expected = scenarios.reference_logprobs(folder, rows, temperature)
    for row, reference in zip(rows, expected, strict=True):
        assert row["engine_logprobs"] == pytest.approx(reference, abs=2e-4)


def test_greedy_samples_take_the_likeliest_token(apart: Apart, folder: Path) -> None:
    request = scenarios.with_greedy(scenarios.shard(sampling=Sampling(max_new_tokens=16)))
    table, _ = apart(scenarios.samples_of_one_engine, folder, [request], dtype="float32")[0]
    greedy = [row for row in table.to_pylist() if row["sample_index"] == GREEDY]
    assert len(greedy) == 4
    assert all(all(scenarios.is_likeliest(folder, row)) for row in greedy)


def test_engines_refuse_what_they_can_not_do_right(apart: Apart, folder: Path) -> None:
    seen = apart(scenarios.refusals, folder)
    assert "serves no published version: it was started without a version" in seen["unpublished"]
    assert seen["overlong"].startswith("DataError: prompt 'p0' has 9 tokens; 1 to 8 fit")
    assert "no update is in progress" in seen["no update"]
    assert seen["versions"] == "{5}"


def test_threads_rest_after_sampling(apart: Apart, folder: Path) -> None:
    assert apart(scenarios.processor_seconds_after_sampling, folder) < 0.3


def test_prompts_that_do_not_fit_into_one_batch_are_sampled_all_the_same(apart: Apart, folder: Path) -> None:
    """vLLM would split a prompt at the edge of a batch, which breaks seeds on CPUs."""
    small = scenarios.shard(sampling=Sampling(max_new_tokens=8), num_samples=48)
    long = [dataclasses.replace(item.prompt, tokens=np.tile(item.prompt.tokens, 40)[:101]) for item in small.requests]
    requests = [dataclasses.replace(item, prompt=prompt) for item, prompt in zip(small.requests, long, strict=True)]
    request = dataclasses.replace(small, requests=requests)
    (first, numbers), (again, _) = apart(scenarios.samples_of_one_engine, folder, [request, request], max_samples=64)
    assert numbers["num_prompt_tokens"] == 48 * 101 > 4096
    assert again.equals(first)
