"""`check` plays a turn of the environment and proves that the chat template can continue."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from actors.text.conversations import Chat, chat_of
from jobs.check.environments import check_environment
from jobs.prepare import Prepared, without_prompts
from jobs.stages.stage import Found
from orchestrator.config.config import Config
from orchestrator.config.loader import config_from_tree
from orchestrator.errors import ConfigError, DataError
from orchestrator.prompts import Splits
from orchestrator.types import Prompt
from tests.tiny import CHATML, tiny_tokenizer
from tests.unit.actors.text.test_learned import THINKING

CALCULATOR = "actors.environments.calculator:Calculator"


def config_of(name: str | None, **keys: Any) -> Config:
    return config_from_tree({"environment": {"name": name, **keys}}, source="test")


def found(template: str = CHATML, **meta: Any) -> Found:
    chat: Chat = chat_of(tiny_tokenizer(chat_template=template))
    prompts = tuple(Prompt(f"p{number}", "Why?", np.zeros(3, np.int32), meta) for number in range(6))
    empty = without_prompts(chat)
    return Found(chat, Prepared(Splits(prompts, (), ()), empty.report, (), chat), None)


def test_without_an_environment_nothing_is_tried() -> None:
    assert check_environment(config_of(None), found()) is None


def test_an_environment_that_answers_is_reported() -> None:
    line = check_environment(config_of(CALCULATOR), found(answer="42"))
    assert line == f"environment {CALCULATOR}: answers on 4 of 4 sample prompts"
    assert check_environment(config_of(CALCULATOR), Found(None, None, None)) is not None


def test_one_that_fails_on_all_prompts_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"KeyError: 'answer' \(and so on all of 4 sample prompts\)"):
        check_environment(config_of(CALCULATOR), found())
    with pytest.raises(ConfigError, match="has no 'Abacus'"):
        check_environment(config_of("actors.environments.calculator:Abacus"), found())


@pytest.mark.parametrize(
    ("name", "options", "error"),
    [
        ("asks", {"turns": 1}, None),
        ("asks", {"turns": 2}, None),
        ("hostile", {}, "the agent raised IndexError"),
        ("needs_level", {"level": 1}, "the agent returned before it made a call"),
    ],
)
def test_an_agent_makes_a_call_and_is_answered(name: str, options: dict[str, Any], error: str | None) -> None:
    name = f"tests.unit.actors.environments.agents:{name}"
    config = config_of(name, options=options)
    if error is not None:
        with pytest.raises(ConfigError, match=f"{error}.*and so on all of 4"):
            check_environment(config, found(does="then raise"))
    else:
        assert check_environment(config, found()) == f"environment {name}: answers on 4 of 4 sample prompts"


def test_the_chat_template_is_tried() -> None:
    dropping = THINKING.replace("+ m['content'] + '<|im_end|>\n' }}{% endif %}", "+ m['content'].split('</think>')[-1] + '<|im_end|>\n' }}{% endif %}")  # fmt: skip # noqa: E501
    line = check_environment(config_of(CALCULATOR), found(dropping, answer="42"))
    assert line is not None and "repeats only turns without thoughts" in line
    with pytest.raises(DataError, match=r"it is not made for tools|does not write a turn of role 'tool'"):
        loop = "{% for message in messages %}"
        silent = CHATML.replace(loop, "{% for message in messages if message.role != 'tool' %}")
        check_environment(config_of(CALCULATOR, role="tool"), found(silent, answer="42"))
