"""Formats of documents: a row -> a text that is learned as a whole."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.data.formats.format import Format, LeftOut, field_sets
from orchestrator.data.messages import BadRow, Fields, required
from orchestrator.data.values import describe

PLAIN = "plain"


def _text(fields: Fields) -> Sequence[str]:
    text = required(fields, "text")
    if not isinstance(text, str):
        raise BadRow(f"'text' must be text, found {describe(text)}")
    if not text.strip():
        raise LeftOut("empty documents")
    return [text]


DOCUMENT_FORMATS: dict[str, Format[str]] = {
    "text": Format(field_sets("text"), _text),
    PLAIN: Format(field_sets("text"), _text),  # a file of text, which the stream cuts into rows
}
