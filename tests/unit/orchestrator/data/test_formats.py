"""A new format of prompts is a function and a line of the table."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from orchestrator.config.loader import load_config
from orchestrator.data.formats.format import Format
from orchestrator.data.formats.prompts import PROMPT_FORMATS
from orchestrator.data.kinds import PROMPTS
from orchestrator.data.messages import Fields, Messages, text_of
from orchestrator.data.readers import read_all
from orchestrator.data.records import Message
from orchestrator.errors import ConfigError


def riddle(fields: Fields) -> list[Messages]:
    return [(Message("user", text_of(fields, "riddle")),)]


RIDDLE = Format([frozenset({"riddle"})], riddle, frozenset({"riddle"}))


def test_a_format_takes_fewer_than_fifteen_lines_and_is_read_checked_and_guessed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "riddles.jsonl"
    path.write_text('{"riddle": "What has keys and opens nothing?", "answer": "a piano"}\n')
    with pytest.raises(ConfigError, match=r"prompts\.format: must be one of auto, messages, .*got 'riddle'"):
        load_config(None, ["prompts.format=riddle", "reward.path=x"])
    monkeypatch.setitem(PROMPT_FORMATS, "riddle", RIDDLE)
    assert load_config(None, ["prompts.format=riddle", "reward.path=x"]).prompts.format == "riddle"
    for format in ("auto", "riddle"):
        (record,), report = read_all(PROMPTS, path, format)
        assert record.messages == (Message("user", "What has keys and opens nothing?"),)
        assert record.meta == {"answer": "a piano"} and report.format == "riddle"
    assert len(inspect.getsource(riddle).splitlines()) + 1 < 15
