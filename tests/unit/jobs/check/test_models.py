"""Models that can't be loaded, computed with or exported are refused before anything starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from actors.models import miniature
from actors.models.miniature import prove_small
from jobs.check import models as preflight_models
from jobs.check.models import check_models
from orchestrator.config.loader import config_from_tree
from orchestrator.errors import ConfigError, DataError
from tests.families import FAMILIES, tiny_folder
from tests.tiny import tiny_llama, tiny_scorer, tiny_tokenizer


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


def check(folder: Path, cache: Path, **sections: Any) -> str | None:
    settings: dict[str, Any] = {
        "stages": ["rl"],
        "model": {"path": str(folder), "max_length": 128},
        "prompts": {"max_prompt_tokens": 32},
        "rollout": {"max_new_tokens": 32},
        "reward": {"name": "rules", "rules": [{"function": "actors.rewards.gold:vader_positivity"}]},
        "run": {"cache": str(cache)},
    }
    for name, section in sections.items():
        is_added = isinstance(section, dict) and "name" not in section  # a section selected by name is replaced
        settings[name] = {**settings.get(name, {}), **section} if is_added else section
    return check_models(config_from_tree(settings, source="test"))


def test_a_good_model_is_tried_in_all_its_roles(llama: Path, tmp_path: Path) -> None:
    scorer = tiny_scorer(tmp_path / "scorer")
    note = check(llama, tmp_path, reward={"name": "model", "path": str(scorer)})
    assert note is not None
    assert "model.path was tried small" in note
    assert "reward.path and critic (reward.path) were tried small" in note


def test_an_ensemble_of_reward_heads_is_tried_in_all_its_roles(llama: Path, tmp_path: Path) -> None:
    ensemble = tiny_scorer(tmp_path / "ensemble", heads=3)
    note = check(llama, tmp_path, reward={"name": "model", "path": str(ensemble)})
    assert note is not None and "reward.path and critic (reward.path) were tried small" in note
    with pytest.raises(DataError, match=r"score\.weight \(3, 64\) for \(1, 64\)"):
        check(llama, tmp_path, reward={"name": "model", "path": str(tiny_scorer(tmp_path / "labels", labels=3))})


@pytest.mark.parametrize(("there", "wanted", "fits"), [(0, 3, True), (3, 3, True), (3, 1, True), (1, 3, False)])
def test_the_base_of_an_ensemble_has_as_many_heads_or_none(
    llama: Path, tmp_path: Path, there: int, wanted: int, fits: bool
) -> None:
    base = tiny_scorer(tmp_path / "base", heads=there) if there else llama
    sections: dict[str, Any] = {
        "stages": ["reward_model"],
        "preferences": {"path": "/pairs.jsonl"},
        "reward_model": {"base": str(base), "heads": wanted},
    }
    if fits:
        assert "reward_model.base was tried small" in str(check(llama, tmp_path, **sections))
    else:
        with pytest.raises(DataError, match=r"with 1 head, and reward_model\.heads=3\. Set reward_model\.heads=1"):
            check(llama, tmp_path, **sections)


ROLES: dict[str, tuple[dict[str, Any], list[dict[str, bool]]]] = {
    "policy, critic and the base of the reward model": (
        {"stages": ["reward_model", "rl"], "preferences": {"path": "/pairs.jsonl"}, "reward": {"name": "model"}},
        [{"scores": False, "exports": True}, {"scores": True, "exports": True}],
    ),
    "policy and reference": (
        {"reference": {"path": "MODEL"}, "rl": {"samples_per_prompt": 4}, "algorithm": {"name": "grpo"}},
        [{"scores": False, "exports": True}],
    ),
    "a reference under another name": (
        {"reference": {"path": "LINK"}, "rl": {"samples_per_prompt": 4}, "algorithm": {"name": "grpo"}},
        [{"scores": False, "exports": True}],
    ),
    "a reference of its own": (
        {"reference": {"path": "COPY"}, "rl": {"samples_per_prompt": 4}, "algorithm": {"name": "grpo"}},
        [{"scores": False, "exports": True}, {"scores": False, "exports": False}],
    ),
    "a policy that recomputes activations": (
        {
            "reference": {"path": "MODEL"},
            "policy": {"gradient_checkpointing": True},
            "rl": {"samples_per_prompt": 4},
            "algorithm": {"name": "grpo"},
        },
        [
            {"scores": False, "exports": True, "checkpointing": True},
            {"scores": False, "exports": False, "checkpointing": False},
        ],
    ),
}


@pytest.mark.parametrize("roles", ROLES)
def test_roles_that_use_a_model_in_one_way_share_its_proof(
    roles: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proved: list[dict[str, Any]] = []
    monkeypatch.setattr(preflight_models, "prove_small", lambda *_, **how: proved.append(how) or True)
    sections, expected = ROLES[roles]
    (tmp_path / "link").symlink_to(llama)
    names = {"MODEL": str(llama), "LINK": str(tmp_path / "link"), "COPY": str(tmp_path / "copy")}
    if "own" in roles:
        shutil.copytree(llama, tmp_path / "copy")
    named = {
        key: {name: names.get(value, value) for name, value in section.items()}
        if isinstance(section, dict)
        else section
        for key, section in sections.items()
    }
    check(llama, tmp_path, **named)
    found = [{name: how[name] for name in wanted} for how, wanted in zip(proved, expected, strict=True)]
    assert sorted(found, key=str) == sorted(expected, key=str)


@pytest.mark.parametrize("name", ["Gemma 2", "OPT", "GLM-4-MoE", "Mixtral", "GPT-2", "BLOOM", "Cohere"])
def test_architectures_are_tried_small(name: str, tmp_path: Path) -> None:
    note = check(
        tiny_folder(name, tmp_path / "model"),
        tmp_path,
        policy={"gradient_checkpointing": True},
        algorithm={"name": "grpo"},
        rl={"samples_per_prompt": 4},
    )
    assert note is not None
    assert "model.path was tried small" in note


# Published configs of models with billions of parameters, without weights.
@pytest.mark.parametrize("name", ["Llama", "Qwen3-MoE", "Gemma 2", "GPT-J", "DeepSeek-V3", "Phi-3", "RecurrentGemma"])
def test_a_large_model_is_tried_small(name: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(FAMILIES[name][0])
    assert prove_small(tmp_path, config, tiny_tokenizer(), scores=False, checkpointing=True, exports=False)
    small = miniature._small(config, scores=False)
    assert sum(parameter.numel() for parameter in small.parameters()) < 20_000_000


@pytest.mark.parametrize(
    ("name", "longest"), [("GPT-2", 256), ("OPT", 256), ("Llama", 256), ("MPT", 256), ("Phi", 256)]
)
def test_windows_beyond_the_positions_are_refused(name: str, longest: int, tmp_path: Path) -> None:
    folder = tiny_folder(name, tmp_path / "model")
    raw = json.loads((folder / "config.json").read_text())
    longest = raw.get("max_seq_len", longest)
    with pytest.raises(
        ConfigError, match=rf"model\.max_length={longest + 1} .*{longest} positions.*model\.max_length="
    ):
        check(folder, tmp_path, model={"path": str(folder), "max_length": longest + 1})


def test_the_references_positions_count_too(llama: Path, tmp_path: Path) -> None:
    reference = shutil.copytree(llama, tmp_path / "reference")
    config = json.loads((reference / "config.json").read_text())
    (reference / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    with pytest.raises(ConfigError, match=r"reference\.path.*64 positions"):
        check(llama, tmp_path, reference={"path": str(reference)})


def test_a_pointer_is_refused_in_every_role(llama: Path, tmp_path: Path) -> None:
    pointer = shutil.copytree(tiny_scorer(tmp_path / "scorer"), tmp_path / "pointer")
    (pointer / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    roles: list[dict[str, Any]] = [
        {"model": {"path": str(pointer), "max_length": 128}},
        {"reference": {"path": str(pointer)}},
        {"reward": {"name": "model", "path": str(pointer)}},
        {"critic": {"path": str(pointer)}},
        {
            "stages": ["reward_model"],
            "reward_model": {"base": str(pointer)},
            "preferences": {"path": str(tmp_path / "preferences.jsonl")},
        },
    ]
    for sections in roles:
        with pytest.raises(DataError, match="Git-LFS pointer"):
            check(llama, tmp_path, **sections)


@pytest.mark.parametrize(
    "generation",
    [
        {"temperature": 0.3},
        {"num_beams": 1, "length_penalty": 0.3},
        {"typical_p": 0.4},
        {"do_sample": False, "top_k": 3},
    ],
)
def test_generation_configs_that_transformers_would_not_write_are_no_obstacle(
    llama: Path, tmp_path: Path, generation: dict[str, Any]
) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, **generation}))
    check(folder, tmp_path, algorithm={"name": "grpo"}, rl={"samples_per_prompt": 4})


def test_an_export_that_would_not_come_back_is_found_before_the_run(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgets(pretrained: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in state.items() if "layers.1.mlp" not in name}

    monkeypatch.setattr("actors.models.export.revert_weight_conversion", forgets)
    with pytest.raises(DataError, match=r"could not be exported after learning.*layers\.1\.mlp"):
        check(llama, tmp_path)


@pytest.mark.parametrize("name", ["Cohere", "Mamba"])
def test_a_critic_of_an_architecture_without_a_classifier_in_transformers_is_tried(name: str, tmp_path: Path) -> None:
    folder = tiny_folder(name, tmp_path / "model")
    assert "critic (model.path) was tried small" in str(check(folder, tmp_path))


def test_a_gradient_that_is_not_the_slope_is_refused(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def small(config: Any, *, scores: bool) -> Any:
        model = original(config, scores=scores)
        layer = model.model.layers[1].mlp
        forward = layer.forward

        def without_gradient(hidden: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return forward(hidden)  # as code made for sampling does

        layer.forward = without_gradient
        return model

    original = miniature._small
    monkeypatch.setattr(miniature, "_small", small)
    with pytest.raises(DataError, match="its gradient says a slope"):
        check(llama, tmp_path)


def test_more_layers_than_the_reward_base_has_are_refused(llama: Path, tmp_path: Path) -> None:
    depth = AutoConfig.from_pretrained(llama).num_hidden_layers

    def tried(layers: int) -> str | None:
        return check(
            llama,
            tmp_path,
            stages=["sample", "preferences", "reward_model"],
            reward={"name": "model"},
            reward_model={"layers": layers},
        )

    assert "reward_model.base was tried small" in (tried(1) or "")
    assert "reward_model.base was tried small" in (tried(depth) or "")
    with pytest.raises(ConfigError, match=rf"reward_model\.layers={depth + 1}, but .* set {depth} or less"):
        tried(depth + 1)


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Mixtral", "BLOOM"])
def test_architectures_are_tried_small_with_adapters(name: str, tmp_path: Path) -> None:
    lora = {"rank": 4, "dora": name == "GPT-2"}
    note = check(
        tiny_folder(name, tmp_path / "model"),
        tmp_path,
        policy={"gradient_checkpointing": True, "lora": lora},
        algorithm={"name": "grpo"},
        rl={"samples_per_prompt": 4},
    )
    assert note is not None and "model.path was tried small, with adapters" in note


def test_adapters_of_a_layer_that_the_model_does_not_have_are_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora\.targets: c_attn names no linear layer .* It has down_proj, "):
        check(llama, tmp_path, policy={"lora": {"rank": 4, "targets": ["c_attn"]}})
