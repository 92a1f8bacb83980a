"""The simulated scenario: the work of a step, and its assignment to devices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from orchestrator.planning.costs import Dimensions, LearnSettings, Lengths
from orchestrator.planning.hardware import Device
from orchestrator.planning.placement import Mode

MODELS = ("policy", "critic", "reference", "reward")
ROLES = ("rollout", *MODELS)


@dataclass(frozen=True)
class Spread:
    """Lengths in tokens: log-normal with `mean` and a relative standard deviation, cut at `longest`."""

    mean: float
    longest: int
    deviation: float = 0.0

    def draw(self, count: int, seed: tuple[int, ...]) -> Lengths:
        """The same seed gives the same lengths."""
        variance = np.log1p(self.deviation**2)
        drawn = np.random.default_rng(seed).lognormal(np.log(self.mean) - variance / 2, np.sqrt(variance), count)
        return np.asarray(np.clip(np.rint(drawn), 1, self.longest).astype(np.int64))


@dataclass(frozen=True)
class Work:
    """The work of one step. A role without a model costs nothing: the reward with rules, the critic with GRPO.

    Args:
        models: sizes of policy, critic, reference and reward.
        samples: samples per step that are learned from; those of one prompt are adjacent.
        sharing: number of samples for which policy and reference compute a prompt once.
        on_trunk: roles without weights of their own: they compute on the policy's ranks.
        greedy: further samples of each prompt, which are scored and not learned from; they follow its others.
        rounds: how often as many further prompts are sampled and scored, in place of prompts that are left out.
    """

    models: Mapping[str, Dimensions | None]
    samples: int
    prompt: Spread
    response: Spread
    sharing: int = field(default=1, kw_only=True)
    on_trunk: frozenset[str] = field(default=frozenset(), kw_only=True)
    greedy: int = field(default=0, kw_only=True)
    rounds: int = field(default=0, kw_only=True)

    @property
    def policy(self) -> Dimensions:
        found = self.models["policy"]
        if found is None:
            raise ValueError("the policy must have a model")
        return found

    @property
    def of_prompt(self) -> int:
        """Samples of one prompt that are scored."""
        return self.sharing + self.greedy

    @property
    def scored(self) -> int:
        """Samples of a step before further rounds, with greedy ones."""
        return self.samples + self.greedy * math.ceil(self.samples / self.sharing)

    def lengths(self, step: int) -> tuple[Lengths, Lengths]:
        """(prompts, responses) of the scored samples of a step; those of further rounds are as long."""
        prompts = self.prompt.draw(math.ceil(self.samples / self.sharing), (step, 0))
        return np.repeat(prompts, self.of_prompt)[: self.scored], self.response.draw(self.scored, (step, 1))

    def are_learned(self, first: int, count: int) -> npt.NDArray[np.bool_]:
        """Whether each of `count` scored samples, from this one on, is learned from."""
        return np.arange(first, first + count) % self.of_prompt < self.sharing


@dataclass(frozen=True)
class Measured(Work):
    """Work with the lengths of a real run.

    Args:
        of_step: lengths (prompts, responses) of each step; repeats after the last.
    """

    of_step: tuple[tuple[Lengths, Lengths], ...] = ()

    def lengths(self, step: int) -> tuple[Lengths, Lengths]:
        return self.of_step[step % len(self.of_step)]


@dataclass(frozen=True)
class Pool:
    """Devices that roles share, and the number of devices that one call of each role occupies."""

    devices: int
    widths: Mapping[str, int]


@dataclass(frozen=True)
class Layout:
    """The assignment of roles to devices. Engines that share a pool with other roles take turns with them.

    Args:
        reward_replicas: copies of the reward model; each scores whole shards.
        models_share: the models take turns on one pool, and the engines have another.
        utilization: share of a GPU that an engine takes. None: as much as the other roles leave.
        learning: settings of each role except the engines; reference and reward use zero_stage and micro_batch_tokens.
        deals_on: one scoring call goes to all ranks and fills them evenly, as in some other programs. Off: this
            program's assignment, see `scoring_ranks`.
    """

    device: Device
    pools: tuple[Pool, ...]
    engines: int
    samples_per_shard: int
    max_staleness: int = 0
    reward_replicas: int = 1
    learning: Mapping[str, LearnSettings] = field(default_factory=lambda: dict.fromkeys(MODELS, LearnSettings()))
    deals_on: bool = False
    utilization: float | None = None
    models_share: bool = False

    @property
    def devices(self) -> int:
        return sum(pool.devices for pool in self.pools)

    def pool_of(self, role: str) -> Pool:
        return next(pool for pool in self.pools if role in pool.widths)

    def width(self, role: str) -> int:
        return self.pool_of(role).widths[role]

    @property
    def takes_turns(self) -> bool:
        return len(self.pool_of("rollout").widths) > 1

    @property
    def mode(self) -> Mode:
        if self.takes_turns:
            return "colocated"
        return "mixed" if self.models_share else "separate"

    @property
    def shares_gpus(self) -> bool:
        """Whether learners move their states off the devices between phases."""
        return self.mode != "separate" and math.isfinite(self.device.host_link)

    def copies(self, role: str) -> int:
        """Number of concurrent calls of a role."""
        return {"rollout": self.engines, "reward": self.reward_replicas}.get(role, 1)

    def scoring_ranks(self, role: str, samples: int) -> int:
        """Number of ranks that score one shard of a step of `samples` samples (actors.remote.roles.ShardedScorer)."""
        if self.deals_on or self.learning[role].zero_stage == 3:
            return self.width(role)
        return max(1, self.width(role) // math.ceil(samples / self.samples_per_shard))

    def devices_of(self, role: str) -> int:
        """Number of devices of the role's actors."""
        return self.width(role) * self.copies(role)


@dataclass(frozen=True)
class Prediction:
    """Results of a simulated run, as means over its steady steps.

    Args:
        step_s: wall seconds of a step.
        phases_s: seconds of generate, score, commit, learn and publish; they may overlap.
        idle: by role, the share of a step in which its devices did not work for it.
        idle_devices: share of all device seconds without computation.
        generated_per_s: response tokens per second.
    """

    step_s: float
    phases_s: Mapping[str, float]
    idle: Mapping[str, float]
    idle_devices: float
    generated_per_s: float

    def money(self, layout: Layout, steps: int = 1) -> float | None:
        """US dollars for `steps` steps; None: the device has no price."""
        price = layout.device.price
        return None if price is None else price * layout.devices * steps * self.step_s / 3600
