"""What an environment's answers mean for the prompts of an episode: one class per kind of environment.

Observed   reset and step: the observation is the next message
Called     an agent: each of its chat-completion calls is the next conversation
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from actors.engines.contract import EngineContext
from actors.environments.calls import refusal, reply
from actors.environments.segments import Episode, Segment
from actors.environments.server import Action
from actors.text.conversations import Chat
from actors.text.tokenizing import Tokens
from actors.text.turns import Conversation
from orchestrator.data.records import Message, Tools, message_dicts, messages_from_dicts
from orchestrator.errors import DataError
from orchestrator.types import Prompt

_MOST_REFUSED = 8


class Talk(Protocol):
    def heard(self, episode: Episode, answer: Mapping[str, Any]) -> Action | None:
        """Takes an answer of the environment. Returns what it is told at once, or None: it is the policy's turn, or the
        episode is over.

        Raises:
            DataError: the episode fails.
        """

    def most_tokens(self, episode: Episode) -> int | None:
        """Most tokens of the next turn, if fewer than rollout.max_new_tokens."""

    def action(self, episode: Episode) -> Action:
        """What the environment is told of the turn that was sampled."""


class Observed:
    """Environments with reset and step."""

    def __init__(self, chat: Chat, context: EngineContext, longest: int) -> None:
        self._chat, self._environment, self._longest = chat, context.environment, longest

    def heard(self, episode: Episode, answer: Mapping[str, Any]) -> None:
        if not episode.segments:
            self._begin(episode, answer["observation"])
            return
        episode.rewarded(answer)
        if answer["done"]:
            episode.is_open = False
            return
        self._continue(episode, answer["observation"])
        episode.is_open = not episode.cut

    def most_tokens(self, episode: Episode) -> int | None:  # noqa: ARG002  the protocol's
        return None

    def action(self, episode: Episode) -> str:
        return self._chat.text(self._chat.body(episode.current().turn))

    def _begin(self, episode: Episode, observation: str | None) -> None:
        prompt = episode.request.prompt
        messages, tools = _messages(prompt), prompt.meta.get("tools", ())
        tokens, is_new = prompt.tokens, observation is not None and observation != prompt.text
        if observation is not None and is_new:
            messages = _with_user_text(messages, observation)
        conversation = Conversation(self._chat, messages, tools)
        if observation is not None and is_new:
            tokens = conversation.prompt
            _set_prompt(episode, observation, tokens, messages, tools)
        if len(tokens) > self._longest:
            raise DataError(
                f"the first observation makes a prompt of {len(tokens)} tokens, and {self._longest} fit beside "
                "rollout.max_new_tokens. Raise model.max_length, or shorten the observation."
            )
        episode.begin(conversation, tokens)

    def _continue(self, episode: Episode, observation: str) -> None:
        """Adds the environment's turn. Without a turn left, or without room for one, the episode is cut."""
        if episode.num_turns >= self._environment.max_turns:
            episode.cut = f"it had environment.max_turns={self._environment.max_turns} turns"
            return
        answers = [Message(self._environment.role, observation)]
        episode.cut = follow(episode, episode.current(), answers, self._longest)


class Called:
    """Agents, which make chat-completion calls."""

    def __init__(self, chat: Chat, context: EngineContext, longest: int) -> None:
        self._chat, self._environment, self._longest = chat, context.environment, longest
        self._calls: dict[int, Mapping[str, Any]] = {}

    def heard(self, episode: Episode, answer: Mapping[str, Any]) -> Action | None:
        call = answer["call"]
        if call is None:
            self._ended(episode, answer)
            return None
        code, problem = self._problem(episode, call)
        if not problem:
            self._calls[episode.number] = call
            return None
        episode.refused += 1
        if episode.refused > _MOST_REFUSED:
            raise DataError(
                f"the agent made more than {_MOST_REFUSED} calls that were refused, the last one: {problem}"
            )
        return refusal(code, problem)

    def most_tokens(self, episode: Episode) -> int | None:
        found: int | None = self._calls[episode.number]["max_tokens"]
        return found

    def action(self, episode: Episode) -> Action:
        call, segment = self._calls.pop(episode.number), episode.current()
        body = self._chat.body(segment.turn)
        is_cut = len(segment.turn) == 0 or int(segment.turn[-1]) not in self._chat.stops
        told = reply(
            self._chat.text(body),
            has_tools=bool(call["tools"]),
            number=episode.num_turns,
            is_cut=is_cut,
            tokens=(len(segment.tokens) - len(segment.turn), len(segment.turn)),
        )
        segment.known = messages_from_dicts([*call["messages"], told["message"]])
        return told

    def _ended(self, episode: Episode, answer: Mapping[str, Any]) -> None:
        episode.is_open = False
        if not episode.num_turns:
            why = f": {episode.cut}" if episode.cut else ""
            raise DataError(f"the agent {answer['raised'] or 'returned'} before a call of it was answered{why}")
        if answer["raised"] and not episode.cut:
            raise DataError(f"the agent {answer['raised']}")
        if not answer["raised"]:
            episode.rewarded(answer)

    def _problem(self, episode: Episode, call: Mapping[str, Any]) -> tuple[str, str]:
        """(code, reason) why a call can't be answered, or ("", ""): then the episode has the call's prompt."""
        most = self._environment.max_turns
        if episode.num_turns >= most:
            episode.cut = f"it had environment.max_turns={most} turns"
            return "max_turns", f"the episode had its environment.max_turns={most} turns"
        try:
            messages, tools = messages_from_dicts(call["messages"]), tuple(call["tools"])
            problem = self._follow(episode, messages, tools)
        except DataError as error:
            return "invalid_messages", str(error)
        if problem:
            episode.cut = problem
            return "context_length_exceeded", f"the call has no room: {problem}"
        episode.cut = ""
        return "", ""

    def _follow(self, episode: Episode, messages: tuple[Message, ...], tools: Tools) -> str:
        """Gives the episode the call's prompt: behind the segment that the call continues, or as a new segment. Returns
        why there is no room for it, or ""."""
        known = [each for each in episode.segments if _continues(each, messages, tools)]
        if known:
            segment = max(known, key=lambda each: len(each.known))
            try:
                return follow(episode, segment, messages[len(segment.known) :], self._longest)
            except DataError:  # a template may need calls of tools in another form than they were sampled
                pass
        conversation = Conversation(self._chat, messages, tools)
        tokens = conversation.prompt
        problem = episode.room_problem(len(tokens), self._longest, of=None)
        if problem:
            return problem
        if not episode.segments:
            _set_prompt(episode, episode.request.prompt.text, tokens, messages, tools)
        episode.begin(conversation, tokens)
        return ""


def follow(episode: Episode, segment: Segment, answers: Sequence[Message], longest: int) -> str:
    """Continues a segment, or begins one where the template rewrites it. Returns why there is no room, or "".

    Raises:
        DataError: the template refuses the conversation.
    """
    following, written = segment.conversation.continued(segment.turn, answers)
    if written is None:
        tokens = following.prompt
        problem = episode.room_problem(len(tokens), longest, of=None)
        if not problem:
            episode.begin(following, tokens)
        return problem
    problem = episode.room_problem(len(segment.tokens) + len(written), longest, of=segment)
    if not problem:
        segment.conversation, episode.speaking = following, segment
        segment.add(written, None)
    return problem


def _continues(segment: Segment, messages: tuple[Message, ...], tools: Tools) -> bool:
    size = len(segment.known)
    return 0 < size < len(messages) and messages[:size] == segment.known and tools == segment.conversation.tools


def _set_prompt(
    episode: Episode, text: str, tokens: Tokens, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
) -> None:
    """Replaces the prompt of the episode's row."""
    prompt = episode.request.prompt
    meta = {**prompt.meta, "messages": message_dicts(messages), **({"tools": list(tools)} if tools else {})}
    episode.request = replace(episode.request, prompt=Prompt(prompt.id, text, tokens, meta))


def _messages(prompt: Prompt) -> tuple[Message, ...]:
    return messages_from_dicts(prompt.meta.get("messages") or [{"role": "user", "content": prompt.text}])


def _with_user_text(messages: Sequence[Message], text: str) -> tuple[Message, ...]:
    """The messages with another text in the user's last one."""
    last = max((place for place, turn in enumerate(messages) if turn.role == "user"), default=None)
    if last is None:
        return (*messages, Message("user", text))
    return (*messages[:last], replace(messages[last], content=text), *messages[last + 1 :])
