"""An engine of two workers, each with its part of the layers: it is published to and proved like one of one worker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from actors.remote.transports import CollectiveTransport, HostTransport, SharedTransport
from orchestrator.errors import PublishError
from tests.deadlines import scaled
from tests.integration import engine_scenarios as scenarios
from tests.integration.altering_engine import AlteringRollout
from tests.integration.altering_policy import AlteringPolicy
from tests.integration.publishing_sides import CALL_S, Sides
from tests.local_ray import local_ray
from tests.tiny import VOCABULARY, tiny_config, tiny_tokenizer

pytestmark = [pytest.mark.ray, pytest.mark.heavy, pytest.mark.slow, pytest.mark.timeout(scaled(900))]

Apart = Callable[..., Any]
CLOSE = 1e-4  # two workers add the parts of a product in another order
TRANSPORTS = (HostTransport, partial(CollectiveTransport, workers_per_engine=2), SharedTransport)
# By layer: the tensor of the trainer that has its last element. All workers keep a key-value head that they share.
LAYERS = {
    "model.layers.1.self_attn.qkv_proj": "model.layers.1.self_attn.v_proj.weight",
    "model.layers.0.mlp.down_proj": "model.layers.0.mlp.down_proj.weight",
}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with local_ray("tw", num_cpus=4) as found:
        yield found


def _model(folder: Path, *, tied: bool) -> Path:
    """One key-value head for two workers, and a vocabulary that is padded to 448 rows: the last worker has some."""
    config = tiny_config(tied)
    config.vocab_size = VOCABULARY + 5
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.variant)])
async def test_two_workers_take_publishes_of_all_transports_and_name_what_one_of_them_lacks(
    address: str, apart: Apart, tmp_path: Path, tied: bool
) -> None:
    model = _model(tmp_path / "model", tied=tied)
    async with Sides(model, ranks=1, engines=1, zero_stage=0, tensor_parallel_size=2) as sides:
        before: list[float] = []
        for version, transport in enumerate(TRANSPORTS, start=1):
            await sides.policy.call_all(AlteringPolicy.perturb, CALL_S, version)
            publisher = sides.over(transport)
            report = await publisher.publish(version)
            assert (report.version, report.num_tensors) == (version, 20 if tied else 21)
            assert publisher.num_breaks == 0, "the weights took the way through the host"
            target = tmp_path / f"published-{version}"
            await sides.policy.call(0, AlteringPolicy.export, CALL_S, target)
            ((logprobs, tokens),) = await sides.engines.call_all(AlteringRollout.behaviour, CALL_S)
            expected_logprobs, expected_tokens = apart(scenarios.behaviour_after, model, target)
            assert logprobs == pytest.approx(expected_logprobs, abs=CLOSE)
            assert logprobs != pytest.approx(before, abs=CLOSE)
            assert tokens == expected_tokens
            before = logprobs

        for rank, (layer, tensor) in enumerate(LAYERS.items()):
            await sides.engines.call(0, AlteringRollout.damage, CALL_S, rank, layer)
            with pytest.raises(PublishError, match=rf"weights of {tensor} \(in {layer}\)"):
                await publisher.publish(4)
            with pytest.raises(PublishError, match="serves no published version"):
                await sides.engines.call(0, AlteringRollout.logprobs, CALL_S)
        assert (await publisher.publish(5)).version == 5
        ((logprobs, _),) = await sides.engines.call_all(AlteringRollout.behaviour, CALL_S)
        assert logprobs == pytest.approx(before, abs=1e-6)
