"""What is checked before anything starts: prompts, preferences, tokenizer, rewards, trackers, ports and the run folder.

Every check runs, and all that is wrong is told at once. Nothing is started and no weights are read.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from safetensors import SafetensorError, safe_open

from actors.learning.model import resolve_model
from actors.rewards import RewardSource
from actors.rewards.http import HttpReward
from actors.rewards.model import read_stats
from actors.rewards.rules import RuleReward
from actors.text.conversations import Chat
from actors.watching.trackers import require_packages, try_trackers
from jobs.check.architecture import check_architecture
from jobs.check.conversations import check_reward_conversations, check_vocabularies
from jobs.check.engine import check_engine
from jobs.check.models import check_models
from jobs.check.reward import check_reward_window
from jobs.command import say
from jobs.prepare import Prepared, find_data, policy_chat, prepare, without_prompts
from jobs.stages.reward_model import split_held_out
from jobs.stages.settings import alone
from orchestrator.config.config import Config, Stage
from orchestrator.config.rewards import HttpRewardConfig, ModelRewardConfig, RuleConfig, RulesRewardConfig
from orchestrator.data.readers import read_rankings
from orchestrator.errors import ConfigError, DataError, RewardError, RlhfError
from orchestrator.run.folder import check_run_folder
from orchestrator.run.mirror import Mirror

PROBES = 8  # prompts on which rules are tried
HTTP_PROBE_S = 10.0
RULES_PROBE_S = 40.0
TRACKERS_PROBE_S = 10.0
_REPLY = "Thank you, I am glad to help with that."


@dataclass(frozen=True)
class Preflight:
    """What was found. `notes` are lines for people; `prepared` is None when the prompts or their model are bad."""

    prepared: Prepared | None
    notes: Sequence[str]
    problems: Sequence[RlhfError]

    def require(self) -> Prepared:
        """The prepared prompts. Raises what is wrong: the one problem itself, or all of them as one ConfigError."""
        if len(self.problems) > 1:
            raise ConfigError(f"{len(self.problems)} problems:\n" + "\n".join(f"- {error}" for error in self.problems))
        if self.problems or self.prepared is None:
            raise self.problems[0]
        return self.prepared


def check_alone(config: Config, stage: Stage) -> Prepared:
    """As `checked`, for a run of one stage by a command of its own (settings.alone)."""
    return _told(preflight(alone(config, stage), kept=config))


def checked(config: Config) -> Prepared:
    """The prompts of a run whose input is good. Raises what is wrong, see Preflight.require."""
    return _told(preflight(config))


def _told(found: Preflight) -> Prepared:
    prepared = found.require()
    for note in found.notes:
        say(note)
    return prepared


def preflight(config: Config, *, kept: Config | None = None) -> Preflight:
    """Checks what the config's stages read and start.

    Args:
        kept: what the run folder will keep, where that is not `config`.
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
    prepared: Prepared | None = None
    if chat is not None:
        prepared = attempt(lambda: prepare(config, chat)) if config.has_rollouts else without_prompts(chat)
    if prepared is not None and config.has_rollouts:
        notes.append(prepared.describe())
    examples = _examples(prepared)
    checks: tuple[Callable[[], str | None], ...] = (
        lambda: _enough_prompts(config, prepared),
        lambda: _preferences(config),
        lambda: _reward(config, examples),
        lambda: _gold(config, examples),
        lambda: check_vocabularies(config, chat),
        lambda: check_reward_conversations(config, chat, prepared),
        lambda: check_reward_window(config),
        lambda: _trackers(config),
        lambda: _port(config),
        lambda: check_engine(config),
        lambda: check_architecture(config),
        lambda: check_models(config),
        lambda: check_run_folder(kept or config),
        lambda: _mirror(config),
    )
    notes.extend(note for note in map(attempt, checks) if note)
    return Preflight(prepared, notes, _distinct(problems))


def _distinct(problems: Sequence[RlhfError]) -> list[RlhfError]:
    """One file may be wrong in two places of the config."""
    return list({str(error): error for error in problems}.values())


def _enough_prompts(config: Config, prepared: Prepared | None) -> None:
    if prepared is None:
        return
    parts = prepared.prompts
    wanted = {
        "ppo": (parts.train, "to train on: lower prompts.held_out_fraction or prompts.reward_model_fraction"),
        "preferences": (parts.reward_model, "for the labeller: raise prompts.reward_model_fraction"),
    }
    for stage, (prompts, way_out) in wanted.items():
        if stage in config.stages and not prompts:
            raise DataError(f"of {prepared.report.num_records} prompts none is left {way_out}, or give more prompts.")


def _preferences(config: Config) -> str | None:
    preferences = config.preferences
    if preferences.path is None or "reward_model" not in config.stages:
        return None
    records, report = read_rankings(find_data(preferences.path), preferences.format, preferences.limit)
    split_held_out(records, preferences.held_out)
    return f"preferences: {report.summary()}"


def _reward(config: Config, examples: pa.Table | None) -> str | None:
    reward = config.reward
    if "ppo" not in config.stages:
        return None
    if isinstance(reward, ModelRewardConfig):
        return _reward_model(config, reward)
    if isinstance(reward, RulesRewardConfig):
        return _rules_tried("rules", reward.rules, "reward.rules", config, examples)
    if isinstance(reward, HttpRewardConfig) and examples is not None:  # without prompts there is nothing to try
        limits = {"timeout_s": min(reward.timeout_s, HTTP_PROBE_S), "retries": min(reward.retries, 1)}
        source = HttpReward(reward.model_copy(update=limits))
        return _tried(f"endpoint {reward.url}", source, examples.slice(0, 1), "reward.url")
    return None


def _tried(name: str, source: RewardSource, examples: pa.Table, key: str) -> str:
    """Scores a made-up reply to real prompts.

    Raises:
        ConfigError: the source is down, or can score none of them.
    """
    try:
        scores = source.scores(examples)
    except RewardError as error:
        raise ConfigError(str(error)) from error
    failed = [score.error for score in scores if score.value is None]
    if failed and len(failed) == len(scores):
        raise ConfigError(
            f"reward ({name}) failed on all of {len(scores)} sample prompts: {failed[0]}. Correct what {key} names, "
            "or give prompts with the fields that it reads."
        )
    return f"reward ({name}): scores a made-up reply to {len(scores) - len(failed)} of {len(scores)} sample prompts"


def _reward_model(config: Config, reward: ModelRewardConfig) -> str | None:
    if reward.path is None:
        return None  # a stage of this run trains it
    folder = resolve_model(reward.path, config.run.cache)
    if reward.normalise:
        read_stats(folder)
    names = {name for file in sorted(folder.glob("*.safetensors")) for name in _tensor_names(file)}
    if names and not any(name.startswith("score.") for name in names):
        raise DataError(
            f"reward.path: {folder} has no scalar head (no tensor score.*), so its scores would be noise. Give a "
            "trained reward model: a sequence classifier with one label."
        )
    return f"reward (model): {folder} has a scalar head"


def _tensor_names(file: Any) -> Iterator[str]:
    try:
        with safe_open(file, "pt") as tensors:
            yield from tensors.keys()
    except (OSError, SafetensorError) as error:
        raise DataError(f"{file} can't be read ({error}): is it complete?") from error


def _gold(config: Config, examples: pa.Table | None) -> str | None:
    wanted = {"labeller.gold": config.labeller.gold if "preferences" in config.stages else None}
    if "ppo" in config.stages and config.evaluation.prompts:
        wanted["evaluation.gold"] = config.evaluation.gold
    keys = {function: key for key, function in wanted.items() if function is not None}
    notes = [
        _rules_tried(f"gold, {function}", [RuleConfig(function=function)], key, config, examples)
        for function, key in keys.items()
    ]
    return "\n".join(note for note in notes if note) or None


def _rules_tried(
    name: str, rules: Sequence[RuleConfig], key: str, config: Config, examples: pa.Table | None
) -> str | None:
    with RuleReward(rules, config.rule_limits, total_s=RULES_PROBE_S) as source:
        return None if examples is None else _tried(name, source, examples, key)


def _mirror(config: Config) -> str | None:
    if config.run.mirror is None:
        return None
    run_id = config.run.id or "none-yet"
    return f"mirror: {config.run.mirror}, {Mirror(config.run.mirror, run_id).check()} snapshots of this run"


def _trackers(config: Config) -> str | None:
    if "ppo" not in config.stages:
        return None
    require_packages(config.telemetry)
    return "\n".join(try_trackers(config.telemetry, TRACKERS_PROBE_S)) or None


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
    """A made-up reply to the first prompts, as reward sources read samples. None: there are no prompts."""
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
