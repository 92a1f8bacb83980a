"""Experiment trackers: TensorBoard, Weights & Biases, MLflow. Each is optional and off unless the config names it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.config import TelemetryConfig
from orchestrator.errors import ConfigError
from orchestrator.roles import Trackers

try:
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
except ImportError:
    EventFileWriter = None
try:
    import wandb
except ImportError:
    wandb = None
try:
    import mlflow
except ImportError:
    mlflow = None


def open_trackers(
    config: TelemetryConfig, folder: Path, run_id: str, *, first_step: int, settings: Mapping[str, Any]
) -> list[Trackers]:
    """The trackers that the config turns on.

    Args:
        folder: the run's folder; local files go below it.
        first_step: step that this attempt starts with; what trackers hold of it and later steps is superseded.
        settings: the resolved config, shown by W&B and MLflow.

    Raises:
        ConfigError: a tracker's package is not installed.
    """
    trackers: list[Trackers] = []
    if config.tensorboard:
        trackers.append(TensorBoardTracker(folder / "tensorboard", first_step=first_step))
    if config.wandb_project is not None:
        trackers.append(WandbTracker(config.wandb_project, run_id, folder, settings))
    if config.mlflow_uri is not None:
        trackers.append(MlflowTracker(config.mlflow_uri, run_id, settings))
    return trackers


class TensorBoardTracker:
    """Event files in `folder`, written without torch or TensorFlow.

    TensorBoard hides what earlier attempts wrote of `first_step` and later steps.
    """

    def __init__(self, folder: Path, *, first_step: int = 0) -> None:
        if EventFileWriter is None:
            raise ConfigError(_missing("telemetry.tensorboard=true", "tensorboard", "telemetry.tensorboard=false"))
        self._writer = EventFileWriter(str(folder))
        start = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(wall_time=time.time(), step=first_step, session_log=start))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """A Weights & Biases run with the run's id; later attempts continue it. W&B ignores steps that it already has."""

    def __init__(self, project: str, run_id: str, folder: Path, settings: Mapping[str, Any]) -> None:
        if wandb is None:
            raise ConfigError(_missing(f"telemetry.wandb_project={project!r}", "wandb", "telemetry.wandb_project=null"))
        self._run = wandb.init(
            project=project, id=run_id, name=run_id, dir=str(folder), config=dict(settings), resume="allow"
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class MlflowTracker:
    """An MLflow run named after the run, in experiment `rlhf`; later attempts continue it.

    MLflow forgets nothing: of a step that was learned again its history keeps both values, the newer one last.
    """

    _EXPERIMENT = "rlhf"

    def __init__(self, uri: str, run_id: str, settings: Mapping[str, Any]) -> None:
        if mlflow is None:
            raise ConfigError(_missing(f"telemetry.mlflow_uri={uri!r}", "mlflow", "telemetry.mlflow_uri=null"))
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        found = self._find(run_id)
        if found is not None:
            self._client.update_run(found, status="RUNNING")
        self._id = found or self._create(run_id, settings)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        now_ms = int(time.time() * 1000)
        entities = [mlflow.entities.Metric(name, value, now_ms, step) for name, value in metrics.items()]
        self._client.log_batch(self._id, metrics=entities)

    def close(self) -> None:
        self._client.set_terminated(self._id)

    def _experiment(self) -> str:
        found = self._client.get_experiment_by_name(self._EXPERIMENT)
        return str(found.experiment_id) if found else str(self._client.create_experiment(self._EXPERIMENT))

    def _find(self, run_id: str) -> str | None:
        query = f"attributes.run_name = '{run_id}'"
        runs = self._client.search_runs([self._experiment()], filter_string=query, max_results=1)
        return str(runs[0].info.run_id) if runs else None

    def _create(self, run_id: str, settings: Mapping[str, Any]) -> str:
        created = str(self._client.create_run(self._experiment(), run_name=run_id).info.run_id)
        for key, value in _flat("", settings).items():
            self._client.log_param(created, key, value)
        return created


def _flat(prefix: str, tree: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(f"{prefix}{key}.", value) if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _missing(setting: str, package: str, way_out: str) -> str:
    return f"{setting} needs the package {package}, which is not installed: `pip install {package}`, or set {way_out}."
