"""A tiny random Llama and a byte-level tokenizer, written as a Hugging Face folder in about a second."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from actors.models.reward_heads import HEADS_ENTRY

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL_TOKENS = ["<|im_end|>", "<|im_start|>", "<s>", "</s>"]
VOCABULARY = 384
_CORPUS = [
    "Write a short story about a river.\nuser\nassistant\nsystem\n",
    "What is two plus three? The answer is five. Once upon a time there was a small house by the sea.",
    "Explain in one sentence why the sky is blue, and say it politely.",
]


def tiny_tokenizer(chat_template: str = CHATML, eos_token: str = "<|im_end|>") -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most VOCABULARY tokens. Its pad token is its EOS, as in many real models,
    so code that uses pad ids to find the end of a response fails."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos_token,
        pad_token=eos_token,
        chat_template=chat_template,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def tiny_config(tied: bool = True) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,  # the smallest that vLLM supports on CPUs
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )


def tiny_llama(folder: Path, tied: bool = True, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Writes a causal LM (hidden 64, 2 layers, about 0.1 M parameters), tokenizer and generation config to `folder`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(tiny_config(tied)).to(dtype)
    model.generation_config.eos_token_id = 0
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_scorer(
    folder: Path, *, seed: int = 1, dtype: torch.dtype = torch.float32, labels: int = 1, heads: int = 1
) -> Path:
    """Writes a sequence classifier (a reward model or a critic) with its tokenizer to `folder`. `heads`: it is an
    ensemble of ours; `labels`: it is another classifier."""
    config = tiny_config(tied=False)
    config.num_labels = max(labels, heads)
    if heads > 1:
        setattr(config, HEADS_ENTRY, heads)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForSequenceClassification(config).to(dtype)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
