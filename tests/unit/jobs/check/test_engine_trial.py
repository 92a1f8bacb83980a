"""`rollout.engine: auto` selects an engine by a trial's verdict; tests/matrix tries vLLM itself."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actors.machine.probe import Speed
from jobs import resolve
from jobs.check import engine_trial
from jobs.check.engine import check_architecture
from jobs.check.engine_trial import TRYING, Verdict
from jobs.resolve import WITHOUT_TRIAL, resolved
from orchestrator.config.config import Config
from orchestrator.errors import ConfigError
from orchestrator.run.folder import open_run

Trials = list[tuple[str, ...]]

UNKNOWN = Verdict(refusal="ValidationError: MptForCausalLM was supported until vLLM 0.9.")
WRONG = Verdict(refusal="its log-probs differ from those of transformers by 5.2 nats", difference=5.2)
CRASHED = Verdict(refusal="its trial ended with -11: Segmentation fault", untried="its trial ended with -11")
SERVES = Verdict(difference=1e-6)
TOO_SLOW = Verdict(untried="240 s were not enough")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "mpt"}')
    return tmp_path / "model"


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Callable[[Verdict], Trials]:
    """Makes trials return a verdict; returns the list of trials made."""
    monkeypatch.setattr(engine_trial, "_TRIED", {})
    monkeypatch.setattr(engine_trial, "_version", lambda library: "1.0")
    monkeypatch.setattr(resolve, "machine_speed", lambda cache: Speed("AVX2", 2, bfloat16=1e9, float32=9e9))

    def become(verdict: Verdict) -> Trials:
        made: Trials = []
        monkeypatch.setattr(engine_trial, "_trial", lambda command: made.append(command) or verdict)
        return made

    return become


def config(model: Path, **sections: Any) -> Config:
    tree: dict[str, Any] = {
        "model": {"path": str(model)},
        "reward": {"path": "/models/reward"},
        "run": {"root": model.parent / "runs", "id": "demo", "cache": model.parent / "cache"},
    }
    return Config.model_validate({**tree, **sections})


@pytest.mark.parametrize("verdict", [UNKNOWN, WRONG, CRASHED])
def test_auto_takes_transformers_where_vllm_does_not_serve_the_model_and_says_why(
    model: Path, says: Callable[[Verdict], Trials], verdict: Verdict
) -> None:
    made, told = says(verdict), list[str]()
    chosen = resolved(config(model), told.append)
    assert chosen.rollout.engine == "hf"
    reason = str(verdict.refusal).rstrip(".")
    assert told[-2:] == [
        f"rollout.engine=auto: {TRYING}",
        f"rollout.engine: hf (vLLM can't serve model.path={model}: {reason}; transformers samples, more slowly)",
    ]
    assert check_architecture(chosen) is None
    assert len(made) == 1


@pytest.mark.parametrize("verdict", [UNKNOWN, WRONG, CRASHED])
def test_vllm_asked_for_by_name_is_refused_with_the_way_out(
    model: Path, says: Callable[[Verdict], Trials], verdict: Verdict
) -> None:
    says(verdict)
    chosen = resolved(config(model, rollout={"engine": "vllm"}), lambda line: None)
    assert chosen.rollout.engine == "vllm"
    with pytest.raises(ConfigError, match=r"rollout.engine=vllm can't serve model.path=.* Set rollout.engine=hf"):
        check_architecture(chosen)


@pytest.mark.parametrize("verdict", [SERVES, TOO_SLOW])
def test_auto_takes_vllm_where_nothing_speaks_against_it(
    model: Path, says: Callable[[Verdict], Trials], verdict: Verdict
) -> None:
    made = says(verdict)
    chosen = resolved(config(model), lambda line: None)
    assert chosen.rollout.engine == "vllm"
    assert str(check_architecture(chosen)).startswith("engine: vLLM ")
    assert len(made) == 1, "the check uses the verdict of the selection"


@pytest.mark.parametrize("verdict", [UNKNOWN, SERVES, CRASHED])
def test_a_cache_that_cannot_be_written_costs_no_second_trial(
    model: Path, says: Callable[[Verdict], Trials], verdict: Verdict
) -> None:
    made = says(verdict)
    (model.parent / "cache").write_text("a file")
    chosen = resolved(config(model), lambda line: None)
    assert chosen.rollout.engine == ("vllm" if verdict == SERVES else "hf")
    check_architecture(chosen)
    assert len(made) == 1


def test_a_verdict_on_the_architecture_is_kept_and_any_other_is_not(
    model: Path, says: Callable[[Verdict], Trials], monkeypatch: pytest.MonkeyPatch
) -> None:
    for verdict, kept in ((CRASHED, False), (TOO_SLOW, False), (WRONG, True)):
        says(verdict)
        monkeypatch.setattr(engine_trial, "_TRIED", {})
        resolved(config(model), lambda line: None)
        assert any((model.parent / "cache").rglob("*.json")) == kept
    monkeypatch.setattr(engine_trial, "_TRIED", {})
    made = says(SERVES)
    assert resolved(config(model), lambda line: None).rollout.engine == "hf" and not made


def test_a_damaged_verdict_is_found_out_again(model: Path, says: Callable[[Verdict], Trials]) -> None:
    says(WRONG)
    resolved(config(model), lambda line: None)
    (kept,) = (model.parent / "cache").rglob("*.json")
    for damaged in ("", "[]", '{"refusal": null, "more": 1}', '{"refusal"'):
        kept.write_text(damaged)
        assert resolved(config(model), lambda line: None).rollout.engine == "hf"


def test_the_engine_is_tried_in_the_dtype_of_the_run(model: Path, says: Callable[[Verdict], Trials]) -> None:
    made = says(SERVES)
    resolved(config(model), lambda line: None)
    assert made[0][made[0].index("--dtype") + 1] == "float32"


def test_a_resume_keeps_the_engine_and_tries_nothing(model: Path, says: Callable[[Verdict], Trials]) -> None:
    says(UNKNOWN)
    open_run(resolved(config(model), lambda line: None))
    made = says(SERVES)
    (model / "config.json").write_text('{"model_type": "mpt", "n_layers": 3}')
    assert resolved(config(model), lambda line: None).rollout.engine == "hf"
    assert not made


@pytest.mark.parametrize(
    "sections",
    [
        {"rollout": {"gpus_per_replica": 1}},
        {"rollout": {"engine": "hf"}},
        {"stages": ["reward_model"], "preferences": {"path": "/pairs.jsonl"}},
    ],
)
def test_nothing_is_tried_on_gpus_with_another_engine_and_where_nothing_samples(
    model: Path, says: Callable[[Verdict], Trials], sections: dict[str, Any]
) -> None:
    made = says(WRONG)
    check_architecture(resolved(config(model, **sections), lambda line: None))
    assert not made


def test_sampling_for_preferences_is_sampling(model: Path, says: Callable[[Verdict], Trials]) -> None:
    says(WRONG)
    assert resolved(config(model, stages=["sample"]), lambda line: None).rollout.engine == "hf"
    named = resolved(config(model, stages=["sample"], rollout={"engine": "vllm"}), lambda line: None)
    with pytest.raises(ConfigError, match="can't serve"):
        check_architecture(named)


def test_what_only_computes_with_a_config_tries_nothing(model: Path, says: Callable[[Verdict], Trials]) -> None:
    made = says(WRONG)
    found = resolved(config(model), lambda line: None, keys=WITHOUT_TRIAL)
    assert not made and found.rollout.engine == "auto" and found.model.dtype == "float32"


def test_a_model_that_is_not_there_is_left_to_the_checks(model: Path, says: Callable[[Verdict], Trials]) -> None:
    made = says(SERVES)
    gone = model / "gone"
    assert resolved(config(gone), lambda line: None).rollout.engine == "vllm"
    assert not made


@pytest.mark.parametrize(
    ("code", "refuses", "why"),
    [
        ("import os; os.kill(os.getpid(), 11)", True, "its trial ended with -11: "),
        ("import no_such_library", True, "ended with 1: ModuleNotFoundError: No module named 'no_such_library'"),
        ("print('all is well')", True, "its trial ended with 0: "),
        ("import os; os.kill(os.getpid(), 9)", False, "its trial ended with -9: "),
        ("import time; time.sleep(60)", False, "1 s were not enough"),
    ],
)
def test_a_trial_that_ends_without_a_verdict(
    monkeypatch: pytest.MonkeyPatch, code: str, refuses: bool, why: str
) -> None:
    monkeypatch.setattr(engine_trial, "TRIAL_S", 1.0 if "sleep" in code else 60.0)
    verdict = engine_trial._trial((sys.executable, "-c", code))
    assert (verdict.refusal is not None) == refuses
    assert why in str(verdict.untried), verdict


def test_a_verdict_is_found_between_other_lines() -> None:
    code = 'print("INFO"); print(\'{"refusal": null, "difference": 1e-6, "untried": null}\'); print("bye")'
    assert engine_trial._trial((sys.executable, "-c", code)) == SERVES
