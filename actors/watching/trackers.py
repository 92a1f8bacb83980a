"""Experiment trackers: TensorBoard, Weights & Biases, MLflow. Each is optional and off unless the config names it.

None of them can block or end a run (background.py)."""

from __future__ import annotations

import contextlib
import netrc
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import Empty, Queue
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

import httpx

from actors.watching.background import BackgroundTracker
from orchestrator.config.sections import TelemetryConfig
from orchestrator.errors import ConfigError
from orchestrator.roles import Trackers

# MLflow's retries take minutes, and rejected metrics are sent again anyway.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
# Time limit of W&B when it is opened, and again when the process ends.
os.environ.setdefault("WANDB_INIT_TIMEOUT", "20")
_WANDB_URL = "https://api.wandb.ai"
_REACH_S = 10.0

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
    config: TelemetryConfig, folder: Path, run_id: str, *, settings: Mapping[str, Any], tell: Callable[[str], None]
) -> list[Trackers]:
    """The enabled trackers, each on a separate thread; they are opened with the first metrics.

    Args:
        folder: the run's folder, for local files.
        settings: the resolved config, shown by W&B and MLflow.
        tell: gets a line when a tracker fails, and one when it has caught up.

    Raises:
        ConfigError: a tracker's package is not installed.
    """
    require_packages(config)
    project, uri = config.wandb_project, config.mlflow_uri
    starts: dict[str, Callable[[int], Trackers]] = {}
    if config.tensorboard:
        starts["TensorBoard"] = lambda step: TensorBoardTracker(folder / "tensorboard", first_step=step)
    if project is not None:
        starts["Weights & Biases"] = lambda _: WandbTracker(project, run_id, folder, settings)
    if uri is not None:
        starts["MLflow"] = lambda _: MlflowTracker(uri, run_id, settings)
    return [BackgroundTracker(name, start, tell) for name, start in starts.items()]


def require_packages(config: TelemetryConfig) -> None:
    """Raises ConfigError, which names it, if the package of an enabled tracker is not installed."""
    wanted = (
        (config.tensorboard, EventFileWriter, "tensorboard", "telemetry.tensorboard=true", "false"),
        (config.wandb_project, wandb, "wandb", f"telemetry.wandb_project={config.wandb_project!r}", "null"),
        (config.mlflow_uri, mlflow, "mlflow", f"telemetry.mlflow_uri={config.mlflow_uri!r}", "null"),
    )
    for value, module, package, setting, off in wanted:
        if value and module is None:
            key = setting.partition("=")[0]
            raise ConfigError(
                f"{setting} needs the package {package}, which is not installed: `pip install {package}`, or set "
                f"{key}={off}."
            )


def try_trackers(config: TelemetryConfig, wait_s: float) -> list[str]:
    """A line for each enabled tracker that does not answer or has no key. Takes at most `wait_s`."""
    tries: dict[str, Callable[[], object]] = {}
    if config.wandb_project is not None:
        tries["telemetry.wandb_project"] = _try_wandb
    if config.mlflow_uri is not None:
        client = mlflow.MlflowClient(tracking_uri=config.mlflow_uri)
        tries["telemetry.mlflow_uri"] = lambda: client.search_experiments(max_results=1)
    until = monotonic() + wait_s
    outcomes = {key: _outcome_of(attempt) for key, attempt in tries.items()}
    lines = []
    for key, outcome in outcomes.items():
        try:
            fault = outcome.get(timeout=max(0.0, until - monotonic()))
        except Empty:
            fault = f"no answer within {wait_s:g} s"
        if fault:
            lines.append(
                f"WARNING {key}: {fault.rstrip('.')}. The run starts anyway, and metrics wait until it answers; "
                f"{key}=null turns it off."
            )
    return lines


def _outcome_of(attempt: Callable[[], object]) -> Queue[str]:
    """Calls it on a daemon thread; returns the reason of a failure, or an empty string."""
    outcome: Queue[str] = Queue()

    def run() -> None:
        try:
            attempt()
            outcome.put("")
        except BaseException as error:  # noqa: BLE001  the tracker's library may raise anything, SystemExit too
            outcome.put(f"{type(error).__name__}: {str(error)[:300]}")

    threading.Thread(target=run, daemon=True).start()
    return outcome


def _try_wandb() -> None:
    _require_wandb_key()
    if os.environ.get("WANDB_MODE", "online") == "online":
        url = os.environ.get("WANDB_BASE_URL", _WANDB_URL)
        httpx.head(url, timeout=_REACH_S, follow_redirects=True)


def _require_wandb_key() -> None:
    """Raises ConfigError if W&B would ask for a key on the terminal."""
    if os.environ.get("WANDB_MODE", "online") != "online" or os.environ.get("WANDB_API_KEY"):
        return
    host = urlsplit(os.environ.get("WANDB_BASE_URL", _WANDB_URL)).hostname or ""
    file = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        if netrc.netrc(file).authenticators(host):
            return
    raise ConfigError(
        f"Weights & Biases has no key for {host}: set WANDB_API_KEY, or run `wandb login`, or set WANDB_MODE=offline"
    )


class TensorBoardTracker:
    """Event files in `folder`, written without torch or TensorFlow.

    TensorBoard hides data of earlier attempts about `first_step` and later steps.
    """

    def __init__(self, folder: Path, *, first_step: int = 0) -> None:
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
        _require_wandb_key()
        self._run = wandb.init(
            project=project, id=run_id, name=run_id, dir=str(folder), config=dict(settings), resume="allow"
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class MlflowTracker:
    """An MLflow run named after the run, in experiment `rlhf`; later attempts continue it.

    MLflow keeps both values of a step that was learned again, the newer one last.
    """

    _EXPERIMENT = "rlhf"

    def __init__(self, uri: str, run_id: str, settings: Mapping[str, Any]) -> None:
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
