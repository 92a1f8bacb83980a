"""A service in this process, and people at its page in Chromium."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from sqlalchemy import select

from jobs.services.labelling import people, work
from jobs.services.labelling.answers import Judgement
from jobs.services.labelling.items.adding import Wanted, add
from jobs.services.labelling.items.sources import Candidate
from jobs.services.labelling.store import Store
from jobs.services.labelling.tables import items, judgements
from jobs.services.labelling.web.app import Settings, create_app
from tests.deadlines import scaled
from tests.unit.jobs.services.labelling.filled import person
from tests.unit.jobs.services.labelling.running import free_port

RULES = work.Rules(gold_share=0.0, num_reviews=3)
Task = tuple[str, str, list[str]]


def store_with(folder: Path, *tasks: Task) -> Store:
    """Tasks (kind, prompt, replies), in this order."""
    store = Store(str(folder / "labels.db"))
    put(store, *tasks)
    return store


def put(store: Store, *tasks: Task, first: float = 0.0) -> None:
    """Adds tasks; `first` is the priority of the first one. Lines of --- separate the turns of a prompt."""
    for number, (kind, prompt, replies) in enumerate(tasks):
        found = Candidate(
            f"{kind}-{number}",
            [
                {"role": ("user", "assistant")[turn % 2], "content": text}
                for turn, text in enumerate(prompt.split("\n---\n"))
            ],
            [],
            [{"reply": text, "source": {}} for text in replies],
            {},
        )
        add(store, [found], Wanted(kind, overlap=1, priority=first - number), batch="test")


def put_review(store: Store, kind: str, prompt: str, text: str, *, num_reviews: int, priority: float) -> None:
    """A text of bob that waits for reviews. The store has nothing else to do for him."""
    put(store, (kind, prompt, []), first=priority)
    who = person(store, "bob")
    with store.writing() as connection:
        task = work.next_task(connection, who, RULES)
        assert task is not None and task.kind == kind
        body = {"id": "written-1", "showing": task.id, "seconds": 9.0, "answer": {"kind": kind, "text": text}}
        work.judge(connection, who, Judgement.model_validate(body), num_reviews=num_reviews)


def admin_of(store: Store) -> str:
    with store.writing() as connection:
        return people.new_admin(connection)


@contextmanager
def served(store: Store, guidelines: str = "", *, port: int | None = None) -> Iterator[str]:
    """The address of a service in a thread."""
    port = port or free_port()
    app = create_app(store, Settings(RULES, guidelines, rate=1000.0))
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + scaled(20)
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.started
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


class Page:
    """A person at the keyboard."""

    def __init__(self, browser: Any, link: str, **settings: Any) -> None:
        self.context = browser.new_context(
            **{"viewport": {"width": 1280, "height": 900}, "locale": "en-US", **settings}
        )
        self.context.set_default_timeout(1000 * scaled(15))
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._note)
        self.page.goto(link)

    def _note(self, line: Any) -> None:
        if line.type == "error":
            self.errors.append(line.text)

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def tab_to(self, name: str) -> None:
        """Presses Tab until what is called `name` has the focus."""
        for _ in range(100):
            self.press("Tab")
            if name == self.page.evaluate(
                "() => ((node) => node.ariaLabel ?? node.labels?.[0]?.textContent ?? node.textContent)"
                "(document.activeElement)"
            ):
                return
        raise AssertionError(f"Tab does not lead to {name!r}")

    def shows(self, selector: str, text: str) -> None:
        self.page.locator(selector, has_text=text).first.wait_for()

    def pressed(self) -> list[str]:
        """The chosen buttons, in the order of the page."""
        found: list[str] = self.page.locator("[aria-pressed=true]").all_inner_texts()
        return found

    def reply_at(self, place: int) -> str:
        return str(self.page.locator("article .text").nth(place).inner_text())

    def look(self, *, width: int, scheme: str, language: str) -> None:
        self.page.set_viewport_size({"width": width, "height": 800})
        self.page.emulate_media(color_scheme=scheme)
        if not self.page.evaluate("document.documentElement.lang").startswith(language):
            self.page.locator("#language").click()


def answers(store: Store) -> list[tuple[str, Mapping[str, Any], bool]]:
    """(kind, answer, whether it is undone) in the order in which they were stored."""
    with store.reading() as connection:
        rows = connection.execute(
            select(items.c.kind, judgements.c.answer, judgements.c.undone_at).join(items).order_by(judgements.c.seq)
        ).all()
    return [(kind, answer, undone is not None) for kind, answer, undone in rows]
