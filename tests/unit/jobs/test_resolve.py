"""Open values are resolved once; a later attempt uses the stored values."""

from __future__ import annotations

import importlib.util
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from actors.machine import probe
from actors.machine.probe import Speed
from jobs import resolve
from jobs.check.engine import check_engine, check_kernels
from jobs.check.engine_trial import Verdict
from jobs.resolve import RESOLVERS, resolved
from orchestrator.config.changes import OPEN, RESOLVED_ONCE, changed_keys, value_of
from orchestrator.config.config import Config
from orchestrator.config.loader import load_config
from orchestrator.errors import ConfigError
from orchestrator.run.folder import CONFIG_FILE, open_run

SLOW_BF16 = Speed("Zen 3, AVX2, 2 threads", threads=2, bfloat16=1e9, float32=129e9)
FAST_BF16 = Speed("AMX, 2 threads", threads=2, bfloat16=1500e9, float32=300e9)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    def become(speed: Speed) -> None:
        monkeypatch.setattr(resolve, "machine_speed", lambda cache: speed)

    become(SLOW_BF16)
    monkeypatch.setattr(resolve, "verdict_on_vllm", lambda config, tell: Verdict(difference=0.0))
    return become


def config(root: Path, **sections: Any) -> Config:
    run = {"root": root, "id": "demo", "cache": root / "cache"}
    return Config.model_validate(
        {"prompts": {"path": "/none.jsonl"}, "reward": {"path": "/models/reward"}, "run": run, **sections}
    )


def test_the_dtype_is_the_faster_one_of_the_machine(tmp_path: Path, machine: Any) -> None:
    told: list[str] = []
    assert resolved(config(tmp_path), told.append).model.dtype == "float32"
    assert told == ["model.dtype: float32 (Zen 3, AVX2, 2 threads: bf16 1 GFLOP/s, fp32 129)"]
    machine(FAST_BF16)
    assert resolved(config(tmp_path)).model.dtype == "bfloat16"


def test_the_dtype_is_bf16_on_gpus(tmp_path: Path, machine: Any) -> None:
    assert resolved(config(tmp_path, policy={"gpus_per_rank": 1})).model.dtype == "bfloat16"


def test_a_value_that_is_given_stays(tmp_path: Path, machine: Any) -> None:
    given = config(tmp_path, model={"dtype": "bfloat16", "today": date(2025, 2, 1)}, rollout={"engine": "hf"})
    assert resolved(given) == given


def test_a_later_attempt_on_another_machine_keeps_the_value(tmp_path: Path, machine: Any) -> None:
    open_run(resolved(config(tmp_path)))
    machine(FAST_BF16)
    told: list[str] = []
    again = resolved(config(tmp_path), told.append)
    assert again.model.dtype == "float32"
    assert told == []
    assert open_run(again).notes == ()
    assert resolved(config(tmp_path / "elsewhere")).model.dtype == "bfloat16"


def test_a_run_that_keeps_an_open_value_is_resolved_and_says_so(tmp_path: Path, machine: Any) -> None:
    open_run(config(tmp_path))
    run = open_run(resolved(config(tmp_path)))
    assert run.notes[0] == 'config changed since the last attempt: model.dtype: "auto" -> "float32"'
    assert {note.split(": ")[1] for note in run.notes} == RESOLVED_ONCE
    assert load_config(run.path / CONFIG_FILE).model.dtype == "float32"


def test_another_value_than_the_kept_one_is_refused(tmp_path: Path, machine: Any) -> None:
    open_run(resolved(config(tmp_path)))
    with pytest.raises(ConfigError, match=r'model.dtype: "float32" -> "bfloat16"  \(matters\)'):
        open_run(resolved(config(tmp_path, model={"dtype": "bfloat16"})))


def test_an_open_dtype_is_never_computed_with() -> None:
    with pytest.raises(ConfigError, match="still auto"):
        _ = Config.model_validate({"reward": {"path": "/m"}}).model.compute_dtype


def without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "vllm" else find(name, *more))


def test_the_engine_is_vllm_where_it_is_installed_and_else_transformers_and_says_so(
    tmp_path: Path, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    assert resolved(config(tmp_path), told.append).rollout.engine == "vllm"
    assert not [line for line in told if "engine" in line]
    without_vllm(monkeypatch)
    assert resolved(config(tmp_path), told.append).rollout.engine == "hf"
    assert told[-1] == "rollout.engine: hf (vLLM is not installed here; transformers samples, more slowly)"


def test_a_run_keeps_its_engine(tmp_path: Path, machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as elsewhere:
        without_vllm(elsewhere)
        open_run(resolved(config(tmp_path)))
    assert resolved(config(tmp_path)).rollout.engine == "hf"


def test_vllm_asked_for_by_name_and_missing_is_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = config(tmp_path, rollout={"engine": "vllm"})
    check_engine(named)
    without_vllm(monkeypatch)
    with pytest.raises(ConfigError, match=r"vLLM is not installed here. Set rollout.engine=hf"):
        check_engine(named)
    check_engine(config(tmp_path, rollout={"engine": "hf"}))


def test_kernels_that_are_wanted_and_missing_are_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = config(tmp_path, policy={"liger": True, "gpus_per_rank": 1.0}, placement={"mode": "separate"})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    note = check_kernels(wanted)
    assert note is not None and note.startswith("policy.liger: ") and "rlhf-orchestrator[liger]" in note
    assert check_kernels(config(tmp_path)) is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert check_kernels(wanted) is None


def test_an_open_engine_is_never_started() -> None:
    with pytest.raises(ConfigError, match="still auto"):
        _ = Config.model_validate({"reward": {"path": "/m"}}).rollout.engine_kind


def test_every_key_that_is_resolved_has_a_resolver_and_is_open_by_default(tmp_path: Path, machine: Any) -> None:
    assert set(RESOLVERS) == RESOLVED_ONCE
    start = config(tmp_path)
    assert all(value_of(start, key) in OPEN for key in RESOLVERS)
    assert {change.key for change in changed_keys(start, resolved(start))} == RESOLVED_ONCE


def test_this_machine_is_measured_once_and_a_damaged_file_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    measured = {"bfloat16": 2e9, "float32": 1e9}
    monkeypatch.setattr(probe, "measure", lambda: calls.append(1) or measured)
    speeds = [probe.machine_speed(tmp_path) for _ in range(3)]
    assert len(calls) == 1
    assert {speed.dtype for speed in speeds} == {"bfloat16"}
    file = next((tmp_path / probe.FOLDER).iterdir())
    for damaged in (file.read_text()[:20], '{"kind": 1}', "[]", '{"kind": "x", "bfloat16": "fast", "float32": null}'):
        file.write_text(damaged)
        assert probe.machine_speed(tmp_path) == speeds[0]
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")  # not AVX2, which the suite may use
    probe.machine_speed(tmp_path)
    assert len(calls) == 6


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "measure", lambda: {"bfloat16": 1e9, "float32": 2e9})
    (tmp_path / "file").write_text("")
    assert probe.machine_speed(tmp_path / "file" / "cache").dtype == "float32"


def test_the_date_belongs_to_the_run(tmp_path: Path, machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = resolved(config(tmp_path)).model.today
    assert first is not None and abs(first - datetime.now().astimezone().date()) <= timedelta(days=1)
    open_run(resolved(config(tmp_path)))
    monkeypatch.setitem(resolve.RESOLVERS, "model.today", lambda config, tell: resolve.Resolved("2031-01-01"))  # type: ignore[arg-type]
    later = resolved(config(tmp_path))
    assert later.model.today == first and open_run(later).notes == ()
    assert resolved(config(tmp_path / "elsewhere")).model.today == date(2031, 1, 1)
