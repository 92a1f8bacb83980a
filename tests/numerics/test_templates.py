"""Which tokens are prompt, response, EOS and loss, for four chat templates; expected masks are written by hand.

The tokenizer used here has one token per character, plus the special tokens, so that masks can be read off the text.
"""

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from actors.learning.templates import conversation_tokens, prompt_tokens
from orchestrator.errors import DataError
from tests.tiny import CHATML

LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<s>[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' </s>' }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
ALPACA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '# I:\n' + m['content'] + '\n\n# R:\n' }}"
    "{% else %}{{ m['content'] + '</s>\n\n' }}{% endif %}{% endfor %}"
)

# Per template: EOS, the prompt's text, and the two-turn conversation as (text, loss) pieces.
CASES = {
    "chatml": (
        CHATML,
        "<|im_end|>",
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
        [
            ("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", 0),
            ("yo<|im_end|>", 1),
            ("\n", 0),
            ("<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\n", 0),
            ("ok<|im_end|>", 1),
            ("\n", 0),
        ],
    ),
    "llama2": (
        LLAMA2,
        "</s>",
        "<s>[INST] hi [/INST]",
        [
            ("<s>[INST] hi [/INST]", 0),
            (" yo </s>", 1),
            ("<s>[INST] bye [/INST]", 0),
            (" ok </s>", 1),
        ],
    ),
    "zephyr": (
        ZEPHYR,
        "</s>",
        "<|user|>\nhi</s>\n<|assistant|>\n",
        [
            ("<|user|>\nhi</s>\n<|assistant|>\n", 0),
            ("yo</s>", 1),
            ("\n", 0),
            ("<|user|>\nbye</s>\n<|assistant|>\n", 0),
            ("ok</s>", 1),
            ("\n", 0),
        ],
    ),
    "alpaca": (
        ALPACA,
        "</s>",
        "# I:\nhi\n\n# R:\n",
        [
            ("# I:\nhi\n\n# R:\n", 0),
            ("yo</s>", 1),
            ("\n\n", 0),
            ("# I:\nbye\n\n# R:\n", 0),
            ("ok</s>", 1),
            ("\n\n", 0),
        ],
    ),
}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<s>", "</s>"]
CONVERSATION = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "ok"},
]


def letters(template: str, eos: str) -> PreTrainedTokenizerFast:
    vocabulary = {text: i for i, text in enumerate([*SPECIAL, "\n", *map(chr, range(32, 127))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token=eos, chat_template=template)


def num_tokens(text: str) -> int:
    """Counted without the tokenizer: a special token is one, any other character is one."""
    count = 0
    while text:
        special = next((token for token in SPECIAL if text.startswith(token)), text[0])
        text = text[len(special) :]
        count += 1
    return count


@pytest.mark.parametrize("name", CASES)
def test_the_prompt_ends_where_the_assistant_speaks(name):
    template, eos, prompt, _ = CASES[name]
    tokenizer = letters(template, eos)
    tokens = prompt_tokens(tokenizer, CONVERSATION[:1])
    assert len(tokens) == num_tokens(prompt)
    assert tokenizer.convert_ids_to_tokens(tokens) == _pieces(prompt)


@pytest.mark.parametrize("name", CASES)
def test_only_the_assistants_words_and_their_eos_are_learned(name):
    template, eos, _, pieces = CASES[name]
    tokenizer = letters(template, eos)
    tokens, mask = conversation_tokens(tokenizer, CONVERSATION)
    assert tokenizer.convert_ids_to_tokens(tokens) == [token for text, _ in pieces for token in _pieces(text)]
    assert mask == [loss for text, loss in pieces for _ in range(num_tokens(text))]
    learned = [i for i, bit in enumerate(mask) if bit]
    assert tokens[learned[-1]] == tokenizer.eos_token_id
    assert sum(tokens[i] == tokenizer.eos_token_id for i in learned) == 2


@pytest.mark.parametrize("name", CASES)
def test_a_conversation_begins_with_the_tokens_that_sampling_starts_from(name):
    template, eos, _, _ = CASES[name]
    tokenizer = letters(template, eos)
    prompt = prompt_tokens(tokenizer, CONVERSATION[:1])
    tokens, mask = conversation_tokens(tokenizer, CONVERSATION)
    assert tokens[: len(prompt)] == prompt
    assert mask[: len(prompt) + 1] == [0] * len(prompt) + [1]


def test_a_template_without_eos_is_refused():
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(DataError, match="EOS"):
        conversation_tokens(letters(template, "</s>"), CONVERSATION[:2])


def test_a_template_that_rewrites_earlier_turns_is_refused():
    template = "{{ messages | length }}{% for m in messages %}{{ m['content'] + '</s>' }}{% endfor %}"
    with pytest.raises(DataError, match="differently"):
        conversation_tokens(letters(template, "</s>"), CONVERSATION)


def _pieces(text: str) -> list[str]:
    pieces = []
    while text:
        pieces.append(next((token for token in SPECIAL if text.startswith(token)), text[0]))
        text = text[len(pieces[-1]) :]
    return pieces
