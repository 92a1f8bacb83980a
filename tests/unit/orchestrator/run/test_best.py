"""The best checkpoint by evaluation: selected exactly, never removed, the same after kills and stops."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.config.changes import changed_keys
from orchestrator.config.config import Config
from orchestrator.config.loader import config_from_tree
from orchestrator.errors import ConfigError, StorageError
from orchestrator.evaluation import EVALUATION, evaluation_file
from orchestrator.run.best import Best, BestByEvaluation
from orchestrator.run.checkpoints import MARKER, Checkpoints, read_best
from orchestrator.types import State
from tests.unit.orchestrator.fakes import Diary, FakeLearner

GOLD = "evaluation/gold_mean"


def evaluate(folder: Path, golds: Mapping[int, float], kl: Mapping[int, float] | None = None) -> BestByEvaluation:
    """Evaluation files of some versions, with two prompts each and the given mean."""
    folder.mkdir(exist_ok=True)
    for version, gold in golds.items():
        write(folder, version, gold, (kl or {}).get(version, 1.0))
    return BestByEvaluation(folder, GOLD)


def write(folder: Path, version: int, gold: float | None, kl: float, reward: float | None = None) -> None:
    rows = [
        {"prompt_id": f"p{n}", "prompt_text": "p", "response_text": "r", "gold": gold, "kl": kl, "length": 3}
        | {"reward": reward}
        for n in range(2)
    ]
    table = pa.Table.from_pylist(rows, schema=EVALUATION).replace_schema_metadata({"run_id": "run"})
    pq.write_table(table, evaluation_file(folder, version))


def test_the_highest_wins_and_of_equal_ones_the_earliest(tmp_path: Path) -> None:
    choice = evaluate(tmp_path / "evaluation", {2: 0.25, 4: 0.5, 6: 0.5, 8: 0.125})
    assert choice.among([8, 6, 4, 2]) == Best(4, GOLD, 0.5, 1.0)
    assert choice.among([6, 8]) == Best(6, GOLD, 0.5, 1.0)


def test_versions_beyond_the_kl_bound_or_without_an_evaluation_do_not_compete(tmp_path: Path) -> None:
    evaluate(tmp_path / "evaluation", {2: 0.25, 4: 0.5, 6: 0.9}, kl={2: 1.0, 4: 2.0, 6: 30.0})
    bounded = BestByEvaluation(tmp_path / "evaluation", GOLD, max_kl=2.0)
    assert bounded.among([2, 4, 6, 10]) == Best(4, GOLD, 0.5, 2.0)
    assert BestByEvaluation(tmp_path / "evaluation", GOLD, max_kl=0.5).among([2, 4, 6]) is None


def test_a_metric_that_no_sample_has_and_a_damaged_file_choose_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    by_reward = BestByEvaluation(tmp_path, "evaluation/reward_mean")
    write(tmp_path, 2, 0.5, 1.0, reward=None)
    assert by_reward.among([2]) is None
    write(tmp_path, 4, 0.5, 1.0, reward=-1.0)
    write(tmp_path, 8, 0.5, 1.0, reward=float("nan"))
    evaluation_file(tmp_path, 6).write_bytes(b"PAR1 torn")
    assert by_reward.among([2, 4, 6, 8]) == Best(4, "evaluation/reward_mean", -1.0, 1.0)
    assert "step-000006.parquet can't be read" in caplog.text


class World:
    """Checkpoints and evaluations; a new World on the same folder is the next attempt."""

    def __init__(self, folder: Path, golds: Mapping[int, float], *, keep: int = 1, last_step: int = 12) -> None:
        self.policy = FakeLearner("policy", Diary())
        self.folder = folder / "checkpoints"
        self.choice = evaluate(folder / "evaluation", golds)
        self.checkpoints = Checkpoints(
            self.folder,
            {"policy": self.policy},
            every_steps=2,
            last_step=last_step,
            keep=keep,
            best=self.choice.among,
        )

    async def run(self, steps: Sequence[int]) -> None:
        for step in steps:
            self.policy.learned = list(range(step))
            await self.checkpoints.save_if_due(State(step, 0.1))

    def steps(self) -> list[int]:
        return [int(path.name.removeprefix("step-")) for path in self.checkpoints.complete()]


GOLDS = {2: 0.1, 4: 0.9, 6: 0.2, 7: 5.0, 8: 0.3, 10: 0.4, 12: 0.5}


@pytest.mark.parametrize("keep", [1, 2])
async def test_the_best_is_kept_beside_the_newest_and_named(tmp_path: Path, keep: int) -> None:
    world = World(tmp_path, GOLDS, keep=keep)
    await world.run(range(1, 13))
    assert world.steps() == [4, 10, 12][-keep - 1 :] if keep == 2 else [4, 12]
    named = json.loads((world.folder / "best.json").read_text())
    assert named == {"step": 4, "metric": GOLD, "value": 0.9, "kl_per_response": 1.0}


async def test_a_better_one_takes_its_place(tmp_path: Path) -> None:
    world = World(tmp_path, GOLDS | {10: 1.5})
    await world.run(range(1, 12))
    assert world.steps() == [10]
    await world.run([12])
    assert world.steps() == [10, 12]


async def test_without_evaluations_only_the_newest_are_kept(tmp_path: Path) -> None:
    world = World(tmp_path, {})
    await world.run(range(1, 13))
    assert world.steps() == [12]
    assert not (world.folder / "best.json").exists()


@pytest.mark.parametrize("killed_at", range(2, 13))
async def test_a_run_killed_anywhere_keeps_what_an_undisturbed_one_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    """Kills a save after it is complete and before old ones are removed; then starts a new attempt."""
    (tmp_path / "whole").mkdir()
    whole = World(tmp_path / "whole", GOLDS)
    await whole.run(range(1, 13))
    (tmp_path / "killed").mkdir()
    with monkeypatch.context() as patch:
        retire = Checkpoints._retire

        def dying(checkpoints: Checkpoints, saved: Path) -> None:
            if saved.name == f"step-{killed_at:06d}":
                raise KeyboardInterrupt
            retire(checkpoints, saved)

        patch.setattr(Checkpoints, "_retire", dying)
        try:
            await World(tmp_path / "killed", GOLDS).run(range(1, 13))
        except KeyboardInterrupt:
            pass
        else:
            assert killed_at % 2, "it was not killed"
    again = World(tmp_path / "killed", GOLDS)
    state = await again.checkpoints.restore()
    assert state is not None
    await again.run(range(state.step, 13))
    assert again.steps() == whole.steps() == [4, 12]
    assert read_best(again.folder) == read_best(whole.folder)


async def test_what_a_stop_saved_does_not_compete(tmp_path: Path) -> None:
    """Step 7 was evaluated and is the best, but was saved only because of a stop."""
    world = World(tmp_path, GOLDS)
    await world.run(range(1, 7))
    await world.checkpoints.save(State(7, 0.1))
    assert world.steps() == [4, 7]
    await World(tmp_path, GOLDS).run(range(8, 13))
    assert world.steps() == [4, 12]


async def test_the_best_of_a_run_that_is_made_longer_stays_although_its_step_is_off_the_schedule(
    tmp_path: Path,
) -> None:
    golds = {2: 0.1, 3: 0.9, 4: 0.2, 5: 0.3}
    await World(tmp_path, golds, last_step=3).run([1, 2, 3])
    longer = World(tmp_path, golds, last_step=5)
    await longer.run([4, 5])
    assert longer.steps() == [3, 5]


async def test_the_best_is_loaded_verified_unless_it_is_the_last(tmp_path: Path) -> None:
    world = World(tmp_path, GOLDS)
    await world.run(range(1, 13))
    best = await world.checkpoints.load_best()
    assert best is not None and best.step == 4
    assert world.policy.learned == [0, 1, 2, 3]
    (world.folder / "step-000004" / "policy" / "weights.txt").write_text("0,1,2,9")
    with pytest.raises(StorageError, match="does not match its checksum"):
        await world.checkpoints.load_best()
    await World(tmp_path, GOLDS | {12: 7.0}).run([12])
    assert await World(tmp_path, GOLDS).checkpoints.load_best() is None


def test_a_best_whose_checkpoint_is_gone_or_a_damaged_file_is_none(tmp_path: Path) -> None:
    assert read_best(tmp_path) is None
    (tmp_path / "best.json").write_text('{"step": 4, "metric": "m", "value": 1, "kl_per_response": 1}')
    assert read_best(tmp_path) is None
    (tmp_path / "step-000004").mkdir()
    (tmp_path / "step-000004" / MARKER).touch()
    assert read_best(tmp_path) == Best(4, "m", 1, 1)
    for text in ("", "[]", '{"step": 4}', "{"):
        (tmp_path / "best.json").write_text(text)
        assert read_best(tmp_path) is None


async def test_a_step_saved_again_below_newer_ones_is_not_retired_by_its_own_save(tmp_path: Path) -> None:
    """As if a replay of fewer steps used the folder of a longer one."""
    world = World(tmp_path, {})
    await world.run([6])
    await world.checkpoints.save(State(4, 0.1))
    assert 4 in world.steps()


def test_the_keys_are_strict_and_may_change_when_a_run_goes_on() -> None:
    def config(**keys: object) -> Config:
        return config_from_tree({"reward": {"path": "x"}, "checkpoints": keys}, source="test")

    assert config().checkpoints.best_metric == GOLD
    with pytest.raises(ConfigError, match="best_metric"):
        config(best_metric="evaluation/length_mean")
    with pytest.raises(ConfigError, match=r"best_max_kl needs checkpoints\.best_metric"):
        config(best_metric=None, best_max_kl=3.0)
    changes = changed_keys(config(), config(best_metric="evaluation/reward_mean", best_max_kl=3.0))
    assert len(changes) == 2 and not any(change.matters for change in changes)


def test_saves_beside_the_loop_choose_as_saves_in_it(tmp_path: Path) -> None:
    async def beside() -> list[int]:
        world = World(tmp_path, GOLDS)
        for step in range(1, 13):
            world.policy.learned = list(range(step))
            await world.checkpoints.begin_if_due(State(step, 0.1), _Phase())
            await world.checkpoints.settled()
        return world.steps()

    assert asyncio.run(beside()) == [4, 12]


class _Phase:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        pass
