"""Sampled turns stay as they are; what is between them is what the template writes."""

from __future__ import annotations

import numpy as np
import pytest

from actors.text.conversations import Chat, chat_of
from actors.text.tokenizing import Tokens
from actors.text.turns import Conversation, prove_turns
from orchestrator.data.records import Message
from orchestrator.errors import DataError
from tests.tiny import CHATML, tiny_tokenizer
from tests.unit.actors.letters import letters
from tests.unit.actors.text.test_closings import CASES
from tests.unit.actors.text.test_learned import ONE_TURN, REWRITING, THINK_FIRST, THINKING

ASKED = (Message("user", "hi"),)
UNMARKED = "prompt only, Answer:"  # writes all turns, but no roles
REWRITES = {UNMARKED, *(name for name in REWRITING if not name.startswith("generation prompt always"))}
REFUSED = {*ONE_TURN} - {UNMARKED}
TOOL_AS_USER = CHATML.replace("message['role'] +", "('user' if message['role'] == 'tool' else message['role']) +")


def played(chat: Chat, turns: list[Tokens], answers: list[str], role: str = "user") -> Tokens:
    """The whole conversation in tokens, with an answer after each turn but the last."""
    conversation = Conversation(chat, ASKED)
    tokens = [conversation.prompt]
    for turn, answer in zip(turns, answers, strict=False):
        conversation, written = conversation.continued(turn, [Message(role, answer)])
        assert written is not None, "a new segment begins"
        tokens += [turn, written]
    return np.concatenate([*tokens, turns[-1]])


@pytest.mark.parametrize("name", sorted(CASES.keys() - REFUSED - REWRITES))
def test_turns_follow_each_other_as_the_template_and_the_tokenizer_write_them(name: str) -> None:
    """The tokenizer has one token per character, so a text has one form in tokens."""
    case = CASES[name]
    chat = chat_of(letters(case.template, case.eos, bos=case.bos))
    turns = [chat.closed(chat.tokens_of(text)) for text in ("yes", "no", "so")]
    messages = [
        *ASKED,
        Message("assistant", "yes"),
        Message("user", "why?"),
        Message("assistant", "no"),
        Message("user", "4\n2"),
    ]
    expected = np.concatenate([chat.prompt(messages), turns[-1]])
    found = played(chat, turns, ["why?", "4\n2"])
    assert "".join(chat.text(found).split()) == "".join(chat.text(expected).split())
    if name not in ("Llama-2", "Vicuna"):  # they write spaces around a reply, which the policy has not sampled
        assert found.tolist() == expected.tolist()
    assert prove_turns(chat, "user") == ""


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_templates_for_one_turn_are_refused_with_a_way_out(name: str) -> None:
    case = CASES[name]
    with pytest.raises(DataError, match=r"Set model\.chat_template=FILE|set model\.chat_template=FILE"):
        prove_turns(chat_of(letters(case.template, case.eos, bos=case.bos)), "user")


@pytest.mark.parametrize("name", sorted(REWRITES))
def test_after_a_template_has_rewritten_a_turn_the_whole_conversation_is_a_new_prompt(name: str) -> None:
    case = CASES[name]
    chat = chat_of(letters(case.template, case.eos, bos=case.bos))
    assert "writes earlier turns differently later on, so every turn is a prompt of its own" in prove_turns(
        chat, "user"
    )
    conversation = Conversation(chat, ASKED)
    following, written = conversation.continued(chat.closed(chat.tokens_of("yes")), [Message("user", "why?")])
    assert written is None
    assert following.messages == (*ASKED, Message("assistant", "yes"), Message("user", "why?"))
    assert following.prompt.tolist() == chat.prompt(following.messages).tolist()
    assert conversation.messages == ASKED, "a segment that ended has changed"


def test_what_was_sampled_is_never_tokenised_again() -> None:
    """The sampled turn is `yes`, one token per letter, which the tokenizer would join."""
    chat = chat_of(tiny_tokenizer())
    joined = chat.tokens_of("story")
    apart = np.concatenate([chat.tokens_of(letter) for letter in "story"])
    assert len(joined) < len(apart)
    turn = np.concatenate([apart, chat.closing])
    found = played(chat, [turn, turn], ["Next."])
    prompt = chat.prompt(ASKED)
    assert found[len(prompt) : len(prompt) + len(turn)].tolist() == turn.tolist()
    between = chat.tokens_of("\n<|im_start|>user\nNext.<|im_end|>\n<|im_start|>assistant\n")
    assert found[len(prompt) + len(turn) : -len(turn)].tolist() == between.tolist()


def test_white_space_that_a_template_trims_stays() -> None:
    case = CASES["Llama-3"]
    chat = chat_of(letters(case.template, case.eos, bos=case.bos))
    turn = chat.closed(chat.tokens_of(" \n yes \n\n"))
    text = chat.text(played(chat, [turn, turn], ["why?"]))
    assert text.count(" \n yes \n\n<|eot_id|>") == 2
    assert "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nwhy?<|eot_id|>" in text


@pytest.mark.parametrize(
    ("end", "shown"),
    [([], "cut<|im_end|>\n"), (["<|endoftext|>"], "cut<|endoftext|><|im_end|>\n"), (["<|im_end|>"], "cut<|im_end|>\n")],
)
def test_a_turn_without_its_closing_is_closed(end: list[str], shown: str) -> None:
    chat = chat_of(letters(CHATML, "<|endoftext|>"))
    turn = np.concatenate([chat.tokens_of("cut"), np.array(chat.tokenizer.convert_tokens_to_ids(end), np.int32)])
    text = chat.text(played(chat, [turn.astype(np.int32), turn.astype(np.int32)], ["why?"]))
    assert f"assistant\n{shown}<|im_start|>user\nwhy?" in text


def test_an_empty_turn_continues() -> None:
    chat = chat_of(letters(CHATML, "<|im_end|>"))
    turns = [chat.closing, chat.closed(chat.tokens_of("yes"))]
    text = chat.text(played(chat, turns, [""]))
    assert text.endswith("assistant\n<|im_end|>\n<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>")


@pytest.mark.parametrize("template", [THINKING, THINK_FIRST])
def test_after_thoughts_that_a_template_drops_nothing_can_follow(template: str) -> None:
    """THINKING drops given thoughts only where a message has them apart; here they are part of the text."""
    dropping = template.replace("+ m['content'] + '<|im_end|>\n' }}{% endif %}", "+ m['content'].split('</think>')[-1] + '<|im_end|>\n' }}{% endif %}")  # fmt: skip # noqa: E501
    chat = chat_of(letters(dropping, "<|im_end|>"))
    thought = chat.closed(chat.tokens_of("<think>\nhm\n</think>\n\nyes"))
    following, written = Conversation(chat, ASKED).continued(thought, [Message("user", "why?")])
    assert written is None and "hm" not in chat.text(following.prompt) and "yes" in chat.text(following.prompt)
    if template == THINKING:
        assert "repeats only turns without thoughts as they were sampled" in prove_turns(chat, "user")
    else:  # its generation prompt begins a thought, which the next prompt drops
        assert "so every turn is a prompt of its own" in prove_turns(chat, "user")


KEEPING = (
    "{% for m in messages %}{% set given = m['content'] %}{% if m['role'] == 'assistant' and '</think>' not in given %}"
    "{% set given = '<think>\n\n</think>\n\n' + given %}{% elif m['role'] == 'assistant' and '<think>' not in given %}"
    "{% set given = '<think>\n' + given %}{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + given + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "reply", "warning"),
    [
        (KEEPING, "<think>\nhm\n</think>\n\nyes", "repeats only turns with thoughts (<think>)"),
        (KEEPING.replace("assistant\n' }}", "assistant\n<think>\n' }}"), "hm\n</think>\n\nyes", ""),
    ],
)
def test_templates_that_give_every_turn_a_thought_continue(template: str, reply: str, warning: str) -> None:
    """As those that TRL has for training: an earlier turn always has a thought, if an empty one."""
    chat = chat_of(letters(template, "<|im_end|>"))
    found = prove_turns(chat, "user")
    assert warning in found and bool(found) == bool(warning)
    turn = chat.closed(chat.tokens_of(reply))
    assert chat.text(played(chat, [turn, turn], ["why?"])).count("<think>\nhm\n</think>\n\nyes<|im_end|>") == 2


def test_the_environment_may_speak_as_a_tool_if_the_template_lets_it() -> None:
    chat = chat_of(letters(TOOL_AS_USER, "<|im_end|>"))
    turn = chat.closed(chat.tokens_of("yes"))
    assert prove_turns(chat, "tool") == ""
    assert "<|im_start|>user\n42<|im_end|>" in chat.text(played(chat, [turn, turn], ["42"], "tool"))
    silent = "{% for m in messages if m.role != 'tool' %}" + CHATML.removeprefix("{% for message in messages %}")
    with pytest.raises(DataError, match="it is not made for tools"):
        prove_turns(chat_of(letters(silent.replace("message[", "m["), "<|im_end|>")), "tool")


def test_a_begun_turn_is_continued_with_what_was_sampled() -> None:
    chat = chat_of(letters(CHATML, "<|im_end|>"))
    conversation = Conversation(chat, (*ASKED, Message("assistant", "well, ")))
    assert chat.text(conversation.prompt).endswith("assistant\nwell, ")
    _, between = conversation.continued(chat.closed(chat.tokens_of("yes")), [Message("user", "why?")])
    assert between is not None
    assert chat.text(between) == "\n<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n"
