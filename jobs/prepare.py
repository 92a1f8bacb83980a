"""Prepares a run's prompts before any actor starts: reads, renders, filters and splits them."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from actors.models.model import resolve_model
from actors.text.conversations import Chat, base_chat, load_chat
from actors.text.tokenizing import encode
from jobs.stages.settings import chat_template
from orchestrator.config.config import Config
from orchestrator.data.inputs import at_home
from orchestrator.data.kinds import PROMPTS
from orchestrator.data.limits import Kept
from orchestrator.data.mixtures import MixedStream, size_of_data, stream_of
from orchestrator.data.records import PromptRecord, ReadReport, message_dicts
from orchestrator.data.streams import Stream
from orchestrator.errors import ConfigError, DataError
from orchestrator.prompt_file import PromptFile, StoredPrompts
from orchestrator.prompts import Part, Splits, split
from orchestrator.types import Prompt

_BATCH_PROMPTS = 1024
_SHOWN = 5
PACKAGE_ROOT = Path(__file__).resolve().parent.parent


@dataclass
class TooLong:
    """Prompts that were left out because they are too long, as (id, tokens): their number, the first few, and the
    shortest."""

    count: int = 0
    first: list[tuple[str, int]] = field(default_factory=list)
    shortest: tuple[str, int] | None = None

    def add(self, identity: str, num_tokens: int) -> None:
        self.count += 1
        if len(self.first) < _SHOWN:
            self.first.append((identity, num_tokens))
        if self.shortest is None or num_tokens < self.shortest[1]:
            self.shortest = identity, num_tokens


@dataclass(frozen=True)
class Prepared:
    """Prompts of a run. `chat` has written them. `others` are those of stages with prompts of their own, see `of`."""

    prompts: Splits[Prompt]
    report: ReadReport
    too_long: TooLong
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
        if self.too_long.count:
            shown = ", ".join(f"{name} ({length})" for name, length in self.too_long.first)
            text += f"; {self.too_long.count} longer than prompts.max_prompt_tokens left out: {shown}"
        return text


def prompts_key(config: Config) -> str:
    """Equal for configs with the same prompts."""
    sections = (config.prompts, config.model)
    return json.dumps([*(section.model_dump(mode="json") for section in sections), config.rollout.max_new_tokens])


def prepare(config: Config, chat: Chat | None = None) -> Prepared:
    """Reads and renders the prompts while they are read; `chat` is the policy's, if it is known already.

    Raises:
        DataError: the file, a row, the model folder, its tokenizer or its chat template; or every prompt is too long.
        StorageError: the temporary file can't be written.
        ConfigError: prompts may be too long for the window.
    """
    longest = config.model.max_length - config.rollout.max_new_tokens
    if config.prompts.max_prompt_tokens > longest:
        raise ConfigError(
            f"prompts.max_prompt_tokens={config.prompts.max_prompt_tokens} and rollout.max_new_tokens="
            f"{config.rollout.max_new_tokens} exceed model.max_length={config.model.max_length}. Set "
            f"prompts.max_prompt_tokens={longest} or raise model.max_length."
        )
    section = config.prompts
    records = stream_of(PROMPTS, find_data(section.path), section.format, section.limit)
    return prepared_from(config, records, chat or policy_chat(config))


def prepared_from(config: Config, records: Stream[PromptRecord] | MixedStream[PromptRecord], chat: Chat) -> Prepared:
    """`prepare` with an open stream."""
    section, path = config.prompts, find_data(config.prompts.path)
    too_long, file = TooLong(), PromptFile()
    places: dict[Part, array[int]] = {"train": array("q"), "reward_model": array("q"), "held_out": array("q")}
    kept = Kept(str(path), PROMPTS.section, lambda: size_of_data(path))
    parts = split(
        prepare_prompts(records, chat, section.max_prompt_tokens, too_long),
        held_out_fraction=section.held_out_fraction,
        reward_model_fraction=section.reward_model_fraction,
    )
    for prompt, part in parts:
        places[part].append(file.append(prompt))
        kept.require(sum(map(len, places.values())), file.num_bytes)
    report = records.report()
    _require_prompts(report.num_records, too_long, section.max_prompt_tokens)
    return Prepared(
        Splits(**{part: StoredPrompts(file, found) for part, found in places.items()}), report, too_long, chat
    )


def without_prompts(chat: Chat) -> Prepared:
    """For stages that read no prompts."""
    return Prepared(Splits((), (), ()), ReadReport("", "", 0, 0, {}), TooLong(), chat)


def policy_chat(config: Config) -> Chat:
    """The policy's chat format. Raises DataError: the model's folder, tokenizer or template."""
    folder = resolve_model(config.model.path, config.run.cache)
    return load_chat(folder, config.model, chat_template(config))


def start_chat(config: Config) -> Chat:
    """The chat format of the model that becomes the reward model. Raises DataError."""
    model = config.reward_model.base or config.model.path
    start, mine = (resolve_model(name, config.run.cache) for name in (model, config.model.path))
    return base_chat(start, mine, config.model, chat_template(config))


def prepare_prompts(
    records: Iterable[PromptRecord], chat: Chat, max_prompt_tokens: int, too_long: TooLong
) -> Iterator[Prompt]:
    """Tokenized prompts. Those with more tokens are left out and counted in `too_long`.

    `Prompt.meta["messages"]` (and `"tools"`) contain the conversation, for reward models with another tokenizer.

    Raises:
        DataError: the template refuses a conversation.
    """
    left = iter(records)
    while batch := list(islice(left, _BATCH_PROMPTS)):
        texts = [_text_of(record, chat) for record in batch]
        for record, token_ids in zip(batch, encode(texts, chat.tokenizer), strict=True):
            if len(token_ids) > max_prompt_tokens:
                too_long.add(record.id, len(token_ids))
                continue
            yield Prompt(record.id, record.text, np.array(token_ids, dtype=np.int32), prompt_meta(record))


def _require_prompts(num_records: int, too_long: TooLong, max_prompt_tokens: int) -> None:
    if too_long.count < num_records or too_long.shortest is None:
        return
    identity, shortest = too_long.shortest
    raise DataError(
        f"all {num_records} prompts are longer than prompts.max_prompt_tokens={max_prompt_tokens}; the shortest, "
        f"{identity!r}, has {shortest} tokens under this model's chat template. Raise prompts.max_prompt_tokens "
        "(and model.max_length with it) or give shorter prompts."
    )


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
