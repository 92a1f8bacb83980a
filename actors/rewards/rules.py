"""Rule rewards: functions of (prompt, response, meta) that give a number, or named parts that are added up.

A rule that raises, exits, hangs, or gives something else than finite numbers, fails that one sample and no other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from time import monotonic
from typing import Any

import pyarrow as pa

from actors.rewards import RewardContext, Score
from actors.rewards.contained import ProcessEndedError, RuleProcess
from orchestrator.config.rewards import RuleConfig, RuleLimits, RulesRewardConfig
from orchestrator.errors import ConfigError, RewardError

_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")
_MARK = "####"
DEFAULT_TARGET_WORDS = 50


def exact_answer(prompt: str, response: str, meta: Mapping[str, Any]) -> float:
    """1 when the response's final number equals that of meta["answer"], else 0 (GSM8K, Cobbe 2021).

    The final number is the one behind the last `####`, or the last number where there is no `####`.
    """
    expected = _final_number(str(meta["answer"]))
    if expected is None:
        raise ValueError(f"meta['answer'] holds no number: {str(meta['answer'])[-40:]!r}")
    return float(_final_number(response) == expected)


def length_target(prompt: str, response: str, meta: Mapping[str, Any]) -> float:
    """0 at meta["target_words"] words (default 50), falling evenly to -1 at none and at twice as many."""
    target = float(meta.get("target_words", DEFAULT_TARGET_WORDS))
    return -min(abs(len(response.split()) - target) / target, 1.0)


def _final_number(text: str) -> float | None:
    _, mark, answer = text.rpartition(_MARK)
    found = _NUMBER.findall(answer)
    if not found:
        return None
    number = found[0] if mark else found[-1]
    return float(number.replace(",", "").replace("$", ""))


class RuleReward:
    """The weighted sum of rules, which run in a process of their own (contained.py).

    Args:
        total_s: time for one table. What is not scored by then is a failure.

    Raises:
        ConfigError: a rule can't be found or imported, or one is named twice.
    """

    def __init__(self, rules: Sequence[RuleConfig], limits: RuleLimits, *, total_s: float) -> None:
        functions = [rule.function for rule in rules]
        twice = sorted({function for function in functions if functions.count(function) > 1})
        if twice:
            raise ConfigError(f"reward.rules names {twice[0]!r} twice; name it once, with the sum of the weights.")
        for function in functions:
            module, _, attribute = function.partition(":")
            if not module or not attribute:
                raise ConfigError(f"rule {function!r} is not of the form package.module:function.")
        short = [function.rpartition(":")[2] for function in functions]
        names = [name if short.count(name) == 1 else function for name, function in zip(short, functions, strict=True)]
        self._rules = [(name, rule.function, rule.weight) for name, rule in zip(names, rules, strict=True)]
        self._limits, self._total_s = limits, total_s
        self._process = RuleProcess(self._rules, limits)

    def scores(self, table: pa.Table) -> list[Score]:
        """A rule that ends, hangs or bursts its process fails the sample it was given; the others are scored.

        Raises:
            RewardError: the rules can't be imported any more.
        """
        columns = (table[name].to_pylist() for name in ("prompt_text", "response_text", "meta"))
        rows = list(zip(*columns, strict=True))
        until = monotonic() + self._total_s
        scores: list[Score] = []
        while len(scores) < len(rows) and monotonic() < until:
            try:
                for answer in self._running().ask(rows[len(scores) :], until):
                    scores.append(_score(answer))  # noqa: PERF401  those before an end are kept
            except ProcessEndedError as error:
                if error.is_certain:  # else it is asked again, as the first one of a new process
                    scores.append(Score(None, error=str(error)))
        late = Score(None, error=f"not scored: the rules took more than {self._total_s:.0f} s for one shard")
        return scores + [late] * (len(rows) - len(scores))

    def close(self) -> None:
        """Ends the process of the rules."""
        self._process.close()

    def __enter__(self) -> RuleReward:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _running(self) -> RuleProcess:
        if not self._process.is_alive():
            self._process.close()
            try:
                self._process = RuleProcess(self._rules, self._limits)
            except ConfigError as error:
                raise RewardError(f"the process of the rules can't be started again: {error}") from None
        return self._process


def build(reward: RulesRewardConfig, context: RewardContext) -> RuleReward:
    return RuleReward(reward.rules, context.limits, total_s=context.total_s)


def _score(answer: Any) -> Score:
    if isinstance(answer, str):
        return Score(None, error=answer)
    value, parts = answer
    return Score(value, parts)
