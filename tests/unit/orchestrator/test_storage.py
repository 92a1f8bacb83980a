"""Files are whole or not there."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

import orchestrator.storage
from orchestrator.errors import StorageError
from orchestrator.storage import read_json, replacing, sha256, write_json


def test_a_file_takes_its_place_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


def test_after_a_failure_the_old_file_stands_and_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="half way"), replacing(path) as temporary:
        temporary.write_text("ne")
        raise RuntimeError("half way")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_content_is_on_disk_before_it_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("sync_file", "sync_folder"):
        monkeypatch.setattr(orchestrator.storage, name, lambda path, name=name: calls.append(name))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    write_json(tmp_path / "file", {"a": 1})
    assert calls == ["sync_file", "replace", "sync_folder"]


def test_a_full_disk_is_a_storage_error_that_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(orchestrator.storage, "sync_file", full)
    with pytest.raises(StorageError, match=r"out\.json can't be written \(No space left on device\)"):
        write_json(tmp_path / "out.json", {})
    assert os.listdir(tmp_path) == []


def test_a_missing_folder_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file"):
        write_json(tmp_path / "gone" / "out.json", {})


def test_json_survives_and_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "content.json"
    write_json(path, {"numbers": [0.1 + 0.2, 1e-300]})
    assert read_json(path) == {"numbers": [0.1 + 0.2, 1e-300]}
    path.write_text("{", encoding="utf-8")
    with pytest.raises(StorageError, match=r"content\.json is damaged"):
        read_json(path)
    with pytest.raises(StorageError, match=r"missing\.json can't be read"):
        read_json(tmp_path / "missing.json")


def test_checksums_are_those_of_the_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc" * 100_000)
    assert sha256(path) == hashlib.sha256(b"abc" * 100_000).hexdigest()
