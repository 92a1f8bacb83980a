"""The check itself: changes of a library that break its users are found, on a small library and a small user of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contract.contract import Contract
from tests.contract.world import World

# Shaped like the parts of vLLM 0.32 that actors.weights uses.
LIBRARY = {
    "__init__.py": """
from typing import TYPE_CHECKING
NAMES = {"LLM": ".engine:LLM"}
if TYPE_CHECKING:
    from engines.engine import LLM
else:
    def __getattr__(name):
        return NAMES[name]
""",
    "source.py": """
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

@dataclass(frozen=True)
class ParamMeta:
    name: str
    shape: tuple[int, ...]

class WeightSource(ABC):
    @abstractmethod
    def metadata(self) -> list[ParamMeta]:
        raise NotImplementedError

    @abstractmethod
    def __iter__(self) -> Iterator[tuple[str, object]]:
        raise NotImplementedError
""",
    "engine.py": """
from dataclasses import dataclass
from typing import Any, Protocol

@dataclass
class Arguments:
    model: str
    max_sequences: int = 8
    seed: int = 0

class Output:
    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

class Client(Protocol):
    def start(self) -> None: ...
    def update(self, info: dict[str, Any]) -> None: ...

class LLM:
    def __init__(self, model: str, **kwargs: Any) -> None:
        self.arguments = Arguments(model=model, **kwargs)

    def generate(self, prompts: list[str], *, use_bar: bool = True) -> list[Output]:
        return []

    def collective_rpc(self, method: str, kwargs: dict[str, Any] | None = None) -> list[Any]:
        return []

    def attach(self, client: Client) -> None: ...

class Transfer:
    def __init__(self, model: Any) -> None:
        self.model = model

    def receive(self, info: Any, is_last: bool = False) -> None:
        raise NotImplementedError

class Worker:
    def load(self, path: str) -> None:
        self._is_loaded = True
""",
}
USER = """
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from engines import LLM
from engines.engine import Output, Transfer
from engines.source import ParamMeta, WeightSource


class ChecksummedSource(WeightSource):
    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta("norm", shape=(8,))]

    def __iter__(self) -> Iterator[tuple[str, object]]:
        yield "norm", None


class Bytes(Transfer):
    def receive(self, info: Any, is_last: bool = False) -> None:
        print(self.model)


class FanOut:
    def start(self) -> None: ...

    def update(self, info: Any) -> None: ...


class Engine:
    def __init__(self) -> None:
        self._llm = started()
        self._llm.attach(client=FanOut())

    def sample(self) -> list[list[int]]:
        return [tokens_of(output) for output in self._llm.generate([], use_bar=False)]

    def _call(self, method: str | Callable[..., Any], **kwargs: Any) -> Any:
        return self._llm.collective_rpc(method, kwargs=kwargs)[0]

    def load(self) -> None:
        self._call("load", path="x")
        self._call(unload)


def started() -> LLM:
    return LLM("model", max_sequences=4, seed=1)


def tokens_of(output: Output) -> list[int]:
    return output.tokens


def unload(worker: Any) -> None:
    worker._is_loaded = False
"""
# (file, what it has, what it has after a change, what must be said of it); each is a change that a release made or may
# make. The first two are those of vLLM 0.33.
CHANGES = {
    "a method becomes a property": (
        "source.py",
        "    @abstractmethod\n    def metadata",
        "    @property\n    @abstractmethod\n    def metadata",
        "metadata overrides engines.source.WeightSource.metadata: is a method, and theirs is a property",
    ),
    "an overridden method gets another name": (
        "source.py",
        "def __iter__",
        "def iter_full",
        "__iter__: nothing calls it: engines.source.WeightSource has no such member",
    ),
    "an abstract method is new": (
        "source.py",
        "    @abstractmethod\n    def metadata",
        "    @abstractmethod\n    def held(self): ...\n    @abstractmethod\n    def metadata",
        "ChecksummedSource is complete: does not implement held",
    ),
    "a field has another name": ("source.py", "shape: tuple", "size: tuple", "missing a required argument: 'size'"),
    "a field is new and required": (
        "source.py",
        "    name: str",
        "    name: str\n    dtype: str",
        "missing a required arg",
    ),
    "a class is gone": ("source.py", "class ParamMeta", "class Meta", "ParamMeta: there is no such name"),
    "an attribute is gone": (
        "engine.py",
        "self.tokens =",
        "self.token_ids =",
        "Output.tokens: there is no such attrib",
    ),
    "a method is gone": ("engine.py", "def generate", "def run", "LLM.generate: there is no such attribute"),
    "an argument has another name": ("engine.py", "use_bar", "use_tqdm", "unexpected keyword argument 'use_bar'"),
    "an argument passed on is gone": ("engine.py", "    seed: int = 0\n", "", "unexpected keyword argument 'seed'"),
    "an override is passed more": (
        "engine.py",
        "is_last: bool = False)",
        "is_last: bool = False, *, version: int = 0)",
        "receive overrides engines.engine.Transfer.receive: does not take 'version'",
    ),
    "an override's arguments change places": (
        "engine.py",
        "info: Any, is_last: bool = False)",
        "is_last: bool = False, info: Any = None)",
        "takes 'is_last' at another place",
    ),
    "an attribute of a base is gone": (
        "engine.py",
        "self.model = model",
        "pass",
        "Bytes.model: there is no such attrib",
    ),
    "a method called by name is gone": (
        "engine.py",
        "def load",
        "def load_from",
        "Worker.load(_, path=): there is no such",
    ),
    "its argument has another name": ("engine.py", "path: str", "folder: str", "missing a required argument: 'folder'"),
    "a private attribute is gone": (
        "engine.py",
        "self._is_loaded",
        "self._loaded",
        "Worker._is_loaded: there is no such",
    ),
    "a protocol asks for more": (
        "engine.py",
        "    def start(self) -> None: ...",
        "    def start(self) -> None: ...\n    def stop(self) -> None: ...",
        "FanOut.stop as engines.engine.Client.stop: is missing",
    ),
    "a lazy name is gone": ("__init__.py", "LLM", "Engine", "engines.LLM: there is no such name"),
}


def problems(folder: Path, library: dict[str, str]) -> list[str]:
    package = folder / "engines"
    package.mkdir()
    for name, text in library.items():
        (package / name).write_text(text, encoding="utf-8")
    (folder / "user.py").write_text(USER, encoding="utf-8")
    world = World({"engines": folder, "user": folder})
    return Contract(world, "engines", workers=["engines.engine.Worker"]).check(["user"]).problems


def test_a_user_of_the_release_that_it_was_written_for_has_no_problems(tmp_path: Path) -> None:
    assert problems(tmp_path, LIBRARY) == []


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_breaks_the_user_is_found(tmp_path: Path, change: str) -> None:
    file, before, after, expected = CHANGES[change]
    assert before in LIBRARY[file]
    found = problems(tmp_path, LIBRARY | {file: LIBRARY[file].replace(before, after)})
    assert any(expected in line for line in found), found
    assert len(found) <= 2
