"""Episodes advance together, turn by turn; their rows hold exactly what was sampled and what was written."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from actors.engines.contract import EngineContext
from actors.environments.episodes import Player
from actors.environments.process import Episodes
from actors.text.conversations import Chat, chat_of
from orchestrator import schema
from orchestrator.config.environments import EnvironmentConfig
from orchestrator.config.rewards import RuleLimits
from orchestrator.config.sections import ModelConfig
from orchestrator.data.records import Message
from orchestrator.prompts import derive_seed, sample_requests
from orchestrator.types import Prompt, SampleRequest, Sampling, ShardRequest
from tests.deadlines import scaled
from tests.tiny import tiny_tokenizer
from tests.unit.actors.environments.engines import ScriptedEngine

OBEDIENT = EnvironmentConfig(name="tests.unit.actors.environments.hostile:Obedient", max_turns=3, step_s=scaled(3.0))
LIMITS = RuleLimits(import_s=scaled(60.0))
NEXT = "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def chat() -> Chat:
    return chat_of(tiny_tokenizer())


@pytest.fixture(scope="module")
def obedient() -> Iterator[Episodes]:
    with Episodes(OBEDIENT, LIMITS) as episodes:
        yield episodes


def prompts(chat: Chat, count: int, **meta: Any) -> list[Prompt]:
    tokens = chat.prompt([Message("user", "Why?")])
    return [Prompt(f"p{number}", "Why?", tokens, {**meta, "number": number}) for number in range(count)]


def requests_of(chat: Chat, count: int = 2, samples: int = 2, **meta: Any) -> Sequence[SampleRequest]:
    return sample_requests(prompts(chat, count, **meta), samples_per_prompt=samples, seed=1, step=5)


def shard(requests: Sequence[SampleRequest], max_new_tokens: int = 16) -> ShardRequest:
    return ShardRequest(5, 0, requests, Sampling(max_new_tokens=max_new_tokens))


def saying(turns: Sequence[str]) -> Callable[[SampleRequest], str]:
    """Each sample says these, one after the other. A row asks once per turn."""
    counts: dict[int, int] = {}

    def script(item: SampleRequest) -> str:
        counts[item.row] = counts.get(item.row, -1) + 1
        return turns[counts[item.row]]

    return script


def play(
    chat: Chat,
    episodes: Episodes,
    script: Callable[[SampleRequest], str],
    request: ShardRequest,
    *,
    max_length: int = 512,
    environment: EnvironmentConfig = OBEDIENT,
) -> tuple[list[dict[str, Any]], ScriptedEngine, dict[str, Any]]:
    model = ModelConfig(max_length=max_length, dtype="float32")
    context = EngineContext(model=model, threads=1, max_samples=8, environment=environment, limits=LIMITS, seed=1)
    engine = ScriptedEngine(chat, script, max_length=max_length)
    table, numbers = Player(engine, chat, episodes, context).generate(request)
    assert table.schema.equals(schema.ROLLOUT)
    return table.to_pylist(), engine, numbers


def episode_of(row: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(row["meta"])["episode"]
    return found


def test_a_row_holds_the_sampled_turns_and_marks_them(chat: Chat, obedient: Episodes) -> None:
    requests = requests_of(chat, 1, 1)
    rows, engine, numbers = play(chat, obedient, saying(["one", "two…", "end"]), shard(requests))
    (row,) = rows
    seed = derive_seed("environment", 1, "p0")
    written = ["one", NEXT.format(f"1 {seed}"), "two", NEXT.format(f"2 {seed}"), "end<|im_end|>"]
    assert chat.text(row["response_tokens"]) == "".join(written)
    spans = [[True, "one<|im_end|>"], [False, written[1].removeprefix("<|im_end|>")], [True, "two"],
             [False, written[3]], [True, "end<|im_end|>"]]  # fmt: skip
    assert episode_of(row)["spans"] == spans
    sampled = [asked[0] for asked in engine.asked]
    assert [sample.seed for sample in sampled] == [requests[0].seed, *(derive_seed("turn", requests[0].seed, n) for n in (1, 2))]  # fmt: skip # noqa: E501
    whole = row["prompt_tokens"] + row["response_tokens"]
    for asked, turn in zip(sampled, ("one", "two", "end"), strict=True):
        known = len(asked.prompt.tokens)
        assert whole[:known] == asked.prompt.tokens.tolist(), "the engine has seen other tokens than the row holds"
        tokens = chat.tokens_of(turn).tolist()
        assert whole[known : known + len(tokens)] == tokens
        start = known - len(row["prompt_tokens"])
        assert all(row["learn"][start : start + len(tokens)])
    assert len(row["learn"]) == len(row["response_tokens"]) == len(row["engine_logprobs"])
    assert all((value == 0.0) != learn for value, learn in zip(row["engine_logprobs"], row["learn"], strict=True))
    assert numbers["num_response_tokens"] == sum(row["learn"])
    assert (row["finish_reason"], row["version"], row["seed"]) == ("stop", 4, requests[0].seed)
    assert row["response_text"] == "".join(written).removesuffix("<|im_end|>")
    assert (episode_of(row)["reward"], episode_of(row)["turns"], episode_of(row)["cut_turns"]) == (1.5, 3, 1)
    said = ["Why?", "one", f"1 {seed}", "two", f"2 {seed}", "end"]
    (held,) = episode_of(row)["conversations"]
    assert [turn["content"] for turn in held["messages"]] == said and "tools" not in held


def test_all_open_episodes_are_sampled_in_one_batch_in_the_order_of_rows(chat: Chat, obedient: Episodes) -> None:
    def script(item: SampleRequest) -> str:
        return "end" if item.row == 1 else "on"

    requests = requests_of(chat)
    shuffled = random.Random(1).sample(list(requests), len(requests))
    rows, engine, _ = play(chat, obedient, script, shard(shuffled))
    assert [[item.row for item in asked] for asked in engine.asked] == [[0, 1, 2, 3], [0, 2, 3], [0, 2, 3]]
    assert [row["row"] for row in rows] == [0, 1, 2, 3]
    assert [row["finish_reason"] for row in rows] == ["length", "stop", "length", "length"]
    assert play(chat, obedient, script, shard(requests))[0] == rows


def test_samples_of_a_prompt_have_the_same_task_and_different_seeds(chat: Chat, obedient: Episodes) -> None:
    rows, engine, _ = play(chat, obedient, lambda item: "on", shard(requests_of(chat)))
    first = [chat.text(row["response_tokens"]) for row in rows]
    assert first[0] == first[1] != first[2] == first[3]
    seeds = [item.seed for asked in engine.asked for item in asked]
    assert len(set(seeds)) == len(seeds) == 12


def test_an_episode_without_room_for_another_turn_is_cut(chat: Chat, obedient: Episodes) -> None:
    requests = requests_of(chat, 1, 2)
    rows, engine, _ = play(
        chat, obedient, lambda item: "on", shard(requests), max_length=len(requests[0].prompt.tokens) + 20
    )
    assert len(engine.asked) == 1
    for row in rows:
        assert row["finish_reason"] == "length" and all(row["learn"])
        assert episode_of(row)["reward"] == 0.5


def test_a_reset_may_write_the_prompt(chat: Chat, obedient: Episodes) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    rows, engine, _ = play(
        chat, obedient, lambda item: "end", shard(requests_of(chat, 1, 2, reset="Begin with a.", messages=messages))
    )
    expected = chat.prompt([Message("system", "Be brief."), Message("user", "Begin with a.")]).tolist()
    for row in rows:
        assert (row["prompt_text"], row["prompt_tokens"]) == ("Begin with a.", expected)
        assert json.loads(row["meta"])["messages"][-1] == {"role": "user", "content": "Begin with a."}
    assert engine.asked[0][0].prompt.tokens.tolist() == expected


@pytest.mark.parametrize("action", ["raise", "kill", "number"])
def test_a_failing_step_fails_its_sample_and_names_prompt_and_turn(chat: Chat, obedient: Episodes, action: str) -> None:
    def script(item: SampleRequest) -> str:
        return action if item.row == 2 and "1 " in chat.text(item.prompt.tokens) else "on"

    rows, engine, _ = play(chat, obedient, script, shard(requests_of(chat)))
    errors = [episode_of(row)["error"] for row in rows]
    assert errors[2].startswith("prompt 'p1', turn 2: environment tests.unit.actors.environments.hostile:Obedient")
    assert errors[:2] == [None, None] and errors[3] is None
    assert episode_of(rows[2])["reward"] is None
    assert [len(asked) for asked in engine.asked] == [4, 4, 3]


def test_a_failing_reset_leaves_a_row_without_learned_tokens(chat: Chat, obedient: Episodes) -> None:
    requests = requests_of(chat, 2, 1)
    bad = replace(requests[1], prompt=replace(requests[1].prompt, meta={"reset": "raise"}))
    rows, _, numbers = play(chat, obedient, lambda item: "end", shard([requests[0], bad]))
    assert "prompt 'p1', reset: environment" in episode_of(rows[1])["error"]
    assert rows[1]["response_tokens"] == chat.closing.tolist() and rows[1]["learn"] == [False]
    assert numbers["num_samples"] == 2
    rows, engine, numbers = play(chat, obedient, lambda item: "end", shard([bad]))
    assert not engine.asked and numbers["version"] == 4 and not any(rows[0]["learn"])


def test_an_observation_that_fills_the_window_fails_its_sample(chat: Chat, obedient: Episodes) -> None:
    rows, _, _ = play(chat, obedient, lambda item: "end", shard(requests_of(chat, 1, 1, reset="x " * 600)))
    assert "the first observation makes a prompt of" in episode_of(rows[0])["error"]
