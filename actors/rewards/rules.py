"""Rule rewards: functions of (prompt, response, meta) that give a number, or named parts that are added up.

A rule that raises, or gives something else than finite numbers, fails that one sample and no other.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from actors.rewards import Sample, Score, is_number, samples
from orchestrator.config import RuleConfig
from orchestrator.errors import ConfigError

Rule = Callable[[str, str, Mapping[str, Any]], float | Mapping[str, float]]

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


def load_rule(name: str) -> Rule:
    """The function at `package.module:function`.

    Raises:
        ConfigError: no such module, no such attribute, or it can't be called.
    """
    module_name, separator, attribute = name.partition(":")
    if not separator or not attribute or not module_name:
        raise ConfigError(f"rule {name!r} is not of the form package.module:function.")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a rule's module is the user's code and may raise anything
        raise ConfigError(
            f"rule {name!r}: module {module_name!r} can't be imported ({type(error).__name__}: {error}). Check "
            "its name, and that it is installed (or in the working directory) on every node."
        ) from error
    rule = getattr(module, attribute, None)
    if rule is None:
        known = ", ".join(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise ConfigError(f"rule {name!r}: {module_name!r} has no {attribute!r}; it has: {known or 'no functions'}.")
    if not callable(rule):
        raise ConfigError(f"rule {name!r} is a {type(rule).__name__}; name a function of (prompt, response, meta).")
    return rule


@dataclass(frozen=True)
class _WeightedRule:
    name: str
    rule: Rule
    weight: float


class RuleReward:
    """The weighted sum of rules.

    Raises:
        ConfigError: a rule can't be found, or one is named twice.
    """

    def __init__(self, rules: Sequence[RuleConfig]) -> None:
        functions = [rule.function for rule in rules]
        twice = sorted({function for function in functions if functions.count(function) > 1})
        if twice:
            raise ConfigError(f"reward.rules names {twice[0]!r} twice; name it once, with the sum of the weights.")
        short = [function.rpartition(":")[2] for function in functions]
        names = [name if short.count(name) == 1 else function for name, function in zip(short, functions, strict=True)]
        self._rules = [
            _WeightedRule(name, load_rule(rule.function), rule.weight) for name, rule in zip(names, rules, strict=True)
        ]

    def scores(self, table: pa.Table) -> list[Score]:
        return [self.score(sample) for sample in samples(table)]

    def score(self, sample: Sample) -> Score:
        total, parts = 0.0, dict[str, float]()
        for weighted in self._rules:
            try:
                result = weighted.rule(sample.prompt, sample.response, sample.meta)
            except Exception as error:  # noqa: BLE001  a rule is the user's code and may raise anything
                return Score(None, error=f"rule {weighted.name}: {type(error).__name__}: {error}")
            named = _named_parts(weighted.name, result)
            bad = [name for name, value in named.items() if not is_number(value)]
            if bad or not named:
                return Score(None, error=f"rule {weighted.name} gave {result!r}, not a finite number or named ones")
            parts |= {name: float(value) for name, value in named.items()}
            total += weighted.weight * float(sum(named.values()))
        return Score(total, parts)


def _named_parts(rule: str, result: Any) -> dict[str, Any]:
    if isinstance(result, Mapping):
        return {f"{rule}.{part}": value for part, value in result.items()}
    return {rule: result}
