"""Chooses which prompts people judge, by the states of a reward model (docs/adr/0026-what-to-ask.md).

Each chosen item keeps in `source.choice` which arm it belongs to and why, and in the source of each reply the score
that the reward model gave it then: so that arms.py can measure what the choice was worth.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from jobs.services.labelling.items.adding import compared, key_of, known_keys
from jobs.services.labelling.items.sources import Candidate
from jobs.services.labelling.store import Store
from orchestrator.errors import ConfigError, DataError, StorageError
from orchestrator.run.storage import read_json, write_json
from orchestrator.training.acquisition import ACTIVE, CONTROL, Choice, Numbers, Signals, choose, information
from orchestrator.training.ensemble import mean_scores

_WAYS = ("active", "random")


@dataclass(frozen=True)
class Asking:
    """What to ask people.

    Args:
        kind: of the tasks: rank or compare.
        budget: number of items.
        control_share: share of the budget that is drawn at random, more than 0.
        seed: of what is random.
    """

    kind: str
    budget: int
    control_share: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.control_share <= 1.0:
            raise ConfigError(
                f"the control arm's share of the items must be more than 0 and at most 1, got {self.control_share:g}: "
                "without random items nobody can tell what the choice was worth."
            )


@dataclass(frozen=True)
class Asked:
    """Args:
    candidates: chosen, in the order in which people get them.
    num_known: prompts whose items were in the store already.
    num_unfit: prompts with too few different replies, or with one that the reward model could not read.
    """

    candidates: Sequence[Candidate]
    num_known: int
    num_unfit: int

    def describe(self) -> str:
        arms = Counter(candidate.source["choice"]["arm"] for candidate in self.candidates)
        return (
            f"{arms[ACTIVE]} items chosen, {arms[CONTROL]} drawn at random; {self.num_known} prompts were known, "
            f"{self.num_unfit} can't be compared"
        )


@dataclass(frozen=True, eq=False)
class _States:
    """A table of schema.STATES as arrays, NaN where a sample failed, and the rows of each prompt."""

    rows: Mapping[str, Sequence[int]]
    heads_BH: npt.NDArray[np.float32]
    states_BD: npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class _Item:
    """A candidate with the replies that would be compared: by index, scores (K, H), and mean state. Without a reward
    model: no scores and no state."""

    candidate: Candidate
    replies: Sequence[int]
    scores_KH: Numbers
    state_D: Numbers


def asked(
    store: Store,
    candidates: Iterable[Candidate],
    asking: Asking,
    states: Callable[[], pa.Table],
    *,
    how: str,
) -> Asked:
    """What people are asked. Items that the store holds are not asked again.

    Args:
        states: of the samples that the candidates were made of; called only if they are needed.
        how: active, or random: all items are of the control arm.

    Raises:
        ConfigError: `how` is unknown.
        DataError, StorageError: as choose_items, and of `states` and the store.
    """
    if how not in _WAYS:
        raise ConfigError(f"--choose {how} is not known; choose one of {', '.join(_WAYS)}.")
    known = known_keys(store)
    return choose_items(candidates, states() if how == "active" else None, asking, known)


def write_asked(path: Path, found: Asked) -> None:
    """Keeps a choice, so that it is not made again. Raises StorageError."""
    write_json(path, {**vars(found), "candidates": [vars(candidate) for candidate in found.candidates]})


def read_asked(path: Path) -> Asked:
    """Raises StorageError."""
    kept = read_json(path)
    try:
        return Asked(**{**kept, "candidates": [Candidate(**each) for each in kept["candidates"]]})
    except (KeyError, TypeError):
        raise StorageError(f"{path} is damaged; delete it, and its stage chooses again.") from None


def choose_items(
    candidates: Iterable[Candidate], states: pa.Table | None, asking: Asking, known: Collection[str] = ()
) -> Asked:
    """Args:
        states: table of schema.STATES for the samples from which the candidates were made, in their order. None: there
            is no reward model yet, and all are drawn at random.
        known: keys of items that are not asked again. They count as judged.

    Raises:
        ConfigError: the kind of task compares nothing.
        DataError: the reward model has one head, so nothing can disagree.
    """
    read = None if states is None else _read(states)
    fresh: list[_Item] = []
    old: list[_Item] = []
    num_unfit = 0
    for candidate in candidates:
        replies = compared(asking.kind, candidate)
        item = _item(candidate, replies, read) if replies else None
        if item is None:
            num_unfit += 1
        else:
            (old if key_of(asking.kind, candidate, replies) in known else fresh).append(item)
    signals = None if read is None or not fresh else _signals(fresh, old)
    chosen = choose(len(fresh), signals, budget=asking.budget, control_share=asking.control_share, seed=asking.seed)
    return Asked([_marked(fresh[choice.index], choice) for choice in chosen], len(old), num_unfit)


def _read(states: pa.Table) -> _States:
    rows: dict[str, list[int]] = defaultdict(list)
    for row, prompt_id in enumerate(states["prompt_id"].to_pylist()):
        rows[prompt_id].append(row)
    return _States(rows, _matrix(states["heads"]), _matrix(states["state"]))


def _matrix(column: pa.ChunkedArray) -> npt.NDArray[np.float32]:
    """Lists of equal lengths as rows; those that are null are NaN."""
    is_there = np.asarray(column.is_valid())
    flat = np.asarray(pc.list_flatten(column), np.float32)
    found = np.full((len(is_there), len(flat) // max(int(is_there.sum()), 1)), np.nan, np.float32)
    found[is_there] = flat.reshape(-1, found.shape[1]) if len(flat) else 0.0
    return found


def _item(candidate: Candidate, replies: Sequence[int], states: _States | None) -> _Item | None:
    """None: the reward model could not read a reply."""
    if states is None:
        return _Item(candidate, replies, np.zeros((len(replies), 0)), np.zeros(0))
    rows = [states.rows[candidate.prompt_id][index] for index in replies]
    scores_KH = states.heads_BH[rows].astype(np.float64)
    if np.isnan(scores_KH).any() or not scores_KH.size:
        return None
    return _Item(candidate, replies, scores_KH, states.states_BD[rows].astype(np.float64).mean(0))


def _signals(fresh: Sequence[_Item], old: Sequence[_Item]) -> Signals:
    num_heads = fresh[0].scores_KH.shape[1]
    if num_heads < 2:
        raise DataError(
            "the reward model has one head, which can't disagree with itself. Train one with reward_model.heads=5, or "
            "draw the items at random."
        )
    judged = np.array([item.state_D for item in old]) if old else None
    return Signals(
        np.array([information(item.scores_KH) for item in fresh]), np.array([item.state_D for item in fresh]), judged
    )


def _marked(item: _Item, choice: Choice) -> Candidate:
    """The candidate with what is known of its choice. No field of it reaches the page."""
    replies = [dict(reply) for reply in item.candidate.replies]
    if item.scores_KH.size:
        for index, score in zip(item.replies, mean_scores(item.scores_KH), strict=True):
            replies[index]["source"] = {**replies[index]["source"], "score": round(float(score), 6)}
    why = {name: round(value, 6) for name, value in choice.why.items()}
    source = {**item.candidate.source, "choice": {"arm": choice.arm, **why}}
    return replace(item.candidate, replies=replies, source=source)
