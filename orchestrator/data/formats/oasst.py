"""OpenAssistant: trees of messages, one per row, or flat tables of messages, tree after tree."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, NamedTuple

from orchestrator.data.formats.format import LeftOut, field_sets
from orchestrator.data.formats.transcripts import TIE, Ranked, as_ranked
from orchestrator.data.messages import BadRow, Fields, Messages, is_messages, number_of, required
from orchestrator.data.records import Message
from orchestrator.data.rows.json_rows import Row
from orchestrator.data.values import describe

OASST_FIELDS = field_sets("message_tree_id prompt", "message_id parent_id text role", "message_id text role")
MAX_TREE_MESSAGES = 10_000
_ROLES = {"prompter": "user", "assistant": "assistant"}


class Turn(NamedTuple):
    """A message of a tree: the conversation that ends with it, its own fields, and its replies, without deleted
    ones."""

    path: Messages
    node: Fields
    replies: Sequence[Fields]


def oasst_paths(fields: Fields) -> Iterator[Messages | LeftOut]:
    """The path from the root to every leaf."""
    for found in oasst_turns(fields):
        if isinstance(found, LeftOut):
            yield found
        elif not found.replies:
            yield found.path


def oasst_prompts(fields: Fields) -> Iterator[Messages | LeftOut]:
    """The path from the root to every message of a prompter."""
    for found in oasst_turns(fields):
        if isinstance(found, LeftOut):
            yield found
        elif found.path[-1].role == "user":
            yield found.path


def oasst_rankings(fields: Fields) -> Iterator[Ranked | LeftOut]:
    """The ranked replies to every message of a prompter; of replies with equal rank the first."""
    num_found = 0
    for found in oasst_turns(fields):
        if isinstance(found, LeftOut):
            yield found
            continue
        path, _, replies = found
        ranked: dict[float, str] = {}
        for reply in replies if path[-1].role == "user" else ():
            rank = number_of(reply, "rank", "a reply")
            if rank is None or rank in ranked:
                yield LeftOut("replies without a rank of their own")
            else:
                ranked[rank] = _message(reply, "a reply").content
        if len(ranked) > 1:
            num_found += 1
            texts = [ranked[rank] for rank in sorted(ranked)]
            yield as_ranked(path, texts) if len(set(texts)) > 1 else LeftOut(TIE)
    if not num_found:
        yield LeftOut("trees without ranked replies")


def trees(rows: Iterator[Row]) -> Iterator[Row]:
    """As `whole_trees`, each with the language of its first message among its own fields."""
    return map(_with_language, whole_trees(rows))


def whole_trees(rows: Iterator[Row]) -> Iterator[Row]:
    """Rows that are trees, and trees made of rows that are messages. Memory holds one tree."""
    for tree_id, group in groupby(rows, key=_tree_id):
        if tree_id is None:
            yield from group
        else:
            yield from _grown(group)


def _with_language(row: Row) -> Row:
    root = row.fields.get("prompt")
    language = root.get("lang") if isinstance(root, dict) else None
    return replace(row, fields={"lang": language, **row.fields}) if isinstance(language, str) else row


def _tree_id(row: Row) -> str | None:
    """The tree of a message; None for a row that is a tree or neither."""
    found = row.fields.get("message_tree_id")
    return found if isinstance(found, str) and "message_id" in row.fields and "prompt" not in row.fields else None


def _grown(group: Iterator[Row]) -> Iterator[Row]:
    """One tree of the messages of a group, and the rows that do not belong to it, with what is wrong."""
    nodes: dict[Any, dict[str, Any]] = {}
    root: Row | None = None
    for row in group:
        parent, name = row.fields.get("parent_id"), str(row.fields["message_id"])
        node = {**row.fields, "replies": []}
        if len(nodes) == MAX_TREE_MESSAGES:
            yield Row(row.number, {}, f"is in a tree of more than {MAX_TREE_MESSAGES:,} messages")
        elif name in nodes:
            yield Row(row.number, {}, f"message_id {name!r} is in its tree twice")
        elif parent is None and root is None:
            root = Row(row.number, {"message_tree_id": row.fields["message_tree_id"], "prompt": node})
            nodes[name] = node
        elif str(parent) in nodes:
            nodes[str(parent)]["replies"].append(node)
            nodes[name] = node
        else:
            fault = "a second message without a parent" if parent is None else "parent_id is no earlier message"
            yield Row(row.number, {}, f"{fault} of its tree; sort the rows by tree, parents first")
    if root is not None:
        yield root


def oasst_turns(fields: Fields) -> Iterator[Turn | LeftOut]:
    """Every message of a tree, depth first. A deleted one ends its path."""
    root = required(fields, "prompt")
    if not isinstance(root, dict):
        raise BadRow(f"'prompt' must be the first message of a tree, found {describe(root)}")
    waiting: list[tuple[Messages, Fields, str]] = [((), root, "prompt")]
    while waiting:
        before, node, where = waiting.pop()
        if node.get("deleted") is True:
            yield LeftOut("messages that were deleted")
            continue
        path = (*before, _message(node, where))
        replies = node.get("replies") or []
        if replies and not is_messages(replies):
            raise BadRow(f"{where}.replies must be a list of messages, found {describe(replies)}")
        yield Turn(path, node, [reply for reply in replies if reply.get("deleted") is not True])
        waiting += reversed([(path, reply, f"{where}.replies[{index}]") for index, reply in enumerate(replies)])


def _message(node: Fields, where: str) -> Message:
    role, text = node.get("role"), node.get("text")
    if not isinstance(role, str) or role not in _ROLES:
        raise BadRow(f"{where}: role must be prompter or assistant, found {reprlib.repr(role)}")
    if not isinstance(text, str) or not text.strip():
        raise BadRow(f"{where}: text must be text that is not empty, found {describe(text)}")
    return Message(_ROLES[role], text)
