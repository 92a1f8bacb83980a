"""What was judged reaches the project's own readers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.services.labelling import work
from jobs.services.labelling.agreement.copies import Voters
from jobs.services.labelling.agreement.merging import Electorate, weight
from jobs.services.labelling.agreement.quality import figures, lines, report
from jobs.services.labelling.answers import Judgement
from jobs.services.labelling.exporting import export
from jobs.services.labelling.items.adding import Wanted, add
from jobs.services.labelling.items.sources import from_file
from jobs.services.labelling.shapes.judged import Judged, judges_of
from jobs.services.labelling.shapes.own import preference_of
from jobs.services.labelling.store import Store
from orchestrator.data.kinds import KINDS
from orchestrator.data.streams import Stream
from orchestrator.errors import ConfigError, DataError
from tests.unit.jobs.services.labelling.filled import candidate, fill, filled, person

RULES = work.Rules(gold_share=0.0)


def judged(store: Store, name: str, answers: Sequence[Any], rules: work.Rules = RULES) -> None:
    """One person's answers, by reply and not by place, to the tasks in their order."""
    who = person(store, name)
    for number, wanted in enumerate(answers):
        with store.writing() as connection:
            task = work.next_task(connection, who, rules)
            assert task is not None
            answer = dict(wanted(task) if callable(wanted) else wanted)
            if answer["kind"] == "rank":
                answer["ranks"] = [answer["ranks"][index] for index in task.order]
            if answer["kind"] == "compare" and task.order == [1, 0]:
                answer["preference"] = -answer["preference"]
            body = {"id": f"answer-{number}", "showing": task.id, "seconds": 2.0, "answer": answer}
            work.judge(connection, who, Judgement.model_validate(body))


def rank(*ranks: int | None) -> dict[str, Any]:
    return {"kind": "rank", "ranks": list(ranks)}


def read(path: Path, kind: str) -> list[Any]:
    stream: Stream[Any] = Stream(KINDS[kind], path)
    found = list(stream)
    stream.report()
    return found


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rankings_are_preferences(tmp_path: Path) -> None:
    store = filled(tmp_path, num=3)
    judged(store, "ann", [rank(2, 1, 3, None), rank(1, 2, 2, None), rank(1, 1, 1, 1)])
    report = export(store, tmp_path / "out.jsonl", "rankings")
    assert (report.num_items, report.num_rows, dict(report.left_out)) == (3, 3, {"without a preference": 1})
    found = [(record.id, list(record.replies)) for record in read(tmp_path / "out.jsonl", "preferences")]
    assert found == [
        ("prompt-0", ["answer 1 to 0", "answer 0 to 0", "answer 2 to 0"]),
        ("prompt-1", ["answer 0 to 1", "answer 1 to 1"]),  # a tie makes a row per pair
        ("prompt-1", ["answer 0 to 1", "answer 2 to 1"]),
    ]
    row = rows(tmp_path / "out.jsonl")[0]
    assert row["people"] == {"judgements": 1, "agreement": 1.0}
    assert row["source"]["run"] == "my-run" and row["source"]["sampling"] == {"temperature": 0.7}
    assert [each["sample_index"] for each in row["source"]["replies"]] == [1, 0, 2]


def test_several_rankings_of_an_item_are_merged(tmp_path: Path) -> None:
    store = filled(tmp_path, num=1, overlap=3)
    for name, answer in (("ann", rank(1, 2, 3, 4)), ("bob", rank(1, 2, 4, 3)), ("cid", rank(2, 1, 3, 4))):
        judged(store, name, [answer])
    export(store, tmp_path / "out.jsonl", "rankings")
    (record,) = read(tmp_path / "out.jsonl", "preferences")
    assert [reply[7] for reply in record.replies] == ["0", "1", "2", "3"]
    people = rows(tmp_path / "out.jsonl")[0]["people"]
    assert people["judgements"] == 3 and 0.8 < people["agreement"] < 1


def test_comparisons_carry_their_strength_as_margin(tmp_path: Path) -> None:
    store = filled(tmp_path, num=2, kind="compare", num_replies=2)
    judged(store, "ann", [{"kind": "compare", "preference": -1}, {"kind": "compare", "preference": 3}])
    export(store, tmp_path / "out.jsonl", "rankings")
    found = read(tmp_path / "out.jsonl", "preferences")
    assert [(list(record.replies), record.scores) for record in found] == [
        (["answer 0 to 0", "answer 1 to 0"], (1.0, 0.0)),
        (["answer 1 to 1", "answer 0 to 1"], (3.0, 0.0)),
    ]


def test_ratings_are_scores_and_texts_are_demonstrations(tmp_path: Path) -> None:
    store = filled(tmp_path, num=1, kind="rate", num_replies=2, overlap=2)
    judged(
        store, "ann", [{"kind": "rate", "rating": 5, "flags": []}, {"kind": "rate", "rating": None, "flags": ["spam"]}]
    )
    judged(store, "bob", [{"kind": "rate", "rating": 2, "flags": ["rude"]}])
    report = export(store, tmp_path / "scores.jsonl", "scores")
    assert dict(report.left_out) == {"only flagged": 1}
    (record,) = read(tmp_path / "scores.jsonl", "scores")
    assert (record.reply, record.score) == ("answer 0 to 0", 3.5)
    assert rows(tmp_path / "scores.jsonl")[0]["people"]["flags"] == {"rude": 1}
    add(store, [candidate(9)], Wanted("write", priority=1), batch="x")
    judged(store, "cid", [{"kind": "write", "text": "Mine.\n"}])
    export(store, tmp_path / "texts.jsonl", "demonstrations")
    (text,) = read(tmp_path / "texts.jsonl", "demonstrations")
    assert [message.content for message in text.messages] == ["Question 9?", "Mine.\n"]


def test_every_judgement_keeps_who_when_how_long_what_and_from_where(tmp_path: Path) -> None:
    store = filled(tmp_path, num=1)
    judged(store, "ann", [rank(1, 2, 3, 4)])
    export(store, tmp_path / "all.jsonl", "judgements")
    (row,) = rows(tmp_path / "all.jsonl")
    assert (row["person"], row["seconds"], row["undone_at"], row["gold"]) == ("ann", 2.0, None, None)
    assert row["shown_at"] <= row["made_at"] and sorted(row["order"]) == [0, 1, 2, 3]
    assert row["answer"]["ranks"] == [1, 2, 3, 4] and row["replies"][2]["source"] == {"sample_index": 2, "version": 3}


def test_an_export_is_whole_or_not_there(tmp_path: Path) -> None:
    store = filled(tmp_path, num=1)
    with pytest.raises(DataError, match="no judgements that make rankings"):
        export(store, tmp_path / "out.jsonl", "rankings")
    assert not (tmp_path / "out.jsonl").exists()
    with pytest.raises(ConfigError, match="rankings, scores, demonstrations"):
        export(store, tmp_path / "out.jsonl", "nonsense")


def test_an_export_is_judged_again_as_it_is(tmp_path: Path) -> None:
    """From a file to people to a file: the same prompts, replies and tools."""
    store = filled(tmp_path, num=3)
    judged(store, "ann", [rank(2, 1, 3, 4)] * 3)
    export(store, tmp_path / "out.jsonl", "rankings")
    (tmp_path / "second").mkdir()
    second = Store(str(tmp_path / "second" / "labels.db"))
    added = add(second, from_file(tmp_path / "out.jsonl", "auto", None), Wanted("rank", overlap_share=0), batch="out")
    assert (added.num_new, added.num_known, added.num_unfit) == (3, 0, 0)
    judged(second, "bob", [rank(1, 2, 3, 4)] * 3)
    export(second, tmp_path / "again.jsonl", "rankings")
    assert read(tmp_path / "again.jsonl", "preferences") == read(tmp_path / "out.jsonl", "preferences")


def test_gold_items_measure_people_and_are_not_exported(tmp_path: Path) -> None:
    store = filled(tmp_path, num=1)
    fill(store, num=30, gold=True, first=100)
    always_gold = work.Rules(gold_share=1.0)
    judged(store, "ann", [rank(1, 2, 3, 4)] * 30 + [rank(1, 2, 3, 4)], always_gold)
    judged(store, "bob", [rank(4, 3, 2, 1)] * 30, always_gold)
    ann, bob = ({figure.name: figure for figure in _figures(store)}[name] for name in ("ann", "bob"))
    assert (ann.num, ann.with_gold, ann.spam, ann.seconds) == (31, 1.0, 0.0, 2.0)
    assert (bob.with_gold, bob.spam) == (-1.0, 1.0)
    export(store, tmp_path / "out.jsonl", "rankings")
    assert [row["id"] for row in rows(tmp_path / "out.jsonl")] == ["prompt-0"]
    with store.reading() as connection:
        *table, alpha = lines(connection)
        found = report(connection)
    assert [line.split()[0] for line in table] == ["name", "ann", "bob"]
    assert alpha == "Krippendorff's alpha, rank: -0.99 (30 items of several people)"
    assert json.loads(json.dumps(found)) == found
    assert [(each["name"], each["paused"], each["revoked"]) for each in found["people"]] == [
        ("ann", False, False),
        ("bob", False, False),
    ]


def _figures(store: Store) -> Any:
    with store.reading() as connection:
        return figures(connection)


def test_habits_of_place_are_seen(tmp_path: Path) -> None:
    store = filled(tmp_path, num=20)
    judged(store, "ann", [lambda task: rank(*[task.order.index(reply) + 1 for reply in range(4)])] * 20)
    (ann,) = _figures(store)
    assert ann.first_share == 1.0


@pytest.mark.parametrize("suffix", ["", "-wal", "-shm", "-journal", ".lock"])
def test_a_file_of_the_store_is_not_written_over(tmp_path: Path, suffix: str) -> None:
    store = filled(tmp_path, num=1)
    judged(store, "ann", [rank(1, 2, 3, 4)])
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "alias.db").symlink_to(tmp_path / "labels.db")
    by_link = Store(str(tmp_path / "alias.db"))
    for opened in (store, by_link):
        for out in (tmp_path / f"labels.db{suffix}", tmp_path / "link" / ".." / tmp_path.name / f"labels.db{suffix}"):
            with pytest.raises(ConfigError, match="is a file of the store .* itself; give another file"):
                opened.back_up(out)
            with pytest.raises(ConfigError, match="is a file of the store .* itself; give another file"):
                export(opened, out, "rankings")
    with pytest.raises(ConfigError, match="itself"):
        by_link.back_up(tmp_path / f"alias.db{suffix}")
    export(store, tmp_path / "labels.db.jsonl", "rankings")
    store.back_up(tmp_path / "copy.db")
    assert Store(str(tmp_path / "copy.db")).file != store.file
    assert export(store, tmp_path / "again.jsonl", "rankings").num_rows == 1


def test_the_strength_of_a_comparison_has_the_side_of_its_order_in_all_shapes(tmp_path: Path) -> None:
    given = {
        "ann": [-1, -1, -3],
        "bob": [-1, -2, 1],
        "cid": [3, 1, -2],
    }
    store = filled(tmp_path, num=3, kind="compare", num_replies=2, overlap=3)
    for name, answers in given.items():
        judged(store, name, [{"kind": "compare", "preference": each} for each in answers])
    for shape in ("rankings", "hh-rlhf", "helpsteer3"):
        export(store, tmp_path / shape, shape)
    with store.reading() as connection:
        weights = judges_of(connection).weights
    ann, bob, cid = weights.values()
    total = ann + bob + cid
    expected = [
        max(0.0, ann + bob - 3 * cid) / total,  # without weights the second would be better by a third
        (ann + 2 * bob - cid) / total,
        (3 * ann - bob + 2 * cid) / total,
    ]
    for shape in ("rankings", "hh-rlhf"):
        found = [row["margin"] for row in rows(tmp_path / shape)]
        assert found == pytest.approx(expected, abs=1e-4), shape
    found = [row["overall_preference"] for row in rows(tmp_path / "helpsteer3")]
    assert found == pytest.approx([-each for each in expected], abs=1e-4)


def test_copies_are_one_voter_of_a_strength_and_who_guesses_none() -> None:
    given = [SimpleNamespace(person=n, answer={"kind": "compare", "preference": each}) for n, each in
             enumerate((-3, -1, 1, 3))]  # fmt: skip
    judges = Electorate(Voters({}, {0: 0, 1: 0}), {0: 0.9, 2: 0.7, 3: 0.5})
    item: Any = SimpleNamespace(id=1, kind="compare")
    one, other = weight(0.9), weight(0.7)
    assert preference_of(Judged(item, given, judges)) == pytest.approx((other - 2 * one) / (one + other), abs=1e-4)
    assert preference_of(Judged(item, given[3:], judges)) == 0.0
    alike = Electorate(Voters({}, {}), dict.fromkeys(range(4), 0.8))
    assert preference_of(Judged(item, given[1:], alike)) == 1.0
    two_by_one = [SimpleNamespace(person=n, answer={"kind": "compare", "preference": (-1, -1, 3)[n]}) for n in range(3)]
    assert preference_of(Judged(item, two_by_one, alike)) == 0.0  # the order has the first before, the mean does not
