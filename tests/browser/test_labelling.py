"""The labelling page in Chromium, by keyboard alone: each kind of task, in both languages, and what gets in the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from jobs.services.labelling.store import Store
from tests.browser.opened import Page, admin_of, answers, put, put_review, served, store_with
from tests.unit.jobs.services.labelling.filled import fill, invited
from tests.unit.jobs.services.labelling.running import free_port

pytestmark = pytest.mark.heavy
EVIL = "<b>bold</b><script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">"
WORDS = {
    "en-US": {
        "title": "Labelling", "incomplete": "Give every reply a rank", "done": "1 done", "empty": "Nothing is left",
        "keys": "undo the last answer", "topic": "Topic", "prompt": "Prompt to review",
    },
    "zh-CN": {
        "title": "标注", "incomplete": "请为每条回复排名", "done": "已完成 1 项", "empty": "目前没有需要你做的任务",
        "keys": "撤销上一个答案", "topic": "主题", "prompt": "待审核的提示",
    },
}  # fmt: skip


@pytest.mark.parametrize("locale", WORDS)
def test_a_person_judges_by_keyboard(browser: Any, tmp_path: Path, locale: str) -> None:
    store = Store(str(tmp_path / "labels.db"))
    put_review(store, "prompt", "Cooking", "How long do eggs boil?", num_reviews=3, priority=-10.0)
    put(
        store,
        ("rank", "Rank these.", ["one", "two", "three"]),
        ("rank", "Skip these.", ["four", "five"]),
        ("compare", "Compare these.", ["six", "seven"]),
        ("rate", "Rate this.", [EVIL]),
        ("write", "Write.", []),
        ("prompt", "Weather", []),
    )
    words = WORDS[locale]
    with served(store) as address:
        ann = Page(browser, f"{address}/#{invited(store, 'ann')}", locale=locale)
        ann.shows("main", "Rank these.")
        assert "#" not in ann.page.url  # the token is not on the screen
        best = ann.reply_at(0)
        ann.press("1", "2", "Enter")
        ann.shows("#notice", words["incomplete"])
        ann.page.reload()
        ann.shows("main", "Rank these.")
        assert ann.pressed() == ["1", "2"]
        ann.press("ArrowDown", "ArrowDown", "2")  # a tie
        assert ann.pressed() == ["1", "2", "2"]
        ann.press("Enter")
        ann.shows("#progress", words["done"])
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
        assert ann.reply_at(0) == EVIL and ann.page.title() == words["title"]
        ann.press("4", "Tab", "Tab", "Space", "Enter")
        ann.shows("main", "Write.")
        ann.page.keyboard.type("Line 1? u\n2 done")
        ann.press("Backspace", "Control+Enter")
        ann.shows("main", "Weather")
        ann.shows(".turn .role", words["topic"])
        ann.page.keyboard.type("Will it rain?")
        ann.page.reload()
        ann.shows("main", "Weather")
        ann.press("End")
        ann.page.keyboard.type(" 会下雨吗？")
        ann.press("Control+Enter")
        ann.shows("article .role", words["prompt"])
        assert ann.reply_at(0) == "How long do eggs boil?"
        ann.press("5", "s", "Enter")
        ann.shows("main", words["empty"])
        ann.press("?")
        ann.shows("dialog[open]", words["keys"])
        assert ann.errors == []
    _, *found = answers(store)
    assert [(kind, undone) for kind, _, undone in found] == [
        ("rank", True), ("rank", False), ("compare", False), ("rate", False), ("write", False), ("prompt", False),
        ("review", False),
    ]  # fmt: skip
    rank = found[1][1]["ranks"]
    assert sorted(rank) == [1, 1, 2] and rank[["one", "two", "three"].index(best)] == 2
    assert found[2][1]["preference"] == (2 if second == "seven" else -2)
    assert found[3][1]["rating"] == 4 and len(found[3][1]["flags"]) == 1
    assert found[4][1]["text"] == "Line 1? u\n2 don"
    assert found[5][1]["text"] == "Will it rain? 会下雨吗？"
    assert (found[6][1]["rating"], found[6][1]["flags"]) == (5, ["spam"])


def test_answers_survive_a_dead_server_and_a_reload(browser: Any, tmp_path: Path) -> None:
    store = store_with(tmp_path, *[("compare", f"Question {number}.", ["a", "b"]) for number in range(3)])
    port = free_port()
    link = f"http://127.0.0.1:{port}/#{invited(store, 'ann')}"
    with served(store, port=port):
        ann = Page(browser, link)
        ann.shows("main", "Question 0.")
    ann.press("3", "Enter")
    ann.shows("#notice", "1 of your answers are kept in this browser")
    with served(store, port=port):
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


def test_the_page_says_that_the_disk_is_full_and_sends_again(browser: Any, tmp_path: Path) -> None:
    store = store_with(tmp_path, ("write", "Write.", []), ("rate", "Rate this.", ["one"]))
    with served(store) as address:
        ann = Page(browser, f"{address}/#{invited(store, 'ann')}")
        ann.shows("main", "Write.")

        def limited(connection: Any) -> None:
            connection.exec_driver_sql("PRAGMA max_page_count=1")  # no new page

        event.listen(store.engine, "begin", limited)
        ann.page.keyboard.insert_text("long " * 5000)
        ann.press("Control+Enter")
        ann.shows("#notice", "The server has no room left. 1 of your answers are kept in this browser")
        assert answers(store) == []
        ann.page.reload()  # what is unsent stays
        ann.shows("#notice", "The server has no room left. 1 of your answers are kept in this browser")
        event.remove(store.engine, "begin", limited)
        with store.writing() as connection:
            connection.exec_driver_sql("PRAGMA max_page_count=1000000")
        store.engine.dispose()  # the limit is of a connection
        ann.shows("main", "Rate this.")
        assert ann.page.locator("#notice").is_hidden()
    assert [answer["text"] for _, answer, _ in answers(store)] == ["long " * 5000]


def test_an_admin_sees_and_changes_everything_by_keyboard(browser: Any, tmp_path: Path) -> None:
    store = store_with(tmp_path, ("rank", "Rank these.", ["one", "two"]))
    fill(store, num=2, kind="write", num_replies=0)
    invited(store, "ann")
    with served(store) as address:
        admin = Page(browser, f"{address}/#{admin_of(store)}", accept_downloads=True)
        admin.shows("h2", "Batches")
        admin.tab_to("Name of a new labeller")
        admin.page.keyboard.type("بسام 王")
        admin.press("Enter")
        admin.shows("[role=status]", "The link of بسام 王, shown only now")
        link = admin.page.locator("#invited-link").input_value()
        assert link.startswith(f"{address}/#") and admin.page.evaluate("document.activeElement.id") == "invited-link"
        bassam = Page(browser, link)
        bassam.shows("main", "Rank these.")
        bassam.press("1", "1", "Enter")
        bassam.shows("main", "Question 0?")
        admin.page.reload()
        admin.shows("tbody th", "بسام 王")
        assert admin.page.locator("#invited-link").count() == 0
        admin.tab_to("Pause: بسام 王")
        admin.press("Enter")
        admin.shows("td", "paused")
        assert admin.page.evaluate("document.activeElement.textContent") == "Resume"
        admin.press("Enter")
        admin.page.locator("td", has_text="paused").wait_for(state="detached")
        admin.tab_to("Revoke: بسام 王")
        admin.press("Enter")
        admin.shows("button", "Really revoke?")
        admin.press("Enter")
        admin.shows("td", "link ended")
        bassam.page.keyboard.type("too late")
        bassam.press("Control+Enter")
        bassam.shows("#notice", "This link is not valid, or no longer.")
        admin.tab_to("Finish: test")
        admin.press("Enter", "Enter")
        admin.shows("button", "Reopen")
        admin.tab_to("judgements")
        with admin.page.expect_download() as download:
            admin.press("Enter")
        assert '"person": "بسام 王"' in Path(download.value.path()).read_text(encoding="utf-8")
        admin.tab_to("scores")
        admin.press("Enter")
        admin.shows("#notice", "This was not done: nothing was judged that this file can hold.")
        assert [error for error in admin.errors if "422" not in error] == []
    assert [kind for kind, _, _ in answers(store)] == ["rank"]
