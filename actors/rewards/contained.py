"""Runs the user's code in a separate process: a call that exits, hangs, crashes or exceeds limits fails only its own
sample. RuleProcess runs rules; actors/environments/process.py runs environments."""

from __future__ import annotations

import contextlib
import json
import pickle
import select
import socket
import subprocess
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import IO, Any

from actors.rewards import rule_process
from orchestrator.config.rewards import RuleLimits
from orchestrator.errors import ConfigError

Row = tuple[str, str, str]
"""Prompt, response, and meta as JSON."""
NamedRule = tuple[str, str, float]
"""Name in messages and parts, `module:function`, weight."""

_CHUNK = 1 << 16
_LONGEST_ANSWER = 1 << 20
_STOP_S = rule_process.END_S + 15.0
_NOTICE_S = 1.0
_GREETING = 1  # number of answers before the first sample's


class ProcessEndedError(Exception):
    """The process ended. The text names the code that was running and the reason.

    Args:
        is_certain: the current call is the cause. Otherwise the cause may be left over from an earlier one.
    """

    def __init__(self, text: str, *, is_certain: bool) -> None:
        super().__init__(text)
        self.is_certain = is_certain


class ContainedProcess:
    """Args:
        kind: what runs there, for messages: "rule", "environment".
        names: of the code that runs there, for messages.
        hello: first message to the process, which imports the code.
        call: time limit of one call in seconds, and the key that sets it.
        limits: the process is ended when it exceeds a limit of memory or processes.

    Attributes:
        greeting: the process's answer to `hello`; it names a "problem", or None.

    Raises:
        ConfigError: the code can't be imported within limits.import_s.
    """

    def __init__(
        self, kind: str, names: Sequence[str], hello: Mapping[str, Any], call: tuple[float, str], limits: RuleLimits
    ) -> None:
        self._kind, self._names, self._call, self._limits = kind, names, call, limits
        requests, self._requests = socket.socketpair()
        self._answers, answers = socket.socketpair()
        with requests, answers:
            memory = int((limits.memory_gib or 0) * (1 << 30))
            numbers = (requests.fileno(), answers.fileno(), memory, limits.processes)
            keeper = subprocess.Popen(
                # -P: modules in the program's folder would shadow the standard library.
                [sys.executable, "-P", str(Path(rule_process.__file__)), *map(str, numbers)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=numbers[:2],
                start_new_session=True,
            )
        self._received = b""
        self._num_answers = 0
        assert keeper.stdin is not None
        assert keeper.stdout is not None
        self._control, self._report = keeper.stdin, keeper.stdout
        self._end = weakref.finalize(self, _end, keeper, self._requests, self._answers)
        self._greet(hello)

    def ask(self, calls: Sequence[Any], until: float, request: Any = None) -> Iterator[Any]:
        """Yields the answers of rule_process in order, one per call, as they arrive.

        Args:
            request: what is sent for the calls, if not the calls themselves.
            until: deadline on the monotonic clock, at which the process is ended.

        Raises:
            ProcessEndedError: the process ended before all calls were answered.
        """
        answered = 0
        try:
            self._send(calls if request is None else request)
            for _ in calls:
                yield self._answer(*self._call_limit(until))
                answered += 1
        finally:
            if answered < len(calls):
                self.close()

    def is_alive(self) -> bool:
        """Whether the process accepts requests. A thread may end it after the last answer."""
        return self._end.alive and not select.select([self._report], [], [], 0)[0]

    def close(self) -> None:
        """Ends the process and all its descendants."""
        self._end()

    def _call_limit(self, until: float) -> tuple[float, str]:
        limit, key = self._call
        by = monotonic() + limit
        if until < by:
            return until, "what was left of its shard's time"
        return by, f"{key}={limit:g} s"

    def _greet(self, hello: Mapping[str, Any]) -> None:
        limit = self._limits.import_s
        try:
            self._send({"path": sys.path, **hello})
            self.greeting: Mapping[str, Any] = self._answer(monotonic() + limit, f"rule_limits.import_s={limit:g} s")
        except ProcessEndedError as error:
            raise ConfigError(f"{error} while it was imported. Correct its module.") from None
        if self.greeting["problem"]:
            self.close()
            raise ConfigError(f"{self._kind} {self.greeting['problem']}")

    def _send(self, message: Any) -> None:
        data = pickle.dumps(message)
        self._requests.settimeout(self._limits.import_s)
        with contextlib.suppress(OSError):  # reading the answers detects that the process ended
            self._requests.sendall(rule_process.LENGTH.pack(len(data)) + data)

    def _answer(self, until: float, limit: str) -> Any:
        while b"\n" not in self._received:
            waited = max(0.0, until - monotonic())
            sources: list[socket.socket | IO[bytes]] = [self._answers, self._report]
            ready = select.select(sources, [], [], waited)[0]
            more = self._answers.recv(_CHUNK) if self._answers in ready else b""
            self._received += more
            if not more:
                raise self._ended(f"gave no answer within {limit}" if not ready else None)
            if len(self._received) > _LONGEST_ANSWER:
                raise self._ended("wrote into the answers of its process")
        line, _, self._received = self._received.partition(b"\n")
        try:
            answer = json.loads(line)
        except ValueError:
            raise self._ended("wrote into the answers of its process") from None
        self._num_answers += 1
        return answer

    def _ended(self, reason: str | None) -> ProcessEndedError:
        """Ends the process. Returns an error that names the running rule and the reason, by default the keeper's."""
        if reason is None:  # the keeper detects it
            select.select([self._report], [], [], _NOTICE_S)
        self._control.close()
        said = self._report.read() if select.select([self._report], [], [], _STOP_S)[0] else b""
        self.close()
        last: dict[str, Any] = {"reason": "ended its process and its keeper", "rule": -1}
        if said:
            last = json.loads(said)
        name = self._names[last["rule"]] if last["rule"] >= 0 else ", ".join(self._names)
        is_first = self._num_answers == _GREETING
        return ProcessEndedError(f"{self._kind} {name} {reason or last['reason']}", is_certain=bool(reason) or is_first)


class RuleProcess(ContainedProcess):
    """Args:
        rules: imported by the process.
        limits: the process is ended when it exceeds a limit of call time, memory or processes.

    Raises:
        ConfigError: a rule is not a function, or can't be imported within limits.import_s.
    """

    def __init__(self, rules: Sequence[NamedRule], limits: RuleLimits) -> None:
        names = [name for name, _, _ in rules]
        super().__init__("rule", names, {"rules": list(rules)}, (limits.call_s, "rule_limits.call_s"), limits)


def _end(keeper: subprocess.Popen[bytes], *sockets: socket.socket) -> None:
    """The keeper ends all other processes when its standard input is closed; a killed keeper would leave some."""
    for stream in (keeper.stdin, *sockets):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        keeper.wait(_STOP_S)
    keeper.kill()
    keeper.wait()
    if keeper.stdout is not None:
        keeper.stdout.close()
