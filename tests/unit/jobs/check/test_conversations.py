"""Models of one run with different tokens, and conversations that a reward model can't read, are detected
before anything starts."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from actors.text.conversations import chat_of
from jobs.check.conversations import describe_chat
from jobs.check.preflight import preflight
from jobs.stages.settings import critic_section
from orchestrator.config.config import Config
from orchestrator.config.loader import config_from_tree
from orchestrator.errors import RlhfError
from tests.tiny import CHATML, tiny_config, tiny_llama, tiny_scorer, tiny_tokenizer

GOLD = "actors.rewards.gold:vader_positivity"
OTHER = CHATML.replace("<|im_start|>", "<|begin|>")
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    made = {"policy": tiny_llama(root / "policy"), "scorer": tiny_scorer(root / "scorer")}
    copies = {"shuffled": "scorer", "fewer": "scorer", "bare": "scorer", "narrow": "scorer"}
    for name, source in {**copies, "shuffled causal": "policy", "narrow causal": "policy"}.items():
        made[name] = Path(shutil.copytree(made[source], root / name))
    for name in ("shuffled", "shuffled causal"):
        swapped = json.loads((made[name] / "tokenizer.json").read_text())
        vocabulary = swapped["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        (made[name] / "tokenizer.json").write_text(json.dumps(swapped))
    for name in ("fewer", "narrow", "narrow causal"):
        config = json.loads((made[name] / "config.json").read_text())
        (made[name] / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
        tensors = load_file(made[name] / "model.safetensors")
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:100].clone()
        save_file(tensors, made[name] / "model.safetensors", metadata={"format": "pt"})
    for name in ("bare", "narrow", "narrow causal"):
        for file in made[name].glob("*token*"):
            file.unlink()
    return made


def problems(tmp_path: Path, models: dict[str, Path], **sections: Any) -> list[str]:
    return [str(problem) for problem in found(tmp_path, models, **sections).problems]


def found(tmp_path: Path, models: dict[str, Path], **sections: Any) -> Any:
    return preflight(config_of(tmp_path, models, **sections))


def config_of(tmp_path: Path, models: dict[str, Path], **sections: Any) -> Config:
    rows = [json.dumps({"prompt": f"Say something about the number {index}."}) for index in range(40)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    tree: dict[str, Any] = {
        "run": {"root": str(tmp_path / "runs")},
        "model": {"path": str(models["policy"]), "dtype": "float32", "max_length": 128},
        "prompts": {"path": str(tmp_path / "prompts.jsonl"), "max_prompt_tokens": 100},
        "reward": {"name": "rules", "rules": [{"function": GOLD}]},
        "rollout": {"max_new_tokens": 16},
        "rl": {"steps": 1, "prompts_per_step": 2},
        "evaluation": {"prompts": 2},
    }
    for name, more in sections.items():
        is_added = isinstance(more, dict) and "name" not in more  # a section selected by name is replaced as a whole
        tree[name] = tree.get(name, {}) | more if is_added else more
    return config_from_tree(tree, source="t")


def reward(models: dict[str, Path], name: str) -> dict[str, Any]:
    return {"name": "model", "path": str(models[name]), "normalise": False}


def test_models_of_one_vocabulary_pass(tmp_path: Path, models: dict[str, Path]) -> None:
    sections = {"reward": reward(models, "scorer"), "reference": {"path": str(models["policy"])}}
    passed = found(tmp_path, models, **sections)
    assert passed.problems == []
    assert any("same conversation format as the policy; it reads the sampled tokens" in note for note in passed.notes)
    assert problems(tmp_path, models, critic={"path": str(models["bare"])}) == []


SHUFFLED = r"'[ab]' is token \d+ for the one and \d+ for the other"
NARROW = "has 100 embeddings where the policy has 384, and no tokenizer"


@pytest.mark.parametrize(
    ("key", "name", "fault"),
    [
        ("reward.path", "shuffled", SHUFFLED),
        ("critic.path", "shuffled", SHUFFLED),
        ("reference.path", "shuffled", SHUFFLED),
        ("critic.path", "narrow", NARROW),
        ("reference.path", "narrow", NARROW),
    ],
)
def test_another_vocabulary_is_refused_with_the_way_out(
    tmp_path: Path, models: dict[str, Path], key: str, name: str, fault: str
) -> None:
    section, leaf = key.split(".")
    name = f"{name} causal" if section == "reference" else name
    sections = {section: reward(models, name)} if key == "reward.path" else {section: {leaf: str(models[name])}}
    (problem,) = problems(tmp_path, models, **sections)
    assert f"{key}: " in problem and "its numbers would mean nothing" in problem
    assert re.search(fault, problem)
    way_out = "reference.path=null" if section == "reference" else f"critic.path={models['policy']}"
    assert way_out in problem


def test_the_ways_out_work(tmp_path: Path, models: dict[str, Path]) -> None:
    foreign = {"reward": reward(models, "shuffled")}
    policy = {"critic": {"path": str(models["policy"])}}
    assert problems(tmp_path, models, **foreign, **policy) == []
    # The policy with a new head: there is no other initial model.
    assert critic_section(config_of(tmp_path, models, **foreign, **policy), str(models["shuffled"])).path is None
    grpo = {"rl": {"samples_per_prompt": 2}, "algorithm": {"name": "grpo"}}
    passed = found(tmp_path, models, **foreign, **grpo)
    assert passed.problems == []
    assert any("its own conversation format; it reads text" in note for note in passed.notes)


def test_a_critic_from_a_base_of_another_vocabulary_is_refused(tmp_path: Path, models: dict[str, Path]) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "Hi", "chosen": "Hello", "rejected": "No"}\n')
    sections = {
        "reward_model": {"base": str(models["shuffled"])},
        "preferences": {"path": str(tmp_path / "pairs.jsonl")},
        "reward": {"name": "model"},
    }
    (problem,) = problems(tmp_path, models, stages=["reward_model", "rl"], **sections)
    assert "the critic starts from reward_model.base" in problem


def test_a_tokenizer_larger_than_the_embeddings_is_refused(tmp_path: Path, models: dict[str, Path]) -> None:
    policy = tmp_path / "policy"
    LlamaForCausalLM(tiny_config()).save_pretrained(policy)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<extra{n}>" for n in range(400)])
    tokenizer.save_pretrained(policy)
    (problem,) = problems(tmp_path, models, model={"path": str(policy)})
    assert problem.startswith("model.path: the tokenizer in") and "embeddings for 384 tokens only" in problem
    (problem, *_) = problems(tmp_path, models, reward=reward(models, "fewer"), algorithm={"name": "grpo"})
    assert problem.startswith("reward.path: the tokenizer in") and "embeddings for 100 tokens only" in problem


def test_a_conversation_that_the_reward_model_refuses_is_named(tmp_path: Path, models: dict[str, Path]) -> None:
    folder = Path(shutil.copytree(models["scorer"], tmp_path / "scorer"))
    (folder / "chat_template.jinja").write_text(NO_SYSTEM)
    (problem,) = problems(tmp_path, models, reward=reward({"own": folder}, "own"), model={"system_prompt": "Be brief."})
    assert "as written for the reward model" in problem and "no system role" in problem
    assert problem.startswith("prompt ")


def test_check_shows_closing_stops_and_one_learned_reply() -> None:
    lines = describe_chat(chat_of(tiny_tokenizer(eos_token="</s>"), system_prompt="Be kind."))
    assert lines == [
        "a reply ends with '<|im_end|>' (token 0); engines stop at '<|im_end|>' (0), '</s>' (3)",
        "a reply as it is learned: '<|im_start|>system\\nBe kind.<|im_end|>\\n"
        "<|im_start|>user\\nIs it?<|im_end|>\\n<|im_start|>assistant\\nYes.<|im_end|>'",
    ]


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ 'a' + 1 }}", "TypeError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        ("{{ range(10 ** 9) }}", "OverflowError"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "does not end within"),
        ("{{ 'x' * 10 ** 11 }}", "needs more than 1024 MiB"),
        ("{% for", "line 1: unexpected"),
        ("Hello!", "writes nothing of what the user says, only 'Hello!'"),
    ],
)
def test_a_broken_template_is_a_problem_and_no_traceback(
    tmp_path: Path, models: dict[str, Path], template: str, fault: str
) -> None:
    (tmp_path / "own.jinja").write_text(template)
    (problem,) = problems(tmp_path, models, model={"chat_template": str(tmp_path / "own.jinja")})
    assert fault in problem and "model.chat_template=FILE" in problem


def test_all_is_told_at_once(tmp_path: Path, models: dict[str, Path]) -> None:
    told = found(tmp_path, models, critic={"path": str(models["shuffled"])}, reference={"path": "/nowhere"})
    assert len(told.problems) == 1 and isinstance(told.problems[0], RlhfError)
