"""The labelling page in Chromium, by keyboard alone. Skipped where Playwright or Chromium is missing."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from jobs.services.labelling.adding import Wanted, add
from jobs.services.labelling.sources import Candidate
from jobs.services.labelling.store import Store
from jobs.services.labelling.tables import items, judgements
from tests.deadlines import scaled
from tests.unit.jobs.services.labelling.filled import invited
from tests.unit.jobs.services.labelling.running import free_port, service, until_healthy

playwright = pytest.importorskip(
    "playwright.sync_api", reason="needs Playwright (pip install playwright) and Debian's package chromium"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)"),
    pytest.mark.heavy,
]
EVIL = "<b>bold</b><script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">"
CODE = "See:\n\n```python\nprint('<i>hi</i>')\n```\nand `x < 1`."
ARABIC = "عاصمة فرنسا هي باريس."


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def store_with(folder: Path, *tasks: tuple[str, str, list[str]]) -> Store:
    """Tasks (kind, prompt, replies), in this order."""
    store = Store(str(folder / "labels.db"))
    for number, (kind, prompt, replies) in enumerate(tasks):
        found = Candidate(
            str(number),
            [{"role": "user", "content": prompt}],
            [],
            [{"reply": text, "source": {}} for text in replies],
            {},
        )
        add(store, [found], Wanted(kind, priority=-number), batch="test")
    return store


class Page:
    """A labeller at the keyboard."""

    def __init__(self, browser: Any, link: str, **settings: Any) -> None:
        self.context = browser.new_context(
            **{"viewport": {"width": 1280, "height": 900}, "locale": "en-US", **settings}
        )
        self.context.set_default_timeout(1000 * scaled(15))
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(link)

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def shows(self, selector: str, text: str) -> None:
        self.page.locator(selector, has_text=text).first.wait_for()

    def pressed(self) -> list[str]:
        """The chosen buttons, in the order of the page."""
        found: list[str] = self.page.locator("[aria-pressed=true]").all_inner_texts()
        return found

    def reply_at(self, place: int) -> str:
        return str(self.page.locator("article .text").nth(place).inner_text())


def answers(store: Store) -> list[tuple[str, Any, bool]]:
    """(kind, answer, whether it is undone) in the order in which they were stored."""
    with store.reading() as connection:
        rows = connection.execute(
            select(items.c.kind, judgements.c.answer, judgements.c.undone_at).join(items).order_by(judgements.c.seq)
        ).all()
    return [(kind, answer, undone is not None) for kind, answer, undone in rows]


def test_a_person_judges_by_keyboard(browser: Any, tmp_path: Path) -> None:
    store = store_with(
        tmp_path,
        ("rank", "Rank these.", ["one", "two", "three"]),
        ("rank", "Skip these.", ["four", "five"]),
        ("compare", "Compare these.", ["six", "seven"]),
        ("rate", "Rate this.", [EVIL]),
        ("write", "Write.", []),
    )
    port = free_port()
    link = f"http://127.0.0.1:{port}/#{invited(store, 'ann')}"
    with service(tmp_path / "labels.db", port) as process:
        until_healthy(port, process)
        ann = Page(browser, link)
        ann.shows("main", "Rank these.")
        assert "#" not in ann.page.url  # the token is not on the screen
        best = ann.reply_at(0)
        ann.press("1", "2", "Enter")
        ann.shows("#notice", "Give every reply a rank")
        ann.page.reload()
        ann.shows("main", "Rank these.")
        assert ann.pressed() == ["1", "2"]
        ann.press("ArrowDown", "ArrowDown", "2")  # a tie
        assert ann.pressed() == ["1", "2", "2"]
        ann.press("Enter")
        ann.shows("#progress", "1 done")
        ann.shows("main", "Skip these.")
        ann.press("u")
        ann.shows("main", "Rank these.")
        assert ann.pressed() == ["1", "2", "2"]
        ann.press("ArrowDown", "ArrowUp", "3", "Enter")
        ann.shows("main", "Skip these.")
        ann.press("Backspace")
        ann.shows("main", "Compare these.")
        second = ann.reply_at(1)
        ann.press("4", "ArrowRight", "ArrowRight", "Enter")
        ann.shows("main", "Rate this.")
        assert ann.reply_at(0) == EVIL and ann.page.title() == "Labelling"
        ann.press("4", "Tab", "Tab", "Space", "Enter")
        ann.shows("main", "Write.")
        ann.page.keyboard.type("Line 1? u\n2 done")
        ann.press("Backspace", "Control+Enter")
        ann.shows("main", "Nothing is left")
        ann.press("?")
        ann.shows("dialog[open]", "undo the last answer")
        assert ann.errors == []
    found = answers(store)
    assert [(kind, undone) for kind, _, undone in found] == [
        ("rank", True), ("rank", False), ("compare", False), ("rate", False), ("write", False),
    ]  # fmt: skip
    rank = found[1][1]["ranks"]
    assert sorted(rank) == [1, 1, 2] and rank[["one", "two", "three"].index(best)] == 2
    assert found[2][1]["preference"] == (2 if second == "seven" else -2)
    assert found[3][1]["rating"] == 4 and len(found[3][1]["flags"]) == 1
    assert found[4][1]["text"] == "Line 1? u\n2 don"


def test_answers_survive_a_dead_server_and_a_reload(browser: Any, tmp_path: Path) -> None:
    store = store_with(tmp_path, *[("compare", f"Question {number}.", ["a", "b"]) for number in range(3)])
    port = free_port()
    link = f"http://127.0.0.1:{port}/#{invited(store, 'ann')}"
    with service(tmp_path / "labels.db", port) as process:
        until_healthy(port, process)
        ann = Page(browser, link)
        ann.shows("main", "Question 0.")
    ann.press("3", "Enter")
    ann.shows("#notice", "1 of your answers are kept in this browser")
    with service(tmp_path / "labels.db", port) as process:
        until_healthy(port, process)
        ann.shows("main", "Question 1.")
        ann.press("3")
        ann.page.reload()
        ann.shows("main", "Question 1.")
        assert ann.pressed() == ["First: slightly better"]
        ann.context.set_offline(True)
        ann.press("Enter")
        ann.shows("#notice", "1 of your answers are kept")
        waiting = ann.context.pages[0].evaluate("Object.keys(localStorage).filter((key) => key.includes('outbox'))")
        assert len(waiting) == 1
        ann.context.set_offline(False)
        ann.shows("main", "Question 2.")
        assert ann.page.locator("#notice").is_hidden()
    assert [kind for kind, _, _ in answers(store)] == ["compare", "compare"]


def test_the_page_fits_windows_in_chinese_and_shows_text_of_both_directions(browser: Any, tmp_path: Path) -> None:
    store = store_with(tmp_path, ("rank", "中国的首都是哪里？", [ARABIC, CODE, "long\n" * 100, "x" * 300]))
    port = free_port()
    link = f"http://127.0.0.1:{port}/#{invited(store, 'ann')}"
    with service(tmp_path / "labels.db", port) as process:
        until_healthy(port, process)
        for width, scheme in itertools.product((1280, 400), ("light", "dark")):
            ann = Page(browser, link, viewport={"width": width, "height": 800}, color_scheme=scheme, locale="zh-CN")
            ann.shows("main", "请为回复排序")
            ann.page.screenshot(path=tmp_path / f"labelling-{width}-{scheme}.png", full_page=True)
            assert ann.page.evaluate("document.documentElement.scrollWidth") <= width
            assert contrast(ann.page) >= 4.5
        assert ann.page.evaluate("document.documentElement.lang") == "zh-Hans"
        for text, direction in ((ARABIC, "rtl"), ("See:", "ltr")):
            shown = ann.page.locator("article .text", has_text=text)
            assert shown.evaluate("(node) => getComputedStyle(node).direction") == direction
        assert ann.page.locator("article pre").inner_text() == "print('<i>hi</i>')"
        long = ann.page.locator("article", has_text="long")
        assert long.locator(".text.long").count() == 1
        long.focus()
        ann.press("e")
        assert long.locator(".text.long").count() == 0


def contrast(page: Any) -> float:
    """The lowest contrast of a text and what is behind it (WCAG 2.2)."""
    found: float = page.evaluate(
        """() => {
        const light = (color) => {
          const [r, g, b] = color.match(/[\\d.]+/g).map(Number).map((c) => c / 255)
            .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
          return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const behind = (node) => {
          for (; node; node = node.parentElement) {
            const color = getComputedStyle(node).backgroundColor;
            if (!/, 0\\)$/.test(color)) return color;
          }
          return "rgb(255, 255, 255)";
        };
        const texts = [...document.querySelectorAll("body *")].filter((node) => node.checkVisibility() &&
          !node.disabled && [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim()));
        return Math.min(...texts.map((node) => {
          const [low, high] = [light(getComputedStyle(node).color), light(behind(node))].sort((a, b) => a - b);
          return (high + 0.05) / (low + 0.05);
        }));
      }"""
    )
    return found
