"""A missing home folder is an error with a remedy."""

from __future__ import annotations

import pwd
from pathlib import Path

import pytest

from orchestrator.data.inputs import at_home
from orchestrator.errors import ConfigError, DataError


def test_the_home_folder_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert at_home("~/x", "run.cache", ConfigError) == tmp_path / "x"
    assert at_home("runs", "run.root", ConfigError) == Path("runs")


@pytest.mark.parametrize("path", ["~/x", "~nobody-of-this-name/x"])
def test_without_a_home_folder_the_key_and_the_way_out_are_named(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """As in a container whose user id has no entry in /etc/passwd."""

    def unknown(key: object) -> None:
        raise KeyError(key)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(DataError, match=r"run\.cache='~.*this user has none\. Set HOME .* absolute path"):
        at_home(path, "run.cache", DataError)
