"""The life of a step on shared GPUs: who is on them in each phase. The loop, the memory plan and the simulation use the
same table.

    phase     engines             states of     what computes
    sample    weights, KV cache   none          the engines
    score     none                none          all models, forward only
    evaluate  none                none          the same; the engines keep their weights on the host
    policy    none                the policy    the policy learns, saves, loads or exports
    critic    none                the critic    the critic does
    publish   weights             none          the policy sends, the engines receive and verify

Weights of models that learn or score stay on the GPUs. States are gradients, master weights and optimizer states; they
are on the host in all other phases. Engines start first, on empty GPUs, and are asleep when the other roles start.

torch keeps freed memory for the process that freed it, so models that computed return it before the next phase.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal, Protocol

from orchestrator.concurrency import together
from orchestrator.roles import Learner, Resting, Rollouts, Tag, Trimming
from orchestrator.types import Experience, Handle, Metrics, RolloutShard

Phase = Literal["sample", "score", "evaluate", "policy", "critic", "publish"]

OFFLOAD, DISCARD = 1, 2
"""Levels of an engine's sleep: its weights are kept on the host, or are gone until the next publish."""


@dataclass(frozen=True)
class Presence:
    """What is on shared GPUs besides the weights of models that learn or score.

    Args:
        engines: parts of the engines, in the order in which they wake.
        states: the learner whose states are there.
        computing: the models that compute.
        samples_next: engines that leave for this phase will sample again before the next publish, though they have
            sampled since the last one.
    """

    engines: tuple[Tag, ...] = ()
    states: frozenset[str] = frozenset()
    computing: frozenset[str] = frozenset()
    samples_next: bool = False


_POLICY, _CRITIC = frozenset({"policy"}), frozenset({"critic"})
_MODELS = frozenset({"policy", "critic", "reference", "reward"})
PHASES: Mapping[Phase, Presence] = MappingProxyType(
    {
        "sample": Presence(engines=("weights", "kv_cache")),
        "score": Presence(computing=_MODELS),
        "evaluate": Presence(computing=_MODELS, samples_next=True),
        "policy": Presence(states=_POLICY, computing=_POLICY),
        "critic": Presence(states=_CRITIC, computing=_CRITIC),
        "publish": Presence(engines=("weights",), computing=_POLICY),
    }
)


class Turns(Protocol):
    """Use of the devices by phases of a step."""

    def hold(self, phase: Phase) -> AbstractAsyncContextManager[None]:
        """The body of the context is the phase."""

    def forget(self) -> None:
        """What is on the devices is unknown: actors were started or restarted."""


class Unshared:
    """Each role has its own devices, or cores; phases may overlap."""

    def hold(self, phase: Phase) -> AbstractAsyncContextManager[None]:  # noqa: ARG002  Protocol
        return nullcontext()

    def forget(self) -> None:
        pass


class SharedGpus:
    """One phase at a time. Before it begins, what it does not need leaves the GPUs, then what it needs comes.

    Args:
        rollouts: None: engines have GPUs of their own.
        learners: policy, and critic if there is one.
        scorers: reference and reward, if they are on these GPUs.
        samples_again: after scoring, further samples may be drawn with the same weights (dynamic sampling).
    """

    def __init__(
        self,
        rollouts: Rollouts | None,
        learners: Mapping[str, Resting],
        scorers: Mapping[str, Trimming] = MappingProxyType({}),
        *,
        samples_again: bool = False,
    ) -> None:
        self._rollouts, self._learners, self._samples_again = rollouts, learners, samples_again
        self._models: Mapping[str, Trimming] = {**scorers, **learners}
        self._there: Presence | None = None
        self._has_sampled = False  # since the last publish
        self._turn = asyncio.Lock()

    @asynccontextmanager
    async def hold(self, phase: Phase) -> AsyncIterator[None]:
        async with self._turn:
            if self._there is not PHASES[phase]:
                await self._enter(PHASES[phase])
            if phase in ("sample", "publish"):
                self._has_sampled = phase == "sample"
            yield

    def forget(self) -> None:
        self._there = None

    async def _enter(self, wanted: Presence) -> None:
        there, self._there = self._there, None  # unknown if a call fails
        coming = wanted.states & self._learners.keys()
        leaving = self._learners.keys() if there is None else there.states & self._learners.keys()
        staying = frozenset() if there is None else coming & leaving
        computed = self._models.keys() & (_MODELS if there is None else there.computing)
        await together(
            [
                *(self._learners[role].rest() for role in sorted(leaving - coming)),
                *(self._models[role].trim() for role in sorted(computed - (leaving - coming))),
            ]
        )
        await self._move_engines(there, wanted)
        await together(self._learners[role].resume() for role in sorted(coming - staying))
        self._there = wanted

    async def _move_engines(self, there: Presence | None, wanted: Presence) -> None:
        if self._rollouts is None:
            return
        awake: Sequence[Tag] = () if there is None else there.engines
        if there is None or set(awake) - set(wanted.engines):
            keeps = there is None or not self._has_sampled or wanted.samples_next or self._samples_again
            await self._rollouts.sleep(OFFLOAD if keeps else DISCARD)
            awake = ()
        if missing := [tag for tag in wanted.engines if tag not in awake]:
            await self._rollouts.wake(missing)


@dataclass(frozen=True)
class InTurn:
    """A learner that learns, saves, loads and exports in its phase. It scores in the phase of all models."""

    learner: Learner
    phase: Phase
    turns: Turns

    async def score(self, shard: RolloutShard) -> Sequence[Handle]:
        return await self.learner.score(shard)

    async def learn(self, experience: Experience) -> Metrics:
        async with self.turns.hold(self.phase):
            return await self.learner.learn(experience)

    async def save(self, folder: Path) -> None:
        async with self.turns.hold(self.phase):
            await self.learner.save(folder)

    async def load(self, folder: Path) -> None:
        async with self.turns.hold(self.phase):
            await self.learner.load(folder)

    async def export(self, folder: Path) -> None:
        async with self.turns.hold(self.phase):
            await self.learner.export(folder)
