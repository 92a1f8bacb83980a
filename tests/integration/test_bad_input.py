"""Bad input on the real command line: one message with a remedy, the right exit code, soon, nothing left behind."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from orchestrator.config.loader import load_config
from orchestrator.run.folder import open_run
from tests.deadlines import scaled
from tests.integration.command_line import CommandLine, assert_refused, command_line
from tests.ports import free_port
from tests.tiny import tiny_llama, tiny_tokenizer

WITH_RAY_S = scaled(120.0)
SIGNAL_S = scaled(15.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def command(tmp_path: Path, model: Path) -> Iterator[CommandLine]:
    with command_line(tmp_path, model) as line:
        yield line


@dataclass(frozen=True)
class Bad:
    """A bad input: `make` prepares files and returns the arguments; the message must contain `words`."""

    make: Callable[[CommandLine], list[str]]
    words: tuple[str, ...]


def _empty_model(line: CommandLine) -> list[str]:
    (line.folder / "empty").mkdir()
    return [f"model.path={line.folder / 'empty'}"]


def _no_template(line: CommandLine) -> list[str]:
    bare = tiny_llama(line.folder / "bare")
    for file in bare.glob("*.jinja"):
        file.unlink()
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(bare)
    return [f"model.path={bare}"]


def _prompts(text: str) -> Callable[[CommandLine], list[str]]:
    def write(line: CommandLine) -> list[str]:
        line.prompts.write_text(text)
        return []

    return write


def _root_below_a_file(line: CommandLine) -> list[str]:
    (line.folder / "file").write_text("")
    return [f"run.root={line.folder / 'file' / 'runs'}"]


def _id_of_another_run(line: CommandLine) -> list[str]:
    open_run(load_config(line.config, ["run.id=twice"]))
    return ["run.id=twice", "algorithm.gamma=0.9"]


def _dead_endpoint(_: CommandLine) -> list[str]:
    return [f"reward={{name: http, url: 'http://127.0.0.1:{free_port()}/score'}}"]


def _taken_port(_: CommandLine) -> list[str]:
    return [f"telemetry.prometheus_port={HOLDER.getsockname()[1]}"]


def _no_ray(_: CommandLine) -> list[str]:
    return ["--ray-address", f"127.0.0.1:{free_port()}", "placement.wait_s=3"]


def _not_ray(_: CommandLine) -> list[str]:
    return ["--ray-address", f"127.0.0.1:{HOLDER.getsockname()[1]}", "placement.wait_s=3"]


HOLDER = socket.socket()  # listens but never answers
HOLDER.bind(("127.0.0.1", 0))
HOLDER.listen()

_LONG = json.dumps({"prompt": "word " * 500}) + "\n"
_BAD_ROW = '{"prompt": "Hello"}\n{"prompt": 3}\n{"prompt": "Bye"}\n'

BAD: Mapping[str, Bad] = {
    "missing model": Bad(lambda _: ["model.path=/nowhere/llama"], ("/nowhere/llama", "Give a folder")),
    "model without config": Bad(_empty_model, ("no config.json", "save_pretrained")),
    "no chat template": Bad(_no_template, ("chat template", "model.chat_template=FILE")),
    "no prompts file": Bad(lambda _: ["prompts.path=/nowhere/p.jsonl"], ("/nowhere/p.jsonl does not exist",)),
    "empty prompts file": Bad(_prompts(""), ("prompts.jsonl is empty", "at least one record")),
    "bad row": Bad(_prompts(_BAD_ROW), ("prompts.jsonl", "row 2", "Correct or remove")),
    "all rows too long": Bad(_prompts(_LONG), ("all 1 prompts are longer", "prompts.max_prompt_tokens=100")),
    "no such rule": Bad(
        lambda _: ["reward.rules=[{function: 'actors.rewards.gold:kindness'}]"], ("gold:kindness", "vader_positivity")
    ),
    "root not writable": Bad(_root_below_a_file, ("run.root", "can't be written", "Set run.root")),
    "other config": Bad(_id_of_another_run, ("'twice'", "another run.id")),
    "port taken": Bad(_taken_port, ("telemetry.prometheus_port=", "Set the port to 0")),
    "endpoint down": Bad(_dead_endpoint, ("http://127.0.0.1:", "gave no answer in 2 tries", "Check that it runs")),
    "no Ray there": Bad(_no_ray, ("no Ray cluster answers at 127.0.0.1", "ray start --head")),
    "something else there": Bad(_not_ray, ("no Ray cluster answers at 127.0.0.1", "ray start --head")),
    "several": Bad(
        lambda _: [
            "prompts.path=/nowhere.jsonl",
            "reward.rules=[{function: 'no.module:rule'}]",
            "run.root=/dev/null/x",
        ],
        ("3 problems", "/nowhere.jsonl", "no.module", "run.root"),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_anything_is_started(name: str, command: CommandLine) -> None:
    assert_refused(command.run_here(*BAD[name].make(command)), *BAD[name].words)


def test_bad_input_ends_the_process_with_its_code(command: CommandLine) -> None:
    assert_refused(command.run("model.path=/nowhere/llama"), "/nowhere/llama", "Give a folder")


def test_an_unknown_key_is_named_before_anything_is_imported(command: CommandLine) -> None:
    ended = command.run("rl.stepz=3")
    assert_refused(ended, "rl.stepz", "did you mean 'rl.steps'")
    assert ended.seconds < scaled(5)


def test_a_wrong_type_is_named_with_its_value(command: CommandLine) -> None:
    assert_refused(command.run("rl.steps=many"), "rl.steps", "'many'")


def test_a_missing_config_file(command: CommandLine) -> None:
    assert_refused(command.run("--config", str(command.folder / "none.yaml")), "none.yaml", "--config")


def test_some_prompts_longer_than_the_window_are_left_out_and_counted(command: CommandLine) -> None:
    with command.prompts.open("a") as file:
        file.write(json.dumps({"id": "long-one", "prompt": "word " * 500}) + "\n")
    ended = command.run(command="check")
    assert ended.code == 0, ended.err
    assert "1 longer than prompts.max_prompt_tokens left out: long-one" in ended.out


@pytest.mark.ray
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("policy.ranks=64", "placement.mode=separate"), ("too few CPUs", "role policy wants 64")),
        (("policy.gpus_per_rank=1",), ("too few GPUs", "role policy")),
    ],
)
def test_a_cluster_that_is_too_small(command: CommandLine, overrides: tuple[str, ...], words: tuple[str, ...]) -> None:
    assert_refused(command.run(*overrides, limit_s=WITH_RAY_S), *words, "Add nodes")


@pytest.mark.ray
def test_what_a_role_says_when_it_cannot_start_is_what_people_read(command: CommandLine, model: Path) -> None:
    """The folder passes the preflight, which reads no weights, but fails in the critic's constructor."""
    broken = command.folder / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((model / "config.json").read_text())
    ended = command.run(f"critic.path={broken}", limit_s=WITH_RAY_S)
    assert_refused(ended, "DataError", str(broken), "safetensors")


@pytest.mark.ray
def test_a_reward_endpoint_that_goes_down_during_the_run(command: CommandLine) -> None:
    with _endpoint(answers=1) as url:
        ended = command.run(
            f"reward={{name: http, url: '{url}', retries: 1}}", "evaluation.prompts=0",
            limit_s=WITH_RAY_S,
        )  # fmt: skip
    assert_refused(ended, url, "gave no answer in 2 tries", code=1)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGINT, "checking"),
        (signal.SIGTERM, "placement:"),
    ],
)
def test_a_signal_ends_the_run_and_all_that_it_started(command: CommandLine, number: int, moment: str) -> None:
    started = time.monotonic()
    process = command.start("rl.steps=1000", "placement.mode=colocated")
    _wait_for_line(process, moment)
    time.sleep(1.0)
    sent = time.monotonic()
    process.send_signal(number)
    ended = command.end(process, started, limit_s=scaled(40))
    assert ended.code == 130, ended.err
    assert "Traceback" not in ended.err
    assert "stopped" in ended.err
    assert ended.seconds - (sent - started) < SIGNAL_S


def _wait_for_line(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    guard = threading.Timer(WITH_RAY_S, process.kill)
    guard.start()
    for line in process.stdout:
        if text in line:
            guard.cancel()
            return
    pytest.fail(f"{text!r} never came: {process.stderr.read() if process.stderr else ''}")


class _endpoint:  # noqa: N801  used as a function
    """Scores every sample with 1 for a number of requests, then stops."""

    def __init__(self, *, answers: int) -> None:
        left = [answers]

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:  # the library's naming
                count = len(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["samples"])
                body = json.dumps({"rewards": [1.0] * count}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
                left[0] -= 1
                if not left[0]:
                    threading.Thread(target=self.server.shutdown).start()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._serve)

    def _serve(self) -> None:
        self._server.serve_forever(poll_interval=0.05)
        self._server.server_close()

    def __enter__(self) -> str:
        self._thread.start()
        return f"http://127.0.0.1:{self._server.server_address[1]}/score"

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
