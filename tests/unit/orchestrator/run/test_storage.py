"""Files are complete or absent."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import orchestrator.run.storage
from orchestrator.errors import StorageError
from orchestrator.run.storage import (
    create_sealed,
    follow_umask,
    inside,
    read_json,
    read_sealed,
    replacing,
    sha256,
    write_json,
)


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
        monkeypatch.setattr(orchestrator.run.storage, name, lambda path, name=name: calls.append(name))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    write_json(tmp_path / "file", {"a": 1})
    assert calls == ["sync_file", "replace", "sync_folder"]


def test_a_full_disk_is_a_storage_error_that_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(orchestrator.run.storage, "sync_file", full)
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


def _answering(number: int) -> Callable[..., None]:
    def refuse(*paths: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM, errno.ENOTSUP, errno.EACCES, errno.EMLINK, errno.EXDEV])
def test_storage_without_hard_links_still_lets_one_writer_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "link", _answering(number))
    path = tmp_path / "manifest.json"
    assert create_sealed(path, {"by": "first"})
    assert not create_sealed(path, {"by": "second"})
    assert read_sealed(path) == {"by": "first"}
    assert os.listdir(tmp_path) == ["manifest.json"]


def test_without_hard_links_a_claim_holds_others_off_until_its_writer_is_long_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", _answering(errno.ENOSYS))
    claim, path = tmp_path / ".manifest.json.claim", tmp_path / "manifest.json"
    claim.touch()
    assert not create_sealed(path, {"by": "second"})
    assert not path.exists()
    long_ago = claim.stat().st_mtime - 120
    os.utime(claim, (long_ago, long_ago))
    assert create_sealed(path, {"by": "second"})
    assert os.listdir(tmp_path) == ["manifest.json"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
def test_storage_that_cannot_sync_a_folder_is_used_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    fsync = os.fsync

    def of_files_only(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", of_files_only)
    write_json(tmp_path / "file", {"a": 1})
    assert read_json(tmp_path / "file") == {"a": 1}
    monkeypatch.setattr(os, "fsync", _answering(errno.EIO))
    with pytest.raises(StorageError, match=r"file can't be written \(Input/output error\); check its storage"):
        write_json(tmp_path / "file", {"a": 2})


def test_files_that_a_library_made_private_follow_the_umask(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        (tmp_path / "folder").mkdir()
        for path in (tmp_path / "model.safetensors", tmp_path / "folder" / "config.json"):
            path.touch(mode=0o600)
        follow_umask(tmp_path)
    finally:
        os.umask(umask)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*.*")} == {
        "model.safetensors": 0o640,
        "config.json": 0o640,
    }


def test_mounts_that_keep_no_modes_are_taken_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr(Path, "chmod", _answering(errno.EPERM))
    follow_umask(tmp_path)
    assert os.listdir(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize("name", ["a/b.txt", "step-000001/x", "..a", "a..b/.c"])
def test_names_inside_a_folder_are_taken(tmp_path: Path, name: str) -> None:
    assert inside(tmp_path, name) == tmp_path / name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "/etc/passwd", "../x", "a/../../x", "a/..", "./a", "a//b", "a/", "a\0b"]
)
def test_names_that_lead_out_of_a_folder_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(StorageError, match="is damaged"):
        inside(tmp_path, name)
