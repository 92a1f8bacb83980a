"""What is kept of an episode while it is played: segments of tokens, and what the environment said about them.

A segment is one prompt and what follows it, turn by turn, exactly as it was sampled. An episode has one, unless its
conversation was rewritten on the way (by the chat template, or by an agent): then the next turn begins another, whose
prompt is the conversation as it is written now. All of them are one row, and share its reward:

    prompt_tokens | response_tokens                                            starts = [a]
    prompt        | turn 1, frame, turn 2 |a  prompt of the next, turn 3
                    learned        learned                        learned
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from actors.engines.contract import Sample
from actors.rewards.environment import EPISODE
from actors.text.conversations import Chat
from actors.text.tokenizing import Tokens
from actors.text.turns import Conversation
from orchestrator.data.records import Message, message_dicts
from orchestrator.prompts import derive_seed
from orchestrator.types import Prompt, SampleRequest


@dataclass(eq=False)
class Segment:
    """One prompt and what follows it.

    Attributes:
        tokens: all of it so far: the next prompt.
        learn, logprobs: of all tokens; the prompt is not learned.
        turn: the policy's last turn.
        known: the conversation as an agent knows it, with the reply to its last call.
    """

    conversation: Conversation
    tokens: Tokens
    learn: list[bool]
    logprobs: list[float]
    turn: Tokens = field(default_factory=lambda: np.zeros(0, np.int32))
    known: tuple[Message, ...] = ()

    @classmethod
    def begun(cls, conversation: Conversation, tokens: Tokens) -> Segment:
        return cls(conversation, tokens, [False] * len(tokens), [0.0] * len(tokens))

    def add(self, tokens: Sequence[int] | Tokens, logprobs: Sequence[float] | None) -> None:
        """Appends a turn of the policy, or (without log-probs) what was written between two turns."""
        added = np.array(tokens, np.int32)
        self.tokens = np.concatenate([self.tokens, added])
        self.learn += [logprobs is not None] * len(added)
        self.logprobs += [0.0] * len(added) if logprobs is None else logprobs
        if logprobs is not None:
            self.turn = added


@dataclass(eq=False)
class Episode:
    """One conversation with the environment.

    Attributes:
        segments: in the order in which they began.
        speaking: the segment of the next turn, or of the last one.
        parts: sums of the rewards so far, by part.
        error: why its reward is unknown; None: it is known.
        cut: why it was ended before its environment ended it; "": it was not.
        refused: how many calls of an agent were refused.
        cut_turns: how many turns of the policy were cut by their length.
        is_open: the policy speaks next.
    """

    number: int
    request: SampleRequest
    segments: list[Segment] = field(default_factory=list)
    speaking: Segment | None = None
    num_turns: int = 0
    parts: dict[str, float] = field(default_factory=dict)
    infos: list[Any] = field(default_factory=list)
    error: str | None = None
    cut: str = ""
    refused: int = 0
    cut_turns: int = 0
    most_tokens: int | None = None
    is_open: bool = True

    def begin(self, conversation: Conversation, tokens: Tokens) -> None:
        """Begins a segment."""
        self.speaking = Segment.begun(conversation, tokens)
        self.segments.append(self.speaking)

    def current(self) -> Segment:
        assert self.speaking is not None, "the episode has no prompt"
        return self.speaking

    def failed(self, reason: str) -> None:
        where = f"turn {self.num_turns}" if self.num_turns else "reset"
        self.error = f"prompt {self.request.prompt.id!r}, {where}: {reason}"
        self.is_open = False

    def rewarded(self, answer: Mapping[str, Any]) -> None:
        for name, value in answer["parts"].items():
            self.parts[name] = self.parts.get(name, 0.0) + value
        self.infos.append(answer["info"])

    def question(self) -> SampleRequest:
        """The request for the next turn."""
        first = self.request
        seed = derive_seed("turn", first.seed, self.num_turns) if self.num_turns else first.seed
        return replace(first, prompt=Prompt(first.prompt.id, first.prompt.text, self.current().tokens), seed=seed)

    def said(self, tokens: Sequence[int], logprobs: Sequence[float], *, is_cut: bool) -> None:
        """The policy has spoken."""
        self.current().add(tokens, logprobs)
        self.num_turns += 1
        self.cut_turns += is_cut

    def room_problem(self, tokens: int, longest: int, *, of: Segment | None) -> str:
        """Why a prompt of so many tokens leaves no room for a turn, or "".

        Args:
            longest: most tokens of a prompt.
            of: the segment that the prompt continues; None: it begins one.
        """
        if tokens > longest:
            room = f"{longest} fit in model.max_length beside rollout.max_new_tokens"
            return f"its prompt has {tokens} tokens, and {room}"
        others = [len(segment.tokens) for segment in self.segments if segment is not of]
        padded = (len(others) + 1) * max([tokens, *others])
        if self.most_tokens is not None and others and padded > self.most_tokens:
            return (
                f"its {len(others) + 1} segments fill {padded} tokens, and {self.most_tokens} fit in one micro-batch "
                "(micro_batch_tokens of policy, critic and reference)"
            )
        return ""

    def sample(self, chat: Chat) -> Sample:
        """The row's sample. An episode that failed before its first turn has no learned tokens: it is dropped."""
        segments = [segment for segment in self.segments if any(segment.learn)]
        if not segments:
            closing = chat.closing.tolist()
            nothing = [False] * len(closing)
            return Sample(closing, [0.0] * len(closing), nothing, is_cut=True, meta={EPISODE: self.record(chat)})
        tokens, learn, logprobs, starts = list[int](), list[bool](), list[float](), list[int]()
        for number, segment in enumerate(segments):
            skipped = 0 if number else len(self.request.prompt.tokens)
            if number:
                starts.append(len(tokens))
            tokens += segment.tokens[skipped:].tolist()
            learn += segment.learn[skipped:]
            logprobs += segment.logprobs[skipped:]
        is_cut = bool(self.cut or self.error)
        text = "\n".join(self._turns(chat, segments)) if starts else None
        return Sample(tokens, logprobs, learn, starts, is_cut, {EPISODE: self.record(chat)}, text)

    def _turns(self, chat: Chat, segments: Sequence[Segment]) -> list[str]:
        return [text for segment in segments for learned, text in _spans(segment, chat) if learned]

    def record(self, chat: Chat) -> dict[str, Any]:
        """reward: sum of all steps, or None with an error; spans: the response in parts [sampled by the policy, text],
        each segment after the first with its prompt; conversations: all of it as messages; infos: what the environment
        returned beside its observations."""
        spans = [list(span) for segment in self.segments if any(segment.learn) for span in _spans(segment, chat)]
        found = {
            "reward": None if self.error else sum(self.parts.values()),
            "parts": self.parts,
            "error": self.error,
            "turns": self.num_turns,
            "spans": spans[1:],  # without the first prompt
            "conversations": self._conversations(),
            "infos": self.infos,
        }
        more = {"cut": self.cut, "cut_turns": self.cut_turns}
        return found | {name: value for name, value in more.items() if value}

    def _conversations(self) -> list[dict[str, Any]]:
        """What was said. One conversation, unless an agent held several: one that another continues is left out."""
        segments = [segment for segment in self.segments if any(segment.learn)]
        held = [(segment.conversation.answered(segment.turn), segment.conversation.tools) for segment in segments]
        return [
            {"messages": message_dicts(messages), **({"tools": list(tools)} if tools else {})}
            for messages, tools in held
            if not any(len(other) > len(messages) and other[: len(messages)] == messages for other, _ in held)
        ]


def _spans(segment: Segment, chat: Chat) -> list[tuple[bool, str]]:
    learn = np.array(segment.learn, np.bool_)
    edges = [0, *(np.flatnonzero(np.diff(learn)) + 1).tolist(), len(learn)]
    return [(bool(learn[start]), chat.text(segment.tokens[start:end])) for start, end in itertools.pairwise(edges)]
