"""Plays the episodes of a shard on an engine, all of them turn by turn in a fixed order:

    reset all     →  the prompts
    sample        →  one batch: the next turn of every open episode, with a seed from (sample's seed, turn)
    step all      →  observations, rewards; the observations become the next prompts
    ...           until no episode is open, or after environment.max_turns

An agent's observations are its chat-completion calls: all of a shard's agents run until each has made one.

So the requests of a shard depend only on its first requests, the weights and the environment's answers: a shard that is
lost is sampled again with the same result, if the environment answers the same.

A row has the first prompt as `prompt_tokens`, and everything after it as response: `learn` marks what was sampled, the
environment's turns and headers have log-prob 0. Its meta["episode"] is what `Episode.record` returns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any, Protocol

import pyarrow as pa

from actors.engines.contract import EngineContext, rollout_table, summary
from actors.environments.contract import Task
from actors.environments.process import Episodes
from actors.environments.segments import Episode
from actors.environments.server import Action, Answer
from actors.environments.talks import Called, Observed, Talk
from actors.text.conversations import Chat, load_chat
from actors.text.turns import prove_turns
from orchestrator.errors import DataError
from orchestrator.prompts import derive_seed
from orchestrator.types import Prompt, ShardRequest


class Samples(Protocol):
    """The part of actors.engines.contract.Engine that samples."""

    def generate(self, request: ShardRequest) -> tuple[pa.Table, dict[str, Any]]: ...

    def version(self) -> int | None: ...


class Player:
    """Samples shards of conversations: the `generate` of an engine, with an environment.

    Raises:
        DataError: the chat template can't continue conversations.
    """

    def __init__(self, engine: Samples, chat: Chat, played: Episodes, context: EngineContext) -> None:
        if not played.is_agent:
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
        most = self._context.episode_tokens
        episodes = [Episode(number, item, most_tokens=most) for number, item in enumerate(ordered)]
        longest = self._context.model.max_length - request.sampling.max_new_tokens
        talk = (Called if self._played.is_agent else Observed)(self._chat, self._context, longest)
        self._played.begin()
        tasks = {each.number: self._task(each.request.prompt) for each in episodes}
        self._hear(episodes, self._played.reset(tasks, until), talk, until)
        version = self._engine.version()
        while speaking := [episode for episode in episodes if episode.is_open]:
            version = self._sample(speaking, request, talk)
            actions = {each.number: talk.action(each) for each in speaking}
            self._hear(speaking, self._played.step(actions, until), talk, until)
        samples = [episode.sample(self._chat) for episode in episodes]
        requests = [episode.request for episode in episodes]
        table = rollout_table(requests, samples, chat=self._chat, version=-1 if version is None else version)
        return table, summary(table, version=table["version"][0].as_py(), seconds=perf_counter() - started)

    def _task(self, prompt: Prompt) -> Task:
        return Task(prompt.text, prompt.meta, derive_seed("environment", self._context.seed, prompt.id))

    def _sample(self, speaking: Sequence[Episode], request: ShardRequest, talk: Talk) -> int:
        """Samples the next turn of these episodes, and returns the version of the weights."""
        table, numbers = self._engine.generate(replace(request, requests=[each.question() for each in speaking]))
        columns = zip(table["response_tokens"].to_pylist(), table["engine_logprobs"].to_pylist(), strict=True)
        for episode, (tokens, logprobs) in zip(speaking, columns, strict=True):
            most = talk.most_tokens(episode)  # the first tokens of a turn do not depend on where it is cut
            said = tokens[:most]
            episode.said(said, logprobs[:most], is_cut=not said or said[-1] not in self._chat.stops)
        return int(numbers["version"])

    def _hear(self, episodes: Sequence[Episode], answers: Mapping[int, Answer], talk: Talk, until: float) -> None:
        """Takes the answers of the environment to a turn, and to what it is told at once."""
        while episodes:
            told: dict[int, Action] = {}
            for episode in episodes:
                action = self._heard(episode, answers[episode.number], talk)
                if action is not None:
                    told[episode.number] = action
                elif not episode.is_open:
                    self._played.end(episode.number)
            episodes = [episode for episode in episodes if episode.number in told]
            answers = self._played.step(told, until) if told else {}

    def _heard(self, episode: Episode, answer: Answer, talk: Talk) -> Action | None:
        try:
            if isinstance(answer, str):
                raise DataError(answer)
            return talk.heard(episode, answer)
        except DataError as error:
            episode.failed(str(error))
            return None


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
