"""If the embedded model can't be unpacked, the message names the folder and a remedy."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import actors.models.model
from actors.models.model import EMBEDDED, resolve_model
from orchestrator.errors import DataError


def a_file(path: Path) -> None:
    path.touch()


def a_circle(path: Path) -> None:
    path.symlink_to(path)


def a_broken_link(path: Path) -> None:
    path.symlink_to(path.with_name("gone"))


@pytest.mark.parametrize("make", [a_file, a_circle, a_broken_link])
def test_a_cache_that_cannot_be_made_is_named(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "cache")
    if make is a_broken_link:
        (tmp_path / "gone").touch()
    with pytest.raises(DataError, match=rf"unpacked into {tmp_path}/cache\S*: .*set run.cache"):
        resolve_model(EMBEDDED, tmp_path / "cache")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(package: Path, folder: Path) -> None:
        raise OSError(number, os.strerror(number), str(folder))

    monkeypatch.setattr(actors.models.model, "_convert", fail)
    with pytest.raises(DataError, match=rf"{os.strerror(number)}.*free space, or set run.cache"):
        resolve_model(EMBEDDED, tmp_path)


@pytest.mark.parametrize("make", [a_circle, a_broken_link])
def test_a_model_behind_a_broken_link_is_named(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "model")
    with pytest.raises(DataError, match="which does not exist: correct the link"):
        resolve_model(str(tmp_path / "model"), tmp_path)
