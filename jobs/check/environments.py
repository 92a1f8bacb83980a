"""Checks of stages: tries the environment, or the agent, on a few prompts, and the chat template on several turns."""

from __future__ import annotations

from time import monotonic

from actors.environments.calls import reply
from actors.environments.contract import Task
from actors.environments.process import Episodes
from actors.environments.server import Answer
from actors.text.turns import prove_turns
from jobs.stages.stage import Found
from orchestrator.config.config import Config
from orchestrator.errors import ConfigError

PROMPTS = 4
PROBE_S = 40.0
_ACTION = "I do not know."


def check_environment(config: Config, found: Found) -> str | None:
    """Plays one turn with an invented action on the first prompts.

    Raises:
        ConfigError: the environment can't be made, or fails on all of these prompts.
        DataError: the chat template can't continue conversations.
    """
    environment = config.environment
    if environment.name is None:
        return None
    with Episodes(environment, config.rule_limits) as episodes:
        role = "user" if episodes.is_agent else environment.role
        warning = prove_turns(found.chat, role) if found.chat is not None else ""
        action = (
            reply(_ACTION, has_tools=False, number=1, is_cut=False, tokens=(1, 1)) if episodes.is_agent else _ACTION
        )
        prompts = found.prepared.prompts.train[:PROMPTS] if found.prepared is not None else ()
        tasks = {number: Task(prompt.text, prompt.meta, number) for number, prompt in enumerate(prompts)}
        until = monotonic() + PROBE_S
        answers = episodes.reset(tasks, until)
        speaking = {number: action for number, answer in answers.items() if _asks(answer)}
        answers |= episodes.step(speaking, until)
    problems = (_problem(answer, has_spoken=number in speaking) for number, answer in answers.items())
    failed = [problem for problem in problems if problem]
    if failed and len(failed) == len(answers):
        raise ConfigError(
            f"{failed[0]} (and so on all of {len(failed)} sample prompts). Correct the class or function that "
            "environment.name names, or give prompts with the fields that it reads."
        )
    line = f"environment {environment.name}: answers on {len(answers) - len(failed)} of {len(answers)} sample prompts"
    return "\n".join(filter(None, [line, warning]))


def _asks(answer: Answer) -> bool:
    """Whether the policy speaks next."""
    return not isinstance(answer, str) and answer.get("call", "of no agent") is not None


def _problem(answer: Answer, *, has_spoken: bool) -> str:
    """Why an answer is none, or ""."""
    if isinstance(answer, str):
        return answer
    if answer.get("raised"):
        return f"the agent {answer['raised']}"
    return "" if has_spoken else "the agent returned before it made a call"
