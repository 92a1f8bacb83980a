"""Trunks in 4 and 8 bits: one function with the dequantised weights, in all that is done with it."""

from functools import partial

import pytest
import torch
from peft import PeftModel

from actors.learning import distributed
from actors.learning.heads import PolicyModel, ValueModel, probed
from actors.learning.learner import Learner
from actors.learning.objectives.losses import LossTerms
from actors.learning.packing import token_rows
from actors.models.adapters import adapt, adapted_layers, frozen_weights
from actors.models.export import named_state
from actors.models.miniature import prove_small
from actors.models.model import load_causal, scorer_on_trunk, torch_dtype
from actors.models.quantised import FrozenWeight, _bitsandbytes
from actors.text.tokenizing import load_tokenizer
from actors.weights.manifest import pack, plan
from orchestrator.config.loader import load_config
from orchestrator.config.sections import LearnerConfig, LoraConfig
from orchestrator.errors import ConfigError
from orchestrator.planning.memory import QUANTISED_BLOCKS
from tests.families import tiny_folder
from tests.numerics.ranks import group
from tests.numerics.test_adapters import stirred

pytest.importorskip("bitsandbytes")
BITS = (4, 8)
PROMPT = torch.tensor([[5, 6, 7, 8, 9, 10]])
ERRORS = {4: 0.2, 8: 0.03}  # of a normal weight, relative to its deviation


def lora(bits, **more):
    return LoraConfig(rank=4, alpha=8.0, trunk_bits=bits, **more)


def make(folder, bits, dtype="float32", stage=0, **more):
    distributed.join(group())
    model = PolicyModel(load_causal(folder, torch_dtype(dtype)), temperature=1.0)
    settings = LearnerConfig(zero_stage=stage, learning_rate=1e-2, lora=lora(bits, **more))
    return Learner(model, settings, dtype=dtype, total_optimizer_steps=4, seed=1)


def micro():
    return token_rows([[5, 6, 7], [9]], [[10, 11, 12], [13, 14, 15, 16]]).pack([0, 1], torch.device("cpu"))


def step(learner):
    learner.update([micro()], lambda output, _: LossTerms(output[0].sum(), {}, {}), count=7.0, what="a step")


def with_weights(folder, weights, dtype="float32"):
    """A plain model of these weights."""
    plain = load_causal(folder, torch_dtype(dtype))
    missing = plain.load_state_dict(dict(weights), strict=False).missing_keys
    assert all("lm_head" in name for name in missing)
    plain.tie_weights()
    return plain


@pytest.mark.parametrize("bits", BITS)
def test_a_weight_is_near_what_it_was_and_the_same_each_time(bits):
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    frozen = FrozenWeight(weight, bits)
    assert frozen.tensor().shape == weight.shape and not torch.equal(frozen.tensor(), weight)
    assert (frozen.tensor() - weight).abs().mean() < ERRORS[bits] * weight.std()
    assert torch.equal(frozen.tensor(), FrozenWeight(weight, bits).tensor())
    num_bytes = sum(buffer.nbytes for buffer in frozen.buffers()) - frozen.code.nbytes
    assert num_bytes == weight.numel() * bits // 8 + 4 * weight.numel() // QUANTISED_BLOCKS[bits]
    assert torch.equal(frozen.bfloat16().tensor(), FrozenWeight(weight, bits).tensor()), "a cast changes no bit of it"


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("family", ["Llama, biases and tied", "GPT-2", "Gemma 2", "Mixtral"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_log_probs_are_those_of_the_dequantised_weights(tmp_path, family, dtype, bits):
    folder = tiny_folder(family, tmp_path)
    learner = make(folder, bits, dtype)
    found = probed(learner._model)
    plain = with_weights(folder, named_state(learner._pretrained), dtype)
    expected = probed(PolicyModel(plain, temperature=1.0))
    original = probed(PolicyModel(load_causal(folder, torch_dtype(dtype)), temperature=1.0))
    tolerance = 1e-6 if dtype == "float32" else 2e-2
    assert (found - expected).abs().max() <= tolerance
    assert (found - original).abs().max() > 10 * tolerance or dtype == "bfloat16"
    assert not list(set(dict(frozen_weights(learner._pretrained))) & set(dict(learner._pretrained.named_parameters())))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("family", ["Llama", "GPT-2"])
def test_gradients_are_those_of_the_dequantised_weights(tmp_path, family, bits):
    folder = tiny_folder(family, tmp_path)
    learner = make(folder, bits)
    stirred_adapters = {name: tensor for name, tensor in learner._pretrained.named_parameters() if "adapters" in name}
    plain = PolicyModel(with_weights(folder, named_state(learner._pretrained)), temperature=1.0)
    adapt(plain, lora(None), name="default", seed=1, forward=partial(probed, plain))
    for model in (learner._model, plain):
        stirred(model.pretrained)
        probed(model).sum().backward()
    others = dict(plain.pretrained.named_parameters())
    for name, tensor in stirred_adapters.items():
        torch.testing.assert_close(tensor.grad, others[name].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", ["plain", "dora"])
def test_what_is_published_and_exported_is_what_was_learned(tmp_path, bits, kind):
    """Merged onto the dequantised trunk: a plain model computes the learner's log-probs."""
    folder = tiny_folder("Llama", tmp_path / "source")
    learner = make(folder, bits, dora=kind == "dora")
    before = learner.pass_through(micro())[0]
    for _ in range(2):
        step(learner)
    learned = learner.pass_through(micro())[0]
    assert (learned - before).abs().max() > 1e-3
    weights = dict(learner.full_weights())
    specs = list(learner.weight_specs())
    assert [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()] == specs
    list(pack(plan(specs, 1 << 16), weights.items()))
    published = PolicyModel(with_weights(folder, weights.items()), temperature=1.0)
    torch.testing.assert_close(published(micro())[0], learned, rtol=0, atol=1e-5)
    learner.export(tmp_path / "export", load_tokenizer(folder))
    exported = PolicyModel(load_causal(tmp_path / "export", torch.float32), temperature=1.0)
    assert torch.equal(exported(micro())[0], published(micro())[0])
    trunk = with_weights(folder, named_state(learner._pretrained))
    adapted = PeftModel.from_pretrained(trunk, str(tmp_path / "export" / "adapter")).base_model.model
    torch.testing.assert_close(PolicyModel(adapted, temperature=1.0)(micro())[0], learned, rtol=0, atol=1e-4)


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_after_a_reload_equal_bit_for_bit(tmp_path, stage, dtype):
    folder = tiny_folder("Llama", tmp_path / "source")
    learner = make(folder, 4, dtype, stage)
    step(learner)
    learner.save(tmp_path / "saved")
    step(learner)
    again = make(folder, 4, dtype, stage)
    again.load(tmp_path / "saved")
    step(again)
    for (name, one), (_, other) in zip(learner.full_weights(), again.full_weights(), strict=True):
        assert torch.equal(one, other), name
    saved = sum(file.stat().st_size for file in (tmp_path / "saved").rglob("*.pt"))
    assert saved < 60 * sum(p.numel() for p in learner._model.parameters() if p.requires_grad), "the trunk was saved"


def test_a_critic_on_the_trunk_shares_the_quantised_weights(tmp_path):
    folder = tiny_folder("Llama", tmp_path)
    learner = make(folder, 4)
    critic = ValueModel(scorer_on_trunk(learner._pretrained, folder))
    before = [id(weight) for _, weight in frozen_weights(learner._pretrained)]
    adapt(critic, lora(4), name="critic", seed=1, forward=partial(probed, critic))
    assert [id(weight) for _, weight in frozen_weights(learner._pretrained)] == before
    layers = [layer for _, layer in adapted_layers(learner._pretrained)]
    assert all(set(layer.adapters) == {"default", "critic"} for layer in layers)


@pytest.mark.parametrize("bits", BITS)
def test_check_proves_a_small_model_with_them(tmp_path, bits):
    folder = tiny_folder("Llama", tmp_path)
    config = load_causal(folder, torch.float32).config
    options = {"scores": False, "checkpointing": True, "exports": True}
    assert prove_small(folder, config, load_tokenizer(folder), lora=lora(bits), **options)


def test_a_missing_package_and_keys_that_do_not_fit_are_refused(tmp_path, monkeypatch):
    def missing(name):
        raise ImportError("No module named 'bitsandbytes'")

    _bitsandbytes.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr("actors.models.quantised.importlib.import_module", missing)
        with pytest.raises(ConfigError, match=r"lora\.trunk_bits needs the package bitsandbytes .* pip install"):
            FrozenWeight(torch.zeros(64, 64), 4)
    with pytest.raises(ConfigError, match=r"trunk_bits=4: bitsandbytes can't quantise torch\.int64"):
        FrozenWeight(torch.zeros(64, 64, dtype=torch.int64), 4)
    with pytest.raises(ConfigError, match=r"policy\.lora\.trunk_bits=4 needs adapters"):
        load_config(None, ["reward.path=/x", "policy.lora.trunk_bits=4"])
    with pytest.raises(ConfigError, match=r"sft\.lora\.trunk_bits=8 needs sft\.zero_stage of 0 to 2"):
        load_config(None, ["reward.path=/x", "sft.lora={rank: 4, trunk_bits: 8}", "sft.zero_stage=3"])
