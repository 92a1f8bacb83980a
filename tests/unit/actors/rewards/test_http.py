"""An HTTP reward: samples go out whole, scores come in order, nulls are failures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from actors.rewards.http import HttpReward
from orchestrator.config.rewards import HttpRewardConfig
from orchestrator.errors import RewardError
from tests.unit.actors.rewards.endpoints import Raw, answered, endpoints
from tests.unit.actors.rewards.rollouts import rollout_table


@pytest.fixture
def serve() -> Iterator[Any]:
    with endpoints() as start:
        yield start


def client(url: str) -> HttpReward:
    return HttpReward(HttpRewardConfig(url=url, timeout_s=5.0, retries=2), first_pause_s=0.01)


def test_samples_go_out_whole_and_null_is_a_failure(serve: Any) -> None:
    endpoint = serve((200, {"rewards": [1.5, None, 2]}))
    scores = client(endpoint.url).scores(rollout_table(["a", "b", "c"], metas=[{"k": 1}, {}, {}]))
    assert endpoint.asked == [
        {
            "samples": [
                {"prompt": "Why?", "response": "a", "meta": {"k": 1}},
                {"prompt": "Why?", "response": "b", "meta": {}},
                {"prompt": "Why?", "response": "c", "meta": {}},
            ]
        }
    ]
    assert [score.value for score in scores] == [1.5, None, 2.0]
    assert scores[0].parts == {"http": 1.5}
    assert scores[1].error == "the reward endpoint answered null"


def test_what_is_no_finite_number_fails_its_sample(serve: Any) -> None:
    endpoint = serve((200, b'{"rewards": ["x", NaN, true, 0]}'))
    scores = client(endpoint.url).scores(rollout_table(["a", "b", "c", "d"]))
    assert [score.value for score in scores] == [None, None, None, 0.0]


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (b"<html>", "did not answer JSON"),
        ({"rewards": [1]}, "with 2 items, one per sample; got 1 rewards"),
        ({"scores": [1, 2]}, "got {'scores'"),
        ([1, 2], "must answer"),
    ],
)
def test_answers_of_another_shape_are_reward_errors(serve: Any, answer: Any, fault: str) -> None:
    with pytest.raises(RewardError, match=fault):
        client(serve((200, answer)).url).scores(rollout_table(["a", "b"]))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1" + "0" * 400, None),
        ("1" + "0" * 5000, None),
        ("-1" + "0" * 400, None),
        ("1e400", None),
        ("1e308", 1e308),
        ("-0", 0.0),
        ('"1"', None),
        ("[1]", None),
        ('{"a": 1}', None),
        ("false", None),
        ("-Infinity", None),
    ],
)
def test_a_number_that_is_none_fails_its_sample_only(text: str, value: float | None) -> None:
    endpoint = Raw(answered(f'{{"rewards": [1, {text}, 2]}}'.encode()))
    scores = client(endpoint.url).scores(rollout_table(["a", "b", "c"]))
    assert [score.value for score in scores] == [1.0, value, 2.0]


def test_metadata_that_is_no_strict_json_goes_out(serve: Any) -> None:
    endpoint = serve((200, {"rewards": [1, 2]}))
    metas = [{"k": float("nan")}, {"k": "\ud800"}]
    assert [score.value for score in client(endpoint.url).scores(rollout_table(["a", "b"], metas=metas))] == [1.0, 2.0]
