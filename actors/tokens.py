"""From conversations to tokens, always through a chat template.

A reply ends with its template's closing (`<|im_end|>`, `<|eot_id|>`, ...) and with nothing after it: so the last token
of a transcript that a reward model learns from is the last token of a response that an engine sampled to its end.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import TemplateError

from actors.learning import model as models
from orchestrator.data.records import Message, PromptRecord, message_dicts
from orchestrator.errors import DataError
from orchestrator.types import Prompt

Tokens = npt.NDArray[np.int32]

_BATCH_PROMPTS = 1024
_REPLY_MARK = "\u2016reply\u2016"  # stands for a reply while the template's closing is looked for


@dataclass(frozen=True, eq=False)
class Transcript:
    """A conversation and one reply in tokens: what a reward model scores."""

    prompt_tokens: Tokens
    response_tokens: Tokens  # the reply and the template's closing

    @property
    def tokens(self) -> Tokens:
        return np.concatenate([self.prompt_tokens, self.response_tokens])

    @property
    def response_mask(self) -> npt.NDArray[np.bool_]:
        """True where `tokens` belongs to the response."""
        return np.arange(len(self)) >= len(self.prompt_tokens)

    def __len__(self) -> int:
        return len(self.prompt_tokens) + len(self.response_tokens)

    def last(self, max_length: int) -> Transcript:
        """At most `max_length` tokens: the conversation loses its start, and only then the reply."""
        kept = max(max_length - len(self.response_tokens), 0)
        prompt_tokens = self.prompt_tokens[max(len(self.prompt_tokens) - kept, 0) :]
        return replace(self, prompt_tokens=prompt_tokens, response_tokens=self.response_tokens[-max_length:])


def load_tokenizer(folder: Path, *, chat_template: Path | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder, which has a chat template or is given one.

    Raises:
        DataError: no usable tokenizer, no chat template, or its file can't be read.
    """
    tokenizer = models.load_tokenizer(folder, trust_remote_code=trust_remote_code)
    if chat_template is not None:
        try:
            tokenizer.chat_template = chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"model.chat_template={chat_template} can't be read as text: {error}.") from error
    if not tokenizer.chat_template:
        raise DataError(
            f"the tokenizer in {folder} has no chat template, so it is not known how to write a prompt for this "
            "model. Set model.chat_template=FILE (a Jinja template), or use an instruction-tuned model."
        )
    return tokenizer


def render(messages: Sequence[Message], tokenizer: Any, system_prompt: str | None = None) -> Tokens:
    """Tokens of a conversation under the chat template, up to where the assistant speaks.

    Args:
        system_prompt: set before conversations that bring no system message. None: the template's own default.

    Raises:
        DataError: the template refuses the conversation.
    """
    return _tokens(prompt_text(messages, tokenizer, system_prompt), tokenizer)


def prompt_text(messages: Sequence[Message], tokenizer: Any, system_prompt: str | None = None) -> str:
    if system_prompt is not None and messages[0].role != "system":
        messages = (Message("system", system_prompt), *messages)
    return _apply(message_dicts(messages), tokenizer, add_generation_prompt=True)


def render_reply(
    messages: Sequence[Message], reply: str, tokenizer: Any, system_prompt: str | None = None
) -> Transcript:
    """A conversation and a reply, the template's closing behind it.

    Prompt and reply are tokenised apart, as they are when the reply is sampled.
    """
    response = np.concatenate([_tokens(reply, tokenizer), closing_tokens(tokenizer)])
    return Transcript(render(messages, tokenizer, system_prompt), response)


def closing_tokens(tokenizer: Any) -> Tokens:
    """What the template writes behind a reply, without white space; the EOS token where it writes nothing.

    Raises:
        DataError: there is neither.
    """
    return _closing(tokenizer, tokenizer.chat_template)


@lru_cache(maxsize=8)
def _closing(tokenizer: Any, chat_template: str) -> Tokens:
    conversation = [{"role": "user", "content": "."}, {"role": "assistant", "content": _REPLY_MARK}]
    _, _, after = _apply(conversation, tokenizer, add_generation_prompt=False).rpartition(_REPLY_MARK)
    closing = _tokens(after.strip(), tokenizer)
    if len(closing) == 0 and tokenizer.eos_token_id is None:
        raise DataError(
            f"the chat template of {tokenizer.name_or_path} writes nothing behind a reply and there is no EOS token: "
            "nothing marks where a reply ends. Set model.chat_template=FILE to one that closes its turns."
        )
    return closing if len(closing) else np.array([tokenizer.eos_token_id], dtype=np.int32)


def prepare_prompts(
    records: Sequence[PromptRecord], tokenizer: Any, max_prompt_tokens: int, system_prompt: str | None = None
) -> tuple[list[Prompt], list[tuple[str, int]]]:
    """Prompts ready to sample from, and (id, tokens) of those left out because they are too long.

    `Prompt.meta["messages"]` holds the conversation, for reward models with another tokenizer.

    Raises:
        DataError: the template refuses a conversation, or every prompt is too long.
    """
    prompts: list[Prompt] = []
    left_out: list[tuple[str, int]] = []
    for start in range(0, len(records), _BATCH_PROMPTS):
        batch = records[start : start + _BATCH_PROMPTS]
        texts = [_text_of(record, tokenizer, system_prompt) for record in batch]
        for record, token_ids in zip(
            batch, tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"], strict=True
        ):
            if len(token_ids) > max_prompt_tokens:
                left_out.append((record.id, len(token_ids)))
                continue
            meta = {**record.meta, "messages": message_dicts(record.messages)}
            prompts.append(Prompt(record.id, record.text, np.array(token_ids, dtype=np.int32), meta))
    if records and not prompts:
        identity, shortest = min(left_out, key=lambda item: item[1])
        raise DataError(
            f"all {len(records)} prompts are longer than prompts.max_prompt_tokens={max_prompt_tokens}; the shortest, "
            f"{identity!r}, has {shortest} tokens under this model's chat template. Raise prompts.max_prompt_tokens "
            "(and model.max_length with it) or give shorter prompts."
        )
    return prompts, left_out


def fingerprint(tokenizer: Any) -> str:
    """Equal for two tokenizers exactly when the same token ids mean the same text and the same turns."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    text = json.dumps([vocabulary, tokenizer.chat_template], ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _text_of(record: PromptRecord, tokenizer: Any, system_prompt: str | None) -> str:
    try:
        return prompt_text(record.messages, tokenizer, system_prompt)
    except DataError as error:
        raise DataError(f"prompt {record.id!r}: {error}") from error


def _apply(messages: list[dict[str, str]], tokenizer: Any, *, add_generation_prompt: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"the chat template of {tokenizer.name_or_path} refuses a conversation of {roles}: {error}. Change the "
            "conversation, unset model.system_prompt, or set model.chat_template=FILE."
        ) from error


def _tokens(text: str, tokenizer: Any) -> Tokens:
    # The template writes BOS itself; a second one would not be what the model was trained on.
    return np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int32)
