"""Puts items into a store. An item that the store holds already is counted, but not added again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from types import MappingProxyType
from typing import Any

from sqlalchemy import Connection, insert, select

from jobs.services.labelling.items.sources import Candidate, distinct
from jobs.services.labelling.items.trees import Tree
from jobs.services.labelling.store import Store
from jobs.services.labelling.tables import items, members, trees
from orchestrator.data.records import content_digest
from orchestrator.errors import ConfigError
from orchestrator.prompts import derive_seed

MAX_REPLIES = 9
TOPIC = "topic"  # role of what a prompt shall be about
_BATCH = 500
Row = dict[str, Any]


@dataclass(frozen=True)
class Wanted:
    """What people shall do with new items.

    Args:
        kind: rank, compare, rate, write or prompt.
        overlap: number of people who judge an item of the share `overlap_share`; others are judged by one.
        gold: the scores of the replies are the known answer, and only measure people.
        priority: items of a higher one come first.
        limit: at most this many items.
    """

    kind: str
    overlap: int = 3
    overlap_share: float = 0.1
    gold: bool = False
    priority: float = 0.0
    limit: int | None = None


@dataclass(frozen=True)
class Added:
    """Args:
    num_unfit: prompts with too few different replies, or without a known order for gold.
    overlaps: by key of each item, also of known ones, the number of people who shall judge it.
    """

    num_new: int
    num_known: int
    num_unfit: int
    overlaps: Mapping[str, int]


def add(store: Store, candidates: Iterable[Candidate | Tree], wanted: Wanted, *, batch: str) -> Added:
    """Trees are kept beside the items; one that the store holds already stays as it is.

    Raises:
    ConfigError: the kind is unknown, or can't be gold.
    DataError: the candidates can't be read.
    StorageError: the store can't be written. Earlier items stay, and the same call continues.
    """
    if wanted.kind not in _CHOICES:
        raise ConfigError(f"--task {wanted.kind} is not known; choose one of {', '.join(_CHOICES)}.")
    if wanted.gold and wanted.kind not in _GOLD:
        raise ConfigError(f"--gold needs a task with a known order: {' or '.join(_GOLD)}, not {wanted.kind}.")
    num_new = num_known = num_unfit = 0
    whole: list[Tree] = []
    overlaps: dict[str, int] = {}

    def rows() -> Iterator[Row]:
        nonlocal num_unfit
        for candidate in candidates:
            if isinstance(candidate, Tree):
                whole.append(candidate)
                continue
            shown = topic_of(candidate) if wanted.kind == "prompt" else candidate
            choices = _CHOICES[wanted.kind](shown) if not wanted.gold or shown.scores else []
            num_unfit += not choices
            yield from (_row(shown, chosen, wanted, batch) for chosen in choices)

    fitting = islice(rows(), wanted.limit)
    while group := list(islice(fitting, _BATCH)):
        new = _insert(store, group, whole, batch)
        num_new, num_known = num_new + new, num_known + len(group) - new
        overlaps |= {row["key"]: row["overlap"] for row in group}
        whole.clear()
    if whole:
        _insert(store, (), whole, batch)
    return Added(num_new, num_known, num_unfit, overlaps)


def _insert(store: Store, group: Sequence[Row], whole: Sequence[Tree], batch: str) -> int:
    """The number of rows that were new."""
    with store.writing() as connection:
        _keep(connection, whole, batch)
        known = set(connection.scalars(select(items.c.key).where(items.c.key.in_([row["key"] for row in group]))))
        new = {row["key"]: row for row in group if row["key"] not in known}
        if new:
            connection.execute(insert(items), list(new.values()))
    return len(new)


def _keep(connection: Connection, whole: Sequence[Tree], batch: str) -> None:
    for start in range(0, len(whole), _BATCH):
        some = whole[start : start + _BATCH]
        known = set(connection.scalars(select(trees.c.key).where(trees.c.key.in_([tree.id for tree in some]))))
        rows = [
            {"key": tree.id, "batch": batch[:200], "content": json.dumps(dict(tree.fields), default=str)}
            for tree in some
            if tree.id not in known
        ]
        if rows:
            connection.execute(insert(trees), rows)


def _rank(candidate: Candidate) -> list[list[int]]:
    chosen = distinct(candidate.replies)[:MAX_REPLIES]
    return [chosen] if len(chosen) > 1 else []


def _compare(candidate: Candidate) -> list[list[int]]:
    """The first and the last reply."""
    chosen = distinct(candidate.replies)
    return [[chosen[0], chosen[-1]]] if len(chosen) > 1 else []


def _rate(candidate: Candidate) -> list[list[int]]:
    return [[index] for index in distinct(candidate.replies)]


def _write(candidate: Candidate) -> list[list[int]]:
    return [[]]


def topic_of(candidate: Candidate) -> Candidate:
    """What a person sees who writes a prompt: a conversation whose next message they write, or, if there is no reply,
    the prompt as a topic."""
    if candidate.replies:
        reply = candidate.replies[0]["reply"]
        shown = [*candidate.messages, {"role": "assistant", "content": reply} if isinstance(reply, str) else reply]
    else:
        shown = [{"role": TOPIC, "content": "\n\n".join(each["content"] for each in candidate.messages)}]
    return replace(candidate, messages=shown, replies=[])


# For each kind of task the replies of its items, by index.
_CHOICES: Mapping[str, Callable[[Candidate], list[list[int]]]] = MappingProxyType(
    {"rank": _rank, "compare": _compare, "rate": _rate, "write": _write, "prompt": _write}
)


def _gold_ranks(scores: Sequence[float]) -> Row:
    levels = sorted(set(scores), reverse=True)
    return {"kind": "rank", "ranks": [levels.index(score) + 1 for score in scores]}


def _gold_preference(scores: Sequence[float]) -> Row:
    first, second = scores
    return {"kind": "compare", "preference": (second > first) - (first > second)}


_GOLD: Mapping[str, Callable[[Sequence[float]], Row]] = MappingProxyType(
    {"rank": _gold_ranks, "compare": _gold_preference}
)


def compared(kind: str, candidate: Candidate) -> list[int]:
    """The replies, by index, that people would compare; none: there are too few different ones.

    Raises ConfigError: nothing is compared in tasks of this kind.
    """
    if kind not in _GOLD:
        raise ConfigError(f"--choose needs a task that compares replies: {' or '.join(_GOLD)}, not {kind}.")
    return next(iter(_CHOICES[kind](candidate)), [])


def key_of(kind: str, candidate: Candidate, chosen: Sequence[int]) -> str:
    """The key in the store of the item with these replies."""
    replies = [candidate.replies[index]["reply"] for index in chosen]
    return content_digest(kind, list(candidate.messages), list(candidate.tools), replies).hex()


def known_keys(store: Store, *, but_of: str = "") -> frozenset[str]:
    """Of all items in the store, without those of the batch `but_of`. Raises StorageError."""
    asked = select(members.c.item).where(members.c.batch == but_of)
    known = select(items.c.key).where(items.c.batch != but_of[:200], items.c.id.not_in(asked))
    with store.reading() as connection:
        return frozenset(connection.scalars(known if but_of else select(items.c.key)))


def _row(candidate: Candidate, chosen: Sequence[int], wanted: Wanted, batch: str) -> Row:
    replies = [candidate.replies[index] for index in chosen]
    key = key_of(wanted.kind, candidate, chosen)
    # By the item, so that the same items are judged several times however often a file is added.
    is_shared = derive_seed("overlap", key) / 2**63 < wanted.overlap_share
    return {
        "key": key,
        "prompt_id": candidate.prompt_id[:200],
        "kind": wanted.kind,
        "messages": list(candidate.messages),
        "tools": list(candidate.tools),
        "replies": replies,
        "gold": _GOLD[wanted.kind]([candidate.scores[index] for index in chosen]) if wanted.gold else None,
        "source": dict(candidate.source),
        "batch": batch[:200],
        "priority": wanted.priority,
        "overlap": wanted.overlap if is_shared else 1,
        "num_judgements": 0,
        "added_at": time.time(),
    }
