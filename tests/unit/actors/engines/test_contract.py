"""An engine's output: the reply without its end token; and the tokens at which it stops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM

from actors.engines.contract import EngineContext, Sample, rollout_table
from actors.engines.hf_engine import HfEngine
from actors.text.conversations import Chat, chat_of
from orchestrator.config.sections import ModelConfig
from orchestrator.types import Prompt, SampleRequest, Sampling, ShardRequest
from tests.tiny import CHATML, tiny_config
from tests.unit.actors.letters import letters

TEXT_END = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '[END]\n' }}{% endfor %}"
SEVERAL = TEXT_END.replace("[END]", "[END]</s>")


def row(chat: Chat, written: str) -> dict[str, Any]:
    ids = chat.tokenizer(written, add_special_tokens=False)["input_ids"]
    request = SampleRequest(0, Prompt("p", "hi", np.array([1], np.int32), {"answer": 7}), 0, 5)
    table = rollout_table([request], [Sample(ids, [0.0] * len(ids))], chat=chat, version=3)
    found: dict[str, Any] = table.to_pylist()[0]
    return found


THINKING = "<think>\nTwo and two.</think>It is 4"
CASES = {
    "special tokens stay": (letters(CHATML, "<|im_end|>"), THINKING, "<|im_end|>", "stop"),
    "cut by length": (letters(CHATML, "<|im_end|>"), THINKING, "", "length"),
    "another EOS": (letters(CHATML, "<|endoftext|>"), THINKING, "<|endoftext|>", "stop"),
    "an end that is not flagged special": (letters(TEXT_END, plain=["[END]"]), "yes", "[END]", "stop"),
    "several tokens": (letters(SEVERAL), "yes", "[END]</s>", "stop"),
    "several tokens, only the stop": (letters(SEVERAL), "yes", "</s>", "stop"),
    "nothing said": (letters(CHATML, "<|im_end|>"), "", "<|im_end|>", "stop"),
    "control tokens stay": (letters(CHATML, "<|im_end|>"), "a<|im_start|>b<s>c", "<|im_end|>", "stop"),
    "white space stays": (letters(CHATML, "<|im_end|>"), " a , b !\n", "<|im_end|>", "stop"),
}


@pytest.mark.parametrize("name", CASES)
def test_rules_get_the_reply_as_it_was_written_without_its_end(name: str) -> None:
    tokenizer, reply, end, reason = CASES[name]
    found = row(chat_of(tokenizer), reply + end)
    assert found["response_text"] == reply
    assert json.loads(found["meta"]) == {"answer": 7, "raw_response": reply + end}
    assert found["finish_reason"] == reason
    assert found["learn"] == [True] * len(found["response_tokens"]), "all tokens of an engine are the policy's"


ENDS = {name: int(letters(None).convert_tokens_to_ids(name)) for name in ("<|im_end|>", "<s>", "</s>")}


@pytest.mark.parametrize("stops", ["the tokenizer", "generation_config.json", "config.json"])
def test_the_hf_engine_stops_at_the_closing_and_at_every_eos(tmp_path: Path, stops: str) -> None:
    """EOS is `</s>` in the tokenizer and `<s>` in a file; the template's closing is `<|im_end|>`."""
    tokenizer = letters(CHATML, "</s>")
    tokenizer.save_pretrained(tmp_path)
    config = tiny_config()
    config.vocab_size = len(tokenizer)
    config.eos_token_id = [ENDS["<s>"], ENDS["</s>"]] if stops == "config.json" else ENDS["</s>"]
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    torch.nn.init.zeros_(model.model.norm.weight)  # all tokens have equal probability
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    if stops == "generation_config.json":
        GenerationConfig(eos_token_id=[ENDS["<s>"]]).save_pretrained(tmp_path)
    expected = set(ENDS.values()) - ({ENDS["<s>"]} if stops == "the tokenizer" else set())
    context = EngineContext(model=ModelConfig(dtype="float32", max_length=64), threads=1, max_samples=64)
    engine = HfEngine(tmp_path, context)
    requests = [SampleRequest(i, Prompt("p", "hi", np.array([9, 17], np.int32), {}), i, i) for i in range(64)]
    table, _ = engine.generate(ShardRequest(0, 0, requests, Sampling(temperature=1.0, max_new_tokens=40)))
    rows = table.to_pylist()
    for found in rows:
        *before, last = found["response_tokens"]
        assert not expected & set(before)
        assert found["finish_reason"] == ("stop" if last in expected else "length")
    assert {found["response_tokens"][-1] for found in rows if found["finish_reason"] == "stop"} == expected
