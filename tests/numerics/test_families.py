"""Models of many architectures: log-probs, gradients and scores equal the model's and are deterministic, and the
export equals the model."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from actors.learning import distributed
from actors.learning.heads import OwnLogProbs, PolicyModel, TokenLogProbs, probed
from actors.learning.learner import Learner
from actors.learning.objectives.losses import LossTerms
from actors.learning.packing import token_rows
from actors.models.model import load_causal, torch_dtype
from actors.models.proofs import require_steady
from actors.text.tokenizing import load_tokenizer
from orchestrator.config.sections import LearnerConfig
from orchestrator.errors import DataError, StorageError
from tests.families import FAMILIES, tiny_folder
from tests.numerics.ranks import group, run_ranks

PROMPTS, RESPONSES = [[5, 6, 7], [9]], [[10, 11, 12], [13, 14, 15, 16]]
TEMPERATURE = 0.7
# Logits of these are scaled, capped or biased.
OWN_HEADS = ("Gemma 2", "Phi", "GPT-J", "Cohere", "Cohere 2", "Granite", "Falcon-H1", "RecurrentGemma")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(name):
        if name not in made:
            made[name] = tiny_folder(name, tmp_path_factory.mktemp("model"))
        return made[name]

    return folder


def own(folder):
    """transformers' log-probs, one row at a time, and their gradient."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        logits = model(torch.tensor([prompt + response]), use_cache=False).logits[0] / TEMPERATURE
        found.append(logits[len(prompt) - 1 : -1].log_softmax(-1)[range(len(response)), response])
    return torch.cat(found), gradient(model, torch.cat(found))


def gradient(model, logprobs):
    (logprobs * torch.linspace(-1, 1, len(logprobs))).sum().backward()
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", FAMILIES)
def test_logprobs_and_gradients_are_the_models_own(folders, name):
    model = PolicyModel(load_causal(folders(name), torch.float32), temperature=TEMPERATURE, chunk=3)
    assert isinstance(model.head, OwnLogProbs if name in OWN_HEADS else TokenLogProbs)
    model.checkpoint_gradients()
    require_steady(model, lambda: probed(model))
    model.train()
    logprobs, _ = model(token_rows(PROMPTS, RESPONSES).pack([0, 1], torch.device("cpu")))
    expected, expected_gradient = own(folders(name))
    torch.testing.assert_close(logprobs, expected, rtol=1e-4, atol=1e-5)
    difference = gradient(model.pretrained, logprobs) - expected_gradient
    assert difference.norm() < 1e-4 * expected_gradient.norm()


def learner(folder, dtype="float32", stage=1):
    distributed.join(group())
    config = LearnerConfig(zero_stage=stage, learning_rate=1e-3)
    model = PolicyModel(load_causal(folder, torch_dtype(dtype)), temperature=TEMPERATURE)
    return Learner(model, config, dtype=dtype, total_optimizer_steps=1)


def learn(learner):
    micro = token_rows(PROMPTS, RESPONSES).pack([0, 1], torch.device("cpu"))
    learner.update([micro], lambda output, micro: LossTerms(output[0].sum(), {}, {}), count=7.0, what="test")


# Some with saved buffers, some whose weights differ in layout between transformers and its files, and others.
EXPORTED = (
    "GLM-4-MoE",
    "DeepSeek-V3",
    "Apertus",
    "Mixtral",
    "Qwen3-MoE",
    "OPT",
    "Gemma 2",
    "GPT-2",
    "Falcon-H1",
    "BLOOM",
)


@pytest.mark.parametrize("name", EXPORTED)
def test_an_export_says_what_the_learner_says(folders, tmp_path, name):
    policy = learner(folders(name))
    learn(policy)
    policy.export(tmp_path / "export", load_tokenizer(folders(name)))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32).eval()
    before = AutoModelForCausalLM.from_pretrained(folders(name), dtype=torch.float32).eval()
    tokens = torch.tensor([PROMPTS[0] + RESPONSES[0]])
    with torch.no_grad():
        says, said = (model(tokens, use_cache=False).logits[0] for model in (exported, before))
        micro = token_rows(PROMPTS[:1], RESPONSES[:1]).pack([0], torch.device("cpu"))
        expected, _ = policy.pass_through(micro)
    logprobs = (says / TEMPERATURE).log_softmax(-1)[range(2, 5), RESPONSES[0]]
    torch.testing.assert_close(logprobs, expected, rtol=1e-4, atol=1e-5)
    assert (says - said).abs().max() > 1e-3, "it must have learned for this test to be meaningful"
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def weights_after_a_step(mine, folders, stage, checkpointing):
    config = LearnerConfig(zero_stage=stage, learning_rate=1e-3, gradient_checkpointing=checkpointing)
    found = []
    for folder in folders:
        model = PolicyModel(load_causal(folder, torch.float32), temperature=TEMPERATURE, chunk=2)
        policy = Learner(model, config, dtype="float32", total_optimizer_steps=1)
        learn(policy)
        found.append({name: tensor.clone() for name, tensor in policy.full_weights()})
    return found


def test_an_own_head_learns_the_same_when_it_is_sharded(folders):
    distributed.join(group())
    models = [folders("Gemma 2"), folders("Phi")]
    alone = weights_after_a_step(group(), models, 0, False)
    first_rank, second_rank = run_ranks(weights_after_a_step, 2, models, 3, True)
    for folder, plain, one, other in zip(models, alone, first_rank, second_rank, strict=True):
        before = dict(load_causal(folder, torch.float32).named_parameters())
        assert max((plain[key] - before[key]).abs().max() for key in plain) > 5e-4
        # Adam's first step is the gradient's sign, which is arbitrary for gradients that are only rounding errors.
        differ = sum(int(((one[key] - plain[key]).abs() > 1e-5).sum()) for key in plain)
        assert differ < 1e-3 * sum(tensor.numel() for tensor in plain.values())
        assert all(torch.equal(one[key], other[key]) for key in plain)


DROPOUTS = {
    "OPT": {"dropout": 0.3, "attention_dropout": 0.3, "layerdrop": 0.5},
    "BLOOM": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
    "Falcon": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
    "Persimmon": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
    "GPT-BigCode": {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3},
    "StarCoder2": {"residual_dropout": 0.3, "embedding_dropout": 0.3, "attention_dropout": 0.3},
    "GPT-2": {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3},
}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("name", DROPOUTS)
def test_learning_computes_what_scoring_computes_whatever_drops_out(folders, tmp_path, name, checkpointing):
    config = json.loads((folders(name) / "config.json").read_text())
    shutil.copytree(folders(name), tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps(config | DROPOUTS[name]))
    model = PolicyModel(load_causal(tmp_path, torch.float32), temperature=1.0)
    forwards = []
    if checkpointing:
        model.checkpoint_gradients()
        layer = next(
            module
            for module in model.modules()
            if getattr(module, "gradient_checkpointing", False) is True
            and isinstance(module, GradientCheckpointingLayer)
        )
        layer.register_forward_pre_hook(lambda *_: forwards.append(1))
    scored = probed(model.eval()).detach()
    forwards.clear()
    learned = probed(model.train())
    learned.sum().backward()
    assert torch.equal(learned, scored)
    assert len(forwards) == (2 if checkpointing else 0), "a layer that recomputes runs again in backward"
    assert {key: getattr(model.pretrained.config, key) for key in DROPOUTS[name]} == DROPOUTS[name]


class AlwaysDrops(torch.nn.Module):
    """Randomness that no flag disables."""

    def forward(self, hidden):
        return torch.nn.functional.dropout(hidden, 0.2, training=True)


def test_chance_that_stays_is_refused_by_name(folders):
    model = PolicyModel(load_causal(folders("Llama"), torch.float32), temperature=1.0)
    model.pretrained.model.layers[1].mlp.act_fn = torch.nn.Sequential(torch.nn.SiLU(), AlwaysDrops())
    with pytest.raises(DataError, match=r"layers\.1\.mlp\.act_fn\.1, a AlwaysDrops"):
        require_steady(model, lambda: probed(model))


class RareDrops(torch.nn.Module):
    """Rare randomness: most pairs of forwards are equal."""

    def forward(self, hidden):
        return hidden * 1.1 if torch.rand(()) < 0.5 else hidden


def test_chance_that_seldom_shows_is_looked_for_longer(folders):
    refused = 0
    for seed in range(10):
        model = PolicyModel(load_causal(folders("Llama"), torch.float32), temperature=1.0)
        model.pretrained.model.layers[1].mlp.act_fn = torch.nn.Sequential(torch.nn.SiLU(), RareDrops())
        torch.manual_seed(seed)
        try:
            require_steady(model, lambda model=model: probed(model))
        except DataError:
            refused += 1
    assert refused >= 9


class Scaled(torch.nn.Module):
    """An unknown head."""

    def __init__(self, head):
        super().__init__()
        self.weight, self.head = head.weight, head

    def forward(self, hidden):
        return self.head(hidden) * 1.5


def test_a_head_that_nobody_knows_is_taken_as_it_is(folders):
    language_model = load_causal(folders("Llama"), torch.float32)
    language_model.lm_head = Scaled(language_model.lm_head)
    model = PolicyModel(language_model, temperature=1.0)
    assert isinstance(model.head, OwnLogProbs)
    with torch.no_grad():
        logits = language_model(torch.tensor([[5, 6, 7, 8]])).logits[0]
    torch.testing.assert_close(probed(model), logits.log_softmax(-1)[[1, 2], [7, 8]], rtol=1e-5, atol=1e-5)


def test_logits_that_are_no_function_of_hidden_states_are_refused(folders):
    language_model = load_causal(folders("Llama"), torch.float32)
    embeddings, forward = language_model.get_input_embeddings(), language_model.forward

    def remembers_inputs(input_ids, **options):
        output = forward(input_ids=input_ids, **options)
        output.logits = output.logits + embeddings(input_ids) @ embeddings.weight.T
        return output

    language_model.forward = remembers_inputs
    with pytest.raises(DataError, match="not a function of its decoder's last hidden states"):
        PolicyModel(language_model, temperature=1.0)


def test_a_model_that_sees_later_tokens_is_refused(tmp_path):
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="depends on the tokens behind it"):
        PolicyModel(load_causal(tmp_path, torch.float32), temperature=1.0)


GENERATION = {
    "temperature without do_sample": {"temperature": 0.3},
    "beams": {"num_beams": 1, "early_stopping": True, "length_penalty": 0.6},
    "typical_p": {"typical_p": 0.5, "do_sample": False},
    "top_k without do_sample": {"top_k": 7, "top_p": 0.3},
}


@pytest.mark.parametrize("case", GENERATION)
def test_an_export_keeps_the_generation_config_that_came_with_the_model(folders, tmp_path, case):
    shutil.copytree(folders("Llama"), tmp_path / "source")
    written = tmp_path / "source" / "generation_config.json"
    written.write_text(json.dumps({"eos_token_id": [0, 3]} | GENERATION[case]))
    policy = learner(tmp_path / "source")
    policy.export(tmp_path / "export", load_tokenizer(tmp_path / "source"))
    assert (tmp_path / "export" / "generation_config.json").read_text() == written.read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "export").generation_config.eos_token_id == [0, 3]


def test_an_export_that_fails_leaves_the_one_before(folders, tmp_path, monkeypatch):
    policy = learner(folders("Llama"))
    tokenizer = load_tokenizer(folders("Llama"))
    policy.export(tmp_path / "export", tokenizer)
    before = {path.name: path.read_bytes() for path in (tmp_path / "export").iterdir()}
    learn(policy)
    monkeypatch.setattr(
        tokenizer, "save_pretrained", lambda folder: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    with pytest.raises(StorageError, match="No space left"):
        policy.export(tmp_path / "export", tokenizer)
    assert {path.name: path.read_bytes() for path in (tmp_path / "export").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_an_export_that_lost_something_is_not_called_done(folders, tmp_path, monkeypatch):
    policy = learner(folders("GLM-4-MoE"))
    lost = [name for name, _ in policy.full_weights() if name.endswith("e_score_correction_bias")]
    assert lost
    monkeypatch.setattr(policy._pretrained, "_keys_to_ignore_on_save", lost)
    with pytest.raises(StorageError, match="can't be read back as it was learned.*e_score_correction_bias"):
        policy.export(tmp_path / "export", load_tokenizer(folders("GLM-4-MoE")))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", [1, 3])
def test_a_checkpoint_brings_buffers_back(folders, tmp_path, stage):
    """They are not learned, but a model folder of the same name may have changed."""
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    policy = learner(folders("GLM-4-MoE"), stage=stage)
    policy._pretrained.get_buffer(name).add_(1.0)
    policy.save(tmp_path)
    again = learner(folders("GLM-4-MoE"), stage=stage)
    again.load(tmp_path)
    saved, loaded = (dict(one.full_weights())[name] for one in (policy, again))
    assert torch.equal(saved, loaded)
    assert not torch.equal(saved, dict(load_causal(folders("GLM-4-MoE"), torch.float32).named_buffers())[name])
