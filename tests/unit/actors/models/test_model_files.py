"""Unusable model folders are refused by their headers alone, with a remedy."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from actors.models.files import read_config, read_headers, require_weights, window
from actors.models.miniature import prove_small
from actors.models.model import load_causal, load_scorer
from orchestrator.errors import DataError
from tests.families import FAMILIES, tiny_folder
from tests.tiny import tiny_llama, tiny_scorer

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 538090408\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def folder(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "model")
    return tmp_path / "model"


def weights(folder):
    return folder / "model.safetensors"


def require(folder, loader=AutoModelForCausalLM, **options):
    require_weights(folder, loader, read_config(folder), read_headers(folder), **options)


def rewrite(folder, change):
    tensors = load_file(weights(folder))
    save_file(change(tensors), weights(folder), metadata={"format": "pt"})


def shard(folder):
    """Two files and an index, as for large models."""
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="150KB")
    weights(folder).unlink(missing_ok=True)
    return sorted(folder.glob("model-*.safetensors"))


def test_a_whole_folder_is_accepted_also_in_shards(folder):
    require(folder)
    assert len(shard(folder)) > 1
    require(folder)


@pytest.mark.parametrize("content", ["pointer", "empty", "cut", "noise", "header only"])
@pytest.mark.parametrize("sharded", [False, True])
def test_weights_that_are_not_there_in_full_are_refused(folder, content, sharded):
    file = shard(folder)[-1] if sharded else weights(folder)
    old = file.read_bytes()
    new, said = {
        "pointer": (LFS, "Git-LFS pointer.*git lfs pull"),
        "empty": (b"", "is empty"),
        "cut": (old[: len(old) // 2], "cut off or damaged"),
        "noise": (b"\x93" * 5000, "cut off or damaged"),
        "header only": (old[: 8 + int.from_bytes(old[:8], "little")], "cut off or damaged"),
    }[content]
    file.write_bytes(new)
    with pytest.raises(DataError, match=rf"{file.name}.*{said}"):
        read_headers(folder)


def test_a_missing_shard_is_named(folder):
    gone = shard(folder)[0]
    gone.unlink()
    with pytest.raises(DataError, match=rf"{gone.name} is missing"):
        read_headers(folder)


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": null}', '{"weight_map": {"a": 3}}', LFS.decode()])
def test_an_index_that_is_none_is_refused(folder, index):
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(DataError, match=r"index\.json"):
        read_headers(folder)


@pytest.mark.parametrize("other", ["pytorch_model.bin", "consolidated.pth", "model.gguf"])
def test_only_safetensors_are_weights(folder, other):
    weights(folder).rename(folder / other)
    with pytest.raises(DataError, match=rf"no model\.safetensors.*{other}.*save_pretrained"):
        read_headers(folder)


def renamed(tensors):
    tensors["model.layers.1.mlp.other.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    return tensors


CHANGES = {
    "missing": (renamed, r"lacks 1 tensors.*layers\.1\.mlp\.up_proj"),
    "another shape": (
        lambda tensors: tensors | {"model.norm.weight": torch.ones(3)},
        r"other shapes.*model\.norm\.weight \(3,\) for \(64,\)",
    ),
    "more layers": (
        lambda tensors: tensors | {"model.layers.2.mlp.up_proj.weight": torch.ones(128, 64)},
        r"holds 1 tensors of layers.*layers\.2\.mlp",
    ),
    "packed": (
        lambda tensors: tensors | {"model.layers.0.mlp.up_proj.weight": torch.ones(128, 64, dtype=torch.uint8)},
        r"quantised weights: model\.layers\.0\.mlp\.up_proj\.weight \(U8\)",
    ),
    "eight bits": (
        lambda tensors: tensors | {"model.layers.0.mlp.up_proj.weight": torch.ones(128, 64).to(torch.float8_e4m3fn)},
        r"quantised weights.*F8_E4M3",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_tensors_that_are_not_the_models_are_named(folder, case):
    change, said = CHANGES[case]
    rewrite(folder, change)
    with pytest.raises(DataError, match=said):
        require(folder)


def test_tensors_that_nobody_asks_for_are_left_alone(folder):
    rewrite(folder, lambda tensors: tensors | {"v_head.weight": torch.ones(1, 64)})
    require(folder)


@pytest.mark.parametrize("name", ["Mixtral", "GLM-4-MoE", "GPT-2", "OPT", "Falcon", "Gemma 2"])
def test_what_transformers_stores_under_other_names_is_known(tmp_path, name):
    assert name in FAMILIES
    require(tiny_folder(name, tmp_path))


def test_a_scorer_needs_its_head_unless_one_is_made(whole, tmp_path):
    require(tiny_scorer(tmp_path), AutoModelForSequenceClassification)
    require(whole, AutoModelForSequenceClassification, may_lack="score.")
    with pytest.raises(DataError, match=r"lacks 1 tensors.*score\.weight"):
        require(whole, AutoModelForSequenceClassification)


QUANTISED = {
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq", "bits": 4},
    "fp8": {"quant_method": "fp8"},
    "compressed-tensors": {"quant_method": "compressed-tensors"},
}
CONFIGS = {
    "unknown architecture": ('{"model_type": "llama9"}', "config.json can't be used.*llama9.*trust_remote_code"),
    "no architecture": ("{}", "config.json can't be used"),
    "no JSON": ("{", "config.json can't be used"),
    "a list": ("[]", "config.json can't be used"),
    "pointer": (LFS.decode(), "config.json is a Git-LFS pointer"),
    "empty": ("", "config.json is empty"),
    "wrong types": ('{"model_type": "llama", "hidden_size": "64"}', "config.json can't be used"),
    "own code": (
        '{"model_type": "odd", "auto_map": {"AutoConfig": "code.OddConfig"}}',
        "config.json can't be used.*trust_remote_code",
    ),
    **{
        name: (json.dumps({"model_type": "llama", "quantization_config": method}), rf"quantised weights \({name}\)")
        for name, method in QUANTISED.items()
    },
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_can_not_be_used_are_refused(folder, case):
    content, said = CONFIGS[case]
    (folder / "config.json").write_text(content)
    with pytest.raises(DataError, match=said):
        read_config(folder)


WINDOWS = {
    "llama": ({"max_position_embeddings": 2048}, 2048),
    "gpt2": ({"n_positions": 1024}, 1024),
    "opt": ({"max_position_embeddings": 2048}, 2048),
    "mpt": ({"max_seq_len": 512}, 512),
    "bloom": ({}, None),
    "mamba": ({}, None),
    "qwen2": (
        {
            "max_position_embeddings": 32768,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32768,
                "rope_theta": 1e6,
            },
        },
        131072,
    ),
}


@pytest.mark.parametrize("kind", WINDOWS)
def test_windows_are_read_from_configs(kind):
    options, positions = WINDOWS[kind]
    assert window(AutoConfig.for_model(kind, **options)) == positions


def test_a_buffer_that_nobody_writes_is_refused(tmp_path):
    """transformers leaves the multipliers of Falcon-H1's layers as they are in memory under a classifier."""
    folder = tiny_folder("Falcon-H1", tmp_path / "model")
    words = r"leaves model\.layers\.0\.mamba\.mup_vector, .* without a value.*another architecture"
    with pytest.raises(DataError, match=words):
        load_scorer(folder, torch.float32, new_head="zero")
    with pytest.raises(DataError, match=words):
        prove_small(folder, read_config(folder), None, scores=True, checkpointing=False, exports=False)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([[5, 6, 7]])).logits
    assert torch.equal(load_causal(folder, torch.float32)(torch.tensor([[5, 6, 7]])).logits, expected)
    assert not torch.are_deterministic_algorithms_enabled(), "memory is as before"
