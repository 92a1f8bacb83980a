"""Runs commands of this program as users do, and checks what they leave behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import typer
import yaml
from typer.testing import CliRunner

from jobs import run as ppo
from tests.deadlines import of_a_run, scaled

ROOT = Path(__file__).resolve().parents[2]
MARK = "RLHF_TEST_MARK"
BEFORE_RAY_S = scaled(60.0)  # imports and a scan of tiny files: 4 to 7 s alone, more under load
GONE_S = scaled(10.0)


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str
    seconds: float


@dataclass(frozen=True)
class CommandLine:
    """Runs commands whose processes and descendants have a mark in their environment."""

    folder: Path
    config: Path
    environment: dict[str, str]

    @property
    def prompts(self) -> Path:
        return self.folder / "prompts.jsonl"

    def start(self, *arguments: str, command: str = "run") -> subprocess.Popen[str]:
        words = [sys.executable, "-m", "jobs", command, "--config", str(self.config), *arguments]
        return subprocess.Popen(
            words, cwd=ROOT, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def run(self, *arguments: str, limit_s: float = BEFORE_RAY_S, command: str = "run") -> Ended:
        started = time.monotonic()
        return self.end(self.start(*arguments, command=command), started, limit_s)

    def run_here(self, *arguments: str) -> Ended:
        """`rlhf run` in this process, for input that is refused before anything starts: it imports only once."""
        program = typer.Typer(add_completion=False)
        program.command()(ppo.main)
        started = time.monotonic()
        result = CliRunner().invoke(program, ["--config", str(self.config), *arguments])
        return Ended(result.exit_code, result.stdout, result.stderr, time.monotonic() - started)

    def end(self, process: subprocess.Popen[str], started: float, limit_s: float) -> Ended:
        """Waits for the end. Fails if it does not end or leaves a process behind."""
        try:
            out, err = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            pytest.fail(f"no end within {limit_s} s:\n{out}\n{err}")
        ended = Ended(process.returncode, out, err, time.monotonic() - started)
        sys.stdout.write(f"exit {ended.code} after {ended.seconds:.1f} s; stderr:\n{ended.err}")
        assert self._left() == []
        return ended

    def _left(self) -> list[str]:
        """Processes that are still alive after a grace period."""
        deadline = time.monotonic() + GONE_S
        while (found := self._marked()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return found

    def _marked(self) -> list[str]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == str(self.folder) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(" ".join(process.cmdline())[:200])
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
        return found


@contextmanager
def command_line(folder: Path, model: Path) -> Iterator[CommandLine]:
    """A command line with a valid config of a tiny run in `folder`."""
    config = {
        "stages": ["rl"],
        "run": {"root": str(folder / "runs"), "name": "bad"},
        "model": {"path": str(model), "dtype": "float32", "max_length": 128},
        "prompts": {"path": str(folder / "prompts.jsonl"), "max_prompt_tokens": 100},
        "reward": {"name": "rules", "rules": [{"function": "actors.rewards.gold:vader_positivity"}]},
        "rollout": {"engine": "hf", "max_new_tokens": 16, "cpus_per_replica": 1},
        "rl": {"steps": 2, "prompts_per_step": 8, "samples_per_prompt": 1},
        "evaluation": {"prompts": 4},
        "deadlines": of_a_run(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [json.dumps({"prompt": f"Say something about the number {index}."}) for index in range(60)]
    (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    with tempfile.TemporaryDirectory(prefix="rb-", dir="/tmp") as short:  # Ray's socket paths must be short
        offline = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "DO_NOT_TRACK"), "1")
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment = {**kept, **offline, MARK: str(folder), "RAY_TMPDIR": short}
        yield CommandLine(folder, folder / "config.yaml", environment)


def assert_refused(ended: Ended, *words: str, code: int = 2) -> None:
    """Standard error has exactly one message, which contains all words, and no traceback."""
    assert ended.code == code, ended.err
    assert "Traceback" not in ended.err + ended.out
    heads = [line for line in ended.err.splitlines() if line and not line.startswith((" ", "-", "Correct", "Set "))]
    assert len(heads) == 1, ended.err
    for word in words:
        assert word in ended.err
