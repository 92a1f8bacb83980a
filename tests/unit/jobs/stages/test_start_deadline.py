"""The deadline of a start grows with the run's largest model, which may lie on slow shared storage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from actors.models import model as models
from jobs.stages.settings import LOADING_S_PER_GIB, start_s
from orchestrator.config.loader import load_config

GIB = 1 << 30


def model(folder: Path, gib: int) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(gib * GIB)  # takes no space
    return folder


@pytest.mark.parametrize("key", ["model.path", "reference.path", "critic.path"])
def test_each_gib_of_the_largest_model_adds_its_time(tmp_path: Path, key: str) -> None:
    small, large = model(tmp_path / "small", 1), model(tmp_path / "large", 15)
    config = load_config(None, [f"model.path={small}", "deadlines.start_s=300", f"{key}={large}"])
    assert start_s(config) == 300 + 15 * LOADING_S_PER_GIB


def test_a_model_that_is_not_there_adds_nothing(tmp_path: Path) -> None:
    small = model(tmp_path / "small", 1)
    config = load_config(None, [f"model.path={small}", "deadlines.start_s=300", f"critic.path={tmp_path / 'not_yet'}"])
    assert start_s(config) == 300 + LOADING_S_PER_GIB


def test_nothing_is_downloaded_or_unpacked_for_a_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(name: str, **options: Any) -> str:
        assert options["local_files_only"], "a deadline is no reason to download"
        asked.append(name)
        if name == "some/model":
            return str(model(tmp_path / "snapshot", 2))
        raise LocalEntryNotFoundError("it is not in the cache")

    monkeypatch.setattr(models, "snapshot_download", download)
    monkeypatch.setattr(
        models, "_convert", lambda *_: pytest.fail("the embedded model is unpacked by those who load it")
    )
    keys = ["reference.path=some/model", "critic.path=another/model", f"run.cache={tmp_path / 'cache'}"]
    assert start_s(load_config(None, [*keys, "deadlines.start_s=300"])) == 300 + 2 * LOADING_S_PER_GIB
    assert sorted(asked) == ["another/model", "some/model"]
