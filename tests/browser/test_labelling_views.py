"""Each view of the labelling page in wide and narrow windows, light and dark, in both languages: it fits, its texts can
be read, and axe-core finds nothing. axe-core is fetched from npm, and its test skipped where that is not possible."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from jobs.services.labelling import people
from jobs.services.labelling.store import Store
from tests.browser.opened import Page, admin_of, put, put_review, served
from tests.deadlines import scaled
from tests.unit.jobs.services.labelling.filled import invited

pytestmark = pytest.mark.heavy
CODE = "See:\n\n```python\nprint('<i>hi</i>')\n```\nand `x < 1`."
ARABIC = "عاصمة فرنسا هي باريس."
MIXED = f"In Arabic:\n{ARABIC}"
LOOKS = [(1280, "light", "en"), (1280, "dark", "zh"), (400, "light", "zh"), (400, "dark", "en")]
KEEP = """async (text) => {
  const { Drafts } = await import("/static/drafts.js");
  const task = { showing: "earlier", kind: "write", messages: [{ role: "user", content: text }], replies: [] };
  new Drafts("nothing").keep(task, { text }, 0);
}"""
AXE = "axe-core@4"


@pytest.fixture(scope="module")
def views(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, Page]]:
    """A person with each kind of task, and the admin."""
    store = Store(str(tmp_path_factory.mktemp("views") / "labels.db"))
    put_review(store, "write", "Who are you?", f"{MIXED}\n\n{CODE}", num_reviews=1, priority=-9.0)
    put(
        store,
        ("rank", "中国的首都是哪里？", [MIXED, CODE, "long\n" * 100, "x" * 300, ARABIC]),
        ("compare", "Which one is **better**?", ["# One\n\n" + "text " * 100, "two"]),
        ("rate", ARABIC, ["one"]),
        ("write", "\n---\n".join(["Who wrote it?", "Somebody. " * 200, ARABIC]), []),
        ("prompt", "Cooking", []),
    )
    with served(store, guidelines="# Rules\n\nBe **fair**. 请公平。") as address:
        found = {}
        for name in ("rank", "compare", "rate", "write", "prompt", "review"):
            found[name] = Page(browser, f"{address}/#{invited(store, name)}")
            found[name].page.locator("#task article, #task textarea").first.wait_for()
        found["nothing"] = Page(browser, f"{address}/#{invited(store, 'nothing')}")
        found["nothing"].shows("#task", "Nothing is left")
        found["nothing"].page.evaluate(KEEP, MIXED)
        found["nothing"].page.reload()
        found["nothing"].page.locator("#kept summary").click()
        with store.writing() as connection:
            people.pause(connection, "write", paused=True)
            people.revoke(connection, "bob")
        found["admin"] = Page(browser, f"{address}/#{admin_of(store)}")
        found["admin"].shows("#task h2", "Batches")
        found["admin"].page.locator("#invite-name").fill("عمر")
        found["admin"].page.locator("#invite").click()
        found["admin"].page.locator("#invited-link").wait_for()
        yield found
        for page in found.values():
            assert page.errors == []
            page.context.close()


def test_each_view_fits_and_can_be_read(views: Mapping[str, Page], tmp_path: Path) -> None:
    for (name, view), (width, scheme, language) in itertools.product(views.items(), LOOKS):
        view.look(width=width, scheme=scheme, language=language)
        view.page.screenshot(path=tmp_path / f"{name}-{width}-{scheme}.png", full_page=True)
        assert view.page.evaluate("document.documentElement.scrollWidth") <= width, name
        assert contrast(view.page) >= 4.5, name


def test_texts_of_both_directions_code_and_long_replies(views: Mapping[str, Page]) -> None:
    rank = views["rank"]
    replies = rank.page.locator("article .text")
    assert sorted(replies.evaluate_all("(nodes) => nodes.map((node) => getComputedStyle(node).direction)")) == [
        "ltr", "ltr", "ltr", "ltr", "rtl",
    ]  # fmt: skip
    # Each paragraph has its own direction: the Arabic one ends at the right, its width being less than the window's.
    ends = replies.filter(has_text="In Arabic:").evaluate(
        """(node) => {
        const range = document.createRange();
        range.setStart(node.firstChild, node.firstChild.data.indexOf("\\n") + 1);
        range.setEnd(node.firstChild, node.firstChild.data.length);
        return [range.getBoundingClientRect().right, node.getBoundingClientRect().right];
      }"""
    )
    assert abs(ends[0] - ends[1]) < 2
    assert rank.page.locator("article pre").inner_text() == "print('<i>hi</i>')\n"
    box = rank.page.locator("article pre").bounding_box()
    assert box["height"] < 60  # its last line break is no line
    long = rank.page.locator("article", has_text="long")
    assert long.locator(".text.long").count() == 1
    long.focus()
    rank.press("e")
    assert long.locator(".text.long").count() == 0


def test_all_turns_of_a_conversation_are_shown_and_long_ones_collapsed(views: Mapping[str, Page]) -> None:
    write = views["write"]
    write.look(width=1280, scheme="light", language="en")
    turns = write.page.locator(".turn")
    assert turns.locator(".role").all_inner_texts() == ["User", "Assistant", "User"]
    long = turns.nth(1)
    height = long.bounding_box()["height"]
    long.get_by_role("button", name="Show all").click()
    assert long.bounding_box()["height"] > height
    long.get_by_role("button", name="Show less").click()
    assert long.bounding_box()["height"] == height


def test_both_languages_have_the_same_words(views: Mapping[str, Page]) -> None:
    shapes = views["admin"].page.evaluate(
        """async () => {
        const { TEXTS } = await import("/static/texts.js");
        const shape = (value) => typeof value === "function" ? `function of ${value.length}` :
          Array.isArray(value) ? value.map(shape) : typeof value === "object" ?
            Object.fromEntries(Object.entries(value).map(([key, each]) => [key, shape(each)])) : typeof value;
        return [shape(TEXTS.en), shape(TEXTS.zh), Object.keys(TEXTS)];
      }"""
    )
    assert shapes[0] == shapes[1] and shapes[2] == ["en", "zh"]


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The source of axe-core."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("needs npm (apt-get install npm), which fetches axe-core")
    folder = tmp_path_factory.mktemp("axe")
    command = [npm, "install", "--prefix", str(folder), "--ignore-scripts", "--no-audit", "--no-fund", AXE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=scaled(60), check=False)
    except subprocess.TimeoutExpired:
        pytest.skip("npm does not answer, so axe-core is missing")
    if done.returncode:
        pytest.skip(f"npm can't fetch axe-core: {done.stderr.strip()[-300:]}")
    return (folder / "node_modules/axe-core/axe.min.js").read_text(encoding="utf-8")


def test_axe_finds_nothing(views: Mapping[str, Page], axe: str) -> None:
    for name, view in views.items():
        view.page.evaluate(axe)
        for width, scheme, language in LOOKS:
            view.look(width=width, scheme=scheme, language=language)
            if name == "compare":  # beside the keys
                view.press("?")
            found = view.page.evaluate(
                """async () => (await axe.run()).violations.map(
                ({id, nodes}) => `${id}: ${nodes.map(({html, failureSummary}) => html + failureSummary).join("; ")}`)"""
            )
            view.press("Escape")
            assert found == [], (name, width, scheme, language)
    unnamed = views["nothing"].page.evaluate(
        """async () => {
        document.getElementById("task").append(document.createElement("input"));
        return (await axe.run()).violations.map(({id}) => id);
      }"""
    )
    assert unnamed == ["label"]  # so it does look


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
