"""The folder of one run: its id, its config, and which attempt this process is."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from orchestrator.config import Config, to_yaml
from orchestrator.errors import ConfigError, StorageError
from orchestrator.storage import replacing

CONFIG_FILE = "config.yaml"
ATTEMPTS = "attempts"


@dataclass(frozen=True)
class RunFolder:
    """An open run folder. `attempt` counts the lives of this run's driver, from 1."""

    path: Path
    id: str
    attempt: int

    @property
    def log(self) -> Path:
        return self.path / "log"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation"

    @property
    def preferences(self) -> Path:
        return self.path / "preferences.jsonl"

    @property
    def reward_model(self) -> Path:
        return self.path / "reward-model"

    @property
    def export(self) -> Path:
        return self.path / "export"


def open_run(config: Config) -> RunFolder:
    """Creates the run's folder, or opens it for a further attempt when run.id names one that exists.

    Raises:
        ConfigError: the folder holds a run with another config.
        StorageError: it can't be written.
    """
    run_id = config.run.id or f"{config.run.name}-{datetime.now().astimezone():%Y%m%d-%H%M%S}-{os.getpid() % 1000:03d}"
    path = storage_root(config.run.root) / run_id
    try:
        (path / ATTEMPTS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"run folder {path} can't be made ({error.strerror}); set run.root to a place that can."
        ) from None
    _keep_config(path / CONFIG_FILE, config)
    return RunFolder(path, run_id, _claim_attempt(path / ATTEMPTS))


def check_run_folder(config: Config) -> str:
    """What `open_run` would find, before anything is made but the root itself; says where runs go and the room there.

    Raises:
        ConfigError: the root can't be written, or run.id names a run with another config.
    """
    root = storage_root(config.run.root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise ConfigError(
            f"run.root={config.run.root}: {root} can't be written ({error.strerror}). Set run.root to a place that can."
        ) from None
    if config.run.id is not None and (root / config.run.id / CONFIG_FILE).exists():
        _refuse_other_config(root / config.run.id / CONFIG_FILE, config)
    return f"run folders: {root}, {shutil.disk_usage(root).free / (1 << 30):.1f} GiB free"


def storage_root(root: Path) -> Path:
    """`root` as an absolute path. Inside a Ray job the working directory is a copy that Ray deletes, so a relative
    root then means one below the home folder."""
    root = root.expanduser()
    if root.is_absolute():
        return root
    inside_package = "runtime_resources" in Path.cwd().parts
    return (Path.home() / "rlhf" / root) if inside_package else Path.cwd() / root


def _keep_config(path: Path, config: Config) -> None:
    if path.exists():
        _refuse_other_config(path, config)
        return
    with replacing(path) as temporary:
        temporary.write_text(to_yaml(config), encoding="utf-8")


def _refuse_other_config(path: Path, config: Config) -> None:
    if path.read_text(encoding="utf-8") != to_yaml(config):
        raise ConfigError(
            f"run {path.parent.name!r} was started with another config, kept in {path}. Give the same config to "
            "continue it, or another run.id to start a new run."
        )


def _claim_attempt(folder: Path) -> int:
    number = 1 + len(list(folder.iterdir()))
    while True:
        try:
            (folder / f"{number:03d}").touch(exist_ok=False)
            return number
        except FileExistsError:
            number += 1
