"""The files that are sent with a job: a folder with the packages and the user's files, regular files only."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from orchestrator.errors import ConfigError

PACKAGES = ("actors", "jobs", "orchestrator")
PROJECT_FILES = ("pyproject.toml", "README.md", "LICENSE")
_COMPILED = shutil.ignore_patterns("__pycache__", "*.pyc")


def stage_project(
    root: Path, folder: Path, include: Sequence[Path] = (), tell: Callable[[str], None] = lambda line: None
) -> None:
    """Copies what a job needs of the project at `root` into `folder`: the packages, no environment, runs or tests.

    Ray refuses packages above a size; a checkout with its environment and runs exceeds it.

    Args:
        root: the checkout.
        folder: an empty folder.
        include: further files or folders, relative to `root` or absolute; copied under their own names.
        tell: gets a line for each socket, named pipe, device or broken link that is left out.

    Raises:
        ConfigError: one of `include` does not exist, is neither a file nor a folder, or can't be read.
    """
    for name in PACKAGES:
        _copy(root / name, folder / name, tell)
    for name in PROJECT_FILES:
        if (root / name).exists():
            _copy(root / name, folder / name, tell)
    for path in include:
        if not path.exists():
            reason = f"a link to {os.readlink(path)}, which does not exist" if path.is_symlink() else "not there"
            raise ConfigError(f"--include {path}: it is {reason}. Check the path.")
        if not (path.is_file() or path.is_dir()):
            raise ConfigError(f"--include {path}: it is neither a file nor a folder, so it can't be sent.")
        _copy(path, folder / path.resolve().name, tell)


def _copy(source: Path, target: Path, tell: Callable[[str], None]) -> None:
    def ignored(folder: str, names: list[str]) -> set[str]:
        odd = {name for name in names if not _can_be_sent(Path(folder, name))}
        for name in sorted(odd):
            tell(f"not sent: {Path(folder, name)} is no regular file or folder, or a link that leads nowhere or back")
        return odd | _COMPILED(folder, names)

    try:
        if source.is_dir():
            shutil.copytree(source, target, ignore=ignored, dirs_exist_ok=True)
        else:
            shutil.copy2(source, target)
    except shutil.Error as error:
        raise ConfigError(f"{source} can't be sent: {_first(error.args[0])}. Fix it, or leave it out.") from None
    except OSError as error:
        where = error.filename or source
        raise ConfigError(f"{where} can't be sent ({error.strerror}). Fix its permissions, or leave it out.") from None


def _can_be_sent(path: Path) -> bool:
    try:
        mode = path.stat().st_mode
        leads_back = path.is_symlink() and path.resolve() in path.absolute().parents
    except (OSError, RuntimeError):  # a broken link, or links in a circle
        return False
    return not leads_back and (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _first(problems: Iterable[tuple[str, str, str]]) -> str:
    return next((reason for _, _, reason in problems), "unknown")
