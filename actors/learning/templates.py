"""Chat templates: which tokens of a conversation are prompt, and which the model is to learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.errors import DataError

Message = Mapping[str, str]


def prompt_tokens(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Tokens of a conversation up to where the assistant is to speak, generation prompt included."""
    return _encode(tokenizer, _render(tokenizer, messages, add_generation_prompt=True))


def conversation_tokens(tokenizer: Any, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Tokens of a whole conversation and its loss mask.

    The mask is 1 on what the assistant says and on the EOS that ends it, 0 on the rest: templates, other roles, and
    what a template writes behind the EOS. Text is split where the assistant begins to speak and tokenised piece by
    piece, so the tokens before it are those that it is asked with when sampling.

    Raises:
        DataError: the template rewrites earlier turns, or an assistant turn does not end in the tokenizer's EOS.
    """
    tokens: list[int] = []
    mask: list[int] = []
    written = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = _render(tokenizer, messages[:index], add_generation_prompt=True)
        answered = _render(tokenizer, messages[: index + 1], add_generation_prompt=False)
        if not asked.startswith(written) or not answered.startswith(asked):
            raise DataError(
                f"the chat template writes turn {index} differently when it comes later, so it can't be told which "
                "tokens are the assistant's. Use a template that only appends, or single-turn data."
            )
        question = _encode(tokenizer, asked[len(written) :])
        answer = _encode(tokenizer, answered[len(asked) :])
        if tokenizer.eos_token_id not in answer:
            raise DataError(
                f"the chat template does not end the assistant's turn {index} with {tokenizer.eos_token!r}: a model "
                "trained on it would not learn to stop. Add the EOS token to the template."
            )
        learned = answer.index(tokenizer.eos_token_id) + 1
        tokens += question + answer
        mask += [0] * len(question) + [1] * learned + [0] * (len(answer) - learned)
        written = answered
    if not any(mask):
        raise DataError("a conversation without an assistant turn has nothing to learn; leave it out.")
    return tokens, mask


def _render(tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    text: str = tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
    )
    return text


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
