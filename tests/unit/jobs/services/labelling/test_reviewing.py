"""Texts that people write, and reviews of them: who gets them, what is accepted, what is exported."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, select

from jobs.services.labelling import work
from jobs.services.labelling.answers import Judgement
from jobs.services.labelling.exporting import export
from jobs.services.labelling.items.adding import TOPIC, Wanted, add
from jobs.services.labelling.items.sources import Candidate
from jobs.services.labelling.people import Person
from jobs.services.labelling.refusals import Unfit
from jobs.services.labelling.reviewing import acceptance, states
from jobs.services.labelling.store import Store
from jobs.services.labelling.tables import batches, items, members
from jobs.services.labelling.waiting.batches import counted, finish, listed
from orchestrator.data.kinds import KINDS
from orchestrator.data.streams import Stream
from orchestrator.errors import DataError
from tests.unit.jobs.services.labelling.filled import candidate, filled, person

RULES = work.Rules(gold_share=0.0)
GOOD = {"kind": "review", "rating": 4, "flags": []}
SPAM = {"kind": "review", "rating": None, "flags": ["spam"]}
FOREIGN = {"kind": "review", "rating": 2, "flags": ["wrong_language"]}
HARMFUL = {"kind": "review", "rating": 1, "flags": ["harmful"]}


class Team:
    """People who write and review in one store."""

    def __init__(self, store: Store, names: Iterable[str]) -> None:
        self.store = store
        self.people = {name: person(store, name) for name in names}
        self._num = 0

    def task(self, name: str) -> Any:
        with self.store.writing() as connection:
            return work.next_task(connection, self.people[name], RULES)

    def answer(self, name: str, answer: dict[str, Any], *, showing: str | None = None) -> str:
        """Answers the person's next task, which must be of this kind, or a showing. Returns the showing."""
        if showing is None:
            task = self.task(name)
            assert task.kind == answer["kind"]
            showing = task.id
        self._num += 1
        body = {"id": f"answer-{self._num}", "showing": showing, "seconds": 1.0, "answer": answer}
        with self.store.writing() as connection:
            work.judge(connection, self.people[name], Judgement.model_validate(body), num_reviews=3)
        return showing

    def undo(self, name: str, showing: str) -> None:
        with self.store.writing() as connection:
            work.undo(connection, self.people[name], showing, RULES)

    def states(self) -> dict[str, int]:
        with self.store.reading() as connection:
            return dict(states(connection))

    def counts(self) -> dict[str, tuple[int, int]]:
        """By kind: judgements that count, and missing ones."""
        with self.store.reading() as connection:
            return {row.name: (row.judgements, row.missing) for row in counted(connection, items.c.kind)}


@pytest.fixture
def team(tmp_path: Path) -> Team:
    """Four people, and one reply to write."""
    return Team(filled(tmp_path, num=1, kind="write", num_replies=0), ("ann", "bob", "cid", "dan"))


def write(text: str, kind: str = "write") -> dict[str, Any]:
    return {"kind": kind, "text": text}


@pytest.mark.parametrize(
    ("given", "accepted"),
    [
        ([GOOD, GOOD, GOOD], True),
        ([GOOD, GOOD, SPAM], True),
        ([GOOD, FOREIGN, SPAM], False),
        ([GOOD, SPAM, SPAM], False),
        ([HARMFUL, HARMFUL, HARMFUL], True),  # for others to filter by
    ],
)
def test_a_text_is_accepted_by_three_reviews_of_others(team: Team, given: list[dict[str, Any]], accepted: bool) -> None:
    team.answer("ann", write("Hello."))
    assert team.task("ann") is None  # nobody reviews what they wrote
    for number, (name, review) in enumerate(zip(("bob", "cid", "dan"), given, strict=True)):
        assert team.states() == {"waiting": 1, "accepted": 0, "rejected": 0}
        assert team.counts()["review"] == (number, 3 - number)
        team.answer(name, review)
    assert (acceptance(given) > 0.6) == accepted
    assert team.states() == {"waiting": 0, "accepted": int(accepted), "rejected": int(not accepted)}


def test_the_text_and_its_conversation_are_shown_and_nothing_of_who_wrote_it(team: Team) -> None:
    team.answer("ann", write("Hello."))
    task = team.task("bob")
    assert task.kind == "review" and task.replies == [{"reply": "Hello.", "source": {}}]
    assert task.messages == [{"role": "user", "content": "Question 0?"}]
    with team.store.reading() as connection:
        source = connection.scalars(select(items.c.source).where(items.c.kind == "review")).one()
    assert source == {"item": source["item"], "judgement": "answer-1", "person": "ann"}


def test_a_rejected_text_is_written_again_by_somebody_else_and_only_accepted_ones_are_exported(
    team: Team, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    team.answer("ann", write("Buy!"))
    with pytest.raises(DataError, match="1 waiting for reviews"):
        export(team.store, out, "demonstrations")
    for name in ("bob", "cid", "dan"):
        team.answer(name, SPAM)
    assert team.counts()["write"] == (0, 1)
    with pytest.raises(DataError, match="1 rejected by reviewers"):
        export(team.store, out, "demonstrations")
    assert team.task("ann") is None
    team.answer("bob", write("Hello."))
    for name, review in (("ann", GOOD), ("cid", HARMFUL), ("dan", SPAM)):
        team.answer(name, review)
    report = export(team.store, out, "demonstrations")
    assert (report.num_rows, dict(report.left_out)) == (1, {"rejected by reviewers": 1})
    row = json.loads(out.read_text(encoding="utf-8"))
    assert row["people"] == {"reviews": 3, "ratings": [4, 1], "flags": {"harmful": 1, "spam": 1}}
    (record,) = Stream[Any](KINDS["demonstrations"], out)
    assert [message.content for message in record.messages] == ["Question 0?", "Hello."]


def test_a_review_that_is_taken_back_reopens_the_decision(team: Team) -> None:
    team.answer("ann", write("Hello."))
    team.answer("bob", SPAM)
    team.answer("cid", SPAM)
    last = team.answer("dan", GOOD)
    assert team.states()["rejected"] == 1 and team.counts()["write"] == (0, 1)
    team.undo("dan", last)
    assert team.states()["waiting"] == 1 and team.counts()["write"] == (1, 0)
    assert team.task("dan").kind == "review"


@pytest.mark.parametrize("reviews", [[], [SPAM, SPAM, SPAM], [GOOD, GOOD, GOOD]])
def test_a_text_that_its_writer_takes_back_needs_no_reviews(team: Team, reviews: list[dict[str, Any]]) -> None:
    first = team.answer("ann", write("Helo."))
    for name, review in zip(("bob", "cid", "dan"), reviews, strict=False):
        team.answer(name, review)
    begun = None if reviews else team.task("bob").id
    team.undo("ann", first)
    assert team.states() == {"waiting": 0, "accepted": 0, "rejected": 0}
    assert team.counts() == {"write": (0, 1), "review": (len(reviews), 0)}
    if begun:
        team.answer("bob", GOOD, showing=begun)  # it changes nothing
    team.answer("ann", write("Hello."))
    assert team.states() == {"waiting": 1, "accepted": 0, "rejected": 0}
    assert team.counts()["write"] == (1, 0) and team.task("cid").replies[0]["reply"] == "Hello."


def test_a_review_has_a_rating_or_a_flag(team: Team) -> None:
    team.answer("ann", write("Hello."))
    with pytest.raises(Unfit, match="neither a rating nor a flag"):
        team.answer("bob", {"kind": "review", "rating": None, "flags": []})


def test_prompts_are_written_for_topics_and_as_the_next_message(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "labels.db"))
    topic = Candidate("t", [{"role": "user", "content": "Cooking"}], [], [], {})
    begun = candidate(7, num_replies=1)
    add(store, [topic, begun], Wanted("prompt"), batch="topics")
    ann = Team(store, ["ann"])
    assert ann.task("ann").messages == [{"role": TOPIC, "content": "Cooking"}]
    ann.answer("ann", write("How long do eggs boil?", "prompt"))
    assert [each["role"] for each in ann.task("ann").messages] == ["user", "assistant"]
    ann.answer("ann", write("And why?", "prompt"))
    # Without reviews, as for texts that were written before the service was started with --reviews.
    others = Team(store, ["bob"])
    assert [others.task("bob").kind] == ["review"]


@pytest.mark.parametrize("shape", ["demonstrations", "oasst", "argilla", "label-studio"])
def test_no_shape_has_a_text_that_waits_or_was_rejected(team: Team, tmp_path: Path, shape: str) -> None:
    out = tmp_path / "out.json"

    def left_out() -> dict[str, int]:
        found = export(team.store, out, shape).left_out
        return {reason: num for reason, num in found.items() if "tasks to" not in reason}

    add(team.store, [candidate(1, num_replies=2)], Wanted("write"), batch="x")
    team.answer("ann", write("Waits."))
    with pytest.raises(DataError, match="1 waiting for reviews"):
        export(team.store, out, shape)
    for name in ("bob", "cid", "dan"):
        team.answer(name, SPAM)
    with pytest.raises(DataError, match="1 rejected by reviewers"):
        export(team.store, out, shape)
    team.answer("bob", write("Accepted."))
    for name in ("ann", "cid", "dan"):
        team.answer(name, GOOD)
    team.answer("cid", write("Is new."))
    assert left_out() == {"rejected by reviewers": 1, "waiting for reviews": 1}
    text = out.read_text(encoding="utf-8")
    assert text.count("Accepted.") == 1 and "Waits." not in text and "Is new." not in text


def test_written_prompts_are_prompts(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "labels.db"))
    topic = Candidate("t", [{"role": "user", "content": "Cooking"}], [], [], {})
    add(store, [topic, candidate(7, num_replies=1)], Wanted("prompt", 2, 1.0), batch="topics")
    for name in ("ann", "bob"):
        _write_all(store, name)
    assert export(store, tmp_path / "out.jsonl", "prompts").num_rows == 4
    found = list(Stream[Any](KINDS["prompts"], tmp_path / "out.jsonl"))
    assert [[message.content for message in record.messages] for record in found] == [
        ["ann asks 0"], ["bob asks 0"],
        ["Question 7?", "answer 0 to 7", "ann asks 1"], ["Question 7?", "answer 0 to 7", "bob asks 1"],
    ]  # fmt: skip
    assert len({record.id for record in found}) == 4


def _write_all(store: Store, name: str) -> None:
    """Without reviews."""
    who: Person = person(store, name)
    for number in range(2):
        with store.writing() as connection:
            task = work.next_task(connection, who, RULES)
            assert task is not None
            body = {"id": f"answer-{number}", "showing": task.id, "seconds": 1.0}
            answer = write(f"{name} asks {number}", "prompt")
            work.judge(connection, who, Judgement.model_validate({**body, "answer": answer}))


def test_nothing_of_a_finished_batch_is_given_out(tmp_path: Path) -> None:
    store = filled(tmp_path, num=2)
    ann, bob = person(store, "ann"), person(store, "bob")
    with store.writing() as connection:
        begun = work.next_task(connection, ann, RULES)
        finish(connection, "test")
        finish(connection, "test")
        assert work.next_task(connection, bob, RULES) is None
        assert work.progress(connection, bob)["left"] == 0
        assert [(row.items, row.missing, row.finished) for row in listed(connection)] == [(2, 0, True)]
        kept = work.next_task(connection, ann, RULES)
        assert begun is not None and kept is not None and kept.id == begun.id
        finish(connection, "test", is_finished=False)
        assert work.next_task(connection, bob, RULES) is not None
        with pytest.raises(DataError, match="no item is of a batch 'tset'; there are: test"):
            finish(connection, "tset")


def test_an_item_of_a_finished_batch_that_another_batch_waits_for_is_given_out(tmp_path: Path) -> None:
    store = filled(tmp_path, num=2)
    ann, bob = person(store, "ann"), person(store, "bob")
    with store.writing() as connection:
        finish(connection, "test")
        connection.execute(insert(batches).values(name="again", opened_at=0.0))
        connection.execute(insert(members).values(batch="again", item=2))
        found = work.next_task(connection, ann, RULES)
        assert found is not None and found.item == 2
        finish(connection, "again")
        assert work.next_task(connection, bob, RULES) is None
