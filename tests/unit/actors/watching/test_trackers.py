from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from actors.watching import trackers
from actors.watching.trackers import TensorBoardTracker, open_trackers, try_trackers
from orchestrator.config.sections import TelemetryConfig
from orchestrator.errors import ConfigError
from tests.deadlines import scaled


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def test_tensorboard_shows_what_was_logged(tmp_path):
    tracker = TensorBoardTracker(tmp_path)
    for step in range(3):
        tracker.log(step, {"reward/mean": step / 4, "policy/loss": -1.0})
    tracker.close()
    assert scalars(tmp_path, "reward/mean") == [(0, 0.0), (1, 0.25), (2, 0.5)]


def test_a_step_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    tracker = TensorBoardTracker(tmp_path)
    tracker.log(0, {"reward/mean": 1.0})
    assert scalars(tmp_path, "reward/mean") == [(0, 1.0)]
    tracker.close()


def test_tensorboard_hides_steps_that_a_later_attempt_learned_again(tmp_path):
    for first_step, value in ((0, 0.0), (2, 10.0)):
        tracker = TensorBoardTracker(tmp_path, first_step=first_step)
        for step in range(first_step, 4):
            tracker.log(step, {"reward/mean": value + step})
        tracker.close()
    assert scalars(tmp_path, "reward/mean") == [(0, 0.0), (1, 1.0), (2, 12.0), (3, 13.0)]


def opened(config: TelemetryConfig, folder: Path, **settings: Any) -> list[Any]:
    return open_trackers(config, folder, "demo-1", settings=settings, tell=pytest.fail)


def test_only_what_the_config_names_is_opened(tmp_path):
    assert opened(TelemetryConfig(tensorboard=False), tmp_path) == []
    (tracker,) = opened(TelemetryConfig(), tmp_path)
    tracker.log(0, {"reward/mean": 1.0})
    tracker.close()
    assert scalars(tmp_path / "tensorboard", "reward/mean") == [(0, 1.0)]


def test_a_further_attempt_keeps_what_earlier_ones_showed(tmp_path):
    for steps in ((0, 1, 2), (2, 3)):
        (tracker,) = opened(TelemetryConfig(), tmp_path)
        for step in steps:
            tracker.log(step, {"reward/mean": float(step)})
        tracker.close()
    assert [step for step, _ in scalars(tmp_path / "tensorboard", "reward/mean")] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("attribute", "settings", "message"),
    [
        ("EventFileWriter", {"tensorboard": True}, "telemetry.tensorboard=true needs the package tensorboard"),
        ("wandb", {"tensorboard": False, "wandb_project": "p"}, "telemetry.wandb_project='p' needs the package wandb"),
        ("mlflow", {"tensorboard": False, "mlflow_uri": "u"}, "telemetry.mlflow_uri='u' needs the package mlflow"),
    ],
)
def test_a_missing_package_is_a_config_error_with_a_way_out(monkeypatch, tmp_path, attribute, settings, message):
    monkeypatch.setattr(trackers, attribute, None)
    with pytest.raises(ConfigError, match=f"{message}.*pip install .*, or set telemetry"):
        opened(TelemetryConfig(**settings), tmp_path)


class FakeWandb:
    """Records the two calls of wandb that are used."""

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.is_finished = False

    def init(self, **options: Any) -> SimpleNamespace:
        self.options = options
        return SimpleNamespace(log=self._log, finish=self._finish)

    def _log(self, metrics: dict[str, float], step: int) -> None:
        self.logged.append((step, metrics))

    def _finish(self) -> None:
        self.is_finished = True


def test_weights_and_biases_continues_the_run_with_the_run_id(monkeypatch, tmp_path):
    fake = FakeWandb()
    monkeypatch.setattr(trackers, "wandb", fake)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    config = TelemetryConfig(tensorboard=False, wandb_project="project")
    (tracker,) = opened(config, tmp_path, rl={"steps": 9})
    tracker.log(3, {"reward/mean": 0.5})
    tracker.close()
    assert (fake.options["id"], fake.options["resume"], fake.options["project"]) == ("demo-1", "allow", "project")
    assert fake.options["config"] == {"rl": {"steps": 9}}
    assert fake.logged == [(3, {"reward/mean": 0.5})]
    assert fake.is_finished


def test_mlflow_keeps_one_run_over_attempts(tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="needs the optional package mlflow")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    config = TelemetryConfig(tensorboard=False, mlflow_uri=uri)
    for step in range(2):
        (tracker,) = opened(config, tmp_path, rl={"steps": 9})
        tracker.log(step, {"reward/mean": float(step)})
        tracker.close()
    client = mlflow.MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("rlhf").experiment_id])
    assert run.data.params == {"rl.steps": "9"}
    history = client.get_metric_history(run.info.run_id, "reward/mean")
    assert [(point.step, point.value) for point in history] == [(0, 0.0), (1, 1.0)]


def test_check_says_within_seconds_that_a_key_or_a_server_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(trackers, "wandb", FakeWandb())
    monkeypatch.setattr(trackers, "mlflow", SimpleNamespace(MlflowClient=Absent))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    config = TelemetryConfig(tensorboard=False, wandb_project="p", mlflow_uri="http://127.0.0.1:1")
    started = time.monotonic()
    lines = try_trackers(config, wait_s=1.0)
    assert time.monotonic() - started < scaled(5)
    assert "WARNING telemetry.wandb_project: ConfigError: Weights & Biases has no key for api.wandb.ai" in lines[0]
    assert "WARNING telemetry.mlflow_uri: no answer within 1 s" in lines[1]
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
    (line,) = try_trackers(config.model_copy(update={"mlflow_uri": None}), wait_s=5.0)
    assert "no key for 127.0.0.1" in line
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    (line,) = try_trackers(config.model_copy(update={"mlflow_uri": None}), wait_s=5.0)
    assert "ConnectError" in line
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert try_trackers(config.model_copy(update={"mlflow_uri": None}), wait_s=5.0) == []


class Absent:
    def __init__(self, tracking_uri: str) -> None:
        pass

    def search_experiments(self, max_results: int) -> None:
        time.sleep(3600)
