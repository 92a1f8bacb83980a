"""Episodes in a contained process, which continue in a new one when it ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import monotonic
from typing import Any

from actors.environments.contract import Task
from actors.environments.server import Action, Answer, Call
from actors.rewards.contained import ContainedProcess, ProcessEndedError
from orchestrator.config.environments import EnvironmentConfig
from orchestrator.config.rewards import RuleLimits
from orchestrator.errors import ConfigError, RewardError

_COMPARED = ("observation", "reward", "done", "call", "raised")


class Episodes:
    """The episodes of one shard at a time.

    A call that ends its process, or takes too long, fails its own episode. The others are played again in a new
    process from their actions; an episode that answers differently then fails.

    Args:
        limits: of the process; environment.step_s limits a call.

    Raises:
        ConfigError: the environment can't be imported or made.
    """

    def __init__(self, environment: EnvironmentConfig, limits: RuleLimits) -> None:
        self._environment, self._limits = environment, limits
        self._process = self._started()
        self._played: dict[int, list[tuple[Call, Answer]]] = {}
        self._lost: dict[int, str] = {}

    @property
    def is_agent(self) -> bool:
        """Whether answers are calls, and actions what calls.reply returns."""
        return bool(self._process.greeting["is_agent"])

    def begin(self) -> None:
        """Forgets all episodes. A process in which agents of them still run is ended."""
        self._played, self._lost = {}, {}
        if self._process.is_alive():
            try:
                running = list(self._process.ask([None], monotonic() + self._environment.step_s, {"forget": True}))
            except ProcessEndedError:
                return
            if running[0]:
                self._process.close()

    def reset(self, tasks: Mapping[int, Task], until: float) -> dict[int, Answer]:
        return self._ask([("reset", episode, task) for episode, task in tasks.items()], until)

    def step(self, actions: Mapping[int, Action], until: float) -> dict[int, Answer]:
        """Answers by episode.

        Args:
            until: deadline of all calls on the monotonic clock.

        Raises:
            RewardError: the process can't be started again.
        """
        return self._ask([("step", episode, action) for episode, action in actions.items()], until)

    def end(self, episode: int) -> None:
        """The episode gets no more calls."""
        self._played.pop(episode, None)

    def close(self) -> None:
        self._process.close()

    def __enter__(self) -> Episodes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, calls: Sequence[Call], until: float) -> dict[int, Answer]:
        answers: dict[int, Answer] = {}
        waiting, suspected = list(calls), set[int]()
        at_once = bool(self._process.greeting["is_async"])
        while waiting and monotonic() < until:
            self._revive(until)
            if not self._process.is_alive():
                continue  # it died again, or there is no time left
            answers |= {episode: self._lost[episode] for _, episode, _ in waiting if episode in self._lost}
            waiting = [call for call in waiting if call[1] not in answers]
            asked = list(waiting)
            try:
                for answer in self._process.ask(asked, until, {"calls": asked, "at_once": at_once}):
                    call = waiting.pop(0)
                    answers[call[1]] = self._kept(call, answer)
            except ProcessEndedError as error:
                episode = waiting[0][1]
                if not at_once and (error.is_certain or episode in suspected):
                    answers[episode] = str(error)
                    waiting.pop(0)
                    self.end(episode)
                suspected.add(episode)
                at_once = False  # one after the other, which shows the cause
        late = f"environment {self._environment.name} was not asked: nothing was left of its shard's time"
        return answers | {episode: late for _, episode, _ in waiting}

    def _kept(self, call: Call, answer: Answer) -> Answer:
        if isinstance(answer, str):
            self.end(call[1])
            return f"environment {self._environment.name}: {answer}"
        if answer.get("done") or "raised" in answer:
            self.end(call[1])
        else:
            self._played.setdefault(call[1], []).append((call, answer))
        return answer

    def _revive(self, until: float) -> None:
        """Replaces a process that has ended, and plays the open episodes again, while there is time."""
        while not self._process.is_alive() and monotonic() < until:
            self._process.close()
            try:
                self._process = self._started()
            except ConfigError as error:
                raise RewardError(f"the process of environments can't be started again: {error}") from None
            for episode, played in list(self._played.items()):
                if problem := self._problem_of_playing(played, until):
                    self._lost[episode] = f"environment {self._environment.name} {problem}"
                    self.end(episode)
                if not self._process.is_alive():
                    break

    def _problem_of_playing(self, played: Sequence[tuple[Call, Answer]], until: float) -> str:
        calls = [call for call, _ in played]
        try:
            found = list(self._process.ask(calls, until, {"calls": calls}))
        except ProcessEndedError as error:
            return f"was played again after its process had ended, and {error}"
        same = all(_compared(now) == _compared(before) for now, (_, before) in zip(found, played, strict=True))
        if same:
            return ""
        return "was played again after its process had ended, and answered differently: it has to be deterministic"

    def _started(self) -> ContainedProcess:
        environment = self._environment
        assert environment.name is not None
        return ContainedProcess(
            "environment",
            [environment.name],
            {
                "server": "actors.environments.server",
                "environment": environment.name,
                "options": dict(environment.options),
                "step_s": environment.step_s,
            },
            (environment.step_s, "environment.step_s"),
            self._limits,
        )


def _compared(answer: Answer) -> Any:
    return answer if isinstance(answer, str) else [answer.get(key) for key in _COMPARED]
