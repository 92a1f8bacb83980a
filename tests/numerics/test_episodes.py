"""Episodes on a real engine, with templates of several families: log-probs that were measured turn by turn equal those
of one forward over each segment of the finished row, so the row holds exactly the tokens that the engine has seen."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.engines.contract import EngineContext
from actors.engines.hf_engine import HfEngine
from actors.environments.episodes import playing
from actors.models.model import load_causal
from actors.text.conversations import load_chat
from orchestrator.config.environments import EnvironmentConfig
from orchestrator.config.rewards import RuleLimits
from orchestrator.config.sections import ModelConfig, RolloutConfig
from orchestrator.data.records import Message
from orchestrator.prompts import derive_seed, sample_requests
from orchestrator.types import Prompt, Sampling, ShardRequest
from tests.deadlines import scaled
from tests.tiny import CHATML, tiny_llama, tiny_tokenizer

CHAT_OF_LLAMA3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<s>\n\n' + m['content'] | trim + '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<s>\n\n' }}{% endif %}"
)
QWEN = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}{% for m in messages %}{% if m['role'] == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + "
    "m['content'] + '\n</tool_response><|im_end|>\n' }}{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
    "'<|im_end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Writes earlier turns of the assistant differently, so every turn begins a segment.
REWRITES = CHATML.replace(
    "message['content']",
    "(('Before: ' if message['role'] == 'assistant' else '') + message['content'])",
)
TEMPLATES = {
    "ChatML": (CHATML, "user"),
    "as Llama 3": (CHAT_OF_LLAMA3, "user"),
    "as Qwen 2.5": (QWEN, "tool"),
    "rewrites": (REWRITES, "user"),
}


def played(folder: Path, template: str, role: str) -> list[dict[str, Any]]:
    tiny_tokenizer(chat_template=template).save_pretrained(folder)
    context = EngineContext(
        model=ModelConfig(dtype="float32", max_length=256),
        threads=1,
        max_samples=6,
        rollout=RolloutConfig(engine="hf"),
        environment=EnvironmentConfig(
            name="tests.unit.actors.environments.hostile:Obedient",
            max_turns=3,
            role="tool" if role == "tool" else "user",
            step_s=scaled(20.0),
        ),
        limits=RuleLimits(import_s=scaled(60.0)),
    )
    chat = load_chat(folder, context.model)
    tokens = chat.prompt([Message("user", "Why?")])
    requests = sample_requests(
        [Prompt("a", "Why?", tokens), Prompt("b", "Why?", tokens)], samples_per_prompt=3, seed=1, step=0
    )
    player = playing(HfEngine(folder, context), folder, context)
    request = ShardRequest(0, 0, requests, Sampling(max_new_tokens=12, temperature=0.8))
    table, _ = player.generate(request)
    again, _ = player.generate(replace(request, requests=requests[::-1]))
    assert again.equals(table)
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def segments_of(row: dict[str, Any]) -> list[list[int]]:
    edges = [0, *row["starts"], len(row["response_tokens"])]
    parts = [row["response_tokens"][start:end] for start, end in pairwise(edges)]
    return [row["prompt_tokens"] + parts[0], *parts[1:]]


def logprobs_of(model: torch.nn.Module, segment: list[int]) -> np.ndarray:
    """Of all tokens; the first has none, and gets 0."""
    tokens = torch.tensor([segment])
    with torch.no_grad():
        logprobs = torch.log_softmax(model(tokens).logits[0, :-1].float() / 0.8, -1)
    return np.concatenate([[0.0], logprobs.gather(1, tokens[0, 1:, None])[:, 0].numpy()])


@pytest.mark.parametrize("name", TEMPLATES)
def test_one_forward_over_a_row_gives_the_log_probs_of_all_turns(tmp_path: Path, name: str) -> None:
    folder = tiny_llama(tmp_path / "model")
    rows = played(folder, *TEMPLATES[name])
    model = load_causal(folder, torch.float32)
    for row in rows:
        assert json.loads(row["meta"])["episode"]["turns"] == 3
        assert len(row["starts"]) == (2 if name == "rewrites" else 0)
        found = np.concatenate([logprobs_of(model, segment) for segment in segments_of(row)])
        found = found[-len(row["response_tokens"]) :]
        learn = np.array(row["learn"])
        assert 3 <= learn.sum() <= 36 and not learn.all()
        np.testing.assert_allclose(found[learn], np.array(row["engine_logprobs"])[learn], atol=2e-4)
        written = [text for learned, text in json.loads(row["meta"])["episode"]["spans"] if not learned]
        seed = derive_seed("environment", 0, row["prompt_id"])
        assert [f"{turn} {seed}" in text for turn, text in enumerate(written, start=1)] == [True, True]
