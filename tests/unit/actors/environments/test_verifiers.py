"""Tasks of verifiers are played through their own harness. Without the package, the error says how to install it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from actors.environments.verifiers import write_prompts
from actors.text.conversations import chat_of
from orchestrator.config.environments import EnvironmentConfig
from tests.deadlines import scaled
from tests.tiny import tiny_tokenizer
from tests.unit.actors.environments.test_agents import NEXT, Shard, episode_of, requests_of

ENV = {"taskset": {"id": "rlhf_sums"}}
needs_verifiers = pytest.mark.skipif(
    importlib.util.find_spec("verifiers") is None, reason="the package verifiers is not installed"
)


def playing(env: dict[str, object]) -> EnvironmentConfig:
    return EnvironmentConfig(
        name="actors.environments.verifiers:play", options={"env": env}, max_turns=3, step_s=scaled(60.0)
    )


@pytest.fixture
def tasksets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "tasksets"))


@needs_verifiers
@pytest.mark.usefixtures("tasksets")
def test_a_task_is_played_by_its_harness_and_scored_by_its_rewards() -> None:
    chat = chat_of(tiny_tokenizer())
    with Shard(chat, playing(ENV)) as shard:
        requests = requests_of(chat, [{"task": 0}, {"task": 1}, {"task": 7}])
        rows, _ = shard.play(requests, lambda item: "one" if len(item.prompt.tokens) < 40 else "twelve")
        assert shard.play(requests, lambda item: "one" if len(item.prompt.tokens) < 40 else "twelve")[0] == rows
    for row in rows[:4]:
        task = int(row["prompt_id"].removeprefix("p"))
        assert f"What is {task} + 1?" in chat.text(row["prompt_tokens"]) and not row["starts"]
        assert chat.text(row["response_tokens"]).startswith("one" + NEXT.format("Go on."))
        assert episode_of(row)["parts"]["environment.is_second"] == task
        assert episode_of(row)["parts"]["environment.length"] in (1.5, 3.0)
    assert all("`task` is 7; the taskset has 3 tasks" in episode_of(row)["error"] for row in rows[4:])


@needs_verifiers
@pytest.mark.usefixtures("tasksets")
def test_a_prompts_file_names_every_task(tmp_path: Path) -> None:
    assert write_prompts(ENV, tmp_path / "tasks.jsonl") == 3
    lines = (tmp_path / "tasks.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[2]) == {"prompt": "What is 2 + 1?", "task": 2}


@pytest.mark.skipif(importlib.util.find_spec("verifiers") is not None, reason="the package verifiers is installed")
def test_without_the_package_the_error_says_how_to_install_it(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match=r"pip install 'rlhf-orchestrator\[verifiers\]'"):
        write_prompts(ENV, tmp_path / "tasks.jsonl")
