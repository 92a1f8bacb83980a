"""Dynamic sampling (Yu 2025, DAPO, section 3.2): prompts whose samples all have the same reward teach nothing, because
their advantages are 0. They are left out, and other prompts are sampled in their place."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from orchestrator.concurrency import together
from orchestrator.roles import Grouping
from orchestrator.sampler import Sampler, StepRollouts
from orchestrator.types import PromptGroup, ScoredShard
from orchestrator.watching.telemetry import Telemetry

Score = Callable[[StepRollouts], Awaitable[list[ScoredShard]]]
Filter = Callable[[int, list[ScoredShard], Score], Awaitable[list[ScoredShard]]]
_SHOWN = 5


async def as_sampled(_step: int, scored: list[ScoredShard], _score: Score) -> list[ScoredShard]:
    """Learns from all prompts."""
    return scored


class DynamicSampling:
    """Fills a step with prompts that are learned from.

    Which prompts replace others depends on the seed, the step and the rewards alone, so that a resumed run samples the
    same.

    Args:
        rounds: how often further prompts may be sampled, prompts_per_step each time.
    """

    def __init__(
        self, grouping: Grouping, sampler: Sampler, telemetry: Telemetry, *, prompts_per_step: int, rounds: int
    ) -> None:
        self._grouping, self._sampler, self._telemetry = grouping, sampler, telemetry
        self._prompts_per_step, self._rounds = prompts_per_step, rounds

    async def __call__(self, step: int, scored: list[ScoredShard], score: Score) -> list[ScoredShard]:
        """The step's shards and those of the replacements, each with the prompts that are learned from: the first
        prompts_per_step that teach something. If there are none after the last round, the step's own prompts."""
        found = await self._groups(scored)
        rounds = 0
        while rounds < self._rounds and self._num_mixed(found) < self._prompts_per_step:
            rounds += 1
            more = await score(await self._sampler.more(step, rounds, first_index=len(scored)))
            scored, found = [*scored, *more], [*found, *await self._groups(more)]
        groups = [group for shard in found for group in shard]
        chosen = [group.number for group in groups if group.is_mixed][: self._prompts_per_step]
        self._tell(step, groups, num_chosen=len(chosen), rounds=rounds)
        kept = frozenset(chosen or [group.number for group in groups][: self._prompts_per_step])
        return [
            replace(shard, groups=tuple(group.number for group in of_shard if group.number in kept))
            for shard, of_shard in zip(scored, found, strict=True)
        ]

    async def _groups(self, scored: Sequence[ScoredShard]) -> list[Sequence[PromptGroup]]:
        return await together(self._grouping.groups(shard) for shard in scored)

    @staticmethod
    def _num_mixed(found: Sequence[Sequence[PromptGroup]]) -> int:
        return sum(group.is_mixed for shard in found for group in shard)

    def _tell(self, step: int, groups: Sequence[PromptGroup], *, num_chosen: int, rounds: int) -> None:
        """An event that names the prompts that teach nothing, and a line if too few are left."""
        same = {group.prompt_id: group.mean_reward for group in groups if not group.is_mixed}
        if same:
            self._telemetry.event("filtered", step=step, rounds=rounds, sampled=len(groups), same_reward=same)
        if num_chosen < self._prompts_per_step:
            few = f"{num_chosen} of {self._prompts_per_step} prompts have samples with different rewards"
            rewards = {prompt: "failed" if mean is None else f"{mean:g}" for prompt, mean in same.items()}
            num_same = sum(not group.is_mixed for group in groups)
            shown = ", ".join(f"{prompt} ({reward})" for prompt, reward in list(rewards.items())[:_SHOWN])
            self._telemetry.tell(
                f"WARNING step {step}: only {few} after {rounds} further rounds. All samples have the same reward for "
                f"{num_same} of {len(groups)} prompts, among them {shown}. Raise algorithm.filter_rounds or "
                "rl.samples_per_prompt, or give other prompts",
                "too_few_prompts",
                step=step,
                kept=num_chosen,
            )
