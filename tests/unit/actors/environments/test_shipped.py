"""The shipped environments: rewards and answers of hand-written episodes."""

from __future__ import annotations

import pytest

from actors.environments.calculator import Calculator, calculated
from actors.environments.contract import Task
from actors.environments.word_game import WORDS, WordGame

TASK = Task("How many?", {"answer": "so it is #### 42"}, 7)


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("3*4", "3*4 = 12"),
        (" 2 × (1,000 − 1) ", "2 × (1,000 − 1) = 1998"),
        ("$7.50/3", "$7.50/3 = 2.5"),
        ("10/4", "10/4 = 2.5"),
        ("8/4", "8/4 = 2"),
        ("2^10 % 7", "2^10 % 7: no result, it is no arithmetic"),
        ("7 // 2 + -1", "7 // 2 + -1 = 2"),
        ("50%", "50% = 0.5"),
        ("8 / 50%", "8 / 50% = 16"),
        ("16 ^ 50%", "16 ^ 50% = 4"),
        ("(20 + 5)% * 8", "(20 + 5)% * 8 = 2"),
        ("-5%", "-5% = -0.05"),
        ("50[100]", "50[100]: no result, it is no arithmetic"),
        ("10 % 3", "10 % 3: no result, it is no arithmetic"),
        ("1/0", "1/0: no result, division by zero"),
        ("9**9**9", "9**9**9: no result, its exponent is too large"),
        ("(10**200)*(10**200)", "(10**200)*(10**200): no result, it is too large"),
        ("(-8)**0.5", "(-8)**0.5: no result, it is not a real number"),
        ("__import__('os')", "__import__('os'): no result, it is no arithmetic"),
        ("x+1", "x+1: no result, it is no arithmetic"),
        ("True + 1", "True + 1: no result, it is no arithmetic"),
        ("", ": no result, it is no arithmetic"),
        ("(" * 300, "(" * 200 + ": no result, it is longer than 200 characters"),
    ],
)
def test_expressions(expression: str, result: str) -> None:
    assert calculated(expression) == result


def test_a_call_is_answered_and_a_marked_number_ends_the_episode() -> None:
    game = Calculator(call_reward=0.2)
    game.reset(TASK)
    observation, reward, done, info = game.step("I need <calc>6*7</calc> and <calc>1+</calc>")
    assert observation == "6*7 = 42\n1+: no result, it is no arithmetic"
    nothing = {"answer": 0.0, "format": 0.0, "call": 0.0}
    assert (reward, done, info) == ({**nothing, "call": 0.2}, False, {"calls": ["6*7", "1+"]})
    assert game.step("<calc>6*7</calc>")[1] == nothing, "only the first call is rewarded"
    fresh = Calculator(call_reward=0.2)
    fresh.reset(TASK)
    assert fresh.step("<calc>6*7 = 42</calc>")[:2] == ("6*7 = 42: no result, it is no arithmetic", nothing)
    assert game.step("It is\n#### 42") == ("", {"answer": 1.0, "format": 0.1, "call": 0.0}, True, {})


@pytest.mark.parametrize(
    ("action", "answer", "form"),
    [("#### 41", 0.0, 0.1), ("it is 42", 1.0, 0.0), ("<answer>42</answer>", 1.0, 0.1), ("no idea", 0.0, 0.0),
     ("<calc>6*7</calc> #### 42", 1.0, 0.1)],
)  # fmt: skip
def test_a_turn_without_a_call_or_with_an_answer_is_final(action: str, answer: float, form: float) -> None:
    game = Calculator()
    game.reset(TASK)
    assert game.step(action) == ("", {"answer": answer, "format": form}, True, {})


def test_the_template_form_of_a_call() -> None:
    game = Calculator()
    game.reset(TASK)
    call = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "6*7"}}\n</tool_call>'
    assert game.step(call)[0] == "6*7 = 42"
    assert game.step("<tool_call>{]</tool_call>")[0] == "{]: no result, it is no arithmetic"


def test_the_word_game_is_deterministic_and_won_when_the_opponent_has_no_word() -> None:
    games = [WordGame(), WordGame(), WordGame(known=0.002)]
    first = [game.reset(TASK) for game in games]
    assert first[0] == first[1]
    assert first[0] != WordGame().reset(Task("", {}, 8))
    letter = first[2][-1]
    word = next(word for word in WORDS if word.startswith(letter) and not first[2].endswith(f" {word}"))
    observation, reward, done, _ = games[2].step(f"{word.upper()}!")
    assert (observation, reward, done) == ("", {"word": 0.1, "win": 1.0}, True)
    letter, used = first[0][-1], first[0].rpartition(" ")[2]
    word = next(word for word in WORDS if word.startswith(letter) and word != used)
    answer, reward, done, _ = games[0].step(word)
    assert (reward, done) == ({"word": 0.1, "win": 0.0}, False) and answer.startswith(word[-1])
    assert games[1].step(word)[0] == answer
    assert games[0].step(word)[1:3] == ({"word": 0.0, "win": 0.0}, True), "no word twice"
    assert games[1].step(f"{word} and more")[2], "one word alone"


def test_every_word_can_be_followed() -> None:
    """Otherwise the first player would have lost such a game before the first turn."""
    assert not [word for word in WORDS if not any(other.startswith(word[-1]) for other in WORDS if other != word)]
