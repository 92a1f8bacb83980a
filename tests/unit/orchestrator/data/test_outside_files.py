"""Files that are not regular are never opened, and the error names their kind."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from jobs.prepare import find_data
from orchestrator.config.loader import load_config
from orchestrator.data.inputs import MAX_SETTINGS_BYTES, read_text
from orchestrator.data.kinds import PROMPTS, RANKINGS
from orchestrator.data.readers import read_all
from orchestrator.errors import ConfigError, DataError


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


def _link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


KINDS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "folder": (Path.mkdir, "it is a folder"),
    "pipe": (_fifo, "it is a named pipe"),
    "socket": (_socket, "it is a socket"),
    "endless device": (_link_to("/dev/zero"), "it is a device"),
    "terminal": (_link_to("/dev/tty"), "it is a device"),
    "dangling link": (_link_to("gone"), "is a link to gone, which does not exist"),
    "loop of links": (_link_to("file"), "symbolic links"),
    "nothing": (lambda path: None, "does not exist: check the path"),
}


@pytest.fixture
def short_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)  # the path of a socket is limited to about 100 bytes
    return Path()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", KINDS)
def test_no_file_but_a_regular_one_is_opened(short_folder: Path, kind: str) -> None:
    make, fault = KINDS[kind]
    path = short_folder / "file"
    make(path)
    reads: tuple[tuple[Callable[[Path], object], type[Exception]], ...] = (
        (partial(read_all, PROMPTS), DataError),
        (partial(read_all, RANKINGS), DataError),
        (load_config, ConfigError),
    )
    for read, error in reads:
        with pytest.raises(error) as caught:
            read(find_data(path))
        assert fault in str(caught.value) and "file" in str(caught.value)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "~no-such-user/x", "file/x"])
def test_impossible_names_are_errors_of_ours(short_folder: Path, name: str) -> None:
    (short_folder / "file").write_bytes(b"x")
    with pytest.raises(DataError):
        read_all(PROMPTS, find_data(Path(name)))
    with pytest.raises(ConfigError):
        load_config(Path(name))


def test_a_link_to_a_file_is_followed(short_folder: Path) -> None:
    (short_folder / "real").write_text('{"prompt": "q"}')
    (short_folder / "link").symlink_to("real")
    assert len(read_all(PROMPTS, short_folder / "link")[0]) == 1


def test_settings_have_a_longest_length(tmp_path: Path) -> None:
    path = tmp_path / "settings"
    path.write_bytes(b"x" * (MAX_SETTINGS_BYTES + 1))
    with pytest.raises(ConfigError, match="longer than 1024 KiB"):
        read_text(path, str(path), ConfigError)
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        read_text(path, str(path), ConfigError)
