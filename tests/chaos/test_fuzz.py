"""10,000 damaged inputs: each gives what was written, or an RlhfError that names the file; nothing else ever happens.

Reading changes no file. A checkpoint or a shard of which one byte differs is never taken for what was written.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from jobs.run_folder import open_run
from orchestrator.checkpoints import Checkpoints
from orchestrator.config import Config, config_from_tree, load_config
from orchestrator.data import read_prompts, read_rankings
from orchestrator.data.records import ROLES, Message
from orchestrator.errors import ConfigError, RlhfError
from orchestrator.experience_log import ExperienceLog, num_committed
from orchestrator.telemetry import METRICS_FILE, Telemetry, read_lines
from orchestrator.types import Experience, State
from tests.chaos.mutations import PLACES, VALUES, damage, damages, with_value
from tests.chaos.recorded import experience_log, scored_shard
from tests.deadlines import scaled
from tests.unit.orchestrator.fakes import Diary, FakeLearner

WANTED = 10_000
EXAMPLES: Counter[str] = Counter()
TESTS: set[str] = set()
Damages = list[Any]


def fuzz(count: int, **strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Runs a test on `count` examples, the same ones every time. Ten seconds on a quiet machine count as hanging."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        TESTS.add(test.__name__)
        return settings(
            max_examples=count,
            derandomize=True,
            database=None,
            deadline=timedelta(seconds=scaled(10)),
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        )(given(**strategies)(test))

    return decorate


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """In memory where that is possible: thousands of files are written and synced."""
    memory = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(prefix="fuzz", dir=memory if memory.is_dir() else None))
    yield path
    shutil.rmtree(path)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextlib.contextmanager
def example(test: str, where: Path, *, names: Path | None = None, reads: bool = True) -> Iterator[None]:
    """One example: only an RlhfError may come, it names the file and can be printed; what is read stays as it is."""
    EXAMPLES[test] += 1
    before = contents(where) if reads else {}
    message = None
    try:
        yield
    except RlhfError as error:
        message = str(error)
    assert message is None or (str(names or where) in message and message.encode())
    if reads:
        assert contents(where) == before
    assert not list(where.rglob("*.tmp"))


# Prompts and preferences

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "?"}]
HH = "\n\nHuman: Hi {}\n\nAssistant:"
PROMPTS: dict[str, list[dict[str, Any]]] = {
    "prompt": [{"id": f"p{i}", "prompt": f"Why {i}?", "answer": i, "tests": [{"in": "ä"}]} for i in range(4)],
    "messages": [{"messages": [*TURNS[:2], {"role": "user", "content": f"Why {i}?"}], "score": 0.5} for i in range(4)],
    "hh-rlhf": [{"chosen": f"{HH.format(i)} yes", "rejected": f"{HH.format(i)} no"} for i in range(4)],
    "alpaca": [{"instruction": f"Add {i}", "input": "1", "output": "2"} for i in range(4)],
    "question": [{"question": f"Why {i}?", "answer": "so"} for i in range(4)],
}
RANKINGS: dict[str, list[dict[str, Any]]] = {
    "ranking": [{"id": f"p{i}", "prompt": f"Why {i}?", "replies": ["so", "no", "oh"]} for i in range(4)],
    "pairwise": [{"prompt": f"Why {i}?", "chosen": "so", "rejected": ["no", "oh"]} for i in range(4)],
    "hh-rlhf": PROMPTS["hh-rlhf"],
}


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue())


def _lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _array(rows: list[Any]) -> bytes:
    return json.dumps(rows, indent=1).encode()


def _zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, "zstd", asbytes=True))


KINDS = st.tuples(st.sampled_from((_lines, _array, _parquet)), st.sampled_from((bytes, bytes, gzip.compress, _zstd)))


def check_messages(messages: tuple[Message, ...]) -> None:
    assert messages and messages[-1].role != "assistant"
    assert all(message.role in ROLES and message.content.encode() is not None for message in messages)


def read_damaged(test: str, folder: Path, data: bytes, rows: dict[str, list[dict[str, Any]]]) -> None:
    path = folder / "data" / "file"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    with example(test, path.parent, names=path):
        if rows is PROMPTS:
            prompts, report = read_prompts(path)
            assert report.num_records == len(prompts) > 0
            for prompt in prompts:
                check_messages(prompt.messages)
                assert prompt.id.encode() and prompt.text.encode()
                json.dumps(prompt.meta, ensure_ascii=False, allow_nan=False).encode()
        else:
            rankings, report = read_rankings(path)
            assert report.num_records == len(rankings) > 0
            for ranking in rankings:
                check_messages(ranking.messages)
                assert ranking.id.encode() and len(set(ranking.replies)) == len(ranking.replies) >= 2
                assert all(reply.encode() is not None for reply in ranking.replies)


@fuzz(1800, format=st.sampled_from(sorted(PROMPTS)), kind=KINDS, mutations=damages())
def test_prompt_files(folder: Path, format: str, kind: Any, mutations: Damages) -> None:
    encode, pack = kind
    read_damaged("test_prompt_files", folder, damage(pack(encode(PROMPTS[format])), mutations), PROMPTS)


@fuzz(1200, format=st.sampled_from(sorted(RANKINGS)), kind=KINDS, mutations=damages())
def test_preference_files(folder: Path, format: str, kind: Any, mutations: Damages) -> None:
    encode, pack = kind
    read_damaged("test_preference_files", folder, damage(pack(encode(RANKINGS[format])), mutations), RANKINGS)


@fuzz(1500, rows=st.sampled_from((PROMPTS, RANKINGS)), number=st.integers(0, 4), place=PLACES, array=st.booleans())
def test_rows_with_other_values(
    folder: Path, rows: dict[str, list[dict[str, Any]]], number: int, place: tuple[int, int], array: bool
) -> None:
    chosen = list(rows.values())[number % len(rows)]
    text = with_value(chosen if array else chosen[1], *place)
    data = text.encode("utf-8") if array else _lines(chosen[:1]) + text.encode("utf-8") + b"\n" + _lines(chosen[2:])
    read_damaged("test_rows_with_other_values", folder, data, rows)


COLUMNS = st.sampled_from(
    [
        pa.array([1, None, 3]),
        pa.array(["a", None, "b"]),
        pa.array([float("nan"), float("inf"), 1.0]),
        pa.array([b"\xff\xfe", b"a", None]),
        pa.array([b"\xff\xfe", b"a", b"\xc3"]).view(pa.string()),
        pa.array([["a", "b"], [], None]),
        pa.array([[b"\xff"], [], None]),
        pa.array([[{"role": "user", "content": "hi"}], [], [{"role": None, "content": None}]]),
        pa.array([2**62, -(2**62), 0]).cast(pa.timestamp("us")),
        pa.array([2**62, -(2**62), 0]).cast(pa.timestamp("us", tz="UTC")),
        pa.array([2**62, -(2**62), 0]).cast(pa.duration("ns")),
        pa.array([2**30, -(2**30), 0], pa.int32()).cast(pa.date32()),
        pa.array([[("k", 1)], [], None], pa.map_(pa.string(), pa.int32())),
        pa.array(["a", "b", "a"]).dictionary_encode(),
        pa.nulls(3),
        pa.array([{"a": {"b": [1]}}, None, {"a": None}]),
    ]
)
NAMES = st.sampled_from(sorted({name for row in (*PROMPTS.values(), *RANKINGS.values()) for name in row[0]}))


@fuzz(
    700, columns=st.lists(st.tuples(NAMES, COLUMNS), min_size=1, max_size=3), rows=st.sampled_from((PROMPTS, RANKINGS))
)
def test_parquet_of_other_schemas(folder: Path, columns: list[Any], rows: dict[str, list[dict[str, Any]]]) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays([array for _, array in columns], names=[name for name, _ in columns]), sink)
    read_damaged("test_parquet_of_other_schemas", folder, bytes(sink.getvalue()), rows)


# Configs

CONFIG = config_from_tree(
    {
        "stages": ["preferences", "reward_model", "ppo"],
        "reward": {"kind": "rules", "rules": [{"function": "a.b:c"}], "http": {"url": "http://h"}},
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
    ["ppo", "steps", "policy.learning_rate", "reward.rules", "run.id", "", ".", "reward.http.url", "1", "stages"]
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
    """Whatever is loaded is what was saved at its step."""
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
        lines = [line for line in read_lines(path) if line["stage"] == "ppo" and line["kind"] == "step"]
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


def test_they_were_ten_thousand(capsys: pytest.CaptureFixture[str]) -> None:
    if EXAMPLES.keys() != TESTS:
        pytest.skip("the tests of this file have to run in one process to be counted")
    with capsys.disabled():
        print(f"\n{EXAMPLES.total():,} damaged inputs: {dict(EXAMPLES)}")  # noqa: T201
    assert EXAMPLES.total() >= WANTED
