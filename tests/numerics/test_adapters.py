"""Adapters: what learns, what is saved, merged and exported, and that it is one function in all forms."""

from functools import partial

import pytest
import torch
from peft import PeftModel

from actors.learning import distributed
from actors.learning.heads import PolicyModel, ValueModel, probed
from actors.learning.learner import Learner
from actors.learning.objectives.objective import LearnJob
from actors.learning.packing import TokenRows
from actors.models.adapters import adapt, adapted_layers, linear_layers, switched_off
from actors.models.model import load_causal, load_scorer, torch_dtype
from actors.roles.critic import CriticWorker
from actors.roles.policy import PolicyWorker
from actors.roles.reference import ReferenceWorker
from actors.text.tokenizing import load_tokenizer
from orchestrator.algorithms.ppo import Ppo
from orchestrator.config.sections import CriticConfig, LearnerConfig, LoraConfig, PolicyConfig, ReferenceConfig
from orchestrator.errors import ConfigError, DataError, StorageError
from tests.families import tiny_folder, tiny_model
from tests.numerics.ranks import by_world, context, group
from tests.numerics.samples import experience, rollout
from tests.numerics.test_save_and_load import learn, weights
from tests.tiny import tiny_llama, tiny_scorer

KINDS = {
    "lora": LoraConfig(rank=4, alpha=8.0),
    "rank-stabilised": LoraConfig(rank=4, alpha=8.0, rank_stabilised=True),
    "dora": LoraConfig(rank=4, alpha=8.0, dora=True),
}
FAMILIES = ["Llama, biases and tied", "Qwen2", "GPT-2", "Falcon", "GPT-NeoX", "Gemma 2", "Phi-3"]
LEARNER = LearnerConfig(learning_rate=1e-2, schedule="cosine", warmup_optimizer_steps=1)
PROMPT = torch.tensor([[5, 6, 7, 8, 9, 10]])


def stirred(pretrained):
    """Random numbers in place of new adapters, which change nothing."""
    generator = torch.Generator().manual_seed(3)
    for _, module in adapted_layers(pretrained):
        for parameter in module.adapters.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.data.add_(noise, alpha=0.05)


def adapted(model, config, **more):
    adapt(model, config, forward=partial(probed, model), **{"seed": 1, "name": "default", **more})
    return model


def policy(folder, config, dtype="float32"):
    return adapted(PolicyModel(load_causal(folder, torch_dtype(dtype)), temperature=1.0), config)


def make(folder, config, stage, dtype="float32", **changes):
    model = PolicyModel(load_causal(folder, torch_dtype(dtype)), temperature=1.0)
    settings = LEARNER.model_copy(update={"zero_stage": stage, "lora": config, **changes})
    return Learner(model, settings, dtype=dtype, total_optimizer_steps=8, seed=1)


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("causal"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_one_function_learned_merged_and_read_by_peft(tmp_path, family, kind):
    """The learner's output, a plain model of the exported folder, and peft's model of the exported adapter."""
    distributed.join(group())
    source = tiny_folder(family, tmp_path / "source")
    learner = make(source, KINDS[kind], 0)
    learner._pretrained.requires_grad_(True)
    stirred(learner._pretrained)
    with torch.no_grad():
        expected = learner._pretrained(input_ids=PROMPT).logits
        with switched_off(learner._adapters.values()):
            plain = learner._pretrained(input_ids=PROMPT).logits
    for name, parameter in learner._pretrained.named_parameters():
        parameter.requires_grad_(".adapters." in name)
    learner.export(tmp_path / "export", load_tokenizer(source))
    with torch.no_grad():
        merged = load_causal(tmp_path / "export", torch.float32)(input_ids=PROMPT).logits
        original = load_causal(source, torch.float32)
        assert torch.equal(original(input_ids=PROMPT).logits, plain), "the trunk has changed"
        by_peft = PeftModel.from_pretrained(original, str(tmp_path / "export" / "adapter"))(input_ids=PROMPT).logits
    assert (expected - plain).abs().max() > 0.01
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(by_peft, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_new_adapters_change_nothing(causal, kind, dtype):
    plain = PolicyModel(load_causal(causal, torch_dtype(dtype)), temperature=1.0)
    assert torch.equal(probed(plain), probed(policy(causal, KINDS[kind], dtype)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_of_zeros_have_lengths_that_can_be_divided_by(causal, dtype):
    """As pruned models have: DoRA divides by the length of each row."""
    plain, model = (PolicyModel(load_causal(causal, torch_dtype(dtype)), temperature=1.0) for _ in range(2))
    for each in (plain, model):
        each.pretrained.model.layers[0].self_attn.q_proj.weight.data[:2] = 0.0
    adapted(model, KINDS["dora"])
    assert torch.equal(probed(plain), probed(model))
    probed(model).float().sum().backward()
    layer = model.pretrained.model.layers[0].self_attn.q_proj
    assert all(torch.isfinite(parameter.grad).all() for parameter in layer.adapters.parameters())
    assert torch.equal(layer.adapters.default.merged(layer.weight)[:2], torch.zeros(2, layer.weight.shape[1]))


def test_gradients_are_those_of_the_merged_weights(causal):
    """dL/dB = scale · dL/dW Aᵀ and dL/dA = scale · Bᵀ dL/dW."""
    model = policy(causal, KINDS["lora"])
    stirred(model.pretrained)
    probed(model).sum().backward()
    plain = load_causal(causal, torch.float32)
    layers = dict(adapted_layers(model.pretrained))
    for name, module in layers.items():
        plain.get_parameter(f"{name}.weight").data.copy_(module.adapters.default.merged(module.weight))
    plain = PolicyModel(plain, temperature=1.0)
    probed(plain).sum().backward()
    for name, module in layers.items():
        slope, adapter = plain.pretrained.get_parameter(f"{name}.weight").grad, module.adapters.default
        torch.testing.assert_close(adapter.B.grad, adapter.scale * slope @ adapter.A.T, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(adapter.A.grad, adapter.scale * adapter.B.T @ slope, rtol=1e-3, atol=1e-5)
    assert model.pretrained.get_input_embeddings().weight.grad is None


@pytest.mark.parametrize("family", ["Llama", "GPT-2", "Falcon", "Mixtral", "BLOOM", "Phi-3", "Falcon-H1"])
def test_the_layers_that_are_adapted_are_the_decoders_products(family):
    pretrained = tiny_model(family)
    model = PolicyModel(pretrained, temperature=1.0)
    layers, unused = linear_layers(model, partial(probed, model))
    found = {layer.name for layer in layers}
    assert not unused
    kinds = ("Linear", "Conv1D")
    named = {name for name, module in pretrained.named_modules() if type(module).__name__.endswith(kinds)}
    heads = {name for name, module in pretrained.named_modules() if module is pretrained.get_output_embeddings()}
    assert found == named - heads


def test_a_layer_that_is_bypassed_in_training_is_refused():
    pretrained = tiny_model("Llama")
    layer = pretrained.model.layers[1].mlp.down_proj
    layer.forward = lambda x: torch.nn.functional.linear(x, layer.weight)  # the adapter is not seen
    model = PolicyModel(pretrained, temperature=1.0)
    with pytest.raises(DataError, match=r"layers\.1\.mlp\.down_proj\.weight are read without calling their"):
        adapted(model, KINDS["lora"])


def test_layers_that_some_tokens_do_not_use_are_refused_unless_others_are_chosen():
    def model():
        pretrained = tiny_model("Llama")
        mlp = pretrained.model.layers[1].mlp
        mlp.forward = lambda hidden: hidden
        return PolicyModel(pretrained, temperature=1.0)

    with pytest.raises(DataError, match=r"3 layers such as model\.layers\.1\.mlp\.gate_proj were not used"):
        adapted(model(), KINDS["lora"])
    chosen = adapted(model(), LoraConfig(rank=2, targets=("q_proj",)))
    assert len(list(adapted_layers(chosen.pretrained))) == 2


def test_targets_choose_layers_and_an_unknown_one_is_refused(causal):
    model = policy(causal, LoraConfig(rank=2, targets=("q_proj", "down_proj")))
    names = [name.rpartition(".")[2] for name, _ in adapted_layers(model.pretrained)]
    assert names == ["q_proj", "down_proj"] * 2
    with pytest.raises(ConfigError, match=r"lora\.targets: lm_head names no linear layer .* It has down_proj, "):
        policy(causal, LoraConfig(rank=2, targets=("lm_head",)))


def test_an_adapters_start_follows_from_the_seed_and_its_name_alone(causal):
    def starts(config, seed):
        model = PolicyModel(load_causal(causal, torch.float32), temperature=1.0)
        torch.manual_seed(seed * 7 + config.rank)
        return {
            name: module.adapters.default.A
            for name, module in adapted_layers(adapted(model, config, seed=seed).pretrained)
        }

    all_layers, few = starts(LoraConfig(rank=4), 1), starts(LoraConfig(rank=4, targets=("q_proj",)), 1)
    assert few and all(torch.equal(all_layers[name], tensor) for name, tensor in few.items())
    other = starts(LoraConfig(rank=4), 2)
    assert not any(torch.equal(all_layers[name], other[name]) for name in other)


def interrupted_and_not(mine, causal, folder, cases):
    """Per case: (weights of 4 updates, weights of 2 + save + load + 2, bytes saved, weights at the start)."""
    found = {}
    for stage, dtype, kind in cases:
        place = folder / f"{stage}-{dtype}-{kind}"
        place.mkdir(exist_ok=True)
        straight = make(causal, KINDS[kind], stage, dtype)
        start = weights(straight)
        learn(straight, [0, 1])
        straight.save(place)
        learn(straight, [2, 3])
        resumed = make(causal, KINDS[kind], stage, dtype)
        resumed.load(place)
        learn(resumed, [2, 3])
        size = sum(file.stat().st_size for file in place.rglob("*.pt"))
        found[stage, dtype, kind] = (weights(straight), weights(resumed), size, start)
    return found


CASES = [(stage, "float32", "lora") for stage in (0, 1, 2, 3)]
CASES += [(0, "bfloat16", "lora"), (1, "bfloat16", "lora"), (3, "bfloat16", "dora"), (1, "float32", "dora")]


@pytest.fixture(scope="module")
def measured(causal, tmp_path_factory):
    return by_world(interrupted_and_not, tmp_path_factory, causal, CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
@pytest.mark.parametrize("world", ["one", "two"])
def test_steps_after_a_reload_equal_bit_for_bit_and_only_adapters_are_saved(measured, world, case):
    straight, resumed, size, start = measured[world][case]
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    changed = {name for name in straight if not torch.equal(straight[name], start[name])}
    assert changed and all(name.endswith("_proj.weight") for name in changed)
    assert size < 0.8 * sum(tensor.nbytes for tensor in straight.values())


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("world", ["one", "two"])
def test_all_stages_learn_the_same(measured, world, stage):
    expected, *_ = measured["one"][0, "float32", "lora"]
    found, *_ = measured[world][stage, "float32", "lora"]
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4)


def test_the_optimizer_holds_adapters_only(causal):
    distributed.join(group())
    learner = make(causal, KINDS["lora"], 0)
    learn(learner, [0])
    held = {id(parameter) for g in learner._engine.optimizer.param_groups for parameter in g["params"]}
    adapters = {id(p) for _, module in adapted_layers(learner._pretrained) for p in module.adapters.parameters()}
    assert held == adapters
    assert all((p.grad is None) or p.requires_grad for p in learner._pretrained.parameters())


def test_a_checkpoint_of_another_rank_is_refused_by_name(causal, tmp_path):
    distributed.join(group())
    make(causal, KINDS["lora"], 1).save(tmp_path)
    with pytest.raises(StorageError, match=r"lora=LoRA of rank 4, scale 2, on all layers \(now LoRA of rank 8"):
        make(causal, LoraConfig(rank=8), 1).load(tmp_path)
    with pytest.raises(StorageError, match=r"\(now off\)"):
        make(causal, LoraConfig(), 1).load(tmp_path)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_the_reference_is_the_policy_without_its_adapters(causal, stage):
    """Also between learning steps, whose layers ZeRO-3 remembers in order."""
    distributed.join(group())
    learner = make(causal, KINDS["lora"], stage)
    rows = TokenRows.of_table(rollout())
    micro = rows.pack(list(range(rows.num_rows)), torch.device("cpu"))
    plain = PolicyModel(load_causal(causal, torch.float32), temperature=1.0)
    with torch.no_grad():
        expected = plain(micro)[0]
    for step in range(2):
        learn(learner, [step])
        assert torch.equal(learner.pass_through_trunk(micro)[0], expected)
        assert not torch.equal(learner.pass_through(micro)[0], expected)


def test_gradient_checkpointing_changes_nothing(causal):
    distributed.join(group())
    plain, checkpointed = (make(causal, KINDS["lora"], 0, gradient_checkpointing=on) for on in (False, True))
    learn(plain, [0, 1]), learn(checkpointed, [0, 1])
    first, second = weights(plain), weights(checkpointed)
    assert all(torch.allclose(first[name], second[name], rtol=1e-4, atol=1e-6) for name in first)


def test_a_scalar_head_learns_beside_adapters_and_is_exported_with_them(tmp_path):
    distributed.join(group())
    folder = tiny_scorer(tmp_path / "scorer")
    scorer = load_scorer(folder, torch.float32)
    settings = LEARNER.model_copy(update={"zero_stage": 1, "lora": KINDS["lora"]})
    learner = Learner(ValueModel(scorer), settings, dtype="float32", total_optimizer_steps=4)
    assert [name for name, p in scorer.named_parameters() if p.requires_grad and ".adapters." not in name] == [
        "score.weight"
    ]
    stirred(scorer)
    scorer.score.weight.data.add_(0.1)
    learner.export(tmp_path / "export", load_tokenizer(folder))
    with torch.no_grad():
        expected = scorer(input_ids=PROMPT).logits
        merged = load_scorer(tmp_path / "export", torch.float32)(input_ids=PROMPT).logits
        base = load_scorer(folder, torch.float32)
        by_peft = PeftModel.from_pretrained(base, str(tmp_path / "export" / "adapter"))(input_ids=PROMPT).logits
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(by_peft, expected, rtol=1e-4, atol=1e-4)


def both_learn(mine, causal, folder, cases):
    """Per case: what a policy and a critic on one trunk have learned after two steps, and after a reload and two more;
    and a policy and a critic with models of their own."""
    found = {}
    for stage, dtype in cases:
        more = {"zero_stage": stage, "lora": KINDS["lora"], "learning_rate": 1e-2}
        sections = PolicyConfig(**more), CriticConfig(**more)
        inputs = context(causal, Ppo(minibatches=1), dtype=dtype, seed=1, total_optimizer_steps=8)
        shared = PolicyWorker(sections[0], inputs, mine, critic=sections[1])
        apart = PolicyWorker(sections[0], inputs, mine), CriticWorker(sections[1], inputs, mine)
        seen = [both_step(shared, shared.critic, step) for step in range(2)]
        expected = [both_step(*apart, step) for step in range(2)]
        for role, worker in (("policy", shared), ("critic", shared.critic)):
            place = folder / f"{stage}-{dtype}-{role}"
            place.mkdir(exist_ok=True)
            worker.save(place)
        again = PolicyWorker(sections[0], inputs, mine, critic=sections[1])
        again.critic_load(folder / f"{stage}-{dtype}-critic")
        again.load(folder / f"{stage}-{dtype}-policy")
        longer = [[both_step(worker, worker.critic, step) for step in (2, 3)] for worker in (shared, again)]
        reference = shared.reference_logprobs(rollout())["logprobs"].to_pylist()
        alone = ReferenceWorker(ReferenceConfig(micro_batch_tokens=2048), inputs, mine)
        separate = alone.logprobs(rollout())["logprobs"].to_pylist()
        assert shared.critic.learner._pretrained.model is shared.learner._pretrained.model
        found[stage, dtype] = (seen, expected, longer, reference, separate)
    return found


def both_step(policy, critic, step):
    """Critic and policy in turns: (values, log-probs, metrics)."""
    table, job = experience(seed=step), LearnJob(step, 0.0, 1.0, 0.0, seed=1)
    values, logprobs = critic.values(rollout()), policy.logprobs(rollout())
    metrics = policy.learn([table], job), critic.learn([table], job)
    return values["values"].to_pylist(), logprobs["logprobs"].to_pylist(), metrics


TRUNKS = [(0, "float32"), (1, "float32"), (1, "bfloat16"), (2, "bfloat16")]


@pytest.fixture(scope="module")
def on_trunk(causal, tmp_path_factory):
    return by_world(both_learn, tmp_path_factory, causal, TRUNKS)


@pytest.mark.parametrize("case", TRUNKS, ids=lambda case: "-".join(map(str, case)))
@pytest.mark.parametrize("world", ["one", "two"])
def test_policy_and_critic_on_one_trunk_learn_as_two_models_do(on_trunk, world, case):
    """Bit for bit, in turns and after a reload; the trunk stays as it was."""
    seen, expected, longer, reference, expected_reference = on_trunk[world][case]
    assert seen == expected
    assert seen[0][0] != seen[1][0] and seen[0][1] != seen[1][1]
    assert longer[0] == longer[1]
    assert reference == expected_reference
