"""Templates are rendered as in transformers, within limits, with the run's date."""

# ruff: noqa: E501  templates are more readable unwrapped

from __future__ import annotations

import os
import time
from datetime import date
from typing import Any

import pytest

from actors.text.conversations import chat_of
from actors.text.templates import _PROCESS, ChatTemplate, TemplateRefused
from orchestrator.data.records import Message
from orchestrator.errors import DataError
from tests.tiny import CHATML
from tests.unit.actors.letters import letters
from tests.unit.actors.text import test_closings as known

ASKED = [{"role": "user", "content": "hi"}]
TALK = [*ASKED, {"role": "assistant", "content": " yo\n"}, {"role": "user", "content": "<b>&‖ 😀</b>"}]
DATED = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}" + CHATML
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] | tojson }}{% if loop.index0 > 5 %}{% break %}{% endif %}{% endif %}{% endfor %}"
)
TOOLS = [{"type": "function", "function": {"name": "look_up", "description": "Looks ü up", "parameters": {}}}]
WITH_TOOLS = "{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}" + CHATML


def template(text: str, today: date = date(2025, 3, 2), **variables: str) -> ChatTemplate:
    return ChatTemplate("m", text, None, variables, today)


@pytest.mark.parametrize("ask", [True, False])
@pytest.mark.parametrize("name", known.CASES)
def test_known_templates_are_rendered_as_transformers_renders_them(name: str, ask: bool) -> None:
    case = known.CASES[name]
    tokenizer = letters(case.template, case.eos, bos=case.bos)
    ours = ChatTemplate(name, case.template, None, tokenizer.special_tokens_map, date(2025, 3, 2))
    for messages in (ASKED, TALK):
        try:
            theirs = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
        except Exception:  # noqa: BLE001  ours must refuse whenever it raises
            with pytest.raises(DataError):
                ours.render(messages, add_generation_prompt=ask)
            continue
        assert ours.render(messages, add_generation_prompt=ask) == theirs


@pytest.mark.parametrize(("text", "tools"), [(MARKED, ()), (WITH_TOOLS, TOOLS), (WITH_TOOLS, ())])
def test_tags_filters_and_tools_are_those_of_transformers(text: str, tools: Any) -> None:
    theirs = letters(text).apply_chat_template(TALK, tools=tools or None, tokenize=False)
    assert template(text, eos_token="</s>").render(TALK, tools, add_generation_prompt=False) == theirs


def test_a_template_writes_the_date_that_it_is_given() -> None:
    first, again = (template(DATED).render(ASKED, add_generation_prompt=True) for _ in range(2))
    assert first == again and first.startswith("02 Mar 2025")
    assert template(DATED).reads_date and not template(CHATML).reads_date
    dated = [chat_of(letters(DATED), today=date(2025, 3, day)) for day in (2, 2, 3)]
    assert dated[0].fingerprint == dated[1].fingerprint != dated[2].fingerprint
    plain = [chat_of(letters(CHATML), today=date(2025, 3, day)) for day in (2, 3)]
    assert plain[0].fingerprint == plain[1].fingerprint


BOMBS = {
    "loops": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "does not end within 2 s"),
    "output": ("{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxxxxxxxxxxx{% endfor %}{% endfor %}", "more than"),
    "memory": ("{{ 'x' * 10 ** 11 }}", "needs more than 1024 MiB"),
    "memory in pieces": ("{% set a = ['x' * 10 ** 7] %}{% for i in range(999) %}{{ a.append(1) }}{{ a * 99999 }}{% endfor %}", ""),
    "power": ("{{ 7 ** (7 ** 11) }}", ""),
    "format": ("{{ '%0999999999999d' % 1 }}", "needs more than"),
    "center": ("{{ 'a' | center(10 ** 11) }}", "needs more than"),
    "join": ("{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}", "needs more"),
    "recursion": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    "nesting": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", ""),
    "division": ("{{ 1 // 0 }}", "ZeroDivisionError"),
    "type": ("{{ messages + 1 }}", "TypeError"),
    "overflow": ("{{ 2.0 ** 99999 }}", "OverflowError"),
    "range": ("{{ range(10 ** 9) }}", "OverflowError"),
    "now": ("{{ now() }}", "'now' is undefined"),
    "random": ("{{ [1, 2] | random }}", "draws at random"),
    "lipsum": ("{{ lipsum(n=10 ** 9) }}", "draws at random"),
    "syntax": ("{% if %}", "line 1"),
    "sandbox": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "include": ("{% include '/etc/passwd' %}", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_that_breaks_or_never_ends_is_an_error(name: str) -> None:
    text, fault = BOMBS[name]
    before = time.process_time()
    with pytest.raises(DataError, match="the chat template of m fails on a conversation of user") as found:
        template(text).render(ASKED, add_generation_prompt=True)
    assert not isinstance(found.value, TemplateRefused)
    assert fault in str(found.value) and "model.chat_template=FILE" in str(found.value)
    assert time.process_time() - before < 1.0
    # The next template is not affected.
    assert template(CHATML).render(ASKED, add_generation_prompt=False) == "<|im_start|>user\nhi<|im_end|>\n"


def test_a_refusal_is_told_apart_from_a_fault() -> None:
    with pytest.raises(TemplateRefused, match="refuses a conversation of user: not today"):
        template("{{ raise_exception('not today') }}").render(ASKED, add_generation_prompt=True)


def test_the_process_holds_no_secrets_and_ends_when_it_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    _PROCESS.close()
    template("x").render(ASKED, add_generation_prompt=True)
    process = _PROCESS._process
    assert process is not None
    with open(f"/proc/{process.pid}/environ", "rb") as stream:
        assert b"secret" not in stream.read()
    _PROCESS.close()
    assert process.returncode is not None and not os.path.exists(f"/proc/{process.pid}")


@pytest.mark.parametrize(
    ("named", "tools", "text"),
    [
        ({"default": CHATML, "tool_use": "tools!"}, (), "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"),
        ({"default": CHATML, "tool_use": WITH_TOOLS + "!"}, TOOLS, "!"),
        ({"default": WITH_TOOLS}, TOOLS, "look_up"),
    ],
)
def test_one_of_several_named_templates_is_used(named: dict[str, str], tools: Any, text: str) -> None:
    assert text in chat_of(letters(named)).prompt_text((Message("user", "hi"),), tools)


def test_named_templates_without_a_default_are_refused() -> None:
    with pytest.raises(DataError, match=r"several chat templates \(rag, tool_use\) and none is called 'default'"):
        chat_of(letters({"tool_use": CHATML, "rag": CHATML}))
