"""Checks of stages: tries preferences, reward sources and gold rules before anything starts."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from time import monotonic
from typing import Any, TypeVar

import pyarrow as pa
from safetensors import SafetensorError, safe_open

from actors.models.files import read_config, window
from actors.models.model import resolve_model
from actors.rewards import RewardSource, Score, samples
from actors.rewards.http import HttpReward
from actors.rewards.judge import JudgeReward
from actors.rewards.model import read_stats
from actors.rewards.pair_judge import PairJudge
from actors.rewards.rules import RuleReward
from jobs.stages.settings import judge_templates, pair_template, reward_bases, reward_max_length
from jobs.stages.stage import Found
from jobs.stages.work.data.judged import sample
from jobs.stages.work.data.replies import read_replies, replies_table
from orchestrator.config.base import Section
from orchestrator.config.config import Config
from orchestrator.config.losses import Judgement
from orchestrator.config.rewards import (
    HttpSource,
    JudgeConfig,
    JudgeSource,
    ModelSource,
    RuleConfig,
    RulesSource,
    reward_models,
)
from orchestrator.errors import ConfigError, DataError, RewardError

HTTP_PROBE_S = 10.0
RULES_PROBE_S = 40.0
JUDGE_PROBE_S = 30.0
_JUDGE_SHOWN = 60  # characters
Judging = TypeVar("Judging", bound=JudgeConfig)


def check_rewarded(config: Config, found: Found) -> str | None:
    """The file that the reward model is trained on."""
    return _judged_file(config, config.reward_model.loss.judgement)


def check_preferred(config: Config, found: Found) -> str | None:
    """The file that the policy is trained on without a reward model."""
    return _judged_file(config, config.preference.loss.judgement)


def _judged_file(config: Config, judgement: Judgement) -> str | None:
    if config.preferences.path is None:
        return None
    return f"preferences: {sample(config, judgement).report.summary()}"


def check_replies(config: Config, found: Found) -> str | None:
    """Reads the file of stage `score`, and writes its first reply. Raises DataError."""
    if config.score.path is None:
        return None
    records, report = read_replies(config)
    if found.chat is not None:
        replies_table(records[:1], found.chat)
    return f"replies: {report.summary()}"


def check_reward(config: Config, found: Found) -> str | None:
    """Tries each source of the reward. Raises ConfigError, DataError, which name its section."""
    lines = []
    for key, source in config.reward.sources_by_key().items():
        try:
            lines.append(_source_tried(key, source, config, found.examples))
        except (ConfigError, DataError) as error:
            if key in str(error):
                raise
            raise type(error)(f"{key}: {error}") from error
    return "\n".join(line for line in lines if line) or None


def _source_tried(key: str, source: Section, config: Config, examples: pa.Table | None) -> str | None:
    if isinstance(source, ModelSource):
        return _reward_model(key, config, source)
    if isinstance(source, RulesSource):
        return _rules_tried(_called(key, "rules"), source.rules, f"{key}.rules", config, examples)
    if isinstance(source, HttpSource) and examples is not None:  # nothing to try without prompts
        limits = {"timeout_s": min(source.timeout_s, HTTP_PROBE_S), "retries": min(source.retries, 1)}
        endpoint = HttpReward(source.model_copy(update=limits))
        return _tried(_called(key, f"endpoint {source.url}"), endpoint, examples.slice(0, 1), f"{key}.url")
    if isinstance(source, JudgeSource):
        return _judge_tried(key, config, source, examples)
    return None


def check_pair_judge(config: Config, found: Found) -> str | None:
    """Compares an invented reply with itself.

    Raises:
        ConfigError: the judge is down, or its answer has no verdict.
    """
    judge = config.evaluate.judge
    if judge is None:
        return None
    source = PairJudge(_for_probe(judge), pair_template(judge))
    if found.examples is None:
        return None
    tried = list(samples(found.examples.slice(0, 1)))
    try:
        compared = asyncio.run(source.compare(tried, tried, monotonic() + 2 * JUDGE_PROBE_S))[0]
    except RewardError as error:
        raise ConfigError(str(error)) from error
    if compared.value is None:
        raise ConfigError(f"evaluate.judge gave no verdict: {compared.error}. Correct its template or verdict.")
    said = "disagrees with itself in the other order" if compared.disagrees else f"values it {compared.value:g}"
    return f"evaluate.judge ({judge.model} at {judge.url}): compares a made-up reply with itself and {said}"


def check_labeller(config: Config, found: Found) -> str | None:
    gold = config.labeller.gold
    return _rules_tried(f"reward (gold, {gold})", [RuleConfig(function=gold)], "labeller.gold", config, found.examples)


def check_gold(config: Config, found: Found) -> str | None:
    gold = config.evaluation.gold if config.evaluation.prompts else None
    if gold is None:
        return None
    return _rules_tried(
        f"reward (gold, {gold})", [RuleConfig(function=gold)], "evaluation.gold", config, found.examples
    )


def check_reward_window(config: Config, found: Found) -> str | None:
    """Reports the reward model's longest transcript if a prompt and its response can be longer.

    Raises:
        ConfigError: reward.max_length exceeds the window of the reward model.
    """
    bases = reward_bases(config)
    lines = [_window_line(key, source, bases[key][0], config) for key, source in reward_models(config.reward).items()]
    return "\n".join(line for line in lines if line) or None


def _window_line(key: str, source: ModelSource, model: str, config: Config) -> str | None:
    folder = resolve_model(model, config.run.cache)
    there = window(read_config(folder, trust_remote_code=config.model.trust_remote_code))
    wanted = source.max_length
    if wanted is not None and there is not None and wanted > there:
        raise ConfigError(
            f"{key}.max_length={wanted} exceeds what the reward model takes: {folder} has {there} positions. Set "
            f"{key}.max_length={there} or less, or leave it out."
        )
    taken = min((n for n in (reward_max_length(config, source), there) if n), default=None)
    if taken is None or taken >= config.model.max_length:
        return None
    return (
        f"{_model_called(key)}: takes the last {taken} tokens of a transcript, which may have model.max_length="
        f"{config.model.max_length} and more in its own template; those that lose their start are counted in reward/cut"
    )


def _tried(name: str, source: RewardSource, examples: pa.Table, key: str) -> str:
    """Scores a made-up reply to real prompts.

    Raises:
        ConfigError: the source is down, or can't score any prompt.
    """
    try:
        return _worked(name, source.scores(examples), key)
    except RewardError as error:
        raise ConfigError(str(error)) from error


def _worked(name: str, scores: Sequence[Score], key: str) -> str:
    failed = [score.error for score in scores if score.value is None]
    if failed and len(failed) == len(scores):
        raise ConfigError(
            f"{name} failed on all of {len(scores)} sample prompts: {failed[0]}. Correct what {key} names, "
            "or give prompts with the fields that it reads."
        )
    return f"{name}: scores a made-up reply to {len(scores) - len(failed)} of {len(scores)} sample prompts"


def _judge_tried(key: str, config: Config, reward: JudgeSource, examples: pa.Table | None) -> str | None:
    """Asks the judge itself, not the cache of its answers."""
    source = JudgeReward(_for_probe(reward), judge_templates(config).get(key), total_s=2 * JUDGE_PROBE_S)
    if examples is None:
        return None
    try:
        judged = source.judgements(examples.slice(0, 1))
    except RewardError as error:
        raise ConfigError(str(error)) from error
    name = _called(key, f"judge {reward.model} at {reward.url}")
    line = _worked(name, [source.score(one) for one in judged], f"{key}.template")
    return f"{line}; its answer ends with {judged[0].text[-_JUDGE_SHOWN:]!r}, which is {judged[0].verdict}"


def _for_probe(judge: Judging) -> Judging:
    limits = {"timeout_s": min(judge.timeout_s, JUDGE_PROBE_S), "retries": min(judge.retries, 1)}
    return judge.model_copy(update=limits)


def _reward_model(key: str, config: Config, reward: ModelSource) -> str | None:
    if reward.path is None:
        return None  # a stage of this run trains it
    folder = resolve_model(reward.path, config.run.cache)
    if reward.normalise:
        read_stats(folder)
    names = {name for file in sorted(folder.glob("*.safetensors")) for name in _tensor_names(file)}
    if names and not any(name.startswith("score.") for name in names):
        raise DataError(
            f"{key}.path: {folder} has no scalar head (no tensor score.*), so its scores would be noise. Give a "
            "trained reward model: a sequence classifier with one label."
        )
    return f"{_called(key, 'model')}: {folder} has a scalar head"


def _called(key: str, kind: str) -> str:
    """A source in messages: reward (rules), reward.sources.brief (rules)."""
    return f"{key} ({kind})"


def _model_called(key: str) -> str:
    return "reward model" if key == "reward" else f"{key} (reward model)"


def _tensor_names(file: Any) -> Iterator[str]:
    try:
        with safe_open(file, "pt") as tensors:
            yield from tensors.keys()
    except (OSError, SafetensorError) as error:
        raise DataError(f"{file} can't be read ({error}): is it complete?") from error


def _rules_tried(
    name: str, rules: Sequence[RuleConfig], key: str, config: Config, examples: pa.Table | None
) -> str | None:
    with RuleReward(rules, config.rule_limits, total_s=RULES_PROBE_S) as source:
        return None if examples is None else _tried(name, source, examples, key)
