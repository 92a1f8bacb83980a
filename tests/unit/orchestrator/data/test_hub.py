"""Data sets of the hub by name, where the package `datasets` is installed; here it is a stand-in."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import date
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.data.kinds import DEMONSTRATIONS, DOCUMENTS
from orchestrator.data.readers import read_all
from orchestrator.errors import DataError


def load_dataset(path: str, name: str | None = None, *, split: str, streaming: bool) -> Iterator[dict[str, Any]]:
    assert streaming
    if path == "nobody/none":
        raise FileNotFoundError("no such data set")
    yield {"question": f"{path} {name} {split}?", "answer": "#### 1", "day": date(2020, 1, 1), "empty": None}
    yield {"question": "2?", "answer": "#### 2", "day": None, "empty": None}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))  # type: ignore[arg-type]


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("name", "asked"), [("openai/gsm8k:main:train", "openai/gsm8k main train?"), ("x:test", "x None test?")]
)
def test_rows_of_a_split_are_read_as_those_of_a_file(name: str, asked: str) -> None:
    records, report = read_all(DEMONSTRATIONS, f"datasets:{name}")
    assert [record.messages[0].content for record in records] == [asked, "2?"]
    assert (report.format, report.num_rows) == ("question", 2)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", ["x", "x:", "a:b:c:d", ":train"])
def test_names_have_two_or_three_parts(name: str) -> None:
    with pytest.raises(DataError, match="must be datasets:NAME:SPLIT or datasets:NAME:CONFIG:SPLIT"):
        read_all(DEMONSTRATIONS, f"datasets:{name}")


@pytest.mark.usefixtures("installed")
def test_what_the_package_raises_and_rows_that_do_not_fit_are_named() -> None:
    with pytest.raises(
        DataError, match="datasets:nobody/none:train can't be loaded: FileNotFoundError: no such data set"
    ):
        read_all(DEMONSTRATIONS, "datasets:nobody/none:train")
    with pytest.raises(DataError, match="datasets:x:train: row 1 fits no known format; its fields are: question"):
        read_all(DOCUMENTS, "datasets:x:train")


def test_without_the_package_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="needs the package `datasets`.*pip install datasets, or give a file"):
        read_all(DEMONSTRATIONS, "datasets:x:train")
