"""Prepares a run's prompts before any actor starts: reads, renders, filters and splits them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from actors.models.model import resolve_model
from actors.text.conversations import Chat, load_chat
from actors.text.tokenizing import encode
from jobs.stages.settings import chat_template
from orchestrator.config.config import Config
from orchestrator.data.inputs import at_home
from orchestrator.data.readers import read_prompts
from orchestrator.data.records import PromptRecord, ReadReport, message_dicts
from orchestrator.errors import ConfigError, DataError
from orchestrator.prompts import Splits, split
from orchestrator.types import Prompt

_BATCH_PROMPTS = 1024
PACKAGE_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Prepared:
    """Prompts of a run. `left_out` lists (id, tokens) of prompts that are too long; `chat` has written them. `others`
    are those of stages with prompts of their own, see `of`."""

    prompts: Splits[Prompt]
    report: ReadReport
    left_out: Sequence[tuple[str, int]]
    chat: Chat
    others: Mapping[str, Prepared] = field(default_factory=dict)

    def of(self, config: Config) -> Prepared:
        """The prompts of a stage with this config."""
        return self.others.get(prompts_key(config), self)

    def describe(self) -> str:
        parts = self.prompts
        text = (
            f"prompts: {self.report.summary()}; {len(parts.train)} to train on, {len(parts.reward_model)} for the "
            f"reward model, {len(parts.held_out)} held out"
        )
        if self.left_out:
            shown = ", ".join(f"{name} ({length})" for name, length in self.left_out[:5])
            text += f"; {len(self.left_out)} longer than prompts.max_prompt_tokens left out: {shown}"
        return text


def prompts_key(config: Config) -> str:
    """Equal for configs with the same prompts."""
    sections = (config.prompts, config.model)
    return json.dumps([*(section.model_dump(mode="json") for section in sections), config.rollout.max_new_tokens])


def prepare(config: Config, chat: Chat | None = None) -> Prepared:
    """Reads and renders the prompts; `chat` is the policy's, if it is known already.

    Raises:
        DataError: the file, a row, the model folder, its tokenizer or its chat template.
        ConfigError: prompts may be too long for the window.
    """
    longest = config.model.max_length - config.rollout.max_new_tokens
    if config.prompts.max_prompt_tokens > longest:
        raise ConfigError(
            f"prompts.max_prompt_tokens={config.prompts.max_prompt_tokens} and rollout.max_new_tokens="
            f"{config.rollout.max_new_tokens} exceed model.max_length={config.model.max_length}. Set "
            f"prompts.max_prompt_tokens={longest} or raise model.max_length."
        )
    records, report = read_prompts(find_data(config.prompts.path), config.prompts.format, config.prompts.limit)
    chat = chat or policy_chat(config)
    prompts, left_out = prepare_prompts(records, chat, config.prompts.max_prompt_tokens)
    parts = split(
        prompts,
        held_out_fraction=config.prompts.held_out_fraction,
        reward_model_fraction=config.prompts.reward_model_fraction,
    )
    return Prepared(parts, report, left_out, chat)


def without_prompts(chat: Chat) -> Prepared:
    """For stages that read no prompts."""
    return Prepared(Splits((), (), ()), ReadReport("", "", 0, 0, {}), (), chat)


def policy_chat(config: Config) -> Chat:
    """The policy's chat format. Raises DataError: the model's folder, tokenizer or template."""
    folder = resolve_model(config.model.path, config.run.cache)
    return load_chat(folder, config.model, chat_template(config))


def prepare_prompts(
    records: Sequence[PromptRecord], chat: Chat, max_prompt_tokens: int
) -> tuple[list[Prompt], list[tuple[str, int]]]:
    """Tokenized prompts, and (id, tokens) of those left out because they are too long.

    `Prompt.meta["messages"]` (and `"tools"`) contain the conversation, for reward models with another tokenizer.

    Raises:
        DataError: the template refuses a conversation, or every prompt is too long.
    """
    prompts: list[Prompt] = []
    left_out: list[tuple[str, int]] = []
    for start in range(0, len(records), _BATCH_PROMPTS):
        batch = records[start : start + _BATCH_PROMPTS]
        texts = [_text_of(record, chat) for record in batch]
        for record, token_ids in zip(batch, encode(texts, chat.tokenizer), strict=True):
            if len(token_ids) > max_prompt_tokens:
                left_out.append((record.id, len(token_ids)))
                continue
            prompts.append(Prompt(record.id, record.text, np.array(token_ids, dtype=np.int32), prompt_meta(record)))
    if records and not prompts:
        identity, shortest = min(left_out, key=lambda item: item[1])
        raise DataError(
            f"all {len(records)} prompts are longer than prompts.max_prompt_tokens={max_prompt_tokens}; the shortest, "
            f"{identity!r}, has {shortest} tokens under this model's chat template. Raise prompts.max_prompt_tokens "
            "(and model.max_length with it) or give shorter prompts."
        )
    return prompts, left_out


def prompt_meta(record: PromptRecord) -> dict[str, Any]:
    meta = {**record.meta, "messages": message_dicts(record.messages)}
    return {**meta, "tools": list(record.tools)} if record.tools else meta


def _text_of(record: PromptRecord, chat: Chat) -> str:
    try:
        return chat.prompt_text(record.messages, record.tools)
    except DataError as error:
        raise DataError(f"prompt {record.id!r}: {error}") from error


def find_data(path: Path) -> Path:
    """The given path or, for a relative one that does not exist, the same path below this program's folder."""
    path = at_home(path, "the file", DataError)
    shipped = PACKAGE_ROOT / path
    return shipped if not os.path.lexists(path) and os.path.isfile(shipped) else path
