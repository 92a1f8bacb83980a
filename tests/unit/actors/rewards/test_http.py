"""The endpoint: scores in order, nulls as failures, retries, and an error that names the address."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from actors.rewards.http import HttpReward
from orchestrator.errors import ConfigError, RewardError
from tests.unit.actors.rewards.rollouts import rollout_table


class Endpoint(ThreadingHTTPServer):
    """Answers from a list of (status, body); the last one for ever. Keeps what it was asked."""

    daemon_threads = True

    def __init__(self, answers: list[tuple[int, Any]], delay_s: float = 0.0) -> None:
        self.answers, self.delay_s = answers, delay_s
        self.asked: list[Any] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/score"


class _Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(json.loads(body))
        status, answer = self.server.answers[min(len(self.server.asked), len(self.server.answers)) - 1]
        time.sleep(self.server.delay_s)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(answer if isinstance(answer, bytes) else json.dumps(answer).encode())

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Any]:
    servers: list[Endpoint] = []

    def start(*answers: tuple[int, Any], delay_s: float = 0.0) -> Endpoint:
        servers.append(Endpoint(list(answers), delay_s))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def client(url: str, *, retries: int = 2, timeout_s: float = 5.0) -> HttpReward:
    return HttpReward(url, timeout_s=timeout_s, retries=retries, first_pause_s=0.01)


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


def test_a_busy_endpoint_is_asked_again(serve: Any) -> None:
    endpoint = serve((503, {}), (429, {}), (200, {"rewards": [1]}))
    assert client(endpoint.url).scores(rollout_table(["a"]))[0].value == 1.0
    assert len(endpoint.asked) == 3


def test_an_endpoint_that_stays_down_is_a_reward_error_with_address_and_cause(serve: Any) -> None:
    endpoint = serve((500, b"out of memory"))
    with pytest.raises(RewardError, match="in 3 tries; the last one: HTTP 500.*out of memory") as caught:
        client(endpoint.url).scores(rollout_table(["a"]))
    assert endpoint.url in str(caught.value)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/"
        with pytest.raises(RewardError, match=f"{url} gave no answer in 1 tries; the last one: ConnectError"):
            client(url, retries=0).scores(rollout_table(["a"]))


def test_a_slow_endpoint_times_out(serve: Any) -> None:
    endpoint = serve((200, {"rewards": [1]}), delay_s=2.0)
    with pytest.raises(RewardError, match="ReadTimeout"):
        client(endpoint.url, retries=0, timeout_s=0.2).scores(rollout_table(["a"]))


def test_a_refusal_is_not_repeated(serve: Any) -> None:
    endpoint = serve((404, {}))
    with pytest.raises(RewardError, match="refused the request .HTTP 404"):
        client(endpoint.url).scores(rollout_table(["a"]))
    assert len(endpoint.asked) == 1


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (b"<html>", "answered no JSON"),
        ({"rewards": [1]}, "with 2 items, one per sample; it answered 1 rewards"),
        ({"scores": [1, 2]}, "it answered {'scores'"),
        ([1, 2], "must answer"),
    ],
)
def test_answers_of_another_shape_are_reward_errors(serve: Any, answer: Any, fault: str) -> None:
    with pytest.raises(RewardError, match=fault):
        client(serve((200, answer)).url).scores(rollout_table(["a", "b"]))


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/", "http://host:port/", "http://"])
def test_an_address_that_is_none_is_a_config_error(url: str) -> None:
    with pytest.raises(ConfigError, match=r"reward\.http\.url"):
        client(url)
