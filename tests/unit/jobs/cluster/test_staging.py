"""A job's files are only regular files, whatever the included folders contain."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from jobs.cluster.staging import PACKAGES, stage_project
from orchestrator.errors import ConfigError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in PACKAGES:
        (tmp_path / "root" / name / "__pycache__").mkdir(parents=True)
        (tmp_path / "root" / name / "x.py").touch()
    return tmp_path / "root"


def test_sockets_pipes_and_links_that_lead_nowhere_or_back_are_left_out_with_a_line(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = tmp_path / "more"
    (more / "inner").mkdir(parents=True)
    (more / "data.txt").write_text("kept")
    (more / "inner" / "link.txt").symlink_to(more / "data.txt")
    os.mkfifo(more / "pipe")
    (more / "broken").symlink_to(tmp_path / "gone")
    (more / "circle").symlink_to(more / "circle")
    (more / "inner" / "back").symlink_to(more)
    monkeypatch.chdir(more)  # a socket's path has at most 107 bytes
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        lines: list[str] = []
        stage = tmp_path / "stage"
        stage.mkdir()
        stage_project(root, stage, [more], lines.append)
    assert {str(path.relative_to(stage)) for path in (stage / "more").rglob("*")} == {
        "more/data.txt",
        "more/inner",
        "more/inner/link.txt",
    }
    assert (stage / "more" / "inner" / "link.txt").read_text() == "kept"
    assert [line.split(" is ")[0] for line in lines] == [
        f"not sent: {more / name}" for name in ("broken", "circle", "pipe", "socket", "inner/back")
    ]
    assert not list(stage.rglob("__pycache__"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "not there"),
        (os.mkfifo, "neither a file nor a folder"),
        (lambda path: path.symlink_to("nowhere"), "a link to nowhere, which does not exist"),
    ],
    ids=["nothing", "pipe", "broken link"],
)
def test_what_cannot_be_sent_is_named(root: Path, tmp_path: Path, make: object, message: str) -> None:
    path = tmp_path / "it"
    make(path)  # type: ignore[operator]
    (tmp_path / "stage").mkdir()
    with pytest.raises(ConfigError, match=message):
        stage_project(root, tmp_path / "stage", [path])


def test_a_file_that_cannot_be_read_is_named(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root can read everything, so the test makes the copy fail."""
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "secret").touch()

    def refuse(source: str, *rest: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", source)

    monkeypatch.setattr("shutil.copyfile", refuse)
    (tmp_path / "stage").mkdir()
    with pytest.raises(ConfigError, match="can't be sent.*Permission denied"):
        stage_project(root, tmp_path / "stage", [tmp_path / "more"])
