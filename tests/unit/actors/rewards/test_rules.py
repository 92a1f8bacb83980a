"""Rules are found by name, summed by weight, and fail one sample at a time."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.rewards.rules import FORMAT_REWARD, RuleReward, exact_answer, formatted_answer, length_target, math_answer
from orchestrator.config.rewards import RuleConfig, RuleLimits
from orchestrator.errors import ConfigError
from tests.unit.actors.rewards.rollouts import rollout_table

HERE = __name__
NOT_A_FUNCTION = 3


def words(prompt: str, response: str, meta: Mapping[str, Any]) -> float:
    return float(len(response.split()))


def parts(prompt: str, response: str, meta: Mapping[str, Any]) -> Mapping[str, float]:
    return {"polite": np.float32(1.0), "brief": 2}


def picky(prompt: str, response: str, meta: Mapping[str, Any]) -> Any:
    return json.loads(response)


def reward(*rules: tuple[str, float]) -> RuleReward:
    return named(*((f"{HERE}:{name}", weight) for name, weight in rules))


def named(*rules: tuple[str, float]) -> RuleReward:
    configs = [RuleConfig(function=function, weight=weight) for function, weight in rules]
    return RuleReward(configs, RuleLimits(), total_s=60.0)


@pytest.mark.parametrize(
    ("answer", "response", "expected"),
    [
        ("x\n#### 72", "So it is 70 + 2 = 72.", 1.0),
        ("#### 72", "It is 72, I think, or 73", 0.0),
        ("#### 1,250", "#### $1250.00 and 3 more", 1.0),
        ("#### -4", "-4", 1.0),
        ("72", "no number", 0.0),
        ("72", "", 0.0),
    ],
)
def test_exact_answer(answer: str, response: str, expected: float) -> None:
    assert exact_answer("q", response, {"answer": answer}) == expected


@pytest.mark.parametrize(
    ("response", "has_format", "is_right"),
    [
        ("70 + 2 = 72\n#### 72", True, True),
        ("所以是 72。\n#### 72\n", True, True),
        ("<answer> $72.00 </answer>", True, True),
        ("so\n<answer>\n72\n</answer>", True, True),
        ("#### 71", True, False),
        ("<answer>none</answer>", True, False),
        ("It is 72.", False, False),
        ("#### 72\nor so", False, False),
        ("#### 71\n#### 72", False, False),
        ("<answer>71</answer> no, <answer>72</answer>", False, False),
        ("<answer>72</answer> I think", False, False),
        ("<answer>72", False, False),
        ("", False, False),
        ("<answer>" * 100_000, False, False),
    ],
)
def test_formatted_answer(response: str, has_format: bool, is_right: bool) -> None:
    found = formatted_answer("q", response, {"answer": "x\n#### 72"})
    assert found == {"format": FORMAT_REWARD * has_format, "answer": float(is_right)}


@pytest.mark.parametrize("rule", [exact_answer, formatted_answer])
def test_an_answer_without_a_number_is_a_failure_and_not_zero(rule: Any) -> None:
    with pytest.raises(ValueError, match="contains no number: 'none'"):
        rule("q", "#### 72", {"answer": "none"})


@pytest.mark.parametrize(
    ("answer", "response", "expected"),
    [
        ("x\n#### 72", "So it is 70 + 2 = 72.", 1.0),
        ("#### 1,234", "#### 1234 dollars", 1.0),
        ("#### 72", "#### 71", 0.0),
        ("\\frac{1}{2}", "It is \\boxed{0.5}", 1.0),
        ("x^2+1", "<answer>1 + x^2</answer>", 1.0),
        ("x^2+1", "<answer>1 + x^3</answer>", 0.0),
        ("5", "答案是5。", 1.0),
        ("5", "不知道", 0.0),
        ("5", "", 0.0),
    ],
)
def test_math_answer(answer: str, response: str, expected: float) -> None:
    pytest.importorskip("math_verify")
    assert math_answer("q", response, {"answer": answer}) == expected


def test_math_answer_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match="needs the package math-verify on every node: pip install"):
        math_answer("q", "#### 72", {"answer": "72"})


def test_length_target() -> None:
    meta = {"target_words": 4}
    assert [length_target("q", "w " * n, meta) for n in (0, 2, 4, 6, 8, 100)] == [-1.0, -0.5, 0.0, -0.5, -1.0, -1.0]
    assert length_target("q", "w " * 50, {}) == 0.0


def test_the_reward_is_the_weighted_sum_and_parts_are_raw() -> None:
    with reward(("words", 0.5), ("parts", 2.0)) as source:
        (score,) = source.scores(rollout_table(["one two"]))
    assert score.value == 0.5 * 2 + 2.0 * 3
    assert score.parts == {"words": 2.0, "parts.polite": 1.0, "parts.brief": 2.0}


def test_a_failing_sample_is_a_failure_not_zero_and_fails_alone() -> None:
    responses = ["1.5", "not json", "NaN", "true", '"text"', "{}", '{"a": null}', "null", "2"]
    with reward(("picky", 1.0)) as source:
        scores = source.scores(rollout_table(responses))
    assert [score.value for score in scores] == [1.5, *[None] * 7, 2.0]
    assert scores[1].error is not None and "rule picky: JSONDecodeError" in scores[1].error
    assert all(score.error and "not a finite number" in score.error for score in scores[2:8])


def test_rules_see_prompt_response_and_meta() -> None:
    with named(("actors.rewards.rules:exact_answer", 1.0)) as source:
        (score,) = source.scores(rollout_table(["#### 7"], metas=[{"answer": "#### 7"}]))
    assert score.value == 1.0


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("nowhere_at_all:f", "can't be imported"),
        (f"{HERE}:missing", "has no 'missing'; it has: .*words"),
        (f"{HERE}:NOT_A_FUNCTION", "is a int, not a function"),
        ("no_colon", "does not have the form package.module:function"),
        (":f", "does not have the form"),
    ],
)
def test_names_that_lead_nowhere_are_config_errors(name: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        named((name, 1.0))


def test_a_rule_named_twice_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="twice"):
        reward(("words", 1.0), ("words", 2.0))


def test_rules_of_one_name_from_two_modules_keep_their_parts_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "other_rules.py").write_text("def words(*_): return {'polite': 1.0, 'brief': 2.0}")
    monkeypatch.syspath_prepend(tmp_path)
    with named((f"{HERE}:words", 1.0), ("other_rules:words", 1.0)) as source:
        (score,) = source.scores(rollout_table(["one"]))
    assert set(score.parts) == {f"{HERE}:words", "other_rules:words.polite", "other_rules:words.brief"}
