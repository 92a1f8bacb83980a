"""Nothing that a person has written gets lost: not by Undo or Skip, not when a task goes to somebody else, not when an
answer or a link is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import update

from jobs.services.labelling import people, work
from jobs.services.labelling.answers import Judgement
from jobs.services.labelling.store import Store
from jobs.services.labelling.tables import showings
from tests.browser.opened import RULES, Page, answers, served, store_with
from tests.unit.jobs.services.labelling.filled import invited, person

pytestmark = pytest.mark.heavy


def written(page: Page) -> str:
    return str(page.page.locator("#task textarea").input_value())


def kept(page: Page) -> list[str]:
    """The texts that the page shows beside the task."""
    if page.page.locator("#kept").is_hidden():
        return []
    areas = page.page.locator("#kept textarea")
    return [str(areas.nth(place).input_value()) for place in range(areas.count())]


def take_over(store: Store, text: str) -> None:
    """All leases end, and bob answers the first task."""
    bob = person(store, "bob")
    with store.writing() as connection:
        connection.execute(update(showings).values(expires_at=0.0))
        task = work.next_task(connection, bob, RULES)
        assert task is not None
        body = {"id": "of-bob-1", "showing": task.id, "seconds": 1.0, "answer": {"kind": "write", "text": text}}
        work.judge(connection, bob, Judgement.model_validate(body))


def test_undo_keeps_the_text_that_is_being_written(browser: Any, tmp_path: Path) -> None:
    store = store_with(tmp_path, ("write", "Task 0.", []), ("write", "Task 1.", []), ("write", "Task 2.", []))
    with served(store) as address:
        ann = Page(browser, f"{address}/#{invited(store, 'ann')}")
        for number in range(2):
            ann.shows("main", f"Task {number}.")
            ann.page.keyboard.type(f"Reply {number}")
            ann.press("Control+Enter")
        ann.shows("main", "Task 2.")
        ann.page.keyboard.type("Half of reply 2")
        ann.page.locator("#undo").click()
        ann.shows("main", "Task 1.")
        assert written(ann) == "Reply 1" and kept(ann) == ["Half of reply 2"]
        ann.page.locator("#undo").click()
        ann.shows("main", "Task 0.")
        assert written(ann) == "Reply 0" and kept(ann) == ["Half of reply 2", "Reply 1"]
        ann.page.reload()
        ann.shows("main", "Task 0.")
        assert kept(ann) == ["Half of reply 2", "Reply 1"]
        for text in ("Reply 0", "Reply 1", "Half of reply 2"):  # each is there again with its task
            ann.page.wait_for_function("(text) => document.querySelector('#task textarea')?.value === text", arg=text)
            assert text not in kept(ann)
            ann.page.locator("#task textarea").focus()
            ann.press("Control+Enter")
        ann.shows("main", "Nothing is left")
        assert kept(ann) == [] and ann.errors == []
    assert [answer["text"] for _, answer, is_undone in answers(store) if not is_undone] == [
        "Reply 0", "Reply 1", "Half of reply 2",
    ]  # fmt: skip


def test_a_skipped_task_can_be_opened_again_with_what_was_entered(browser: Any, tmp_path: Path) -> None:
    store = store_with(tmp_path, ("write", "Task 0.", []), ("rate", "Task 1.", ["one"]))
    with served(store) as address:
        ann = Page(browser, f"{address}/#{invited(store, 'ann')}")
        ann.shows("main", "Task 0.")
        ann.page.keyboard.type("Reply 0")
        ann.page.locator("#skip").click()
        ann.shows("main", "Task 1.")
        ann.shows("#progress", "0 done, 1 left")
        ann.press("u")
        ann.shows("main", "Task 0.")
        assert written(ann) == "Reply 0"
        ann.press("Control+Enter")
        ann.shows("main", "Task 1.")
        ann.shows("#progress", "1 done, 1 left")


def test_a_text_whose_task_went_to_somebody_else_is_shown_to_copy_and_discard(browser: Any, tmp_path: Path) -> None:
    store = store_with(tmp_path, ("write", "Task 0.", []))
    with served(store) as address:
        ann = Page(browser, f"{address}/#{invited(store, 'ann')}", permissions=["clipboard-read", "clipboard-write"])
        ann.shows("main", "Task 0.")
        ann.page.keyboard.type("Mine")
        take_over(store, "Theirs")
        ann.page.reload()
        ann.shows("#notice", "Your task went to somebody else.")
        ann.shows("main", "Nothing is left")
        ann.page.reload()
        ann.shows("#kept summary", "A text of yours was not sent")
        ann.page.locator("#kept summary").click()
        ann.shows("#kept .hint", "Task 0.")
        assert kept(ann) == ["Mine"]
        ann.page.get_by_role("button", name="Copy").click()
        ann.shows("#kept button", "Copied")
        assert ann.page.evaluate("navigator.clipboard.readText()") == "Mine"
        ann.page.get_by_role("button", name="Discard").click()
        assert kept(ann) == ["Mine"]
        ann.page.get_by_role("button", name="Really discard?").click()
        assert kept(ann) == []
        ann.page.reload()
        ann.shows("main", "Nothing is left")
        assert kept(ann) == [] and ann.errors == []


def test_a_text_that_was_refused_is_shown_with_the_reason_in_both_languages(browser: Any, tmp_path: Path) -> None:
    store = store_with(tmp_path, ("write", "Task 0.", []), ("write", "Task 1.", []))
    token = invited(store, "ann")
    with served(store) as address:
        ann = Page(browser, f"{address}/#{token}")
        ann.shows("main", "Task 0.")
        ann.page.keyboard.type("First")
        with httpx.Client(base_url=address, headers={"Authorization": f"Bearer {token}"}) as elsewhere:
            showing = elsewhere.post("/api/next", json={}).json()["task"]["showing"]
            assert elsewhere.post("/api/skip", json={"showing": showing}).status_code == 200
        ann.press("Control+Enter")
        ann.shows("main", "Task 1.")
        ann.shows("#notice", "Not accepted: this task was answered or skipped already.")
        ann.page.reload()
        ann.shows("main", "Task 1.")
        ann.page.locator("#kept summary").click()
        ann.shows("#kept p", "Not accepted: this task was answered or skipped already.")
        assert kept(ann) == ["First"]
        ann.page.locator("#language").click()
        ann.shows("#kept p", "未被接受：此任务已有答案或已被跳过。")
        # Keys in this text are not meant for the task.
        ann.page.locator("#kept textarea").focus()
        ann.press("Control+Enter")
        assert ann.page.locator("#notice").is_hidden()


def test_a_link_that_has_ended_is_said_beside_a_draft(browser: Any, tmp_path: Path) -> None:
    store = store_with(tmp_path, ("write", "Task 0.", []))
    with served(store) as address:
        ann = Page(browser, f"{address}/#{invited(store, 'ann')}")
        ann.shows("main", "Task 0.")
        ann.page.keyboard.type("Mine")
        with store.writing() as connection:
            people.revoke(connection, "ann")
        ann.page.reload()
        ann.shows("#notice", "This link is not valid, or no longer.")
        assert written(ann) == "Mine"
        ann.page.goto(f"{address}/#{invited(store, 'ann')}")
        ann.page.reload()  # the address differs in what follows the # alone
        ann.page.locator("#notice").wait_for(state="hidden")
        assert written(ann) == "Mine"


def test_a_draft_follows_its_replies_into_another_order(browser: Any, tmp_path: Path) -> None:
    with served(store_with(tmp_path)) as address:
        page = Page(browser, f"{address}/").page
        found = page.evaluate(
            """async () => {
            const { Drafts } = await import("/static/drafts.js");
            const messages = [{ role: "user", content: "Why?" }];
            const task = (showing, kind, ...replies) => ({ showing, kind, messages, replies });
            const drafts = new Drafts("ann");
            drafts.keep(task("1", "rank", "a", "b", "c"), { ranks: [1, 2, null] }, 7);
            drafts.keep(task("2", "compare", "a", "b"), { preference: -2 }, 0);
            drafts.keep(task("3", "rate", "a"), { rating: 4, flags: ["spam"] }, 0);
            for (let number = 0; number < 17; number += 1) drafts.keep(task(`x${number}`, "prompt"), { text: "" }, 0);
            return [
              new Drafts("ann").of(task("4", "rank", "c", "a", "b")), drafts.of(task("5", "compare", "b", "a")).draft,
              drafts.of(task("6", "rate", "a")).draft, new Drafts("bob").of(task("1", "rank", "a", "b", "c")),
              drafts.of(task("7", "rank", "a", "b", "d")),
            ];
          }"""
        )
    assert found == [
        {"draft": {"ranks": [None, 1, 2]}, "seconds": 7}, {"preference": 2}, {"rating": 4, "flags": ["spam"]}, None,
        None,
    ]  # fmt: skip
