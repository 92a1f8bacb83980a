"""A person at this machine judges samples of a run, and its rewards are compared with that person."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.services.labelling import embedded, work
from jobs.services.labelling.embedded import Agreement, agreement, newest_run, offer, training
from jobs.services.labelling.items.adding import Wanted, add
from jobs.services.labelling.items.sources import Candidate
from jobs.services.labelling.store import Store
from orchestrator.config.config import Config
from orchestrator.config.loader import load_config, to_yaml
from orchestrator.errors import DataError
from orchestrator.run.storage import write_json, write_sealed
from orchestrator.schema import ROLLOUT
from orchestrator.training.ranking import wilson_interval
from tests.deadlines import scaled
from tests.unit.jobs.services.labelling.filled import filled, person
from tests.unit.jobs.services.labelling.running import ROOT
from tests.unit.jobs.services.labelling.test_exporting import judged, rank

QUICKSTART = ROOT / "jobs" / "configs" / "quickstart.yaml"
LINK = re.compile(r"(http://127\.0\.0\.1:\d+)/#(\S+)")


def log_of(run: Path, *, num_steps: int = 2) -> None:
    """Two prompts per step with three samples each; the reward of a sample is its index."""
    for step in range(num_steps):
        file = run / "log" / f"step-{step:06d}" / "shard-0000.parquet"
        file.parent.mkdir(parents=True)
        table = [
            {
                "row": row,
                "prompt_id": f"p{2 * step + row // 3}",
                "sample_index": row % 3,
                "seed": row,
                "prompt_text": "Why?",
                "response_text": f"because {step} {row}",
                "finish_reason": "stop",
                "prompt_tokens": [1],
                "response_tokens": [2],
                "learn": [True],
                "starts": [],
                "engine_logprobs": [-0.5],
                "version": step,
                "meta": json.dumps({"messages": [{"role": "user", "content": f"Why {step} {row // 3}?"}]}),
                "reward": float(row % 3),
            }
            for row in range(6)
        ]
        schema = ROLLOUT.append(pa.field("reward", pa.float32()))
        pq.write_table(pa.Table.from_pylist(table, schema), file)
        write_sealed(file.with_name("manifest.json"), {"shards": [{"file": file.name}]})


def run_of(root: Path, name: str = "quickstart-20260101-000000-001", **steps: int) -> Path:
    run = root / name
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(load_config(QUICKSTART, [f"run.root={root}"])))
    log_of(run, **steps)
    return run


def test_the_newest_run_with_samples_is_chosen(tmp_path: Path) -> None:
    config = tmp_path / "quickstart.yaml"
    config.write_text(to_yaml(load_config(QUICKSTART, [f"run.root={tmp_path / 'runs'}"])))
    (tmp_path / "runs").mkdir()
    with pytest.raises(DataError, match="no run of .* with samples: run `make quickstart`"):
        newest_run(config)
    first = run_of(tmp_path / "runs")
    run_of(tmp_path / "runs", "quickstart-without-steps", num_steps=0)
    run_of(tmp_path / "runs", "other-run")
    assert newest_run(config) == first


def candidate(rewards: list[float | None]) -> Candidate:
    replies = [{"reply": f"reply {n}", "source": {"reward": reward}} for n, reward in enumerate(rewards)]
    return Candidate("p", [{"role": "user", "content": "x"}], [], replies, {})


def test_agreement_is_the_share_of_pairs_that_rewards_order_as_the_person(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "labels.db"))
    add(store, [candidate([3.0, 2.0, 1.0, 1.0])], Wanted("rank", overlap_share=0), batch="x")
    judged(store, "you", [rank(1, 1, 3, 2)])
    with store.reading() as connection:
        found = agreement(connection)
    # Of five ordered pairs the rewards order four so; those of the last two replies are equal.
    assert found == Agreement(num_items=1, num_pairs=5, num_agreed=4.5, num_tied=1)
    low, high = wilson_interval(4.5, 5)
    assert found.describe() == (
        f"the reward model orders 90.0% of 5 pairs of 1 prompts as you did (95 %: {low:.1%} to {high:.1%}); "
        "you found 1 pairs equal"
    )
    assert Agreement(0, 0, 0.0, 0).describe() == "no pair of replies to compare"


def answer_all(address: str, token: str, num: int | None = None) -> int:
    """Ranks as the rewards do: the later sample is the better one."""
    done = 0
    with httpx.Client(base_url=address, headers={"Authorization": f"Bearer {token}"}, timeout=scaled(20)) as client:
        while done != num and (task := client.post("/api/next", json={}).json()["task"]):
            places = [int(reply.split()[-1]) for reply in task["replies"]]
            ranks = [sorted(places, reverse=True).index(place) + 1 for place in places]
            body = {
                "id": f"answer-{task['showing']}",
                "showing": task["showing"],
                "seconds": 1.0,
                "answer": {"kind": "rank", "ranks": ranks},
            }
            assert client.post("/api/judgements", json=body).status_code == 200
            done += 1
    return done


@contextmanager
def label(run: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "jobs", "label", "quickstart", str(run), "--no-browser", *options]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def linked(process: subprocess.Popen[str]) -> tuple[str, str, str]:
    """Address, token, and what was printed so far."""
    assert process.stdout is not None
    printed = ""
    for line in process.stdout:
        printed += line
        if found := LINK.search(line):
            return found[1], found[2], printed
    pytest.fail("no link was printed")


def test_it_ends_when_all_is_judged_and_continues_after_an_interruption(tmp_path: Path) -> None:
    run = run_of(tmp_path / "runs")
    with label(run, "--limit", "3") as process:
        assert answer_all(*linked(process)[:2], num=1) == 1
        process.terminate()
        output, _ = process.communicate(timeout=scaled(60))
    assert process.returncode == 0, output
    assert "orders 100.0% of 3 pairs of 1 prompts as you did (95 %: 43.9% to 100.0%)" in output
    with label(run, "--limit", "3") as process:
        address, token, printed = linked(process)
        assert answer_all(address, token) == 2
        output = printed + process.communicate(timeout=scaled(60))[0]
    assert process.returncode == 0, output
    assert f"{run}: 2 prompts to judge, 1 judged before" in output
    assert "of 9 pairs of 3 prompts" in output and f"{run / 'labels.jsonl'}: your rankings of 3 prompts\n" in output
    assert f"rlhf reward-model --config {run / 'config.yaml'} 'stages=[reward_model]'" in output
    assert len((run / "labels.jsonl").read_text().splitlines()) == 3
    with label(run, "--limit", "3") as process:  # once more: there is nothing to open a page for
        output, _ = process.communicate(timeout=scaled(60))
    assert process.returncode == 0 and "nothing is left to judge; --limit 6 shows more prompts" in output
    assert "judge here" not in output and "of 9 pairs of 3 prompts" in output


def test_nothing_is_offered_before_anything_is_judged(tmp_path: Path) -> None:
    run = run_of(tmp_path / "runs")
    with label(run) as process:
        linked(process)
        process.terminate()
        output, _ = process.communicate(timeout=scaled(60))
    assert process.returncode == 0, output
    assert "nothing to train on yet; the same command continues" in output and "Traceback" not in output
    assert not (run / "labels.jsonl").exists()


def test_a_folder_that_is_no_run_gets_no_store(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere is no folder: give the folder of a run"):
        embedded.label_run(tmp_path / "nowhere", QUICKSTART, limit=1, port=0, opens=False)
    with pytest.raises(DataError, match="has no committed step"):
        embedded.label_run(tmp_path, QUICKSTART, limit=1, port=0, opens=False)
    assert list(tmp_path.iterdir()) == []


def test_it_ends_when_the_person_has_answered_or_skipped_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(embedded, "monotonic", lambda: now)
    store = filled(tmp_path, num=2)
    you, rules = person(store, "you"), work.Rules(gold_share=0.0)
    done = embedded.Done(store, you)
    for _ in range(2):
        now += 10.0
        assert not done() and not done()
        with store.writing() as connection:
            task = work.next_task(connection, you, rules)
            assert task is not None
            work.skip(connection, you, task.id)
    assert not done()
    now += 10.0
    assert done()
    with store.writing() as connection:
        work.undo(connection, you, task.id, rules)
    assert not done()


class Terminal:
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("agreed", [True, False])
def test_it_trains_on_the_rankings_if_the_person_agrees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, agreed: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tmp_path / "runs", num_steps=0)
    (run / "reward-model").mkdir()
    trained: list[Config] = []

    def imported(name: str) -> Any:
        assert name == "jobs.stages.work.reward_model:run_alone"

        def train(config: Config, address: str | None) -> Path:
            trained.append(config)
            write_json(tmp_path / "reward_model.json", {"path": "/new model", "num_held_out": 0})
            return tmp_path

        return train

    monkeypatch.setattr(embedded, "imported", imported)
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("typer.confirm", lambda question, default: agreed)
    offer(run, run / "labels.jsonl")
    if not agreed:
        assert trained == [] and "to train the reward model on them: rlhf reward-model" in capsys.readouterr().out
        return
    (config,) = trained
    assert config.preferences.path == run / "labels.jsonl" and config.reward_model.base == str(run / "reward-model")
    assert (config.run.id, config.run.name) == (None, f"{run.name}-labels")
    assert [stage.kind for stage in config.stages] == ["reward_model"]
    output = capsys.readouterr().out
    assert "none of your rankings was held out" in output and "the new reward model: /new model" in output
    assert """run.id=null 'reward={name: model, path: "/new model"}'""" in output


def test_without_a_reward_model_training_begins_at_the_policy(tmp_path: Path) -> None:
    assert not any("base" in each for each in training(tmp_path, tmp_path / "labels.jsonl"))


def test_a_link_is_not_on_a_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everybody on a machine can read those."""
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    store = Store(str(tmp_path / "labels.db"))
    with embedded._opened(store, "http://127.0.0.1:1/#secret"):
        (page,) = (Path(address.removeprefix("file://")) for address in opened)
        assert "secret" not in opened[0] and "/#secret" in page.read_text()
        assert page.stat().st_mode & 0o777 == 0o600
    assert not page.exists()
