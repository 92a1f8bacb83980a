"""Rendering and filtering of a run's prompts."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import jobs.prepare
from actors.text.conversations import Chat, chat_of
from jobs.prepare import TooLong, prepare, prepare_prompts, prepared_from, prompt_meta
from orchestrator.config.config import Config
from orchestrator.data import limits
from orchestrator.data.kinds import PROMPTS
from orchestrator.data.readers import read_all
from orchestrator.data.records import Message, PromptRecord
from orchestrator.data.streams import Stream
from orchestrator.errors import DataError
from orchestrator.prompts import PromptSchedule, derive_seed
from orchestrator.types import Prompt
from tests.tiny import CHATML, tiny_tokenizer

SHARED = Path(__file__).parents[4] / "shared" / "data"
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}" + CHATML


def chat(template: str = CHATML, system_prompt: str | None = None) -> Chat:
    return chat_of(tiny_tokenizer(chat_template=template), system_prompt=system_prompt)


def config_of(folder: Path, rows: Sequence[Mapping[str, Any]], **keys: Any) -> Config:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Config.model_validate({"prompts": {"path": str(path), **keys}})


def test_prompts_are_prepared_in_order_and_too_long_ones_counted() -> None:
    records = [PromptRecord(f"p{n}", (Message("user", "ab " * n),), "ab", {"answer": n}) for n in (1, 90, 2, 80)]
    too_long = TooLong()
    prompts = list(prepare_prompts(records, chat(), 60, too_long))
    assert [prompt.id for prompt in prompts] == ["p1", "p2"]
    for prompt, record in zip(prompts, (records[0], records[2]), strict=True):
        assert prompt.tokens.tolist() == chat().prompt(record.messages).tolist()
        assert prompt.meta == {
            "answer": record.meta["answer"],
            "messages": [{"role": "user", "content": record.messages[0].content}],
        }
    lengths = [len(chat().prompt(records[place].messages)) for place in (1, 3)]
    assert too_long.first == [("p90", lengths[0]), ("p80", lengths[1])]
    assert (too_long.count, too_long.shortest) == (2, ("p80", lengths[1]))


def test_all_prompts_too_long_is_an_error_that_names_the_shortest(tmp_path: Path) -> None:
    rows = [{"id": f"p{n}", "prompt": "ab " * n} for n in (50, 40, 45)]
    config = config_of(tmp_path, rows, max_prompt_tokens=20)
    with pytest.raises(DataError, match=r"all 3 prompts are longer than prompts.max_prompt_tokens=20.*'p40'"):
        prepare(config, chat())


def test_a_template_that_refuses_names_the_prompt_and_the_reason() -> None:
    records = [PromptRecord("p7", (Message("user", "Why?"),), "Why?")]
    with pytest.raises(DataError, match="prompt 'p7': .*no system role here.*unset model.system_prompt"):
        list(prepare_prompts(records, chat(NO_SYSTEM, "Be brief."), 100, TooLong()))


def test_few_prompts_are_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs.prepare, "_BATCH_PROMPTS", 8)
    held: list[int] = []

    class Counting(Stream[PromptRecord]):
        def __iter__(self) -> Iterator[PromptRecord]:
            for number, record in enumerate(super().__iter__()):
                if number % 50 == 49:
                    held.append(sum(type(found) in (PromptRecord, Prompt) for found in gc.get_objects()))
                yield record

    config = config_of(tmp_path, [{"prompt": f"number {n}?"} for n in range(300)])
    before = sum(type(found) in (PromptRecord, Prompt) for found in gc.get_objects())
    prepared = prepared_from(config, Counting(PROMPTS, config.prompts.path), chat())
    parts = prepared.prompts
    assert len(parts.train) + len(parts.reward_model) + len(parts.held_out) == 300
    assert len(held) == 6 and max(held) - before < 30


def test_a_file_that_expands_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path, [{"prompt": str(n)} for n in range(200)])
    monkeypatch.setattr(limits, "SMALL_KEPT_BYTES", 1000)
    prepare(config, chat())
    monkeypatch.setattr(limits, "MAX_KEPT_EXPANSION", 2)
    with pytest.raises(DataError, match=r"2 times the file's own size.*set prompts\.limit"):
        prepare(config, chat())


FILES = ("gsm8k-train.jsonl.gz", "hh-rlhf-harmless.jsonl.gz", "oasst-trees-en.jsonl.gz", "self-instruct-seeds.jsonl")


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is absent")
@pytest.mark.parametrize("name", FILES)
def test_prompts_in_a_file_are_those_that_are_held_in_memory(tmp_path: Path, name: str) -> None:
    keys = {"path": str(SHARED / name), "limit": 500, "max_prompt_tokens": 100}
    config = Config.model_validate({"prompts": {**keys, "held_out_fraction": 0.2, "reward_model_fraction": 0.3}})
    format = chat()
    records, report = read_all(PROMPTS, SHARED / name, limit=500)
    expected: dict[str, list[Prompt]] = {"train": [], "reward_model": [], "held_out": []}
    too_long = []
    for record in records:
        tokens = format.prompt(record.messages, record.tools)
        if len(tokens) > 100:
            too_long.append((record.id, len(tokens)))
            continue
        place = derive_seed("split", "prompts", record.id) / 2**63
        part = "held_out" if place < 0.2 else "reward_model" if place < 0.5 else "train"
        expected[part].append(Prompt(record.id, record.text, tokens, prompt_meta(record)))
    prepared = prepare(config, format)
    assert prepared.report == report
    assert (prepared.too_long.count, prepared.too_long.first) == (len(too_long), too_long[:5])
    for part, prompts in expected.items():
        found = getattr(prepared.prompts, part)
        assert list(map(content, found)) == list(map(content, prompts))
        if prompts:
            plans = [
                PromptSchedule(each, seed=3, prompts_per_step=5, samples_per_prompt=2) for each in (found, prompts)
            ]
            for step in (0, 1, 40):
                one, other = (plan.requests(step) for plan in plans)
                assert [(r.row, content(r.prompt), r.sample_index, r.seed) for r in one] == [
                    (r.row, content(r.prompt), r.sample_index, r.seed) for r in other
                ]


def content(prompt: Prompt) -> tuple[Any, ...]:
    return prompt.id, prompt.text, prompt.tokens.dtype, prompt.tokens.tolist(), json.dumps(dict(prompt.meta))
