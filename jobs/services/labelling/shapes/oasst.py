"""Trees of messages in the form of Open Assistant (oasst-data: ExportMessageTree).

Trees that were added come out as they came in, with what was judged: ranks of replies, labels, written replies. Other
items become trees of their conversation and its replies. Names made here depend only on content and judgements, so an
unchanged store gives the same file, also if that file was added to the store itself.
"""

from __future__ import annotations

import json
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from sqlalchemy import Connection, select

from jobs.services.labelling.shapes.judged import IS_JUDGED, Exported, Json, Judged, every, judges_of
from jobs.services.labelling.shapes.own import ratings_of
from jobs.services.labelling.shapes.texts import UNKNOWN, exchange, model_of, replies
from jobs.services.labelling.tables import items, trees
from orchestrator.data.formats.format import LeftOut

_MADE = uuid.UUID("0d6f0a3e-52b7-4a65-9d8e-8f6b5d0a7c11")  # namespace of names made here
READY = "ready_for_export"
_UNREVIEWED: Json = {"review_count": 0, "deleted": False}
QUALITY = "quality"
LABELS: Mapping[str, str] = {
    "spam": "spam",
    "wrong_language": "lang_mismatch",
    "personal_data": "pii",
    "harmful": "not_appropriate",
    "off_topic": "fails_task",
}
"""Labels of Open Assistant by flag. The other flags have none."""
UNLABELLED = "flags, for which oasst has no label"
UNRANKED = "ranks of replies that were not among those judged"


def oasst(connection: Connection, report: Exported) -> Iterator[Json]:
    of_tree, of_conversation = _groups(connection, report)
    judges = judges_of(connection)

    def grown(ids: Sequence[int]) -> Json | None:
        return _grown(every(connection, judges, report, ids), report)

    for row in connection.execute(select(trees.c.key, trees.c.content).order_by(trees.c.id)).yield_per(100):
        tree = json.loads(row.content)
        if row.key in of_conversation and (fresh := grown(of_conversation.pop(row.key))):
            tree = _with_rest(fresh, tree)
        if row.key in of_tree:
            _put_all(tree, every(connection, judges, report, of_tree[row.key]), report)
        yield tree
    for ids in of_conversation.values():
        tree = grown(ids)
        if tree is not None:
            yield tree


def _groups(connection: Connection, report: Exported) -> tuple[Mapping[str, list[int]], dict[str, list[int]]]:
    """Ids of judged items by their tree, and those of no tree by the tree that they will become."""
    of_tree: dict[str, list[int]] = defaultdict(list)
    of_conversation: dict[str, list[int]] = defaultdict(list)
    columns = (items.c.id, items.c.kind, items.c.prompt_id, items.c.source, items.c.messages)
    for row in connection.execute(select(*columns).where(IS_JUDGED).order_by(items.c.id)).yield_per(500):
        if row.kind not in _PUTTERS:
            report.num_items += 1
            report.left_out[f"tasks to {row.kind}, which oasst does not hold"] += 1
        elif "tree" in row.source:
            of_tree[row.source["tree"]].append(row.id)
        else:
            of_conversation[_tree_name(row.prompt_id, [turn["content"] for turn in row.messages])].append(row.id)
    return of_tree, of_conversation


def _put_all(tree: Json, group: Iterable[Judged], report: Exported) -> None:
    """Changes the messages of a tree by the judgements of its items."""
    for judged in group:
        report.num_items += 1
        nodes = _nodes(tree)
        names = [judged.item.source["message"], *(each["source"]["message"] for each in judged.item.replies)]
        found = [nodes[name] for name in names if name in nodes]
        if len(found) < len(names):
            report.left_out["whose messages are not in their tree"] += 1
            continue
        _PUTTERS[judged.item.kind](found[0], found[1:], judged, report)


def _grown(group: Iterable[Judged], report: Exported) -> Json | None:
    """The tree of the items of one conversation. None: the shape can't hold them."""
    tree: Json | None = None
    asked: Json = {}
    for judged in group:
        report.num_items += 1
        try:
            path, texts = exchange(judged), replies(judged)
        except LeftOut as reason:
            report.left_out[str(reason)] += 1
            continue
        if tree is None:
            tree, asked = _trunk(judged.item.prompt_id, [turn["content"] for turn in path])
        answers = [_answer(asked, text, model_of(judged, index)) for index, text in enumerate(texts)]
        _PUTTERS[judged.item.kind](asked, answers, judged, report)
    return tree


def _with_rest(grown: Json, added: Json) -> Json:
    """A tree with what an added one of the same name has beside: it is this store's own export, to which others may
    have replied."""
    nodes = _nodes(grown)
    for name, node in _nodes(added).items():
        if name in nodes:
            known = {below["message_id"] for below in nodes[name]["replies"]}
            fresh = [below for below in node.get("replies") or () if below.get("message_id") not in known]
            nodes[name]["replies"] += fresh
    return grown


def _trunk(prompt_id: str, texts: Sequence[str]) -> tuple[Json, Json]:
    """The tree of a conversation, and its last message."""
    name = _tree_name(prompt_id, texts)
    root: Json = {"message_id": name, "text": texts[0], "role": "prompter", **_UNREVIEWED, "replies": []}
    end = root
    for place, text in enumerate(texts[1:], 1):
        node = _node(end, "assistant" if place % 2 else "prompter", text)
        end["replies"].append(node)
        end = node
    return {"message_tree_id": name, "tree_state": READY, "prompt": root}, end


def _answer(asked: Json, text: str, model: str) -> Json:
    """The reply with this text, which is added if it is not there."""
    fresh = _node(asked, "assistant", text, {} if model == UNKNOWN else {"synthetic": True, "model_name": model})
    for node in asked["replies"]:
        if node["message_id"] == fresh["message_id"]:
            found: Json = node
            return found
    asked["replies"].append(fresh)
    return fresh


def _node(parent: Json, role: str, text: str, about: Json | None = None, *, writer: str = "") -> Json:
    return {
        "message_id": _name(parent["message_id"], role, text, writer),
        "parent_id": parent["message_id"],
        "text": text,
        "role": role,
        **_UNREVIEWED,
        **(about or {}),
        "replies": [],
    }


def _tree_name(prompt_id: str, texts: Sequence[str]) -> str:
    return _name("tree", prompt_id, *texts)


def _name(*parts: str) -> str:
    return str(uuid.uuid5(_MADE, json.dumps(parts)))


def _nodes(tree: Json) -> dict[Any, Json]:
    """The messages of a tree by their names."""
    found: dict[Any, Json] = {}
    waiting = [tree["prompt"]]
    while waiting:
        node = waiting.pop()
        found[node.get("message_id")] = node
        waiting += node.get("replies") or []
    return found


def _put_ranks(asked: Json, answers: Sequence[Json], judged: Judged, report: Exported) -> None:
    """A rank is the number of replies that are better; equal replies have equal ranks. Replies that nobody ranked
    have none."""
    votes = judged.votes
    if not votes:
        report.left_out["without a preference"] += 1
        return
    order = judged.pairs()
    seen = {index for vote in votes for index in (vote.first, vote.second)}
    ranks = {answers[index]["message_id"]: sum(worse == index for _, worse in order) for index in seen}
    for node in asked["replies"]:
        rank = ranks.get(node.get("message_id"))
        if rank is not None:
            _set(node, "rank", rank)
        elif node.pop("rank", None) is not None:
            report.left_out[UNRANKED] += 1


def _put_labels(_: Json, answers: Sequence[Json], judged: Judged, report: Exported) -> None:
    """Means and counts, together with those that the tree has: yes is 1, and the quality is from 0 to 1."""
    (node,) = answers
    flags = [set(row.answer["flags"]) for row in judged.given]
    values = {label: [float(flag in given) for given in flags] for flag, label in LABELS.items()}
    with suppress(LeftOut):  # flags alone
        values[QUALITY] = [(rating - 1) / 4 for rating in ratings_of(judged)]
    labels = dict(node.get("labels") or {})
    for label, found in values.items():
        before = labels.get(label) or {}
        count = before.get("count") or 0
        total = count * (before.get("value") or 0.0) + sum(found)
        labels[label] = {"value": total / (count + len(found)), "count": count + len(found)}
    _set(node, "labels", labels)
    report.left_out.update(UNLABELLED for given in flags for flag in given if flag not in LABELS)


def _put_texts(asked: Json, _: Sequence[Json], judged: Judged, __: Exported) -> None:
    for row in judged.given:
        writer = f"{row.name}/{row.client_id}"
        asked["replies"] = [
            *(asked.get("replies") or []),
            _node(asked, "assistant", row.answer["text"], {"synthetic": False}, writer=writer),
        ]


def _set(node: Json, key: str, value: Any) -> None:
    """Sets a field of a message; a new one lies before its replies."""
    below = node.pop("replies", None) if key not in node else None
    node[key] = value
    if below is not None:
        node["replies"] = below


_PUTTERS: Mapping[str, Callable[[Json, Sequence[Json], Judged, Exported], None]] = {
    "rank": _put_ranks,
    "compare": _put_ranks,
    "rate": _put_labels,
    "write": _put_texts,
}
