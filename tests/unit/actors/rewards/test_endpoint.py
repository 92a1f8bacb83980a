"""Clients of an endpoint: retries, limits, proxies, tokens, errors that name the address. HTTP rewards and judges
share the client, so each scenario runs over both."""

from __future__ import annotations

import gzip
import json
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors.rewards import RewardSource
from actors.rewards.http import HttpReward
from actors.rewards.judge import JudgeReward
from orchestrator.config.rewards import HttpRewardConfig, JudgeRewardConfig
from orchestrator.errors import ConfigError, RewardError
from tests.deadlines import scaled
from tests.unit.actors.rewards.endpoints import CHUNKED, Endpoint, Raw, answered, endpoints, for_ever
from tests.unit.actors.rewards.rollouts import rollout_table


@pytest.fixture
def serve() -> Iterator[Any]:
    with endpoints() as start:
        yield start


@pytest.fixture(params=["http", "judge"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def good(kind: str, score: float) -> Any:
    """The answer that gives one sample this score."""
    if kind == "http":
        return {"rewards": [score]}
    return {"choices": [{"message": {"role": "assistant", "content": f"[[{score}]]"}}]}


def client(
    kind: str,
    url: str,
    *,
    retries: int = 2,
    timeout_s: float = 5.0,
    total_s: float = 480.0,
    token_from: str | None = None,
) -> RewardSource:
    keys = {"url": url, "timeout_s": timeout_s, "retries": retries, "token_from": token_from}
    if kind == "http":
        return HttpReward(HttpRewardConfig.model_validate(keys), total_s=total_s, first_pause_s=0.01)
    judge = JudgeRewardConfig.model_validate({**keys, "model": "m"})
    return JudgeReward(judge, total_s=total_s, first_pause_s=0.01)


def test_a_busy_endpoint_is_asked_again(kind: str, serve: Any) -> None:
    endpoint = serve((503, {}), (429, {}), (200, good(kind, 1)))
    assert client(kind, endpoint.url).scores(rollout_table(["a"]))[0].value == 1.0
    assert len(endpoint.asked) == 3


def test_an_endpoint_that_stays_down_is_a_reward_error_with_address_and_cause(kind: str, serve: Any) -> None:
    endpoint = serve((500, b"out of memory"))
    with pytest.raises(RewardError, match="in 3 tries; the last one: HTTP 500.*out of memory") as caught:
        client(kind, endpoint.url).scores(rollout_table(["a"]))
    assert endpoint.url in str(caught.value)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/"
        with pytest.raises(RewardError, match=rf"{url}\S* gave no answer in 1 tries; the last one: ConnectError"):
            client(kind, url, retries=0).scores(rollout_table(["a"]))


def test_a_slow_endpoint_times_out(kind: str, serve: Any) -> None:
    endpoint = serve((200, good(kind, 1)), delay_s=2.0)
    with pytest.raises(RewardError, match="ReadTimeout"):
        client(kind, endpoint.url, retries=0, timeout_s=0.2).scores(rollout_table(["a"]))


def test_a_refusal_is_not_repeated(kind: str, serve: Any) -> None:
    endpoint = serve((404, {}))
    with pytest.raises(RewardError, match="refused the request .HTTP 404"):
        client(kind, endpoint.url).scores(rollout_table(["a"]))
    assert len(endpoint.asked) == 1


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/", "http://host:port/", "http://"])
def test_an_address_that_is_none_is_a_config_error(kind: str, url: str) -> None:
    with pytest.raises(ConfigError, match=r"reward\.url"):
        client(kind, url)


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
def test_an_answer_that_drips_ends_with_its_time(kind: str, head: bytes, item: bytes) -> None:
    endpoint = Raw(for_ever(head, item), pause_s=0.2)
    started = time.monotonic()
    with pytest.raises(RewardError, match="in 1 tries; the last one: (ReadTimeout: no complete answer|Remote)"):
        client(kind, endpoint.url, retries=0, timeout_s=1.0).scores(rollout_table(["a"]))
    assert time.monotonic() - started < scaled(4)


def test_all_tries_together_have_a_time(kind: str) -> None:
    endpoint = Raw(for_ever(b"", b"H"), pause_s=0.2)
    source = client(kind, endpoint.url, timeout_s=1.0, retries=1000, total_s=2.5)
    started = time.monotonic()
    with pytest.raises(RewardError, match="gave no answer in [23] tries"):
        source.scores(rollout_table(["a"]))
    assert time.monotonic() - started < scaled(6)


def test_an_answer_that_unpacks_to_gigabytes_is_cut_off(kind: str) -> None:
    packed = gzip.compress(bytes(1 << 28), 9)
    bomb = gzip.compress(b'{"rewards": [1], "more": "' + b"A" * (1 << 28) + b'"}', 9)
    before = psutil.Process().memory_info().rss
    for body in (packed, bomb):
        with pytest.raises(RewardError, match="answered more than 10(49600|48576) bytes, HTTP 200"):
            client(kind, Raw(answered(body, "Content-Encoding: gzip")).url).scores(rollout_table(["a"]))
    with pytest.raises(RewardError, match="answered more than"):
        client(kind, Raw(for_ever(CHUNKED, b"10000\r\n" + b" " * 65536 + b"\r\n")).url).scores(rollout_table(["a"]))
    assert psutil.Process().memory_info().rss - before < 64 << 20


@pytest.mark.parametrize(
    "header", ["Content-Encoding: gzip", "content-encoding: deflate", "Content-Encoding: identity"]
)
def test_an_answer_may_be_packed_and_of_any_type(kind: str, header: str) -> None:
    body = json.dumps(good(kind, 1.5)).encode()
    packed = body if "identity" in header else gzip.compress(body)
    endpoint = Raw(answered(packed, header, "Content-Type: text/html; charset=latin-1"))
    assert client(kind, endpoint.url).scores(rollout_table(["a"]))[0].value == 1.5


def test_a_packing_that_was_not_asked_for_is_named(kind: str) -> None:
    with pytest.raises(RewardError, match="compresses its answer with 'zstd'"):
        client(kind, Raw(answered(b"x", "Content-Encoding: zstd")).url).scores(rollout_table(["a"]))
    with pytest.raises(RewardError, match="DecodingError"):
        client(kind, Raw(answered(b"x" * 50, "Content-Encoding: gzip")).url, retries=0).scores(rollout_table(["a"]))


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
def test_json_that_can_not_be_read_is_a_reward_error(kind: str, body: bytes, fault: str) -> None:
    with pytest.raises(RewardError, match=fault):
        client(kind, Raw(answered(body)).url).scores(rollout_table(["a"]))


def test_a_redirect_names_where_it_leads(kind: str) -> None:
    endpoint = Raw(iter([b"HTTP/1.1 307 Temporary Redirect\r\nLocation: http://b/\r\nContent-Length: 0\r\n\r\n"]))
    with pytest.raises(RewardError, match="refused the request .HTTP 307, redirect to 'http://b/'"):
        client(kind, endpoint.url).scores(rollout_table(["a"]))


def test_a_connection_that_is_reset_is_tried_again(kind: str) -> None:
    endpoint = Raw(iter([]), reads=False)
    with pytest.raises(RewardError, match="in 3 tries; the last one: (ReadError|WriteError|RemoteProtocolError)"):
        client(kind, endpoint.url).scores(rollout_table(["a" * 100_000]))
    assert endpoint.num_requests == 3


def test_a_proxy_is_not_asked_for_this_machine(kind: str, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy, endpoint = serve((200, good(kind, 9))), serve((200, good(kind, 1)))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.server_port}")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for host in ("127.0.0.1", "localhost", "[::ffff:127.0.0.1]"):
        url = f"http://{host}:{endpoint.server_port}/score"
        assert client(kind, url).scores(rollout_table(["a"]))[0].value == 1.0
    assert client(kind, "http://reward.invalid/score").scores(rollout_table(["a"]))[0].value == 9.0


def test_an_unknown_certificate_is_named(kind: str, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run([*command, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = Endpoint([(200, good(kind, 1))])
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.raises(RewardError, match="CERTIFICATE_VERIFY_FAILED"):
        client(kind, server.url.replace("http:", "https:"), retries=0).scores(rollout_table(["a"]))
    with pytest.raises(RewardError, match=r"SSL|Remote|Read"):
        client(kind, server.url, retries=0).scores(rollout_table(["a"]))
    server.shutdown()
    server.server_close()


def test_a_token_comes_from_the_environment_or_a_file_and_may_change(
    kind: str, serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = serve((200, good(kind, 1)))
    monkeypatch.setenv("SCORER_TOKEN", "from-the-environment")
    file = tmp_path / "token"
    file.write_text("from-a-file\n")
    for source in ("env:SCORER_TOKEN", f"file:{file}"):
        client(kind, endpoint.url, retries=0, token_from=source).scores(rollout_table(["a"]))
    source = client(kind, endpoint.url, retries=0, token_from=f"file:{file}")
    file.write_text("another")
    source.scores(rollout_table(["a"]))
    client(kind, endpoint.url).scores(rollout_table(["a"]))
    assert endpoint.authorizations == ["Bearer from-the-environment", "Bearer from-a-file", "Bearer another", None]


@pytest.mark.parametrize("content", ["", " ", "two\nlines", "no\x00token"])
def test_a_token_that_is_not_there_is_named_before_anything_is_sent(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    file = tmp_path / "token"
    file.write_text(content)
    monkeypatch.delenv("SCORER_TOKEN", raising=False)
    for source in ("env:SCORER_TOKEN", f"file:{file}"):
        with pytest.raises(ConfigError, match=f"token_from={source} yields no token"):
            client(kind, "http://127.0.0.1:1/", retries=0, token_from=source)
    with pytest.raises(ConfigError, match="does not exist"):
        client(kind, "http://127.0.0.1:1/", retries=0, token_from=f"file:{tmp_path}/none")
