"""A model cut to its first layers computes the same as the full model does in these layers."""

import pytest
import torch
from transformers import AutoConfig

from actors.models.depth import shallow
from actors.models.model import load_scorer
from actors.models.size import model_size
from orchestrator.errors import ConfigError
from tests.families import FAMILIES, tiny_folder


def first_layer(model):
    """The output of a model's first layer."""
    layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    found = []
    handle = layers[0].register_forward_hook(lambda module, inputs, output: found.append(output))
    model(torch.tensor([[5, 6, 7, 8]]), use_cache=False)
    handle.remove()
    return len(layers), found[0] if isinstance(found[0], torch.Tensor) else found[0][0]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_cut_model_is_the_start_of_the_whole_one(name, tmp_path):
    folder = tiny_folder(name, tmp_path / "model")
    if name == "Falcon-H1":
        pytest.skip("it is refused as a scorer: see test_a_buffer_that_nobody_writes_is_refused")
    whole = load_scorer(folder, torch.float32, new_head="zero")
    cut = load_scorer(folder, torch.float32, new_head="zero", layers=1)
    num_layers, expected = first_layer(whole)
    assert num_layers > 1
    kept, found = first_layer(cut)
    assert kept == 1
    assert torch.equal(found, expected)
    tensors = whole.state_dict()
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in cut.state_dict().items())
    assert cut.config.num_hidden_layers == 1
    assert model_size(folder, layers=1).num_layers == 1
    cut.save_pretrained(tmp_path / "saved")
    again = load_scorer(tmp_path / "saved", torch.float32)
    assert torch.equal(first_layer(again)[1], expected)


def test_more_layers_than_there_are_are_refused(tmp_path):
    folder = tiny_folder("Llama", tmp_path / "model")
    config = AutoConfig.from_pretrained(folder)
    assert shallow(config, None, folder) is config
    assert shallow(config, 2, folder).num_hidden_layers == 2
    with pytest.raises(ConfigError, match="layers=3, but .* has 2 layers: set 2 or less"):
        load_scorer(folder, torch.float32, new_head="zero", layers=3)
