"""Fetches the peers' wheels, and imports single modules from them without what they depend on."""

from __future__ import annotations

import importlib
import importlib.machinery
import subprocess
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

PINS = ("verl==0.9.1", "openrlhf==0.11.2")
CACHE = Path("~/.cache/rlhf-orchestrator/peers").expanduser()
FETCH_S = 300.0


def fetch() -> list[Path]:
    """The folders to import from; the wheels are downloaded once.

    Raises:
        OSError: pip can't fetch them; the message is its last lines.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    return [_fetched(pin) for pin in PINS]


def _fetched(pin: str) -> Path:
    name, _, version = pin.partition("==")
    folder = CACHE / f"{name}-{version}"
    if not folder.is_dir():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(CACHE)]
        # One of them has a wheel for one Python alone, and is pure Python all the same.
        command += ["--python-version=3.11", "--implementation=cp", "--abi=cp311", "--abi=none"]
        command += ["--platform=manylinux1_x86_64", "--platform=any", pin]
        done = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_S, check=False)
        if done.returncode:
            raise OSError(f"{pin} can't be fetched: {done.stderr[-500:]}")
        (wheel,) = CACHE.glob(f"{name}-{version}-*.whl")
        part = folder.with_suffix(".part")
        zipfile.ZipFile(wheel).extractall(part)
        part.rename(folder)
    return next((path for path in folder.glob("*.data/purelib")), folder)


class _Stub(types.ModuleType):
    """A package that is not installed; its names are empty classes."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Stubs:
    """Finds a stub for each module of packages that turned out to be missing."""

    def __init__(self) -> None:
        self.packages: set[str] = set()

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in self.packages:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


_STUBS = _Stubs()


def load(name: str) -> Any:
    """Imports a module of a peer. For a process that does nothing else: packages that are missing stay replaced."""
    if _STUBS not in sys.meta_path:
        sys.path[:0] = map(str, fetch())
        sys.meta_path.append(_STUBS)  # type: ignore[arg-type]
    peer = name.partition(".")[0]
    while True:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package in {peer, *_STUBS.packages}:
                raise
            _STUBS.packages.add(package)
            for half_imported in [key for key in sys.modules if key.partition(".")[0] == peer]:
                del sys.modules[half_imported]
