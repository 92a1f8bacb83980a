"""Checks of stages: tries the environment on a few prompts, and the chat template on several turns."""

from __future__ import annotations

from time import monotonic

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
    warning = prove_turns(found.chat, environment.role) if found.chat is not None else ""
    with Episodes(environment, config.rule_limits) as episodes:
        prompts = found.prepared.prompts.train[:PROMPTS] if found.prepared is not None else ()
        tasks = {number: Task(prompt.text, prompt.meta, number) for number, prompt in enumerate(prompts)}
        until = monotonic() + PROBE_S
        answers = episodes.reset(tasks, until)
        answers |= episodes.step({number: _ACTION for number in tasks if _went(answers[number])}, until)
    failed = [answer for answer in answers.values() if isinstance(answer, str)]
    if failed and len(failed) == len(answers):
        raise ConfigError(
            f"{failed[0]} (and so on all of {len(failed)} sample prompts). Correct the class that environment.name "
            "names, or give prompts with the fields that it reads."
        )
    line = f"environment {environment.name}: answers on {len(answers) - len(failed)} of {len(answers)} sample prompts"
    return "\n".join(filter(None, [line, warning]))


def _went(answer: Answer) -> bool:
    return not isinstance(answer, str)
