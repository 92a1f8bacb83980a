"""Canonical rows: how records are written, so that the readers read the same records back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.data.records import (
    DemonstrationRecord,
    DocumentRecord,
    LabelledRecord,
    Message,
    PromptRecord,
    RankingRecord,
    ScoredRecord,
    Tools,
    is_begun,
    message_dicts,
    reply_json,
)

Row = dict[str, Any]
_TAKEN = frozenset({"id", "prompt", "messages", "tools", "functions", "message_id", "message_tree_id"})


def prompt_row(record: PromptRecord) -> Row:
    """Other fields stay; one whose name a row needs for something else gets a name that ends with _."""
    meta = {f"{key}_" if key in _TAKEN else key: value for key, value in record.meta.items()}
    return {**_conversation(record.id, "prompt", record.messages, record.tools), **meta}


def demonstration_row(record: DemonstrationRecord) -> Row:
    return _conversation(record.id, "messages", record.messages, record.tools)


def ranking_row(record: RankingRecord) -> Row:
    row = _conversation(record.id, "messages", record.messages, record.tools)
    row["replies"] = [reply_json(reply) for reply in record.replies]
    if record.scores:
        row["scores"] = list(record.scores)
    return {**row, "continued": True} if is_begun(record.messages) else row


def scored_ranking_row(record: RankingRecord, gold: Sequence[float]) -> Row:
    """With the scores by which the replies are ranked, best first, for people: readers leave them out."""
    return {**ranking_row(record), "gold": list(gold)}


def labelled_row(record: LabelledRecord) -> Row:
    row = _conversation(record.id, "prompt", record.messages, record.tools)
    return {**row, "completion": reply_json(record.reply), "label": record.label}


def scored_row(record: ScoredRecord) -> Row:
    row = _conversation(record.id, "prompt", record.messages, record.tools)
    return {**row, "completion": reply_json(record.reply), "score": record.score}


def document_row(record: DocumentRecord) -> Row:
    return {"id": record.id, "text": record.text}


def _conversation(identity: str, key: str, messages: Sequence[Message], tools: Tools) -> Row:
    more: Mapping[str, Any] = {"tools": list(tools)} if tools else {}
    return {"id": identity, key: message_dicts(messages), **more}
