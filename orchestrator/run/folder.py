"""The folder of one run: its id, its config, and the number of this attempt."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from orchestrator.config.changes import Change, changed_keys
from orchestrator.config.config import Config
from orchestrator.config.loader import load_kept_config, to_yaml
from orchestrator.errors import ConfigError, StorageError, Superseded
from orchestrator.run.attempts import ATTEMPTS, claim, numbers
from orchestrator.run.mirror import Mirror
from orchestrator.run.storage import reading, replacing, writing
from orchestrator.watching.telemetry import EVENTS_FILE, read_lines

CONFIG_FILE = "config.yaml"


@dataclass(frozen=True)
class RunFolder:
    """An open run folder. `attempt` counts the processes of this run's driver, from 1; `notes` are lines for the
    console."""

    path: Path
    id: str
    attempt: int
    notes: tuple[str, ...] = ()
    stage: str = ""

    @property
    def place(self) -> Path:
        """The folder of a stage's outputs: the run's folder, or that of the stage `stage`."""
        return stage_place(self.path, self.stage)

    def require_newest(self) -> None:
        """Raises Superseded if a later attempt has opened this folder: two attempts must never write one run."""
        with reading(self.path / ATTEMPTS):
            newest = max(numbers(self.path / ATTEMPTS), default=0)
        if newest > self.attempt:
            raise Superseded(f"run {self.id}: attempt {newest} now writes this run, so attempt {self.attempt} stops.")

    @property
    def log(self) -> Path:
        return self.place / "log"

    @property
    def checkpoints(self) -> Path:
        return self.place / "checkpoints"

    @property
    def evaluation(self) -> Path:
        return self.place / "evaluation"

    @property
    def export(self) -> Path:
        return self.place / "export"

    @property
    def best_export(self) -> Path:
        return self.place / "export-best"


def stage_place(run: Path, stage: str) -> Path:
    """The folder of a stage's outputs. Without a stage name: the run's folder."""
    return run / "stages" / stage if stage else run


Compare = Callable[[Config, Config], tuple[Change, ...]]


def open_run(
    config: Config,
    tell: Callable[[str], None] = lambda line: None,
    *,
    compare: Compare = changed_keys,
    prepare: Callable[[RunFolder], None] = lambda run: None,
) -> RunFolder:
    """Creates the run's folder, or opens an existing one (run.id) for another attempt.

    If the config differs only in keys that do not matter (config/changes.py), it replaces the previous config, which is
    kept as config.attempt-NNN.yaml, where NNN is the last attempt that used it.

    Args:
        tell: gets a line for the console while this waits for an attempt that may be alive.
        compare: says of the kept config and this one what differs, and what of it matters.
        prepare: called with the folder before its config is replaced, while no other attempt writes it.

    Raises:
        CapacityError: another attempt of this run is alive.
        ConfigError: the run's config can't be read or differs in a key that matters.
        StorageError: the folder can't be written.
    """
    path = _make_folder(storage_root(config.run.root), config)
    attempt = claim(path, wait_s=config.placement.wait_s, tell=tell)
    # Read after the claim: an attempt that started at the same time may have written its config first.
    try:
        changes = _harmless_changes(path / CONFIG_FILE, config, compare)
    except BaseException:
        with writing(path / ATTEMPTS):
            (path / ATTEMPTS / f"{attempt:03d}").unlink()
        raise
    prepare(RunFolder(path, path.name, attempt))
    _keep_config(path / CONFIG_FILE, config, changes, attempt)
    notes = tuple(f"config changed since the last attempt: {change}" for change in changes)
    return RunFolder(path, path.name, attempt, notes)


def _make_folder(root: Path, config: Config) -> Path:
    """Makes the run's folder, accessible only to this user because it contains samples and quoted texts. An existing
    folder keeps its mode, so a shared folder stays shared.

    Two runs that start in the same second get different folders.
    """
    path = root / (config.run.id or _new_id(config.run.name, os.getpid()))
    try:
        root.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                path.mkdir(mode=0o700, exist_ok=config.run.id is not None)
                break
            except FileExistsError:
                if config.run.id is not None:
                    raise
                path = root / _new_id(config.run.name, secrets.randbelow(1000))
        (path / ATTEMPTS).mkdir(exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"run folder {path} can't be made ({error.strerror}); set run.root to a writable folder."
        ) from None
    return path


def _new_id(name: str, number: int) -> str:
    return f"{name}-{datetime.now().astimezone():%Y%m%d-%H%M%S}-{number % 1000:03d}"


def restore_lost(config: Config) -> str | None:
    """Restores the missing folder of run.id from its mirror. Returns a line for the console.

    Raises:
        StorageError: the mirror does not answer or has no undamaged snapshot.
    """
    if config.run.id is None or config.run.mirror is None:
        return None
    path = storage_root(config.run.root) / config.run.id
    if path.exists():
        return None
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    snapshot = Mirror(config.run.mirror, config.run.id).pull(path)
    if snapshot is None:
        return None
    with writing(path):
        path.chmod(0o700)
    return f"run {path.name}: restored the lost folder, {len(snapshot.files)} files, from snapshot {snapshot.name}"


def kept_config(config: Config) -> Config | None:
    """The config in the folder of run.id. None: there is no such run.

    Raises:
        ConfigError: the file is not a valid config.
        StorageError: the file can't be read.
    """
    if config.run.id is None:
        return None
    path = storage_root(config.run.root) / config.run.id / CONFIG_FILE
    with reading(path):
        return load_kept_config(path) if path.exists() else None


def refuse_existing(config: Config) -> None:
    """Raises ConfigError if run.id exists."""
    if config.run.id is not None and (storage_root(config.run.root) / config.run.id / CONFIG_FILE).exists():
        raise ConfigError(
            f"run {config.run.id!r} exists in {storage_root(config.run.root)}, and --resume is never. Give another "
            "run.id."
        )


def existing_run(config: Config) -> RunFolder | None:
    """The folder of run.id, without starting an attempt. None: there is no such run."""
    if config.run.id is None:
        return None
    path = storage_root(config.run.root) / config.run.id
    return RunFolder(path, path.name, attempt=0) if (path / CONFIG_FILE).exists() else None


def has_finished(path: Path, stage: str) -> bool:
    """Whether the last stage event of a stage of the run in `path` is its end. Raises StorageError."""
    events = read_lines(path / EVENTS_FILE)
    kinds = [line["kind"] for line in events if line["stage"] == stage and line["kind"].startswith("stage_")]
    return kinds[-1:] == ["stage_finished"]


def check_run_folder(config: Config, compare: Compare = changed_keys) -> str:
    """Checks that `open_run` will succeed; creates only the root. Returns a line about the root and its free space.

    Raises:
        ConfigError: the root can't be written, or run.id names a run that this config can't continue.
    """
    root = storage_root(config.run.root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise ConfigError(
            f"run.root={config.run.root}: {root} can't be written ({error.strerror}). Set run.root to another folder."
        ) from None
    if config.run.id is not None:
        _harmless_changes(root / config.run.id / CONFIG_FILE, config, compare)
    return f"run folders: {root}, {shutil.disk_usage(root).free / (1 << 30):.1f} GiB free"


def storage_root(root: Path) -> Path:
    """`root` as an absolute path. In a Ray job the working directory is a copy that Ray deletes, so a relative root is
    then below the home folder."""
    root = root.expanduser()
    if root.is_absolute():
        return root
    inside_package = "runtime_resources" in Path.cwd().parts
    return (Path.home() / "rlhf" / root) if inside_package else Path.cwd() / root


def _harmless_changes(path: Path, config: Config, compare: Compare) -> tuple[Change, ...]:
    """Differences from the config in `path`, if it exists. Raises ConfigError if one matters."""
    with reading(path):
        if not path.exists():
            return ()
    changes = compare(load_kept_config(path), config)
    if any(change.matters for change in changes):
        lines = (f"{change}  ({'matters' if change.matters else 'does not matter'})" for change in changes)
        way_out = (
            "Set the keys that matter back to continue the run, run the stages that see them again (--from STAGE), or "
            "give another run.id to start a new one."
        )
        if any(change.matters and change.is_of_contents for change in changes):
            way_out += (
                " If a file changed, restore the one that the run started with, or continue with the new one by "
                "run.accept_changed_files=true."
            )
        raise ConfigError(
            f"run {path.parent.name!r} was started with another config, kept in {path}:\n  " + "\n  ".join(lines) + "\n"
            f"{way_out}"
        )
    return changes


def _keep_config(path: Path, config: Config, changes: Sequence[Change], attempt: int) -> None:
    with reading(path):
        before = path.read_bytes() if path.exists() else None
    if before is not None and not changes:
        return
    if before is not None:
        with replacing(path.with_name(f"config.attempt-{attempt - 1:03d}.yaml")) as temporary:
            temporary.write_bytes(before)
    with replacing(path) as temporary:
        temporary.write_text(to_yaml(config), encoding="utf-8")
