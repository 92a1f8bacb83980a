"""Rule rewards: functions of (prompt, response, meta) that return a number, or named parts to be summed.

A rule that raises, exits, hangs or does not return finite numbers fails only the current sample.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from time import monotonic
from typing import Any

import pyarrow as pa

from actors.rewards import RewardContext, Score
from actors.rewards.contained import ProcessEndedError, RuleProcess
from orchestrator.config.rewards import RuleConfig, RuleLimits, RulesSource
from orchestrator.errors import ConfigError, RewardError

_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")
_MARK = "####"
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
# One marked answer, at the end.
_ENDS_MARKED = re.compile(
    r"(?:(?!<answer>|####).)*(?:<answer>(?P<tag>(?:(?!<answer>|####|</answer>).)*)</answer>|#### ?(?P<line>[^\n#]+))",
    re.DOTALL,
)
_FORMULA_SIGNS = ("$", "\\(", "\\[", "\\boxed")
_OPERATOR = re.compile(r"[=^*/+\\{}()\[\]<>-]")
FORMAT_REWARD = 0.1
DEFAULT_TARGET_WORDS = 50


def exact_answer(prompt: str, response: str, meta: Mapping[str, Any]) -> float:
    """1 if the response's final number equals that of meta["answer"], else 0 (GSM8K, Cobbe 2021).

    The final number is the one after the last `####`, or the last number if there is no `####`.
    """
    return float(_final_number(response) == _expected_number(meta))


def formatted_answer(prompt: str, response: str, meta: Mapping[str, Any]) -> Mapping[str, float]:
    """Parts `format`: 0.1 if the response ends with its only marked answer, `<answer>...</answer>` or a last line
    `#### ...`, else 0; and `answer`: 1 if that answer's number equals that of meta["answer"], else 0.

    Raises:
        ValueError: meta["answer"] contains no number.
    """
    expected = _expected_number(meta)
    found = _ENDS_MARKED.fullmatch(response.rstrip())
    if found is None:
        return {"format": 0.0, "answer": 0.0}
    return {"format": FORMAT_REWARD, "answer": float(_final_number(found["tag"] or found["line"]) == expected)}


def math_answer(prompt: str, response: str, meta: Mapping[str, Any]) -> float:
    """1 if the response's final expression equals that of meta["answer"] by the package math-verify, else 0: 1/2, 0.5
    and \\boxed{\\frac{1}{2}} are equal.

    The final expression is the last in `<answer>...</answer>`, or the one after the last `####`; without a mark it is
    the one that math-verify finds: a box, a formula, or the last number.

    Raises:
        ImportError: math-verify is not installed.
        ValueError: meta["answer"] contains no expression.
    """
    expected = _expressions(str(meta["answer"]), is_answer=True)
    if not expected:
        raise ValueError(f"meta['answer'] contains no expression: {str(meta['answer'])[-40:]!r}")
    return float(_math_verify().verify(expected, _expressions(response)))


def length_target(prompt: str, response: str, meta: Mapping[str, Any]) -> float:
    """0 at meta["target_words"] words (default 50), decreasing linearly to -1 at no words and at twice the target."""
    target = float(meta.get("target_words", DEFAULT_TARGET_WORDS))
    return -min(abs(len(response.split()) - target) / target, 1.0)


def _expected_number(meta: Mapping[str, Any]) -> float:
    expected = _final_number(str(meta["answer"]))
    if expected is None:
        raise ValueError(f"meta['answer'] contains no number: {str(meta['answer'])[-40:]!r}")
    return expected


def _final_number(text: str) -> float | None:
    _, mark, answer = text.rpartition(_MARK)
    found = _NUMBER.findall(answer)
    if not found:
        return None
    number = found[0] if mark else found[-1]
    return float(number.replace(",", "").replace("$", ""))


def _expressions(text: str, *, is_answer: bool = False) -> list[Any]:
    """What math-verify reads in a text. `is_answer`: the whole text is the answer, if none is marked in it."""
    tagged = _TAGGED.findall(text)
    _, mark, line = text.rpartition(_MARK)
    is_marked = bool(tagged or mark)
    text = tagged[-1] if tagged else line.strip().partition("\n")[0] if mark else text
    numbers = _NUMBER.findall(text)
    if (is_marked or is_answer) and not any(sign in text for sign in _FORMULA_SIGNS):
        if len(numbers) == 1 and not _OPERATOR.search(text.replace(numbers[0], "")):
            text = numbers[0]  # a number with its unit: "18 dollars"
        else:
            text = f"${text.strip()}$"
    found: list[Any] = _math_verify().parse(text)
    # It overlooks a number beside Chinese characters.
    return found or (_math_verify().parse(numbers[-1]) if numbers else [])


def _math_verify() -> Any:
    try:
        return importlib.import_module("math_verify")  # not above: it is optional, and imports sympy for a second
    except ImportError:
        raise ImportError(
            "needs the package math-verify on every node: pip install 'math-verify[antlr4_13_2]'"
        ) from None


class RuleReward:
    """The weighted sum of rules, which run in a separate process (contained.py).

    Args:
        total_s: time limit for one table. Samples that are not scored in time fail.

    Raises:
        ConfigError: a rule is duplicated or can't be imported.
    """

    def __init__(self, rules: Sequence[RuleConfig], limits: RuleLimits, *, total_s: float) -> None:
        functions = [rule.function for rule in rules]
        twice = sorted({function for function in functions if functions.count(function) > 1})
        if twice:
            raise ConfigError(f"reward.rules names {twice[0]!r} twice; name it once with the sum of the weights.")
        for function in functions:
            module, _, attribute = function.partition(":")
            if not module or not attribute:
                raise ConfigError(f"rule {function!r} does not have the form package.module:function.")
        short = [function.rpartition(":")[2] for function in functions]
        names = [name if short.count(name) == 1 else function for name, function in zip(short, functions, strict=True)]
        self._rules = [(name, rule.function, rule.weight) for name, rule in zip(names, rules, strict=True)]
        self._limits, self._total_s = limits, total_s
        self._process = RuleProcess(self._rules, limits)

    def scores(self, table: pa.Table) -> list[Score]:
        """A rule that ends its process, hangs or exceeds a limit fails its sample; the others are scored.

        Raises:
            RewardError: the process can't be restarted.
        """
        columns = (table[name].to_pylist() for name in ("prompt_text", "response_text", "meta"))
        rows = list(zip(*columns, strict=True))
        until = monotonic() + self._total_s
        scores: list[Score] = []
        while len(scores) < len(rows) and monotonic() < until:
            try:
                for answer in self._running().ask(rows[len(scores) :], until):
                    scores.append(_score(answer))  # noqa: PERF401  keeps the scores before an error
            except ProcessEndedError as error:
                if error.is_certain:  # else the sample is retried first in a new process
                    scores.append(Score(None, error=str(error)))
        late = Score(None, error=f"not scored: the rules took more than {self._total_s:.0f} s for one shard")
        return scores + [late] * (len(rows) - len(scores))

    def close(self) -> None:
        """Ends the rules' process."""
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
                raise RewardError(f"the rules' process can't be restarted: {error}") from None
        return self._process


def build(reward: RulesSource, context: RewardContext) -> RuleReward:
    return RuleReward(reward.rules, context.limits, total_s=context.total_s)


def _score(answer: Any) -> Score:
    if isinstance(answer, str):
        return Score(None, error=answer)
    value, parts = answer
    return Score(value, parts)
