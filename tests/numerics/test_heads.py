"""Log-probs, entropies and values equal those of transformers' forward; packing uses lengths."""

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from actors.learning.heads import PolicyModel, TokenLogProbs, ValueModel, states_at
from actors.learning.packing import TokenRows, token_rows
from actors.models.model import load_causal, load_scorer
from actors.models.reward_heads import HEADS_ENTRY, num_heads
from orchestrator.errors import DataError
from tests.tiny import tiny_llama, tiny_scorer

CPU = torch.device("cpu")
# The tiny tokenizer's pad and EOS token is 0: prompts and responses contain it in the middle and at the end.
PROMPTS = [[5, 6, 0, 7], [9], [11, 12, 13]]
RESPONSES = [[0, 8, 0], [10, 0, 0, 0, 3], [14]]


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("causal"), tied=True)


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    return tiny_scorer(tmp_path_factory.mktemp("scorer"))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [2, 100])
def test_logprobs_and_entropy_equal_a_plain_forward_of_each_row(causal, temperature, chunk):
    model = PolicyModel(load_causal(causal, torch.float32), temperature=temperature, chunk=chunk)
    with torch.no_grad():
        logprobs, entropy = model(token_rows(PROMPTS, RESPONSES).pack([0, 1, 2], CPU))
    plain = AutoModelForCausalLM.from_pretrained(causal)
    expected_logprobs, expected_entropy = [], []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        with torch.no_grad():
            logits = plain(torch.tensor([prompt + response])).logits[0] / temperature
        log_p = logits[len(prompt) - 1 : -1].log_softmax(-1)
        expected_logprobs += [row[token] for row, token in zip(log_p, response, strict=True)]
        expected_entropy += [-(row.exp() * row).sum() for row in log_p]
    torch.testing.assert_close(logprobs, torch.stack(expected_logprobs), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, torch.stack(expected_entropy), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [3, 64])
def test_gradients_of_logprobs_and_entropy_equal_autograds(chunk):
    torch.manual_seed(0)
    hidden, matrix = torch.randn(7, 5), torch.randn(11, 5)
    targets, factors = torch.randint(11, (7,)), torch.randn(2, 7)
    gradients = []
    for kind in (torch.float32, torch.float64):
        x, weight = hidden.to(kind, copy=True).requires_grad_(), torch.nn.Parameter(matrix.to(kind, copy=True))
        if kind == torch.float32:
            logprobs, entropy = TokenLogProbs(weight, temperature=0.7, chunk=chunk)(x, targets)
        else:
            log_p = (x @ weight.T / 0.7).log_softmax(-1)
            logprobs, entropy = log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
        (factors[0] * logprobs.exp() + factors[1] * entropy).sum().backward()
        gradients.append((x.grad.double(), weight.grad.double()))
    for ours, autograds in zip(*gradients, strict=True):
        assert (ours - autograds).norm() / autograds.norm() < 1e-5


def test_values_are_those_of_the_states_in_which_tokens_are_chosen(scorer):
    loaded = load_scorer(scorer, torch.float32)
    rows = token_rows(PROMPTS, RESPONSES)
    with torch.no_grad():
        values, last = ValueModel(loaded)(rows.pack([2, 0, 1], CPU))
        expected, expected_last = [], []
        for row in (2, 0, 1):
            hidden = loaded.model(torch.tensor([PROMPTS[row] + RESPONSES[row]])).last_hidden_state[0]
            per_position = loaded.score(hidden)[:, 0]
            expected.append(per_position[len(PROMPTS[row]) - 1 : -1])
            expected_last.append(per_position[-1])
    torch.testing.assert_close(values, torch.cat(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, torch.stack(expected_last), rtol=1e-5, atol=1e-5)


def test_what_stands_in_the_padding_changes_nothing(causal):
    model = PolicyModel(load_causal(causal, torch.float32), temperature=1.0)
    micro = token_rows(PROMPTS, RESPONSES).pack([0, 1, 2], CPU)
    with torch.no_grad():
        before = model(micro)[0]
        for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
            micro.input_ids_BT[i, len(prompt) + len(response) :] = 99
        torch.testing.assert_close(model(micro)[0], before, rtol=0, atol=0)


def test_packing_reads_sliced_tables():
    kind = pa.list_(pa.int32())
    table = pa.table(
        {
            "prompt_tokens": pa.array(PROMPTS, kind),
            "response_tokens": pa.array(RESPONSES, kind),
            "values": pa.array([[1.0] * 3, [2.0] * 5, [3.0]], pa.list_(pa.float32())),
            "reward": pa.array([7.0, 8.0, 9.0], pa.float32()),
        }
    ).slice(1)
    micro = TokenRows.of_table(table, ["values", "reward"]).pack([1, 0], CPU)
    assert micro.input_ids_BT.tolist() == [[11, 12, 13, 14, 0, 0], [9, 10, 0, 0, 0, 3]]
    assert micro.targets_N.tolist() == [14, 10, 0, 0, 0, 3]
    assert micro.state_index_N.tolist() == [2, 6, 7, 8, 9, 10]
    assert micro.last_index_B.tolist() == [3, 11]
    assert micro.columns["values"].tolist() == [3.0] + [2.0] * 5
    assert micro.columns["reward"].tolist() == [9.0, 8.0]


def test_a_missing_head_is_refused_by_name_unless_asked_for(causal):
    with pytest.raises(DataError, match=r"score\.weight"):
        load_scorer(causal, torch.float32)
    assert load_scorer(causal, torch.float32, new_head="zero").score.weight.abs().max() == 0
    first, again, other = (
        load_scorer(causal, torch.float32, new_head="normal", seed=seed).score.weight for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert 0.5 < first.std() * 65**0.5 < 1.5


def test_every_new_head_has_its_own_start_and_the_first_is_that_of_one_head(causal):
    one, three = (load_scorer(causal, torch.float32, new_head="normal", seed=3, heads=n) for n in (1, 3))
    assert torch.equal(three.score.weight[0], one.score.weight[0])
    assert torch.corrcoef(three.score.weight).triu(1).abs().max() < 0.5
    assert three.config.num_labels == 3 and num_heads(three.config) == 3
    assert one.config.num_labels == 1 and HEADS_ENTRY not in one.config.to_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_head_of_several_is_their_mean(tmp_path, dtype):
    folder = tiny_scorer(tmp_path, heads=3)
    heads, folded = (load_scorer(folder, dtype, heads=n) for n in (None, 1))
    rows = token_rows(PROMPTS, RESPONSES).pack([0, 1, 2], CPU)
    with torch.no_grad():
        (values_NH, last_BH), (values_N, last_B) = (ValueModel(model)(rows) for model in (heads, folded))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(values_N, values_NH.mean(-1), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(last_B, last_BH.mean(-1), rtol=tolerance, atol=tolerance)
    assert folded.config.num_labels == 1 and num_heads(folded.config) == 1
    folded.save_pretrained(tmp_path / "folded")
    assert torch.equal(load_scorer(tmp_path / "folded", dtype).score.weight, folded.score.weight)


def test_more_heads_than_there_are_can_t_start(scorer, tmp_path):
    with pytest.raises(DataError, match=r"with 1 head, and reward_model\.heads=3\. Set reward_model\.heads=1"):
        load_scorer(scorer, torch.float32, new_head="normal", heads=3)
    with pytest.raises(DataError, match="with 3 heads"):
        load_scorer(tiny_scorer(tmp_path, heads=3), torch.float32, new_head="normal", heads=2)


def test_a_head_that_is_there_is_not_replaced(scorer):
    kept = load_scorer(scorer, torch.float32).score.weight
    assert torch.equal(load_scorer(scorer, torch.float32, new_head="zero").score.weight, kept)


def test_missing_tensors_of_a_causal_model_are_named(causal, tmp_path):
    tensors = load_file(causal / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    for path in causal.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"layers\.1\.mlp\.up_proj"):
        load_causal(tmp_path, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_that_are_taken_several_times_get_the_same_gradient_in_every_run(dtype):
    """Samples of a prompt share its last state. `x[index]` gave six gradients in six runs (fp32, two threads)."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, 2000, 576, generator=generator)
    index = torch.cat([torch.full((600,), 7), torch.randint(0, 2000, (1800,), generator=generator)])
    weights = torch.randn(len(index), 576, generator=generator)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        gradients = []
        for _ in range(6):
            leaf = states.to(dtype).clone().requires_grad_()
            taken = states_at(leaf, index)
            assert torch.equal(taken, leaf.detach().flatten(0, 1)[index])
            taken.backward(weights.to(dtype))
            gradients.append(leaf.grad)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)
    if dtype == torch.float32:  # bfloat16 rounds after each of 600 sums
        exact = torch.zeros(2000, 576, dtype=torch.float64).index_add_(0, index, weights.double())
        torch.testing.assert_close(gradients[0][0].double(), exact, atol=1e-3, rtol=0.0)
