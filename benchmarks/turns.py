"""Alternating processes: each contender has a separate process and environment (allocator, threads), and computes only
in its turn."""

from __future__ import annotations

import argparse
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from actors.machine.allocator import keep_large_blocks

ROOT = Path(__file__).resolve().parent.parent
DEADLINE_S = 300.0
# Settings that affect speed come from the contender, not from this shell's environment.
_NOT_INHERITED = ("LD_PRELOAD", "MALLOC_CONF", "OMP_NUM_THREADS")

Answer = Mapping[str, Any]


class Contender:
    """A process that runs `python -m <module> --serve <options>` and answers questions, one at a time.

    Args:
        options: passed by `serve` to the module.
        environment: added to this process's environment without its allocator and thread settings.
        deadline_s: of an answer; the first one includes the start.
    """

    def __init__(
        self,
        module: str,
        options: Mapping[str, Any],
        environment: Mapping[str, str],
        *,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        self._deadline_s = deadline_s
        inherited = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
        self._what = f"{module} {json.dumps(options)}"
        self._errors = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115  # closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, "--serve", json.dumps(options)],
            cwd=ROOT,
            env={**inherited, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def ask(self, **question: Any) -> Answer:
        """Raises RuntimeError with the end of the error output if the process died or did not answer in time."""
        self.begin(**question)
        return self.answer()

    def begin(self, **question: Any) -> None:
        """Sends a request without waiting, so that several processes compute concurrently."""
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure("ended") from None

    def answer(self) -> Answer:
        assert self._process.stdout
        ready, _, _ = select.select([self._process.stdout], [], [], self._deadline_s)
        line = self._process.stdout.readline() if ready else ""
        if not line:
            raise self._failure("ended" if ready else f"did not answer in {self._deadline_s:.0f} s")
        answer: Answer = json.loads(line)
        return answer

    def _failure(self, cause: str) -> RuntimeError:
        self._errors.seek(0)
        return RuntimeError(f"{self._what} {cause}:\n{self._errors.read()[-4000:]}")

    def __enter__(self) -> Contender:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()


def parsed(parser: argparse.ArgumentParser, build: Callable[[Mapping[str, Any]], Callable[..., Answer]]) -> Any:
    """The arguments of a benchmark. In a contender's process it serves instead, and exits."""
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(build, arguments.serve)
        sys.exit()
    return arguments


def serve(build: Callable[[Mapping[str, Any]], Callable[..., Answer]], options: str) -> None:
    """The contender's side: builds the contender, then answers each line of stdin until it ends.

    Output of libraries goes to stderr, because stdout carries answers only.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    keep_large_blocks()
    answer = build(json.loads(options))
    for line in sys.stdin:
        answers.write(json.dumps(answer(**json.loads(line))) + "\n")
        answers.flush()
