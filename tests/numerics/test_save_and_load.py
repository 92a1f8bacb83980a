"""A loaded learner continues exactly like the saved one, bit for bit."""

import dataclasses
import os

import pytest
import torch
from transformers import GenerationConfig

from actors.learning import distributed
from actors.learning.heads import PolicyModel
from actors.learning.learner import Learner
from actors.learning.objectives.objective import LearnJob
from actors.learning.objectives.table import objective_of
from actors.learning.packing import TokenRows
from actors.models.model import load_causal, torch_dtype
from actors.roles.critic import CriticWorker
from actors.roles.policy import PolicyWorker
from actors.text.conversations import load_chat
from actors.text.tokenizing import load_tokenizer
from orchestrator.algorithms.ppo import Ppo
from orchestrator.config.sections import CriticConfig, LearnerConfig, PolicyConfig
from orchestrator.errors import NonFiniteError, StorageError
from orchestrator.planning.balance import plan_minibatches
from tests.chaos.test_storage import fill, small_disk  # noqa: F401  a fixture
from tests.numerics.ranks import by_world, context, group
from tests.numerics.samples import experience, rollout, rows_of
from tests.tiny import CHATML, tiny_llama, tiny_scorer, tiny_tokenizer

PPO = Ppo()
CONFIG = LearnerConfig(learning_rate=1e-3, schedule="cosine", warmup_optimizer_steps=2, weight_decay=0.01)
COLUMNS = ("old_logprobs", "ref_logprobs", "engine_logprobs", "advantages")
CASES = [(stage, dtype) for stage in (0, 1, 2, 3) for dtype in ("bfloat16", "float32")]


def make(causal, stage, dtype):
    model = PolicyModel(load_causal(causal, torch_dtype(dtype)), temperature=1.0)
    return Learner(model, CONFIG.model_copy(update={"zero_stage": stage}), dtype=dtype, total_optimizer_steps=8)


def learn(learner, steps):
    """Makes the updates `steps`, each on different samples; returns the learning rates."""
    rates = []
    for step in steps:
        rows = TokenRows.of_table(experience(seed=step), COLUMNS)
        job = LearnJob(step, 0.0, 1.0, 0.0, seed=1)
        plan = plan_minibatches(
            rows.lengths, num_minibatches=1, num_ranks=learner.world_size, micro_batch_tokens=60, seed=(1, step)
        )
        micros = [rows.pack(micro, learner.device) for micro in plan[0][learner.rank]]
        update = learner.update(
            micros,
            lambda output, micro, job=job: objective_of(PPO).policy_terms(*output, rows_of(micro), job),
            count=float(rows.response_lengths.sum()),
            what=f"step {step}",
        )
        rates.append(update.learning_rate)
    return rates


def weights(learner):
    return {name: tensor.clone() for name, tensor in learner.full_weights(torch.float32)}


def interrupted_and_not(mine, causal, folder, cases):
    """Per case: (weights of 4 updates, weights of 2 + save + load + 2, learning rates of both)."""
    found = {}
    for stage, dtype in cases:
        place = folder / f"{stage}-{dtype}"
        place.mkdir(exist_ok=True)
        straight = make(causal, stage, dtype)
        rates = learn(straight, [0, 1])
        straight.save(place)
        rates += learn(straight, [2, 3])
        resumed = make(causal, stage, dtype)
        resumed.load(place)
        resumed_rates = learn(resumed, [2, 3])
        found[stage, dtype] = (weights(straight), weights(resumed), rates, resumed_rates)
    return found


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("causal"))


@pytest.fixture(scope="module")
def measured(causal, tmp_path_factory):
    of_two = [(stage, "bfloat16") for stage in range(4)]
    return by_world(interrupted_and_not, tmp_path_factory, causal, CASES, of_two=of_two)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("world", "dtype"), [("one", "bfloat16"), ("one", "float32"), ("two", "bfloat16")])
def test_steps_after_a_reload_equal_bit_for_bit(measured, world, stage, dtype):
    straight, resumed, rates, resumed_rates = measured[world][stage, dtype]
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert resumed_rates == rates[2:]
    assert len(set(rates)) == 4, "the schedule must change, so that its position is visible"


@pytest.mark.parametrize("max_grad_norm", [0.01, 1e3])
def test_a_single_rank_in_fp32_computes_the_bits_of_zero_without_it(causal, monkeypatch, max_grad_norm):
    monkeypatch.setitem(globals(), "CONFIG", CONFIG.model_copy(update={"max_grad_norm": max_grad_norm}))
    distributed.join(group())
    plain = make(causal, 1, "float32")
    monkeypatch.setattr("actors.learning.learner.effective_zero_stage", lambda stage, **_: stage)
    zero = make(causal, 1, "float32")
    assert type(plain._engine.optimizer) is torch.optim.AdamW and type(zero._engine.optimizer) is not torch.optim.AdamW
    rates = [learn(learner, range(3)) for learner in (plain, zero)]
    assert rates[0] == rates[1]
    expected = dict(zero.full_weights())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in plain.full_weights())


def test_another_shape_is_refused_by_name(causal, tmp_path):
    distributed.join(group())
    make(causal, 1, "bfloat16").save(tmp_path)
    with pytest.raises(StorageError, match=r"zero_stage=1 \(now 2\)"):
        make(causal, 2, "bfloat16").load(tmp_path)
    with pytest.raises(StorageError, match=r"dtype=bfloat16 \(now float32\)"):
        make(causal, 1, "float32").load(tmp_path)
    with pytest.raises(StorageError, match="no complete learner checkpoint"):
        make(causal, 1, "bfloat16").load(tmp_path / "nothing")


class _Attack:
    """A pickle that makes a call with arguments when it is loaded."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("file", ["model_states", "optim_states"])
def test_a_checkpoint_that_names_code_is_not_loaded(causal, tmp_path, stage, file):
    distributed.join(group())
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    make(causal, stage, "bfloat16").save(folder)
    (path,) = (path for path in folder.rglob("*.pt") if file in path.name)
    content = torch.load(path, weights_only=False)
    torch.save({**content, "more": _Attack(tmp_path / "owned")}, path)
    with pytest.raises(StorageError, match=rf"{path.name} holds more than weights"):
        make(causal, stage, "bfloat16").load(folder)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_nothing_is_applied_when_a_loss_or_a_gradient_is_not_finite(causal, stage, dtype, poison):
    distributed.join(group())
    learner = make(causal, stage, dtype)
    before = weights(learner)
    rows = TokenRows.of_table(experience(), COLUMNS)
    micros = [rows.pack([0, 1], torch.device("cpu")), rows.pack([2, 3], torch.device("cpu"))]

    def objective(output, micro):
        terms = objective_of(PPO).policy_terms(*output, rows_of(micro), LearnJob(7, 0.0, 1.0, 0.0, seed=1))
        if micro.rows != (2, 3):
            return terms
        # The gradient of the square root is infinite at 0, although its value is finite.
        bad = float("nan") * output[0].sum() if poison == "loss" else (output[0].sum() * 0.0).sqrt()
        return dataclasses.replace(terms, loss=terms.loss + bad)

    named = r"step 7.*rows \[2, 3\]" if poison == "loss" else "step 7.*gradient norm"
    with pytest.raises(NonFiniteError, match=named):
        learner.update(micros, objective, count=1.0, what="step 7")
    after = weights(learner)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("stage", [1, 3])
def test_an_export_is_an_ordinary_folder(causal, tmp_path, stage):
    distributed.join(group())
    learner = make(causal, stage, "bfloat16")
    learn(learner, [0])
    learner.export(tmp_path, load_tokenizer(causal))
    exported = dict(load_causal(tmp_path, torch.bfloat16).named_parameters())
    published = dict(learner.full_weights())
    assert exported.keys() == published.keys()
    assert all(torch.equal(exported[name], published[name]) for name in published)
    assert load_tokenizer(tmp_path).chat_template == load_tokenizer(causal).chat_template
    assert (tmp_path / "generation_config.json").is_file()


@pytest.mark.parametrize("stage", [0, 3])
def test_weights_that_are_lent_are_the_learners_own_unless_they_are_partitioned(causal, stage):
    distributed.join(group())
    learner = make(causal, stage, "float32")
    learn(learner, [0])
    expected = dict(learner.full_weights())
    own = {parameter.data_ptr() for parameter in learner._pretrained.parameters()}
    for name, tensor in learner.full_weights(lends=True):
        assert torch.equal(tensor, expected.pop(name))
        assert (tensor.data_ptr() in own) == (stage == 0)
    assert not expected


def test_an_export_is_asked_and_stops_as_the_policy_was(tmp_path):
    """A base model without a template, whose EOS is not the template's closing."""
    base = tiny_llama(tmp_path / "base")
    bare = tiny_tokenizer(eos_token="</s>")
    bare.chat_template = None
    bare.save_pretrained(base)
    (base / "chat_template.jinja").unlink()
    (base / "generation_config.json").unlink()
    template = CHATML.replace("<|im_start|>", "<s>")
    policy = PolicyWorker(PolicyConfig(zero_stage=0), context(base, PPO, dtype="float32", template=template), group())
    policy.export(tmp_path / "export")
    asked = load_chat(base, template=template)
    exported = load_chat(tmp_path / "export")
    assert exported.fingerprint == asked.fingerprint and exported.stops == asked.stops == (0, 3)
    assert GenerationConfig.from_pretrained(tmp_path / "export").eos_token_id == [0, 3]


def test_the_critic_learns_its_returns(tmp_path):
    ppo = Ppo(epochs=30, clip_value=None)
    section = CriticConfig(path=str(tiny_scorer(tmp_path)), learning_rate=3e-3)
    critic = CriticWorker(section, context(tmp_path, ppo, dtype="float32"), group())
    table = critic.values(rollout())
    assert [len(values) for values in table["values"].to_pylist()] == [row[1] for row in _lengths()]
    first = critic.learn([experience()], LearnJob(0, 0.0, 1.0, 0.0, seed=1))
    second = critic.learn([experience()], LearnJob(1, 0.0, 1.0, 0.0, seed=1))
    assert second["loss"] < 0.5 * first["loss"]


def _lengths():
    return [
        (len(p), len(r))
        for p, r in zip(*(rollout()[n].to_pylist() for n in ("prompt_tokens", "response_tokens")), strict=True)
    ]


def test_a_full_disk_is_told_as_one(causal, small_disk):  # noqa: F811
    distributed.join(group())
    learner = make(causal, 1, "bfloat16")
    filler = fill(small_disk)
    os.truncate(filler, filler.stat().st_size - 65536)
    with pytest.raises(StorageError, match=rf"{small_disk}\S* can't be written \(.*MiB are free"):
        learner.save(small_disk / "step")
