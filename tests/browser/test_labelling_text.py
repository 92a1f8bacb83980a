"""What the page writes: every character of a reply, and every word in both languages."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from jobs.services.labelling.answers import FLAGS
from jobs.services.labelling.refusals import CODES
from jobs.services.labelling.shapes.table import SHAPES
from tests.browser.opened import Page, served, store_with

pytestmark = pytest.mark.heavy
SHOWN = """async (texts) => {
  const { formatted } = await import("/static/dom.js");
  return texts.map((text) => {
    const node = formatted(text);
    const all = (selector) => [...node.querySelectorAll(selector)].map((each) => each.textContent);
    return [node.textContent, all("pre"), all(".caption")];
  });
}"""
CASES = {
    "```python\nx\n```\nend": ("pythonx\nend", ["x\n"], ["python"]),
    "a\n````md\n```py\nx\n```\n````\nb": ("a\nmd```py\nx\n```\nb", ["```py\nx\n```\n"], ["md"]),
    "1. a\n   ```sh\n   ls\n   ```\n2. b": ("1. a\nsh   ls\n2. b", ["   ls\n"], ["sh"]),
    "- ```sh\n  ls\n  ```\nb": ("- sh  ls\nb", ["  ls\n"], ["sh"]),
    "~~~ c, hidden: vote for me\n```\n~~~": (" c, hidden: vote for me```\n", ["```\n"], [" c, hidden: vote for me"]),
    "```\nnever ends": ("never ends", ["never ends"], []),
    "```\r\nx\r\n```\r\ny": ("x\r\ny", ["x\r\n"], []),
    "```a`b\nx": ("```a`b\nx", [], []),
    "2 ** 3 ** 4, **bold**, `code` and ``": ("2 ** 3 ** 4, **bold**, `code` and ``", [], []),
    "# Head\n<b>x</b>": ("# Head\n<b>x</b>", [], []),
}


@pytest.fixture(scope="module")
def page(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with served(store_with(tmp_path_factory.mktemp("text"))) as address:
        opened = Page(browser, f"{address}/")
        yield opened.page
        assert opened.errors == []
        opened.context.close()


def test_blocks_of_code_by_hand(page: Any) -> None:
    found = page.evaluate(SHOWN, list(CASES))
    assert {text: tuple(shown) for text, shown in zip(CASES, found, strict=True)} == CASES


def drawn(draw: random.Random) -> tuple[str, str]:
    """A reply, and what must be shown of it: all but the marks of its blocks of code."""
    reply = shown = ""
    for _ in range(draw.randrange(6)):
        if draw.random() < 0.5:
            text = "".join(draw.choice([*"a \n\t中", "`a", "``b", "**", "# ", "<i>", "- "]) for _ in range(9))
            reply, shown = f"{reply}{text}\n", f"{shown}{text}\n"
            continue
        mark = draw.choice("`~") * draw.randrange(3, 7)
        indent, language = draw.choice(["", "  ", "      ", "\t"]), draw.choice(["", "py", " js {1,2} hidden", "中"])
        lines = [draw.choice(["x", "", "  y", "`z`", mark[:-1], "**", mark[0] * 2]) for _ in range(draw.randrange(4))]
        code = "".join(f"{line}\n" for line in lines)
        reply += f"{indent}{mark}{language}\n{code}{draw.choice(['', '  '])}{mark}{mark[0] * draw.randrange(2)}\n"
        shown += language + code
    return reply, shown


def test_every_character_of_a_reply_is_shown_but_the_marks_of_blocks(page: Any) -> None:
    draw = random.Random(0)
    pairs = [drawn(draw) for _ in range(2000)]
    found = page.evaluate(SHOWN, [reply for reply, _ in pairs])
    for (reply, shown), (text, _, _) in zip(pairs, found, strict=True):
        assert text == shown, repr(reply)


def test_of_any_text_only_marks_and_spaces_are_not_shown(page: Any) -> None:
    draw = random.Random(1)
    replies = ["".join(draw.choice("```~~~\n\n ab*#-") for _ in range(draw.randrange(60))) for _ in range(2000)]
    for reply, (text, _, _) in zip(replies, page.evaluate(SHOWN, replies), strict=True):
        assert [each for each in text if each not in "`~ \n"] == [each for each in reply if each not in "`~ \n"]


def test_every_reason_shape_and_flag_has_words_in_both_languages(page: Any) -> None:
    found = page.evaluate(
        """async () => Object.values((await import("/static/texts.js")).TEXTS)
        .map((words) => [words.reasons, words.admin.shapes, words.flags].map(Object.keys))"""
    )
    assert len(found) == 2
    for reasons, shapes, flags in found:
        assert (sorted(reasons), shapes, flags) == (sorted(CODES), list(SHAPES), list(FLAGS))


def test_nothing_is_said_of_answers_when_none_is_unsent(page: Any) -> None:
    found = page.evaluate(
        """async () => Object.values((await import("/static/texts.js")).TEXTS)
        .flatMap((words) => [words.away(0), words.full(0)])"""
    )
    assert len(found) == 4 and not any("0" in text or "answers" in text for text in found)
