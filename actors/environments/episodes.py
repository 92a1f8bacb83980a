"""Plays the episodes of a shard on an engine, all of them turn by turn in a fixed order:

    reset all     →  the prompts
    sample        →  one batch: the next turn of every open episode, with a seed from (sample's seed, turn)
    step all      →  observations, rewards; the observations become the next prompts
    ...           until no episode is open, or after environment.max_turns

So the requests of a shard depend only on its first requests, the weights and the environment's answers: a shard that is
lost is sampled again with the same result, if the environment answers the same.

A row has the first prompt as `prompt_tokens`, and everything after it as response: `learn` marks what was sampled, the
environment's turns and headers have log-prob 0. Its meta["episode"] is what `Episode.record` returns.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from actors.engines.contract import EngineContext, Sample, rollout_table, summary
from actors.environments.contract import Task
from actors.environments.process import Episodes
from actors.rewards.environment import EPISODE
from actors.text.conversations import Chat, load_chat
from actors.text.tokenizing import Tokens
from actors.text.turns import Conversation, prove_turns
from orchestrator.data.records import Message, message_dicts, messages_from_dicts
from orchestrator.errors import DataError
from orchestrator.prompts import derive_seed
from orchestrator.types import Prompt, SampleRequest, ShardRequest


class Samples(Protocol):
    """The part of actors.engines.contract.Engine that samples."""

    def generate(self, request: ShardRequest) -> tuple[pa.Table, dict[str, Any]]: ...

    def version(self) -> int | None: ...


@dataclass(eq=False)
class Episode:
    """One conversation with the environment.

    Attributes:
        tokens: all of it so far: the next prompt.
        turn: the policy's last turn.
        response, learn, logprobs: its part after the first prompt.
        parts: sums of the rewards so far, by part.
        error: why its reward is unknown; None: it is known.
        is_open: the policy speaks next.
        is_over: the environment has ended it.
    """

    number: int
    request: SampleRequest
    conversation: Conversation | None = None
    tokens: Tokens = field(default_factory=lambda: np.zeros(0, np.int32))
    turn: Tokens = field(default_factory=lambda: np.zeros(0, np.int32))
    response: list[int] = field(default_factory=list)
    learn: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    num_turns: int = 0
    parts: dict[str, float] = field(default_factory=dict)
    infos: list[Any] = field(default_factory=list)
    error: str | None = None
    is_open: bool = True
    is_over: bool = False

    def failed(self, reason: str) -> None:
        where = f"turn {self.num_turns}" if self.num_turns else "reset"
        self.error = f"prompt {self.request.prompt.id!r}, {where}: {reason}"
        self.is_open = False

    def answered(self, answer: Mapping[str, Any]) -> None:
        for name, value in answer["parts"].items():
            self.parts[name] = self.parts.get(name, 0.0) + value
        self.infos.append(answer["info"])
        self.is_over = answer["done"]
        self.is_open = not self.is_over

    def add(self, tokens: Sequence[int], logprobs: Sequence[float] | None) -> None:
        """Appends a turn of the policy, or (without log-probs) what the environment wrote."""
        self.tokens = np.concatenate([self.tokens, np.array(tokens, np.int32)])
        self.response += map(int, tokens)
        self.learn += [logprobs is not None] * len(tokens)
        self.logprobs += [0.0] * len(tokens) if logprobs is None else logprobs

    def question(self) -> SampleRequest:
        """The request for the next turn."""
        first = self.request
        seed = derive_seed("turn", first.seed, self.num_turns) if self.num_turns else first.seed
        return replace(first, prompt=Prompt(first.prompt.id, first.prompt.text, self.tokens), seed=seed)

    def sample(self, chat: Chat) -> Sample:
        """The row's sample. An episode that failed before its first turn has no learned tokens: it is dropped."""
        tokens, logprobs, learn = self.response, self.logprobs, self.learn
        if not tokens:
            tokens, logprobs, learn = chat.closing.tolist(), [0.0] * len(chat.closing), [False] * len(chat.closing)
        return Sample(tokens, logprobs, learn, is_cut=not self.is_over, meta={EPISODE: self.record(chat)})

    def record(self, chat: Chat) -> dict[str, Any]:
        """reward: sum of all steps, or None with an error; spans: the response in parts [sampled by the policy, text];
        infos: what the environment returned beside its observations."""
        learn = np.array(self.learn, np.bool_)
        edges = [0, *(np.flatnonzero(np.diff(learn)) + 1).tolist(), len(learn)] if len(learn) else []
        return {
            "reward": None if self.error else sum(self.parts.values()),
            "parts": self.parts,
            "error": self.error,
            "turns": self.num_turns,
            "spans": [
                [bool(learn[start]), chat.text(self.response[start:end])] for start, end in itertools.pairwise(edges)
            ],
            "infos": self.infos,
        }


class Player:
    """Samples shards of conversations: the `generate` of an engine, with an environment.

    Raises:
        DataError: the chat template can't continue conversations.
    """

    def __init__(self, engine: Samples, chat: Chat, played: Episodes, context: EngineContext) -> None:
        prove_turns(chat, context.environment.role)
        self._engine, self._chat, self._played, self._context = engine, chat, played, context

    def generate(self, request: ShardRequest) -> tuple[pa.Table, dict[str, Any]]:
        """As actors.engines.contract.Engine.generate. An episode that fails has the error in its meta.

        Raises:
            RewardError: the environment's process can't be started again.
        """
        started = perf_counter()
        until = monotonic() + self._context.environment_s
        ordered = sorted(request.requests, key=lambda item: item.row)
        episodes = [Episode(number, item) for number, item in enumerate(ordered)]
        longest = self._context.model.max_length - request.sampling.max_new_tokens
        self._reset(episodes, longest, until)
        version = self._engine.version()
        while speaking := [episode for episode in episodes if episode.is_open]:
            version = self._sample(speaking, request)
            self._step(speaking, longest, until)
        samples = [episode.sample(self._chat) for episode in episodes]
        requests = [episode.request for episode in episodes]
        table = rollout_table(requests, samples, chat=self._chat, version=-1 if version is None else version)
        return table, summary(table, version=table["version"][0].as_py(), seconds=perf_counter() - started)

    def _reset(self, episodes: Sequence[Episode], longest: int, until: float) -> None:
        self._played.begin()
        answers = self._played.reset({each.number: self._task(each.request.prompt) for each in episodes}, until)
        for episode in episodes:
            answer = answers[episode.number]
            try:
                if isinstance(answer, str):
                    raise DataError(answer)
                self._begin(episode, answer["observation"], longest)
            except DataError as error:
                self._fail(episode, str(error))

    def _task(self, prompt: Prompt) -> Task:
        return Task(prompt.text, prompt.meta, derive_seed("environment", self._context.seed, prompt.id))

    def _begin(self, episode: Episode, observation: str | None, longest: int) -> None:
        prompt = episode.request.prompt
        messages, tools = _messages(prompt), prompt.meta.get("tools", ())
        is_new = observation is not None and observation != prompt.text
        if observation is not None and is_new:
            messages = _with_user_text(messages, observation)
        episode.conversation = Conversation(self._chat, messages, tools)
        if observation is not None and is_new:
            meta = {**prompt.meta, "messages": message_dicts(messages)}
            prompt = Prompt(prompt.id, observation, episode.conversation.prompt, meta)
            episode.request = replace(episode.request, prompt=prompt)
        if len(prompt.tokens) > longest:
            raise DataError(
                f"the first observation makes a prompt of {len(prompt.tokens)} tokens, and {longest} fit beside "
                "rollout.max_new_tokens. Raise model.max_length, or shorten the observation."
            )
        episode.tokens = prompt.tokens

    def _sample(self, speaking: Sequence[Episode], request: ShardRequest) -> int:
        """Samples the next turn of these episodes, and returns the version of the weights."""
        table, numbers = self._engine.generate(replace(request, requests=[each.question() for each in speaking]))
        columns = zip(table["response_tokens"].to_pylist(), table["engine_logprobs"].to_pylist(), strict=True)
        for episode, (tokens, logprobs) in zip(speaking, columns, strict=True):
            episode.add(tokens, logprobs)
            episode.turn = np.array(tokens, np.int32)
            episode.num_turns += 1
        return int(numbers["version"])

    def _step(self, speaking: Sequence[Episode], longest: int, until: float) -> None:
        actions = {each.number: self._chat.text(self._chat.body(each.turn)) for each in speaking}
        answers = self._played.step(actions, until)
        for episode in speaking:
            answer = answers[episode.number]
            if isinstance(answer, str):
                self._fail(episode, answer)
                continue
            episode.answered(answer)
            if episode.is_open:
                self._continue(episode, answer["observation"], longest)

    def _continue(self, episode: Episode, observation: str, longest: int) -> None:
        """Adds the environment's turn. Without a turn left, or without room for one, the episode is cut."""
        environment = self._context.environment
        assert episode.conversation is not None
        if episode.num_turns < environment.max_turns:
            try:
                written = episode.conversation.continued(episode.turn, environment.role, observation)
            except DataError as error:
                self._fail(episode, str(error))
                return
            if len(episode.tokens) + len(written) <= longest:
                episode.add(written.tolist(), None)
                return
        episode.is_open = False
        self._played.end(episode.number)

    def _fail(self, episode: Episode, reason: str) -> None:
        episode.failed(reason)
        self._played.end(episode.number)


def playing(engine: Samples, folder: Path, context: EngineContext) -> Player:
    """Plays episodes of the context's environment on an engine.

    Args:
        folder: of the engine's model.

    Raises:
        ConfigError: the environment can't be imported or made.
        DataError: the chat template can't continue conversations.
    """
    chat = load_chat(folder, context.model, context.template)
    return Player(engine, chat, Episodes(context.environment, context.limits), context)


def _messages(prompt: Prompt) -> tuple[Message, ...]:
    return messages_from_dicts(prompt.meta.get("messages") or [{"role": "user", "content": prompt.text}])


def _with_user_text(messages: Sequence[Message], text: str) -> tuple[Message, ...]:
    """The messages with another text in the user's last one."""
    last = max((place for place, turn in enumerate(messages) if turn.role == "user"), default=None)
    if last is None:
        return (*messages, Message("user", text))
    return (*messages[:last], replace(messages[last], content=text), *messages[last + 1 :])
