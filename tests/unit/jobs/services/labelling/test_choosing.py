"""Which prompts become items, what each item keeps of its choice, and what the arms were worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs.services.labelling.agreement.arms import arms_of, lines
from jobs.services.labelling.items.adding import Wanted, add, compared, key_of
from jobs.services.labelling.items.choosing import Asked, Asking, asked, choose_items
from jobs.services.labelling.store import Store
from orchestrator.errors import ConfigError, DataError
from orchestrator.schema import STATES
from orchestrator.training.acquisition import ACTIVE, CONTROL
from tests.unit.jobs.services.labelling.filled import candidate, client, invited, person
from tests.unit.jobs.services.labelling.test_exporting import judged

SURE, UNSURE = (2.0, 2.0), (2.0, -2.0)


def states(heads: Mapping[int, Sequence[float] | None], *, num_replies: int = 2, apart: bool = True) -> pa.Table:
    """By prompt what the heads say of its first reply; they give the others 0, 1, ... less. None: it can't be read.
    The states of a prompt are at its number if they are `apart`."""
    rows = [
        {
            "row": num_replies * number + place,
            "prompt_id": f"prompt-{number}",
            "heads": None if found is None else [score - place * (1 if score > 0 else -1) for score in found],
            "state": None if found is None else [float(apart * number), float(apart * number**2)],
            "error": None if found is not None else "too long",
        }
        for number, found in heads.items()
        for place in range(num_replies)
    ]
    return pa.Table.from_pylist(rows, STATES)


def arms(found: Asked) -> dict[str, str]:
    return {each.prompt_id: each.source["choice"]["arm"] for each in found.candidates}


def test_an_item_keeps_its_arm_and_why_and_the_scores_that_it_had() -> None:
    candidates = [candidate(number, num_replies=2) for number in range(6)]
    table = states({number: UNSURE if number == 3 else SURE for number in range(6)})
    found = choose_items(candidates, table, Asking("rank", 4, 0.5))
    assert list(arms(found).values()).count(CONTROL) == 2 and len(arms(found)) == 4
    assert "prompt-3" in arms(found)
    for each in found.candidates:
        choice = each.source["choice"]
        assert choice["information"] == pytest.approx(0.11 if each.prompt_id == "prompt-3" else 0.0, abs=0.01)
        assert each.source["run"] == "my-run"
        scores = [reply["source"]["score"] for reply in each.replies]
        assert scores == ([0.0, 0.0] if each.prompt_id == "prompt-3" else [2.0, 1.0])
        assert each.replies[0]["source"]["version"] == 3
    assert candidates[3].source.get("choice") is None, "the candidate itself is left alone"


def test_what_the_heads_disagree_about_is_asked() -> None:
    """Of 30 prompts 3 are uncertain; in 20 draws they are in the active arm unless the control arm has them."""
    candidates = [candidate(number, num_replies=2) for number in range(30)]
    table = states({number: UNSURE if number in (3, 11, 20) else SURE for number in range(30)}, apart=False)
    for seed in range(20):
        found = arms(choose_items(candidates, table, Asking("compare", 6, 0.5, seed)))
        assert {"prompt-3", "prompt-11", "prompt-20"} <= set(found)


def test_the_replies_of_an_item_are_those_that_people_compare() -> None:
    """A comparison shows the first and the last of the different replies, so the others do not count."""
    many = candidate(0, num_replies=4)
    table = states({0: SURE}, num_replies=4)
    (whole,) = choose_items([many], table, Asking("rank", 1)).candidates
    assert [reply["source"].get("score") for reply in whole.replies] == [2.0, 1.0, 0.0, -1.0]
    (pair,) = choose_items([many], table, Asking("compare", 1)).candidates
    assert [reply["source"].get("score") for reply in pair.replies] == [2.0, None, None, -1.0]


def test_known_items_are_not_asked_again_and_unfit_ones_are_counted() -> None:
    candidates = [candidate(number, num_replies=1 if number == 4 else 2) for number in range(5)]
    known = {key_of("rank", candidates[0], compared("rank", candidates[0]))}
    table = states({0: UNSURE, 1: SURE, 2: None, 3: SURE, 4: SURE})
    found = choose_items(candidates, table, Asking("rank", 10), known)
    assert set(arms(found)) == {"prompt-1", "prompt-3"}
    assert (found.num_known, found.num_unfit) == (1, 2)
    assert found.describe() == "1 items chosen, 1 drawn at random; 1 prompts were known, 2 can't be compared"
    assert choose_items([candidates[2]], states({2: None}), Asking("rank", 1)).num_unfit == 1


def test_without_a_reward_model_all_are_at_random() -> None:
    found = choose_items((candidate(number) for number in range(8)), None, Asking("rank", 5, 0.2))
    assert list(arms(found).values()) == [CONTROL] * 5
    assert "score" not in found.candidates[0].replies[0]["source"]


def test_what_can_not_be_chosen_is_refused() -> None:
    with pytest.raises(DataError, match=r"one head.*reward_model\.heads=5"):
        choose_items([candidate(0, num_replies=2)], states({0: [1.0]}), Asking("rank", 1))
    with pytest.raises(ConfigError, match="rank or compare, not rate"):
        choose_items([candidate(0)], None, Asking("rate", 1))
    for share in (0.0, -0.1, 1.5):
        with pytest.raises(ConfigError, match="more than 0 and at most 1"):
            Asking("rank", 1, share)


def test_a_second_call_asks_others(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "labels.db"))
    candidates = [candidate(number, num_replies=2) for number in range(10)]
    table = states(dict.fromkeys(range(10), UNSURE))
    seen: set[str] = set()
    for _ in range(2):
        found = asked(store, candidates, Asking("rank", 5), lambda: table, how="active")
        assert add(store, found.candidates, Wanted("rank"), batch="x").num_new == 5
        assert not seen & set(arms(found))
        seen |= set(arms(found))
    assert asked(store, candidates, Asking("rank", 5), lambda: table, how="active").candidates == []
    with pytest.raises(ConfigError, match="active, random"):
        asked(store, candidates, Asking("rank", 5), lambda: table, how="best")


async def test_the_page_learns_nothing_of_the_choice(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "labels.db"))
    found = choose_items([candidate(0, num_replies=2)], states({0: SURE}), Asking("rank", 1))
    add(store, found.candidates, Wanted("rank"), batch="x")
    async with client(store, invited(store, "ann")) as page:
        shown = (await page.post("/api/next", json={})).text
    assert "answer 0 to 0" in shown and "choice" not in shown and "score" not in shown and "control" not in shown


def asked_and_judged(tmp_path: Path, answers: Sequence[Any], arm_of: Sequence[str], *, overlap: int = 1) -> Store:
    """Items with three replies, of scores 3, 2 and 1, that one person judges."""
    store = Store(str(tmp_path / "labels.db"))
    candidates = []
    for number, arm in enumerate(arm_of):
        item = candidate(number, num_replies=3)
        replies = [{**reply, "source": {"score": 3.0 - place}} for place, reply in enumerate(item.replies)]
        source = {**item.source, "choice": {"arm": arm}} if arm else item.source
        candidates.append(type(item)(item.prompt_id, item.messages, item.tools, replies, source))
    add(store, candidates, Wanted("rank", overlap, 1.0), batch="x")
    judged(store, "ann", [{"kind": "rank", "ranks": ranks} for ranks in answers])
    return store


def test_the_errors_of_the_reward_model_are_counted_by_arm(tmp_path: Path) -> None:
    answers = [[1, 2, 3], [3, 2, 1], [2, 1, 3], [1, 1, 1], [None, 2, 1], [3, 2, 1]]
    store = asked_and_judged(tmp_path, answers, [CONTROL, ACTIVE, ACTIVE, ACTIVE, CONTROL, ""])
    with store.reading() as connection:
        found = arms_of(connection)
        table = list(lines(connection))
    assert found[ACTIVE].num_items == 3 and sorted(found[ACTIVE].wrong) == pytest.approx([1 / 3, 1.0])
    assert found[CONTROL].num_items == 2 and sorted(found[CONTROL].wrong) == [0.0, 1.0]
    assert table[1].startswith("active          3  66.7% (95 %: ") and table[2].startswith("control         2  50.0%")
    assert table[3].startswith("active less control: +16.7 points (95 %: -") and "no difference is shown" in table[3]


def test_agreement_of_people_is_counted_by_arm(tmp_path: Path) -> None:
    store = asked_and_judged(tmp_path, [[1, 2, 3], [1, 2, 3]], [CONTROL, ACTIVE], overlap=2)
    judged(store, "bob", [{"kind": "rank", "ranks": [1, 2, 3]}, {"kind": "rank", "ranks": [1, 3, 2]}])
    with store.reading() as connection:
        found = arms_of(connection)
    assert found[CONTROL].agreed == [1.0] and found[ACTIVE].agreed == pytest.approx([2 / 3])
    # On two of three pairs both prefer as the model does; on the third they tie, which is no preference.
    assert found[ACTIVE].wrong == [0.0]


def test_a_store_without_choices_prints_nothing_of_arms(tmp_path: Path) -> None:
    store = asked_and_judged(tmp_path, [[1, 2, 3]], [""])
    with store.reading() as connection:
        assert list(lines(connection)) == []
    assert person(store, "cid").name == "cid"
