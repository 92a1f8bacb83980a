"""Agents call the policy by HTTP; what they ask and are told is recorded token by token, and what they do wrong fails
their own episode."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from actors.engines.contract import EngineContext
from actors.environments.agents import Agent
from actors.environments.calls import RefusedCallError, reply
from actors.environments.contract import Task
from actors.environments.episodes import Player
from actors.environments.process import Episodes
from actors.rewards.rule_process import Channel
from actors.text.conversations import Chat, chat_of
from orchestrator import schema
from orchestrator.config.environments import EnvironmentConfig
from orchestrator.config.rewards import RuleLimits
from orchestrator.config.sections import ModelConfig
from orchestrator.data.records import Message
from orchestrator.errors import ConfigError
from orchestrator.prompts import derive_seed, sample_requests
from orchestrator.types import Prompt, SampleRequest, Sampling, ShardRequest
from tests.deadlines import scaled
from tests.tiny import CHATML, tiny_tokenizer
from tests.unit.actors.environments.engines import ScriptedEngine

HERE = "tests.unit.actors.environments.agents"
LIMITS = RuleLimits(import_s=scaled(60.0))
NEXT = "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
Script = Callable[[SampleRequest], str]

# Leaves out the thoughts of earlier turns.
FORGETS = CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")


@pytest.fixture(scope="module")
def chat() -> Chat:
    return chat_of(tiny_tokenizer())


def agent(name: str, **keys: Any) -> EnvironmentConfig:
    return EnvironmentConfig(name=f"{HERE}:{name}", **{"max_turns": 4, "step_s": scaled(20.0), **keys})


def requests_of(chat: Chat, metas: Sequence[dict[str, Any]] = ({},)) -> Sequence[SampleRequest]:
    tokens = chat.prompt([Message("user", "Why?")])
    prompts = [Prompt(f"p{number}", "Why?", tokens, meta) for number, meta in enumerate(metas)]
    return sample_requests(prompts, samples_per_prompt=2, seed=1, step=5)


class Shard:
    """Plays shards of one agent."""

    def __init__(self, chat: Chat, environment: EnvironmentConfig, *, max_length: int = 512, **keys: Any) -> None:
        model = ModelConfig(max_length=max_length, dtype="float32")
        self._context = EngineContext(
            model=model, threads=1, max_samples=8, environment=environment, limits=LIMITS, seed=1, **keys
        )
        self._chat = chat
        self.episodes = Episodes(environment, LIMITS)

    def __enter__(self) -> Shard:
        return self

    def __exit__(self, *_: object) -> None:
        self.episodes.close()

    def play(
        self, requests: Sequence[SampleRequest], script: Script = lambda item: "yes", *, tokens: int = 16
    ) -> tuple[list[dict[str, Any]], list[list[SampleRequest]]]:
        engine = ScriptedEngine(self._chat, script, max_length=self._context.model.max_length)
        player = Player(engine, self._chat, self.episodes, self._context)
        table, _ = player.generate(ShardRequest(5, 0, requests, Sampling(max_new_tokens=tokens)))
        assert table.schema.equals(schema.ROLLOUT)
        return table.to_pylist(), engine.asked


def played(
    chat: Chat, environment: EnvironmentConfig, script: Script = lambda item: "yes", **keys: Any
) -> tuple[list[dict[str, Any]], list[list[SampleRequest]]]:
    with Shard(chat, environment, **keys) as shard:
        return shard.play(requests_of(chat), script)


def episode_of(row: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(row["meta"])["episode"]
    return found


def require_seen(row: dict[str, Any], asked: Sequence[SampleRequest]) -> None:
    """Each learned run of a row follows, in its segment, exactly what the engine was asked."""
    tokens, learn = row["prompt_tokens"] + row["response_tokens"], [False] * len(row["prompt_tokens"]) + row["learn"]
    edges = [0, *(len(row["prompt_tokens"]) + start for start in row["starts"])]
    runs = [place for place, (before, mark) in enumerate(pairwise(learn), start=1) if mark and not before]
    found = sorted(tokens[max(edge for edge in edges if edge < run) : run] for run in runs)
    assert found == sorted(request.prompt.tokens.tolist() for request in asked)


def test_calls_that_extend_the_conversation_continue_its_tokens(chat: Chat) -> None:
    def script(item: SampleRequest) -> str:
        return ["one", "two…", "three"][chat.text(item.prompt.tokens).count("assistant") - 1]

    rows, asked = played(chat, agent("asks"), script)
    assert [[item.row for item in batch] for batch in asked] == [[0, 1]] * 3
    for row in rows:
        between = [NEXT.format("0: 3"), NEXT.format("1: 3")]
        assert chat.text(row["response_tokens"]) == "one" + between[0] + "two" + between[1] + "three<|im_end|>"
        assert row["prompt_tokens"] == chat.prompt([Message("user", "Why?")]).tolist()
        assert row["starts"] == [] and row["finish_reason"] == "stop"
        require_seen(row, [item for batch in asked for item in batch if item.row == row["row"]])
        assert episode_of(row)["parts"] == {"environment.length": 5.0, "environment.turns": 3.0}
        assert (episode_of(row)["reward"], episode_of(row)["turns"]) == (8.0, 3)
    first = requests_of(chat)[0]
    seeds = [first.seed, *(derive_seed("turn", first.seed, turn) for turn in (1, 2))]
    assert [batch[0].seed for batch in asked] == seeds


def test_an_agent_written_for_openais_client_runs_unchanged(chat: Chat) -> None:
    openai = EnvironmentConfig(name="tests.unit.actors.environments.openai_agent:talk", step_s=scaled(30.0))
    rows, asked = played(chat, openai, lambda item: "short")
    messages = [Message("system", "Be brief."), Message("user", "Why?")]
    for row in rows:
        assert row["prompt_tokens"] == chat.prompt(messages).tolist()
        assert row["starts"] == [] and sum(row["learn"]) == 2 * (len(chat.tokens_of("short")) + len(chat.closing))
        assert episode_of(row)["reward"] == len(chat.tokens_of("short")) + len(chat.closing)
        assert json.loads(row["meta"])["messages"] == [
            {"role": turn.role, "content": turn.content} for turn in messages
        ]
    assert len(asked) == 2


def test_the_documents_agent_plays(chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).resolve().parents[4] / "docs" / "environments.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(from openai.*?)```", text, re.DOTALL)
    (tmp_path / "my_agent.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    with Shard(chat, EnvironmentConfig(name="my_agent:solve", step_s=scaled(30.0))) as shard:
        rows, _ = shard.play(requests_of(chat, [{"answer": 4}, {"answer": 5}]), lambda item: "it is 4")
    assert [episode_of(row)["parts"] for row in rows] == [
        {"environment.right": right} for right in (1.0, 1.0, 0.0, 0.0)
    ]
    assert [episode_of(row)["turns"] for row in rows] == [1, 1, 3, 3]


def test_an_agent_may_stream(chat: Chat) -> None:
    streams = EnvironmentConfig(name="tests.unit.actors.environments.openai_agent:stream", step_s=scaled(30.0))
    call = '<tool_call>{"name": "weather", "arguments": {}}</tool_call>'
    rows, _ = played(chat_of(tiny_tokenizer(chat_template=TOOLS)), streams, lambda item: f"so {call}")
    for row in rows:
        assert episode_of(row)["parts"] == {"environment.so": 1.0, "environment.weather": 1.0}


def test_a_coroutine_is_an_agent(chat: Chat) -> None:
    rows, _ = played(chat, agent("waits"))
    assert [episode_of(row)["reward"] for row in rows] == [3.0, 3.0]


def test_calls_of_tools_are_given_as_such_and_continue_as_sampled(chat: Chat) -> None:
    chat = chat_of(tiny_tokenizer(chat_template=TOOLS))
    call = '<tool_call>{"name":  "weather", "arguments": {"place": "Bergen"}}</tool_call>'
    rows, _ = played(
        chat, agent("uses_a_tool"), lambda item: "wet" if "rain" in chat.text(item.prompt.tokens) else call
    )
    for row in rows:
        between = NEXT.format("rain in Bergen").replace("user", "tool")
        assert chat.text(row["response_tokens"]) == call + between + "wet<|im_end|>"
        assert row["starts"] == [] and episode_of(row)["reward"] == 1.0
        assert json.loads(row["meta"])["tools"][0]["function"]["name"] == "weather"


TOOLS = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}" + CHATML


def test_a_rewritten_history_begins_a_segment_and_every_turn_is_learned(chat: Chat) -> None:
    rows, asked = played(chat, agent("rewrites"), lambda item: f"turn {len(item.prompt.tokens)}")
    for row in rows:
        of_row = [item for batch in asked for item in batch if item.row == row["row"]]
        assert len(of_row) == 4 and len(row["starts"]) == 2
        require_seen(row, of_row)
        contexts = [chat.text(row["response_tokens"][start:]) for start in row["starts"]]
        assert "short" in contexts[0] and "or?" in contexts[1] and "and?" not in contexts[1]
        assert contexts[0].index("and?") < contexts[0].index("so?") < contexts[0].index("or?")
        assert row["response_text"].count("turn ") == 4
        assert [learned for learned, _ in episode_of(row)["spans"]] == [True, False, True, False, True, False, True]


def test_a_template_that_rewrites_turns_begins_segments(chat: Chat) -> None:
    chat = chat_of(tiny_tokenizer(chat_template=FORGETS))
    rows, asked = played(chat, agent("asks"), lambda item: "<think>hm</think>yes")
    for row in rows:
        assert len(row["starts"]) == 2
        require_seen(row, [item for batch in asked for item in batch if item.row == row["row"]])
        assert episode_of(row)["reward"] == len("<think>hm</think>yes") + 3.0


def test_a_call_may_ask_for_fewer_tokens(chat: Chat) -> None:
    rows, _ = played(chat, agent("limited"), lambda item: "a b c d e f")
    for row in rows:
        assert episode_of(row)["error"] is None
        assert len(row["response_tokens"]) == 3 and all(row["learn"])


@pytest.mark.parametrize(("name", "reward"), [("never_stops", 0.0), ("knows_when_to_stop", 1.0)])
def test_an_agent_that_has_had_its_turns_is_cut_and_keeps_what_it_returns(chat: Chat, name: str, reward: float) -> None:
    rows, asked = played(chat, agent(name, max_turns=2))
    assert len(asked) == 2
    for row in rows:
        assert row["finish_reason"] == "length" and episode_of(row)["cut"] == "it had environment.max_turns=2 turns"
        assert (episode_of(row)["reward"], episode_of(row)["turns"]) == (reward, 2)


def test_a_conversation_that_fills_the_window_is_cut(chat: Chat) -> None:
    tokens = len(chat.prompt([Message("user", "Why?")]))
    rows, _ = played(chat, agent("knows_when_to_stop", max_turns=9), max_length=tokens + 40)
    for row in rows:
        assert episode_of(row)["parts"] == {"environment.context_length_exceeded": 1.0}
        assert "fit in model.max_length beside rollout.max_new_tokens" in episode_of(row)["cut"]
    rows, _ = played(chat, agent("rewrites"), episode_tokens=2 * tokens + 30)
    assert all("fit in one micro-batch" in episode_of(row)["cut"] and not episode_of(row)["reward"] for row in rows)


def test_calls_that_cannot_be_answered_are_refused_and_the_agent_may_go_on(chat: Chat) -> None:
    rows, asked = played(chat, agent("bad_calls"))
    assert len(asked) == 1
    parts = {
        "model_not_found": 1.0, "unsupported_value": 3.0, "invalid_value": 2.0, "invalid_tools": 1.0,
        "invalid_messages": 5.0, "invalid_request": 1.0, "context_length_exceeded": 1.0,
    }  # fmt: skip
    assert episode_of(rows[0])["parts"] == {f"environment.{code}": count for code, count in parts.items()}


CHANNEL = Channel(list, list, list, lambda *_: None, repr, lambda name, value: ({name: value}, ""))


async def test_a_call_after_the_deadline_is_refused_and_a_coroutine_is_cancelled() -> None:
    def run(_: Task) -> float:
        time.sleep(60)
        return 1.0

    late, task = Agent(run, CHANNEL, is_async=False), Task("one", {}, 0)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(late.reset(task), timeout=scaled(0.1))
    late.abandon()  # what the server does at a deadline
    with pytest.raises(RefusedCallError, match="the episode is over"):
        await late.called({})
    assert late.is_running(), "a thread can't be ended: its process is"

    async def talk(_: Task) -> float:
        await waiting.called({"model": "policy", "messages": [{"role": "user", "content": "one"}]})
        return 1.0

    waiting = Agent(talk, CHANNEL, is_async=True)
    assert (await waiting.reset(Task("one", {}, 0)))["call"]["max_tokens"] is None
    waiting.abandon()
    await asyncio.sleep(0.05)
    assert not waiting.is_running()


def test_a_thread_that_ends_after_its_endpoint_is_gone_ends_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    may_end = threading.Event()

    def run(_: Task) -> float:
        may_end.wait(60)
        return 1.0

    async def begin() -> threading.Thread:
        late = Agent(run, CHANNEL, is_async=False)
        one = Task("one", {}, 0)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(late.reset(one), timeout=scaled(0.1))
        late.abandon()
        assert late._thread is not None
        return late._thread

    thread = asyncio.run(begin())
    may_end.set()
    thread.join(scaled(10))
    assert not thread.is_alive() and not raised


async def test_a_second_call_beside_an_open_one_is_refused() -> None:
    one: dict[str, Any] = {"model": "policy", "messages": [{"role": "user", "content": "one"}]}
    refused: list[str] = []

    async def run(_: Task) -> float:
        first = asyncio.create_task(playing.called(one))
        await asyncio.sleep(0)
        with pytest.raises(RefusedCallError, match="make one after the other") as error:
            await playing.called(one)
        refused.append(error.value.code)
        await first
        return 1.0

    playing = Agent(run, CHANNEL, is_async=True)
    event = await playing.reset(Task("one", {}, 0))
    assert event["call"]["messages"] == one["messages"]
    told = reply("two", has_tools=False, number=1, is_cut=False, tokens=(1, 1))
    assert (await playing.step(told))["reward"] == 1.0 and refused == ["call_in_progress"]


def test_an_agent_that_goes_on_after_many_refusals_fails(chat: Chat) -> None:
    rows, asked = played(chat, agent("insists"))
    assert not asked and all("made more than 8 calls that were refused" in episode_of(row)["error"] for row in rows)
    assert not any(any(row["learn"]) for row in rows)


@pytest.mark.parametrize(
    ("does", "error"),
    [
        ("first never call", "the agent returned before a call of it was answered"),
        ("first raise", "the agent raised IndexError: list index out of range before a call of it was answered"),
        ("then raise", "turn 1: the agent raised IndexError: list index out of range"),
        ("then text", "turn 1: the agent returned no reward: it returned 'good'"),
        ("then nan", "turn 1: the agent returned no reward"),
        ("then nothing", "turn 1: the agent returned no reward"),
        ("first freeze", "reset: environment .*hostile: neither made a call nor returned within"),
        ("then freeze", "turn 1: environment .*hostile: neither made a call nor returned within"),
        ("then backtrack", "turn 1: environment .*hostile gave no answer within environment.step_s"),
        ("first kill", "reset: environment .*hostile ended its process with SIGKILL"),
        ("then kill", "turn 1: environment .*hostile ended its process with SIGKILL"),
        ("then exit", "turn 1: environment .*hostile ended its process with exit code 3"),
    ],
)
def test_what_an_agent_does_wrong_fails_its_own_episode(chat: Chat, does: str, error: str) -> None:
    with Shard(chat, agent("hostile", step_s=scaled(4.0))) as shard:
        rows, _ = shard.play(requests_of(chat, [{}, {"does": does}]))
        expected, _ = shard.play(requests_of(chat, [{}, {}]))
    assert [episode_of(row)["error"] for row in rows[:2]] == [None, None] and rows[:2] == expected[:2]
    assert all(
        re.search(f"^prompt 'p1', {error}|^prompt 'p1', reset: {error}", episode_of(row)["error"]) for row in rows[2:]
    )
    assert [episode_of(row)["reward"] for row in expected] == [0.5] * 4


def test_a_call_after_the_end_is_refused_and_troubles_no_later_shard(chat: Chat) -> None:
    with Shard(chat, agent("returns_early")) as shard:
        first, _ = shard.play(requests_of(chat))
        assert shard.play(requests_of(chat))[0] == first
        assert [episode_of(row)["reward"] for row in first] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("options", "error"), [({}, "missing a required argument: 'level'"), ({"more": 1, "level": 1}, "unexpected")]
)
def test_options_that_the_agent_does_not_take_are_a_config_error(options: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError, match=f"as agent\\(prompt, base_url, .*{error}"):
        Episodes(agent("needs_level", options=options), LIMITS)
