"""The endpoint: scores in order, nulls as failures, retries, and an error that names the address."""

from __future__ import annotations

import gzip
import json
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors.rewards.http import HttpReward
from orchestrator.config.rewards import HttpRewardConfig
from orchestrator.errors import ConfigError, RewardError
from tests.deadlines import scaled
from tests.unit.actors.rewards.rollouts import rollout_table


class Endpoint(ThreadingHTTPServer):
    """Answers from a list of (status, body); repeats the last. Records requests."""

    daemon_threads = True

    def __init__(self, answers: list[tuple[int, Any]], delay_s: float = 0.0) -> None:
        self.answers, self.delay_s = answers, delay_s
        self.asked: list[Any] = []
        self.authorizations: list[str | None] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/score"


class _Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(json.loads(body))
        self.server.authorizations.append(self.headers["Authorization"])
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
    return HttpReward(HttpRewardConfig(url=url, timeout_s=timeout_s, retries=retries), first_pause_s=0.01)


def with_token(url: str, source: str) -> HttpReward:
    return HttpReward(HttpRewardConfig(url=url, timeout_s=5.0, retries=0, token_from=source))


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
        (b"<html>", "did not answer JSON"),
        ({"rewards": [1]}, "with 2 items, one per sample; got 1 rewards"),
        ({"scores": [1, 2]}, "got {'scores'"),
        ([1, 2], "must answer"),
    ],
)
def test_answers_of_another_shape_are_reward_errors(serve: Any, answer: Any, fault: str) -> None:
    with pytest.raises(RewardError, match=fault):
        client(serve((200, answer)).url).scores(rollout_table(["a", "b"]))


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/", "http://host:port/", "http://"])
def test_an_address_that_is_none_is_a_config_error(url: str) -> None:
    with pytest.raises(ConfigError, match=r"reward\.url"):
        client(url)


class Raw:
    """Accepts one request per connection and sends these bytes, with a pause before each, then closes or waits."""

    def __init__(self, chunks: Iterator[bytes], *, pause_s: float = 0.0, reads: bool = True) -> None:
        self._chunks, self._pause_s, self._reads = chunks, pause_s, reads
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.num_requests = 0
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/score"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            self.num_requests += 1
            with connection:
                if not self._reads:  # the kernel resets connections with unread data
                    continue
                connection.recv(1 << 20)
                try:
                    for chunk in self._chunks:
                        time.sleep(self._pause_s)
                        connection.sendall(chunk)
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(1 << 20):  # closing with unread bytes would lose the answer
                        pass
                except OSError:
                    continue


def answered(body: bytes, *headers: str) -> Iterator[bytes]:
    head = ["HTTP/1.1 200 OK", f"Content-Length: {len(body)}", *headers]
    return iter(["\r\n".join(head).encode() + b"\r\n\r\n" + body])


def for_ever(head: bytes, item: bytes) -> Iterator[bytes]:
    yield head
    while True:
        yield item


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("head", "item"),
    [
        (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
        (CHUNKED, b"1\r\n \r\n"),
        (b"", b"H"),
        (b"", b"HTTP/1.1 102 Processing\r\n\r\n"),
    ],
    ids=["headers", "body", "status line", "interim answers"],
)
def test_an_answer_that_drips_ends_with_its_time(head: bytes, item: bytes) -> None:
    endpoint = Raw(for_ever(head, item), pause_s=0.2)
    started = time.monotonic()
    with pytest.raises(RewardError, match="in 1 tries; the last one: (ReadTimeout: no complete answer|Remote)"):
        client(endpoint.url, retries=0, timeout_s=1.0).scores(rollout_table(["a"]))
    assert time.monotonic() - started < scaled(4)


def test_all_tries_together_have_a_time() -> None:
    endpoint = Raw(for_ever(b"", b"H"), pause_s=0.2)
    reward = HttpRewardConfig(url=endpoint.url, timeout_s=1.0, retries=1000)
    source = HttpReward(reward, total_s=2.5, first_pause_s=0.01)
    started = time.monotonic()
    with pytest.raises(RewardError, match="gave no answer in [23] tries"):
        source.scores(rollout_table(["a"]))
    assert time.monotonic() - started < scaled(6)


def test_an_answer_that_unpacks_to_gigabytes_is_cut_off() -> None:
    packed = gzip.compress(bytes(1 << 28), 9)
    bomb = gzip.compress(b'{"rewards": [1], "more": "' + b"A" * (1 << 28) + b'"}', 9)
    before = psutil.Process().memory_info().rss
    for body in (packed, bomb):
        with pytest.raises(RewardError, match="answered more than 1049600 bytes, HTTP 200"):
            client(Raw(answered(body, "Content-Encoding: gzip")).url).scores(rollout_table(["a"]))
    with pytest.raises(RewardError, match="answered more than"):
        client(Raw(for_ever(CHUNKED, b"10000\r\n" + b" " * 65536 + b"\r\n")).url).scores(rollout_table(["a"]))
    assert psutil.Process().memory_info().rss - before < 64 << 20


@pytest.mark.parametrize(
    "header", ["Content-Encoding: gzip", "content-encoding: deflate", "Content-Encoding: identity"]
)
def test_an_answer_may_be_packed_and_of_any_type(header: str) -> None:
    body = b'{"rewards": [1.5]}'
    packed = body if "identity" in header else gzip.compress(body)
    endpoint = Raw(answered(packed, header, "Content-Type: text/html; charset=latin-1"))
    assert client(endpoint.url).scores(rollout_table(["a"]))[0].value == 1.5


def test_a_packing_that_was_not_asked_for_is_named() -> None:
    with pytest.raises(RewardError, match="compresses its answer with 'zstd'"):
        client(Raw(answered(b"x", "Content-Encoding: zstd")).url).scores(rollout_table(["a"]))
    with pytest.raises(RewardError, match="DecodingError"):
        client(Raw(answered(b"x" * 50, "Content-Encoding: gzip")).url, retries=0).scores(rollout_table(["a"]))


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


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (b'{"rewards": [1], "rewards": [2]}', "did not answer JSON .an object with a duplicate key"),
        (b"[" * 500_000, "did not answer JSON"),
        (b'{"rewards": [' + b"[" * 500_000, "did not answer JSON"),
        (b"\xff\xfe\x00", "did not answer JSON"),
        (b"", "did not answer JSON: ''"),
    ],
)
def test_json_that_can_not_be_read_is_a_reward_error(body: bytes, fault: str) -> None:
    with pytest.raises(RewardError, match=fault):
        client(Raw(answered(body)).url).scores(rollout_table(["a"]))


def test_a_redirect_names_where_it_leads() -> None:
    endpoint = Raw(iter([b"HTTP/1.1 307 Temporary Redirect\r\nLocation: http://b/\r\nContent-Length: 0\r\n\r\n"]))
    with pytest.raises(RewardError, match="refused the request .HTTP 307, redirect to 'http://b/'"):
        client(endpoint.url).scores(rollout_table(["a"]))


def test_a_connection_that_is_reset_is_tried_again() -> None:
    endpoint = Raw(iter([]), reads=False)
    with pytest.raises(RewardError, match="in 3 tries; the last one: (ReadError|WriteError|RemoteProtocolError)"):
        client(endpoint.url).scores(rollout_table(["a" * 100_000]))
    assert endpoint.num_requests == 3


def test_a_proxy_is_not_asked_for_this_machine(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy, endpoint = serve((200, {"rewards": [9]})), serve((200, {"rewards": [1]}))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.server_port}")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for host in ("127.0.0.1", "localhost", "[::ffff:127.0.0.1]"):
        url = f"http://{host}:{endpoint.server_port}/score"
        assert client(url).scores(rollout_table(["a"]))[0].value == 1.0
    assert client("http://reward.invalid/score").scores(rollout_table(["a"]))[0].value == 9.0


def test_an_unknown_certificate_is_named(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run([*command, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = Endpoint([(200, {"rewards": [1]})])
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.raises(RewardError, match="CERTIFICATE_VERIFY_FAILED"):
        client(server.url.replace("http:", "https:"), retries=0).scores(rollout_table(["a"]))
    with pytest.raises(RewardError, match=r"SSL|Remote|Read"):
        client(server.url, retries=0).scores(rollout_table(["a"]))
    server.shutdown()
    server.server_close()


def test_metadata_that_is_no_strict_json_goes_out(serve: Any) -> None:
    endpoint = serve((200, {"rewards": [1, 2]}))
    metas = [{"k": float("nan")}, {"k": "\ud800"}]
    assert [score.value for score in client(endpoint.url).scores(rollout_table(["a", "b"], metas=metas))] == [1.0, 2.0]


def test_a_token_comes_from_the_environment_or_a_file_and_may_change(
    serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = serve((200, {"rewards": [1]}))
    monkeypatch.setenv("SCORER_TOKEN", "from-the-environment")
    file = tmp_path / "token"
    file.write_text("from-a-file\n")
    for source in ("env:SCORER_TOKEN", f"file:{file}"):
        with_token(endpoint.url, source).scores(rollout_table(["a"]))
    source = with_token(endpoint.url, f"file:{file}")
    file.write_text("another")
    source.scores(rollout_table(["a"]))
    client(endpoint.url).scores(rollout_table(["a"]))
    assert endpoint.authorizations == ["Bearer from-the-environment", "Bearer from-a-file", "Bearer another", None]


@pytest.mark.parametrize("content", ["", " ", "two\nlines", "no\x00token"])
def test_a_token_that_is_not_there_is_named_before_anything_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    file = tmp_path / "token"
    file.write_text(content)
    monkeypatch.delenv("SCORER_TOKEN", raising=False)
    for source in ("env:SCORER_TOKEN", f"file:{file}"):
        with pytest.raises(ConfigError, match=f"token_from={source} yields no token"):
            with_token("http://127.0.0.1:1/", source)
    with pytest.raises(ConfigError, match="does not exist"):
        with_token("http://127.0.0.1:1/", f"file:{tmp_path}/none")
