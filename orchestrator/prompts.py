"""Selects the prompts and seeds of each step: pure functions of the run seed.

There is no stored position: step k of a resumed run makes the same requests as in an uninterrupted run.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from orchestrator.errors import ConfigError, DataError
from orchestrator.types import GREEDY, Prompt, SampleRequest

# The largest unsigned integer that both schema.ROLLOUT (int64) and a torch generator accept: with 63 bits no two
# samples of a run share a seed by chance.
_SEED_BITS = 63
HELD_OUT_FRACTION = 0.1


class Identified(Protocol):
    @property
    def id(self) -> str: ...


Record = TypeVar("Record", bound=Identified)


Part = Literal["train", "reward_model", "held_out"]


@dataclass(frozen=True)
class Splits(Generic[Record]):
    """Disjoint parts of the prompts, each in file order."""

    train: Sequence[Record]
    reward_model: Sequence[Record]
    held_out: Sequence[Record]


def split(
    records: Iterable[Record], *, held_out_fraction: float, reward_model_fraction: float, salt: str = "prompts"
) -> Iterator[tuple[Record, Part]]:
    """Every record and its part, by a hash of the prompt id: a prompt keeps its part when others are added, removed or
    reordered.

    Args:
        salt: part of the hash. To split a part again, use another salt: with the same salt all its prompts would fall
            on one side.

    Raises:
        ConfigError: the fractions leave no room for training.
    """
    taken = held_out_fraction + reward_model_fraction
    if taken > 1.0 and not math.isclose(taken, 1.0):
        raise ConfigError(
            f"prompts.held_out_fraction={held_out_fraction} and prompts.reward_model_fraction={reward_model_fraction} "
            "add up to more than 1: lower one of them."
        )

    def part_of(record: Record) -> Part:
        place = _place(salt, record)
        return "held_out" if place < held_out_fraction else "reward_model" if place < taken else "train"

    return ((record, part_of(record)) for record in records)


def marked_held_out(records: Iterable[Record], held_out: int | None, *, section: str) -> Iterator[tuple[Record, bool]]:
    """Every record in order, and whether it is held out: the last `held_out` records are, or (None) a tenth by a hash
    of the prompt. Memory holds `held_out` records.

    Args:
        section: of the config that has the key `held_out`; part of the hash.

    Raises:
        DataError: at the end: nothing is left to train on.
    """
    counts = [0, 0]
    waiting: deque[Record] = deque()
    for record in records:
        if held_out is None:
            is_held_out = _place(section, record) < HELD_OUT_FRACTION
            yield record, is_held_out
            counts[is_held_out] += 1
            continue
        waiting.append(record)
        if len(waiting) > held_out:
            yield waiting.popleft(), False
            counts[False] += 1
    for record in waiting:
        yield record, True
        counts[True] += 1
    if not counts[False]:
        raise DataError(
            f"all {counts[True]} {section} are held out, so none is left to train on. Give more {section} or lower "
            f"{section}.held_out."
        )


def _place(salt: str, record: Identified) -> float:
    """In [0, 1), from a hash of the id."""
    return float(derive_seed("split", salt, record.id) / 2**_SEED_BITS)


def derive_seed(*parts: int | str) -> int:
    """A number in [0, 2**63) that depends only on the parts and is equal on all machines and in all processes."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - _SEED_BITS)


def sample_requests(
    prompts: Sequence[Prompt],
    *,
    samples_per_prompt: int,
    seed: int,
    step: int,
    greedy_samples: int = 0,
    refill: int = 0,
) -> tuple[SampleRequest, ...]:
    """Requests for `samples_per_prompt` samples of every prompt, followed by the greedy ones.

    The samples of a repeated prompt are numbered continuously, so that no two requests of a step have the same seed.

    Args:
        refill: which requests of the step, see PromptSchedule.requests; rows are numbered on from those before.
    """
    requests: list[SampleRequest] = []
    drawn: dict[str, int] = {}
    before = refill * len(prompts) * (samples_per_prompt + greedy_samples)
    again = (refill,) if refill else ()
    for prompt in prompts:
        first = drawn.get(prompt.id, 0)
        drawn[prompt.id] = first + samples_per_prompt
        for sample_index in [*range(first, first + samples_per_prompt), *[GREEDY] * greedy_samples]:
            sample_seed = derive_seed("sample", seed, step, prompt.id, sample_index, *again)
            requests.append(SampleRequest(before + len(requests), prompt, sample_index, sample_seed))
    return tuple(requests)


class PromptSchedule:
    """Goes through the prompts epoch by epoch, each epoch in a different order, and never ends.

    Args:
        prompts: at least one; their order matters, so it must be the same in every attempt.
        seed: the run seed.
        prompts_per_step: may exceed the number of prompts: then some occur twice in one step.
        samples_per_prompt: samples per prompt.
        greedy_samples: samples per prompt in addition, at temperature 0.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        *,
        seed: int,
        prompts_per_step: int,
        samples_per_prompt: int,
        greedy_samples: int = 0,
    ) -> None:
        if not prompts:
            raise DataError(
                "no prompts are left to train on: lower prompts.held_out_fraction or prompts.reward_model_fraction, "
                "raise prompts.max_prompt_tokens, or give more prompts."
            )
        self._prompts = prompts
        self._seed = seed
        self._prompts_per_step = prompts_per_step
        self._samples_per_prompt, self._greedy_samples = samples_per_prompt, greedy_samples

    def requests(self, step: int, refill: int = 0) -> tuple[SampleRequest, ...]:
        """The step's requests, or (refill > 0) those of as many other prompts, drawn by (seed, step, refill) alone, for
        prompts that are left out (orchestrator/filtering.py)."""
        if refill:
            order = _permutation(derive_seed("refill", self._seed, step, refill), len(self._prompts))
            chosen = [self._prompts[int(order[place % len(order)])] for place in range(self._prompts_per_step)]
        else:
            start = step * self._prompts_per_step
            chosen = [self._at(position) for position in range(start, start + self._prompts_per_step)]
        return sample_requests(
            chosen,
            samples_per_prompt=self._samples_per_prompt,
            seed=self._seed,
            step=step,
            greedy_samples=self._greedy_samples,
            refill=refill,
        )

    def epoch(self, step: int) -> int:
        """The epoch in which a step begins."""
        return step * self._prompts_per_step // len(self._prompts)

    def _at(self, position: int) -> Prompt:
        epoch, index = divmod(position, len(self._prompts))
        return self._prompts[int(_order(self._seed, epoch, len(self._prompts))[index])]


@lru_cache(maxsize=2)  # a step may end in the next epoch
def _order(seed: int, epoch: int, count: int) -> npt.NDArray[np.intp]:
    order = _permutation(derive_seed("epoch", seed, epoch), count)
    order.flags.writeable = False
    return order


def _permutation(seed: int, count: int) -> npt.NDArray[np.intp]:
    """Sorts raw Philox words: unlike Generator.permutation, numpy promises never to change these."""
    words = np.random.Philox(np.random.SeedSequence(seed)).random_raw(count)
    return np.argsort(words, kind="stable")
