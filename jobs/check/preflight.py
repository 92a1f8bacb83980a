"""Checks before anything starts: prompts, preferences, tokenizer, rewards, trackers, ports and the run folder.

Every check runs, and all problems are reported together. Nothing is started and no weights are read.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa

from actors.text.conversations import Chat
from jobs.check.conversations import require_embeddings
from jobs.check.engine import check_architecture, check_engine, check_kernels, check_width
from jobs.check.models import check_models
from jobs.command import imported, say
from jobs.prepare import Prepared, policy_chat, prepare, prompts_key, without_prompts
from jobs.stages.settings import alone
from jobs.stages.stage import Found
from jobs.stages.table import NamedStage, stages_of
from orchestrator.config.changes import changed_keys
from orchestrator.config.config import Config
from orchestrator.errors import ConfigError, RlhfError
from orchestrator.run.folder import Compare, check_run_folder
from orchestrator.run.mirror import Mirror

PROBES = 8  # prompts on which rules are tried
_REPLY = "Thank you, I am glad to help with that."


@dataclass(frozen=True)
class Preflight:
    """The findings. `notes` are console lines; `prepared` is None if the prompts or their model are bad."""

    prepared: Prepared | None
    notes: Sequence[str]
    problems: Sequence[RlhfError]

    def require(self) -> Prepared:
        """The prepared prompts. Raises the problem, or several of them as one ConfigError."""
        if len(self.problems) > 1:
            raise ConfigError(f"{len(self.problems)} problems:\n" + "\n".join(f"- {error}" for error in self.problems))
        if self.problems or self.prepared is None:
            raise self.problems[0]
        return self.prepared


def check_alone(config: Config, stage: str) -> Prepared:
    """As `checked`, for a command that runs one stage (settings.alone)."""
    return _told(preflight(alone(config, stage), kept=config))


def checked(config: Config, compare: Compare = changed_keys) -> Prepared:
    """The prompts of a run with valid input. Raises the problems, see Preflight.require."""
    return _told(preflight(config, compare=compare))


def _told(found: Preflight) -> Prepared:
    prepared = found.require()
    for note in found.notes:
        say(note)
    return prepared


def preflight(config: Config, *, kept: Config | None = None, compare: Compare = changed_keys) -> Preflight:
    """Checks what the config's stages read and start.

    Args:
        kept: the config that the run folder will keep, if different from `config`.
        compare: see open_run.
    """
    notes: list[str] = []
    problems: list[RlhfError] = []

    def attempt(check: Callable[[], Any]) -> Any:
        try:
            return check()
        except RlhfError as error:
            problems.append(error)
            return None

    chat: Chat | None = attempt(lambda: policy_chat(config))
    stages: list[NamedStage] = attempt(lambda: stages_of(config)) or []
    prepared: Prepared | None = None
    if chat is not None:
        prepared = _prepared(config, stages, chat, attempt)
    found_of = {entry.name: _found(entry.config, chat, prepared) for entry in stages}
    read = () if prepared is None else (prepared, *prepared.others.values())
    notes.extend(each.describe() for each in read if each.report.path)
    checks: list[Callable[[], str | None]] = [
        lambda: require_embeddings(config, chat),
        *(
            partial(imported(check), entry.config, found_of[entry.name])
            for entry in stages
            for check in entry.stage.checks
        ),
        lambda: _port(config),
        lambda: check_engine(config),
        *(partial(check_width, entry.config) for entry in stages if entry.stage.samples),
        lambda: check_kernels(config),
        lambda: check_architecture(config),
        lambda: check_models(config),
        lambda: check_run_folder(kept or config, compare),
        lambda: _mirror(config),
    ]
    told = dict.fromkeys(note for note in map(attempt, checks) if note)  # two stages may report the same problem
    notes.extend(told)
    return Preflight(prepared, notes, _distinct(problems))


def _prepared(
    config: Config, stages: Sequence[NamedStage], chat: Chat, attempt: Callable[[Callable[[], Any]], Any]
) -> Prepared | None:
    """The prompts of all stages that sample; None if those of the run itself are bad."""
    configs = {prompts_key(entry.config): entry.config for entry in stages if entry.stage.samples}
    own = configs.pop(prompts_key(config), None)
    prepared: Prepared | None = without_prompts(chat) if own is None else attempt(lambda: prepare(config, chat))
    others = {key: attempt(partial(prepare, other, chat)) for key, other in configs.items()}
    if prepared is None or None in others.values():
        return None
    return replace(prepared, others=others)


def _found(config: Config, chat: Chat | None, prepared: Prepared | None) -> Found:
    mine = None if prepared is None else prepared.of(config)
    return Found(chat, mine, _examples(mine))


def _distinct(problems: Sequence[RlhfError]) -> list[RlhfError]:
    """Removes duplicates: two keys may name one bad file."""
    return list({str(error): error for error in problems}.values())


def _mirror(config: Config) -> str | None:
    if config.run.mirror is None:
        return None
    run_id = config.run.id or "none-yet"
    return f"mirror: {config.run.mirror}, {Mirror(config.run.mirror, run_id).check()} snapshots of this run"


def _port(config: Config) -> None:
    host, port = config.telemetry.prometheus_host, config.telemetry.prometheus_port
    if not port:
        return
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"telemetry.prometheus_host={host!r}, telemetry.prometheus_port={port}: can't listen there ({error}). Set "
            "the port to 0 for a free one, to another number, or to null for no endpoint."
        ) from None


def _examples(prepared: Prepared | None) -> pa.Table | None:
    """A made-up reply to the first prompts, in the form that reward sources get. None: no prompts."""
    if prepared is None or not prepared.prompts.train:
        return None
    prompts = prepared.prompts.train[:PROBES]
    return pa.table(
        {
            "prompt_text": [prompt.text for prompt in prompts],
            "response_text": [_REPLY for _ in prompts],
            "meta": [json.dumps(dict(prompt.meta)) for prompt in prompts],
        }
    )
