"""A tokenizer with one token per character, plus special and added tokens, so that expected tokens are readable."""

# ruff: noqa: E501  templates are more readable unwrapped

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = (
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>", "</s>", "<|begin_of_text|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<|user|>",
    "<|assistant|>", "<|system|>", "<|end|>", "<think>", "</think>",
)  # fmt: skip


def letters(
    template: str | dict[str, str] | None,
    eos: str | None = "</s>",
    *,
    special: Sequence[str] = SPECIAL,
    plain: Sequence[str] = (),
    bos: str | None = None,
) -> PreTrainedTokenizerFast:
    """`plain`: added tokens that are not special."""
    vocabulary = {text: i for i, text in enumerate(["?", *special, *plain, "\n", *map(chr, range(32, 127))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(special))
    tokenizer.add_tokens([AddedToken(text, special=False) for text in plain])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, bos_token=bos, pad_token=eos, chat_template=template
    )
