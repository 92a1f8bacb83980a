"""Stage `people`: asks, waits, continues, and leaves the same whenever it was killed."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs.services.labelling import work
from jobs.services.labelling.answers import Judgement
from jobs.services.labelling.store import Store
from jobs.services.labelling.waiting import batches
from jobs.services.labelling.waiting.batches import Progress
from jobs.stages.table import stages_of
from jobs.stages.work import asking, score
from jobs.stages.work import people as stage
from jobs.stages.work.people import Wait
from jobs.why.explain import explain
from jobs.why.reader import read_facts
from orchestrator.config.config import Config
from orchestrator.config.loader import config_from_tree
from orchestrator.config.people import PeopleConfig
from orchestrator.errors import ConfigError, DataError
from orchestrator.planning.placement import Node
from orchestrator.run.lineage import read_lineage
from orchestrator.schema import STATES
from orchestrator.watching.telemetry import read_lines
from tests.deadlines import scaled
from tests.people import labellers, until
from tests.unit.jobs.services.labelling.filled import person
from tests.unit.jobs.services.labelling.running import free_port
from tests.unit.jobs.stages.work.waiting import config_of, driver, run_all, samples, with_samples, written

RULES = work.Rules(gold_share=0.0)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "POLL_S", 0.05)


def judge(store: Store, name: str, num: int) -> None:
    """One person's answers to `num` tasks: the first reply of the item is the best."""
    who = person(store, name)
    for _ in range(num):
        with store.writing() as connection:
            task = work.next_task(connection, who, RULES)
            assert task is not None
            answer = {"kind": "rank", "ranks": [index + 1 for index in task.order]}
            body = {"id": f"answer-{task.id}", "showing": task.id, "seconds": 1.0, "answer": answer}
            work.judge(connection, who, Judgement.model_validate(body))


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


async def reached(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(scaled(20)):
        while not holds():  # noqa: ASYNC110  another task writes files
            await asyncio.sleep(0.02)


@asynccontextmanager
async def waiting(
    config: Config, say: Callable[[str], None] = lambda line: None
) -> AsyncIterator[tuple[Path, Store, asyncio.Task[Any]]]:
    """A run that waits for people, with its folder and store."""
    run = with_samples(config)
    task = asyncio.create_task(run_all(config, say))
    try:
        place = Path(config.people.store or run / "labels.db")
        await reached(lambda: task.done() or ((run / "people.json").exists() and place.exists()))
        store = Store(str(place))
        yield run, store, task
        store.close()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def beat(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "heartbeat.json").read_text())
    return found


async def test_a_run_continues_when_all_is_judged_and_says_meanwhile_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.watching.heartbeat.EVERY_S", 0.05)
    async with waiting(config_of(tmp_path, overlap=2, overlap_share=1.0)) as (run, store, task):
        judge(store, "ann", 3)
        await reached(lambda: (beat(run)["people"] or {}).get("missing") == 5)
        facts = read_facts(run, time.time())
        assert facts is not None and explain(facts).state == "waiting"
        now = "\n".join(explain(facts).now)
        assert "waits for people: 5 of 8 judgements of demo/people are missing, for " in now
        assert f"rlhf label finish demo/people --store {run}/labels.db" in now
        target = json.loads((run / "prometheus.json").read_text())[0]["targets"][0]
        exposed = await asyncio.to_thread(lambda: urllib.request.urlopen(f"http://{target}/metrics").read().decode())
        assert 'rlhf_people_waiting{run_id="demo"} 1.0' in exposed
        assert 'rlhf_people_missing{run_id="demo"} 5.0' in exposed
        judge(store, "ann", 1)
        judge(store, "bob", 4)
        await asyncio.wait_for(task, scaled(20))
    assert beat(run)["people"] is None
    assert len(rows(run / "people.jsonl")) == 4 and len(rows(run / "judgements.jsonl")) == 4
    made = {entry.path: entry for entry in read_lineage(run)}
    assert made["people.jsonl"].reads == {"samples": "samples.parquet"}
    assert made["people.jsonl"].result["agreement"] == 1.0 and made["people.jsonl"].result["judgements"] == 8
    assert [event["kind"] for event in read_lines(run / "events.jsonl")][1:3] == ["people_asked", "people_judged"]


async def test_an_admin_ends_the_wait_and_what_is_missing_is_no_longer_asked_for(tmp_path: Path) -> None:
    async with waiting(config_of(tmp_path, overlap_share=0.0)) as (run, store, task):
        judge(store, "ann", 1)
        with store.writing() as connection:
            batches.finish(connection, "demo/people")
        await asyncio.wait_for(task, scaled(20))
        bob = person(store, "bob")
        with store.writing() as connection:
            assert work.next_task(connection, bob, RULES) is None
    assert len(rows(run / "people.jsonl")) == 1 and len(rows(run / "judgements.jsonl")) == 4
    assert read_lines(run / "events.jsonl")[-2]["reason"] == "an admin finished the batch"


async def test_a_deadline_without_any_judgement_is_an_error_and_a_longer_one_continues(tmp_path: Path) -> None:
    config = config_of(tmp_path, deadline_hours=1e-6)
    with_samples(config)
    with pytest.raises(DataError, match=r"nobody has judged anything.*people\.deadline_hours"):
        await run_all(config)
    async with waiting(config_of(tmp_path, deadline_hours=100, judgements=2)) as (run, store, task):
        judge(store, "ann", 2)
        await asyncio.wait_for(task, scaled(20))
    assert len(rows(run / "people.jsonl")) == 2


async def test_each_round_learns_from_all_judgements_so_far_and_late_ones_count_in_the_next(tmp_path: Path) -> None:
    config = config_of(tmp_path, rounds=2, overlap_share=0.0, judgements=3)
    run = with_samples(config)
    task = asyncio.create_task(run_all(config))
    first, second = (run / "stages" / f"people-{number}" for number in (1, 2))
    await reached((first / "people.json").exists)
    store = Store(str(run / "labels.db"))
    slow = person(store, "slow")
    with store.writing() as connection:
        late = work.next_task(connection, slow, RULES)
    assert late is not None
    judge(store, "ann", 3)
    await reached((second / "people.json").exists)
    frozen = (first / "people.jsonl").read_text()
    with store.writing() as connection:
        answer = {"kind": "rank", "ranks": [1, 2, 3]}
        body = {"id": "late-answer", "showing": late.id, "seconds": 1.0, "answer": answer}
        work.judge(connection, slow, Judgement.model_validate(body))
    judge(store, "ann", 3)
    await asyncio.wait_for(task, scaled(20))
    assert (first / "people.jsonl").read_text() == frozen
    assert (len(rows(first / "people.jsonl")), len(rows(second / "people.jsonl"))) == (3, 7)
    known = {row["key"] for row in rows(first / "judgements.jsonl")}
    assert known < {row["key"] for row in rows(second / "judgements.jsonl")}
    reads = {entry.path: dict(entry.reads) for entry in read_lineage(run)}
    assert reads["stages/people-2/people.jsonl"] == {
        "samples": "stages/sample-2/samples.parquet",
        "judgements": "stages/people-1/judgements.jsonl",
    }


async def test_a_store_that_lacks_the_batch_for_a_while_delays_the_run_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.watching.heartbeat.EVERY_S", 0.05)
    place = tmp_path / "elsewhere.db"
    async with waiting(config_of(tmp_path, store=str(place), overlap_share=0.0)) as (run, store, task):
        with store.writing() as connection:
            keys = batches.keys_of(connection, "demo/people")
            connection.execute(batches.members.delete())
            connection.execute(batches.batches.delete())
        await reached(lambda: "no longer has the batch" in ((beat(run)["people"] or {}).get("problem") or ""))
        assert not task.done()
        with store.writing() as connection:
            batches.open_batch(connection, "demo/people", dict.fromkeys(keys, 1), opened_at=1.0)
        judge(store, "ann", 4)
        await asyncio.wait_for(task, scaled(20))


async def test_a_lost_folder_comes_back_from_the_mirror_with_its_judgements(tmp_path: Path) -> None:
    mirror = {"mirror": str(tmp_path / "mirror"), "mirror_every_s": 0.05}
    config = config_of(tmp_path, run=mirror, overlap_share=0.0)
    async with waiting(config) as (run, store, _):
        judge(store, "ann", 3)
        await asyncio.sleep(0.3)
        await reached((run / "labels-copy.db").exists)
    for path in run.glob("labels.db*"):
        path.unlink()
    async with waiting(config) as (run, store, task):
        judge(store, "bob", 1)
        await asyncio.wait_for(task, scaled(20))
    assert len(rows(run / "people.jsonl")) == 4


def test_a_driver_killed_while_it_waits_and_while_people_answer_ends_with_the_same_preferences(tmp_path: Path) -> None:
    outcomes = []
    for name, kills in (("whole", 0), ("killed", 2)):
        port = free_port()
        config = config_of(tmp_path, name, address=f"127.0.0.1:{port}", overlap=2, overlap_share=1.0)
        run = with_samples(config)
        samples(run / "samples.parquet", num_prompts=24)
        outcomes.append(_judged_run(written(config, tmp_path / f"{name}.yaml"), run, port, kills=kills))
    assert outcomes[0] == outcomes[1] and outcomes[0]


def _judged_run(config: Path, run: Path, port: int, *, kills: int) -> list[Any]:
    """What a run learns from people that two people gave it. It is killed when it waits, and again when some of their
    judgements are there."""
    store = run / "labels.db"

    def num_judged() -> int:
        opened = Store(str(store))
        with opened.reading() as connection:
            found = batches.progress(connection, f"{run.name}/people")
        opened.close()
        return found.num_judgements if found else 0

    process = driver(config)
    try:
        until((run / "people.json").exists, within_s=scaled(60), what="the wait for people")
        if kills:
            process.kill()
            process.join()
            process = driver(config)
        with labellers(store, f"http://127.0.0.1:{port}", ("ann", "bob"), pause_s=0.02) as found:
            if kills > 1:
                until(lambda: num_judged() > 5, within_s=scaled(30), what="judgements")
                process.kill()
                process.join()
                assert num_judged() < 48, "it was killed while people answered"
                process = driver(config)
            process.join(scaled(60))
            assert process.exitcode == 0
            assert not kills or any(each.failures for each in found), "the service was away"
    finally:
        process.kill()
        process.join()
    assert sum(len(row["judgements"]) for row in rows(run / "judgements.jsonl")) == 48
    return [{**row, "source": None} for row in rows(run / "people.jsonl")]


@pytest.mark.parametrize(
    ("people", "progress", "now", "reason"),
    [
        ({}, (3, 1), 0.0, None),
        ({}, (4, 0), 0.0, "all that were asked for"),
        ({"judgements": 3}, (2, 2), 0.0, None),
        ({"judgements": 3}, (3, 1), 0.0, r"people.judgements are reached"),
        ({"deadline_hours": 2.0}, (1, 3), 7299.0, None),
        ({"deadline_hours": 2.0}, (1, 3), 7300.0, r"people.deadline_hours are over"),
    ],
)
def test_why_a_run_continues(people: dict[str, Any], progress: tuple[int, int], now: float, reason: str | None) -> None:
    wait = Wait("run/people", 100.0, PeopleConfig(**people))
    assert wait.reason(Progress(4, *progress, 1, 1, False, None), now) == reason
    assert wait.reason(Progress(4, 0, 4, 1, 1, False, "by an earlier attempt"), now) == "by an earlier attempt"


def test_rounds_hold_out_the_same_prompts(tmp_path: Path) -> None:
    tree = {"stages": [{"rounds": 2, "stages": ["sample", "people"]}], "run": {"root": str(tmp_path)}}
    with pytest.raises(ConfigError, match=r"preferences\.held_out=5 holds out the end of a file, which grows"):
        stages_of(config_from_tree({**tree, "preferences": {"held_out": 5}}, source="the test"))


def asked_keys(store: Store) -> list[str]:
    with store.reading() as connection:
        return list(batches.keys_of(connection, "demo/people"))


def forget_the_batch(run: Path, store: Store) -> None:
    """As if the run had been killed before it asked."""
    (run / "people.json").unlink()
    with store.writing() as connection:
        connection.execute(batches.members.delete())
        connection.execute(batches.batches.delete())


async def test_a_part_of_the_samples_is_asked_for_and_a_killed_run_asks_for_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path, items=2, overlap_share=0.0)
    async with waiting(config) as (run, store, _):
        first = asked_keys(store)
    assert len(first) == 2

    async def fail(*arguments: Any) -> None:
        raise AssertionError("it chooses again")

    monkeypatch.setattr(asking, "choose_items", fail)
    store = Store(str(run / "labels.db"))
    forget_the_batch(run, store)
    store.close()
    async with waiting(config) as (run, store, task):
        assert asked_keys(store) == first
        judge(store, "ann", 2)
        await asyncio.wait_for(task, scaled(20))
    assert [row["key"] for row in rows(run / "judgements.jsonl")] == first


async def test_items_of_its_own_batch_are_asked_for_again_and_those_of_others_are_not(tmp_path: Path) -> None:
    config = config_of(tmp_path, items=4)
    async with waiting(config) as (run, store, _):
        first = asked_keys(store)
    store = Store(str(run / "labels.db"))
    forget_the_batch(run, store)
    store.close()
    (run / "asked.json").unlink()
    async with waiting(config) as (_, store, _):
        assert asked_keys(store) == first and len(first) == 4
    other = config_of(tmp_path, "other", items=4, store=str(run / "labels.db"))
    with_samples(other)
    with pytest.raises(DataError, match=r"the 4 prompts whose replies can be compared are in .*labels\.db already"):
        await run_all(other)


TRAINED = ["sample", "preferences", "reward_model", "people"]


def active(root: Path, *, heads: int = 2, stages: Any = TRAINED, **people: Any) -> Config:
    sections = {"stages": stages, "reward_model": {"heads": heads}}
    return config_of(root, sections=sections, choose="active", **people)


async def test_items_are_chosen_by_the_reward_model_before_the_wait_and_the_gain_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its heads agree on all prompts but p3, of which the mean makes all replies equal."""
    config, asked, lines = active(tmp_path, items=2, overlap_share=0.0), [], list[str]()
    trained = tmp_path / "demo" / "reward-model"
    trained.mkdir(parents=True)
    for path in (trained / "config.json", trained.parent / "reward_model.json"):
        path.write_text("{}")

    async def measure(job: Any, model: Path, samples: pa.Table) -> pa.Table:
        asked.append((model, (job.run.place / "people.json").exists()))
        found = []
        for row in samples.to_pylist():
            best = 2.0 - row["sample_index"]
            heads = [best, -best if row["prompt_id"] == "p3" else best]
            state = [float(row["prompt_id"][1:]), 1.0]
            found.append({"row": row["row"], "prompt_id": row["prompt_id"], "heads": heads, "state": state})
        return pa.Table.from_pylist(found, STATES)

    monkeypatch.setattr(score, "measure_states", measure)
    async with waiting(config, lines.append) as (run, store, task):
        judge(store, "ann", 2)
        await asyncio.wait_for(task, scaled(20))
    assert asked == [(trained, False)]
    arms = {row["source"]["choice"]["arm"]: row["prompt_id"] for row in rows(run / "judgements.jsonl")}
    assert arms.keys() == {"active", "control"} and arms["active"] == "p3"
    assert "people: 1 items chosen, 1 drawn at random; 0 prompts were known, 0 can't be compared" in lines
    assert any(line.startswith("people: active          1  50.0% (95 %: ") for line in lines)
    assert any(line.startswith("people: control         1  0.0% (95 %: ") for line in lines)
    assert {entry.path: entry.reads for entry in read_lineage(run)}["people.jsonl"]["reward_model"] == "reward-model"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"people\.choose=active needs people\.items"),
        ({"items": 2, "heads": 1}, r"reward_model\.heads=1 makes one head: set reward_model\.heads=5"),
        ({"items": 2, "stages": ["sample", "people", "reward_model"]}, "no stage 'reward_model' comes before"),
        ({"items": 2, "stages": [{"rounds": 1, "stages": ["sample", "people", "reward_model"]}]}, "repeat them"),
    ],
)
def test_a_choice_that_can_not_be_made_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        stages_of(active(tmp_path, **changes))


def test_a_first_round_has_no_reward_model_and_the_plan_has_room_for_that_of_the_second(tmp_path: Path) -> None:
    rounds = [{"rounds": 2, "stages": ["sample", "people", "reward_model"]}]
    found = {entry.name: entry for entry in stages_of(active(tmp_path, items=2, stages=rounds))}
    assert "reward_model" not in found["people-1"].sources
    assert found["people-2"].sources["reward_model"].name == "reward_model-1"
    second = found["people-2"]
    assert [slot.role for slot in second.stage.plan(second.config, [Node("here", 4.0, 0.0)]).slots] == ["states"]
    at_random = {entry.name: entry for entry in stages_of(config_of(tmp_path, sections={"stages": rounds}, items=2))}
    assert "reward_model" not in at_random["people-2"].sources
    assert not at_random["people-2"].stage.plan(at_random["people-2"].config, [Node("here", 4.0, 0.0)]).slots
