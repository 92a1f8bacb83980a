"""Damaged configs, checkpoints, logs and run folders are read correctly or raise an RlhfError that names the file.

Reading changes no file. A checkpoint or shard with one changed byte is never accepted.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hypothesis import strategies as st

from orchestrator.config.config import Config
from orchestrator.config.loader import config_from_tree, load_config
from orchestrator.errors import ConfigError
from orchestrator.run.checkpoints import Checkpoints
from orchestrator.run.experience_log import ExperienceLog, num_committed
from orchestrator.run.folder import open_run
from orchestrator.types import Experience, State
from orchestrator.watching.telemetry import METRICS_FILE, Telemetry, read_lines
from tests.chaos.fuzzing import Damages, example, fuzz
from tests.chaos.mutations import PLACES, VALUES, damage, damages, with_value
from tests.chaos.recorded import experience_log, scored_shard
from tests.unit.orchestrator.fakes import Diary, FakeLearner

# Configs

CONFIG = config_from_tree(
    {
        "stages": ["sample", "preferences", "reward_model", "rl"],
        "reward": {"name": "rules", "rules": [{"function": "a.b:c"}]},
        "run": {"id": "demo"},
    },
    source="test",
)
CONFIG_BYTES = (Path(__file__).resolve().parents[2] / "jobs" / "configs" / "quickstart.yaml").read_bytes()
CONFIG_TREE = {**yaml.safe_load(CONFIG_BYTES), "reward": CONFIG.reward.model_dump(mode="json")}


def check_config(config: Config) -> None:
    text = json.dumps(config.model_dump(mode="json"), ensure_ascii=False, allow_nan=False)
    text.encode()
    assert config_from_tree(json.loads(text), source="again") == config


@fuzz(700, mutations=damages())
def test_config_files(folder: Path, mutations: Damages) -> None:
    path = folder / "config" / "config.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(damage(CONFIG_BYTES, mutations))
    with example("test_config_files", path.parent, names=path):
        check_config(load_config(path))


@fuzz(700, place=PLACES)
def test_configs_with_other_values(folder: Path, place: tuple[int, int]) -> None:
    path = folder / "config" / "config.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(with_value(CONFIG_TREE, *place), encoding="utf-8")
    with example("test_configs_with_other_values", path.parent, names=path):
        check_config(load_config(path))


KEYS = st.sampled_from(
    [
        "rl",
        "steps",
        "policy.learning_rate",
        "reward.rules",
        "run.id",
        "",
        ".",
        "reward.url",
        "reward.name",
        "1",
        "stages",
    ]
)


@fuzz(
    700,
    key=st.lists(KEYS, min_size=1, max_size=2),
    value=st.sampled_from(VALUES),
    sign=st.sampled_from(["=", "", "=="]),
)
def test_overrides(folder: Path, key: list[str], value: str, sign: str) -> None:
    with example("test_overrides", folder, names=Path(" ")):
        try:
            check_config(load_config(None, ["reward.path=/m", f"{'.'.join(key)}{sign}{value}"]))
        except ConfigError as error:
            raise ConfigError(f" {error}") from None


# Checkpoints


async def _write_checkpoints(folder: Path) -> None:
    for step in (2, 4):
        learners = {name: FakeLearner(name, Diary(), list(range(step))) for name in ("policy", "critic")}
        await Checkpoints(folder, learners, every_steps=1, last_step=9, keep=2).save(State(step, 0.1 * step))


@pytest.fixture(scope="module")
def checkpoints(folder: Path) -> Path:
    asyncio.run(_write_checkpoints(folder / "checkpoints"))
    return folder / "checkpoints"


@contextlib.contextmanager
def damaged_file(path: Path, data: bytes) -> Iterator[None]:
    whole = path.read_bytes()
    path.write_bytes(data)
    yield
    path.write_bytes(whole)


def restored(folder: Path) -> None:
    """A loaded state equals the one saved at its step."""
    learners = {name: FakeLearner(name, Diary()) for name in ("policy", "critic")}
    state = asyncio.run(Checkpoints(folder, learners, every_steps=1, last_step=9, keep=2).restore())
    assert state in (State(2, 0.1 * 2), State(4, 0.1 * 4))
    assert all(learner.learned == list(range(state.step)) for learner in learners.values())


CHECKPOINT_FILES = ("policy/weights.txt", "critic/weights.txt", "state.json", "manifest.json", "COMPLETE")
BOTH = st.sampled_from([(4,), (2,), (2, 4)])


@fuzz(900, steps=BOTH, name=st.sampled_from(CHECKPOINT_FILES), mutations=damages())
def test_checkpoint_files(checkpoints: Path, steps: tuple[int, ...], name: str, mutations: Damages) -> None:
    with contextlib.ExitStack() as stack:
        for step in steps:
            path = checkpoints / f"step-{step:06d}" / name
            stack.enter_context(damaged_file(path, damage(path.read_bytes(), mutations)))
        with example("test_checkpoint_files", checkpoints):
            restored(checkpoints)


@fuzz(500, steps=BOTH, name=st.sampled_from(["manifest.json", "state.json"]), place=PLACES)
def test_checkpoint_files_with_other_values(
    checkpoints: Path, steps: tuple[int, ...], name: str, place: tuple[int, int]
) -> None:
    with contextlib.ExitStack() as stack:
        for step in steps:
            path = checkpoints / f"step-{step:06d}" / name
            text = with_value(json.loads(path.read_bytes()), *place)
            stack.enter_context(damaged_file(path, text.encode("utf-8")))
        with example("test_checkpoint_files_with_other_values", checkpoints):
            restored(checkpoints)


# The experience log


@pytest.fixture(scope="module")
def log(folder: Path) -> Iterator[tuple[ExperienceLog, Path, Experience]]:
    with experience_log(folder / "log") as written:
        experience = asyncio.run(written.commit(State(0, 0.1), [scored_shard(0, index) for index in range(2)]))
        yield written, folder / "log", experience


def load_damaged(test: str, log: tuple[ExperienceLog, Path, Experience], name: str, data: bytes) -> None:
    written, folder, experience = log
    path = folder / "step-000000" / name
    altered = path.read_bytes() != data
    with damaged_file(path, data), example(test, folder):
        assert num_committed(folder) == 1
        loaded = asyncio.run(written.load(0))
        assert loaded.metrics == experience.metrics and loaded.records == experience.records
        assert all(left.equals(right) for left, right in zip(loaded.handles, experience.handles, strict=True))
        assert name == "manifest.json" or not altered


LOG_FILES = st.sampled_from(["shard-0000.parquet", "shard-0001.parquet", "manifest.json"])


@fuzz(900, name=LOG_FILES, mutations=damages(most=3))
def test_log_files(log: tuple[ExperienceLog, Path, Experience], name: str, mutations: Damages) -> None:
    data = damage((log[1] / "step-000000" / name).read_bytes(), mutations)
    load_damaged("test_log_files", log, name, data)


@fuzz(500, place=PLACES)
def test_log_manifests_with_other_values(log: tuple[ExperienceLog, Path, Experience], place: tuple[int, int]) -> None:
    manifest = json.loads((log[1] / "step-000000" / "manifest.json").read_bytes())
    load_damaged("test_log_manifests_with_other_values", log, "manifest.json", with_value(manifest, *place).encode())


# Telemetry and the run folder


@pytest.fixture(scope="module")
def metrics(folder: Path) -> bytes:
    path = folder / "telemetry"
    path.mkdir()
    with Telemetry(path, "run-1", 1) as telemetry:
        for step in range(3):
            with telemetry.step(step) as record:
                record({"reward/mean": 0.5, "tokens/generated": 10.0})
            telemetry.evaluation(step, {"evaluation/gold_mean": 0.5})
    return (path / METRICS_FILE).read_bytes()


def continue_metrics(test: str, folder: Path, data: bytes) -> None:
    path = folder / "telemetry" / METRICS_FILE
    path.write_bytes(data)
    with example(test, path.parent, names=path, reads=False):
        with Telemetry(path.parent, "run-1", 2) as telemetry:
            telemetry.rewind(1)
            with telemetry.step(1) as record:
                record({"reward/mean": 0.5})
        lines = [line for line in read_lines(path) if line["stage"] == "rl" and line["kind"] == "step"]
        assert lines[-1]["step"] == 1 and all(line["step"] < 1 for line in lines[:-1])


@fuzz(500, mutations=damages())
def test_metrics_files(folder: Path, metrics: bytes, mutations: Damages) -> None:
    continue_metrics("test_metrics_files", folder, damage(metrics, mutations))


@fuzz(300, place=PLACES)
def test_metrics_with_other_values(folder: Path, metrics: bytes, place: tuple[int, int]) -> None:
    first, *rest = metrics.splitlines(keepends=True)
    text = with_value(json.loads(first), *place).encode()
    continue_metrics("test_metrics_with_other_values", folder, text + b"\n" + b"".join(rest))


@fuzz(300, mutations=damages())
def test_run_folders_with_another_config(folder: Path, mutations: Damages) -> None:
    root = folder / "runs"
    shutil.rmtree(root, ignore_errors=True)
    config = CONFIG.model_copy(update={"run": CONFIG.run.model_copy(update={"root": root})})
    path = open_run(config).path / "config.yaml"
    data = damage(path.read_bytes(), mutations)
    path.write_bytes(data)
    try:
        with example("test_run_folders_with_another_config", root, names=path, reads=False):
            run = open_run(config)
            assert run.attempt == 2 and load_config(path) == config
            assert not run.notes or (path.parent / "config.attempt-001.yaml").read_bytes() == data
    finally:
        refused = not (path.parent / "attempts" / "002").exists()
        assert not refused or path.read_bytes() == data
