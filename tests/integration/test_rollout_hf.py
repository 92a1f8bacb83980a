"""HfEngine has the same contract as VllmEngine; it needs no separate process."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from actors.engines.hf_engine import HfEngine, processed_logprobs
from actors.weights.manifest import pack, plan
from orchestrator import schema
from orchestrator.errors import DataError, PublishError
from orchestrator.types import GREEDY, Sampling
from tests.integration import engine_scenarios as scenarios


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenarios.served_llama(tmp_path_factory.mktemp("llama") / "model", tied=request.param, dtype=torch.float32)


def test_a_shard_gives_the_same_bits_again_in_any_order(folder: Path) -> None:
    engine = HfEngine(folder, scenarios.context())
    request = scenarios.shard(sampling=Sampling(max_new_tokens=16))
    first, numbers = engine.generate(request)
    backwards, _ = engine.generate(dataclasses.replace(request, requests=list(reversed(request.requests))))
    assert first.schema.equals(schema.ROLLOUT)
    assert first.equals(backwards)
    assert numbers["num_response_tokens"] == sum(map(len, first.column("response_tokens").to_pylist()))
    assert len({tuple(tokens) for tokens in first.column("response_tokens").to_pylist()}) > 8


def test_a_sample_follows_from_its_seed_and_not_from_its_neighbours(folder: Path) -> None:
    engine = HfEngine(folder, scenarios.context())
    sampling = Sampling(max_new_tokens=8)
    many, _ = engine.generate(scenarios.shard(sampling=sampling, num_samples=12))
    few, _ = engine.generate(scenarios.shard(sampling=sampling, num_samples=3))
    assert few.column("response_tokens").to_pylist() == many.column("response_tokens").to_pylist()[:3]


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_logprobs_are_those_of_the_model_at_the_sampling_temperature(folder: Path, temperature: float) -> None:
    request = scenarios.shard(sampling=Sampling(temperature=temperature, max_new_tokens=60))
    rows = HfEngine(folder, scenarios.context()).generate(request)[0].to_pylist()
    expected = scenarios.reference_logprobs(folder, rows, temperature)
    for row, reference in zip(rows, expected, strict=True):
        assert row["engine_logprobs"] == pytest.approx(reference, abs=2e-4)
        assert row["finish_reason"] == ("stop" if row["response_tokens"][-1] == 0 else "length")
        assert 0 not in row["response_tokens"][:-1]


def test_greedy_samples_take_the_likeliest_token_and_leave_others_as_they_were(folder: Path) -> None:
    plain = scenarios.shard(sampling=Sampling(max_new_tokens=16))
    engine = HfEngine(folder, scenarios.context())
    before, rows = (engine.generate(request)[0].to_pylist() for request in (plain, scenarios.with_greedy(plain)))
    for row, other in zip(rows, before, strict=True):
        if row["sample_index"] == GREEDY:
            assert all(scenarios.is_likeliest(folder, row))
        else:
            assert row["response_tokens"] == other["response_tokens"]
    assert [row["sample_index"] for row in rows].count(GREEDY) == len(rows) // 3


def test_top_k_and_top_p_cut_and_renormalise() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    assert processed_logprobs(logits, Sampling(top_k=2)).exp()[0].tolist() == pytest.approx([0.625, 0.375, 0, 0])
    assert processed_logprobs(logits, Sampling(top_p=0.7)).exp()[0].tolist() == pytest.approx([0.625, 0.375, 0, 0])
    assert processed_logprobs(logits, Sampling(top_p=0.4)).exp()[0].tolist() == pytest.approx([1, 0, 0, 0])
    flat = processed_logprobs(logits, Sampling(temperature=2.0)).exp()[0]
    roots = torch.tensor([0.5, 0.3, 0.15, 0.05]).sqrt()
    assert flat.tolist() == pytest.approx((roots / roots.sum()).tolist())


def test_a_published_engine_equals_a_fresh_one(folder: Path, tmp_path: Path) -> None:
    engine = HfEngine(folder, scenarios.context())
    weights = scenarios.perturbed(scenarios.read_weights(folder), list(scenarios.read_weights(folder)), seed=3)
    before = scenarios.behaviour(engine)
    report = scenarios.publish(engine, weights, 4)
    assert (report.version, report.num_tensors, report.num_compared) == (4, len(weights), len(weights))
    fresh = HfEngine(scenarios.saved_beside(folder, weights, tmp_path / "fresh"), scenarios.context())
    assert scenarios.behaviour(engine) == scenarios.behaviour(fresh)
    assert scenarios.behaviour(engine) != before
    table, _ = engine.generate(scenarios.shard(sampling=Sampling(max_new_tokens=2)))
    assert set(table.column("version").to_pylist()) == {4}


def test_a_failed_publish_takes_the_engine_out_of_service(folder: Path) -> None:
    engine = HfEngine(folder, scenarios.context())
    weights = scenarios.read_weights(folder)
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(PublishError, match=f"weights of {name};"):
        scenarios.publish(engine, weights, 1, alter=scenarios.flip_one_bit(name, weights))
    with pytest.raises(PublishError, match="its last update failed"):
        engine.generate(scenarios.shard(sampling=Sampling()))
    with pytest.raises(PublishError, match="not sent: model.norm.weight"):
        scenarios.publish(engine, {key: t for key, t in weights.items() if key != "model.norm.weight"}, 1)
    scenarios.publish(engine, weights, 2)
    assert engine.version() == 2


def test_a_parameter_that_changes_after_it_was_loaded_is_named(folder: Path) -> None:
    engine = HfEngine(folder, scenarios.context())
    weights = scenarios.read_weights(folder)
    header = plan(((key, t.dtype, t.shape) for key, t in weights.items()), bucket_bytes=1 << 20)
    engine.begin_update(header)
    for bucket in pack(header, weights.items()):
        engine.receive_bucket(bucket)
    with torch.no_grad():
        engine._model.get_parameter("model.norm.weight")[3] += 0.5
    with pytest.raises(PublishError, match=r"weights of model\.norm\.weight"):
        engine.finish_update(1)
    assert engine.version() is None


def test_an_overlong_prompt_is_named(folder: Path) -> None:
    with pytest.raises(DataError, match="prompt 'p0' has 9 tokens; 1 to 8 fit"):
        HfEngine(folder, scenarios.context()).generate(scenarios.shard(sampling=Sampling(max_new_tokens=120)))
