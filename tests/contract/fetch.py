"""Fetches what the lock of GPU machines names, without installing it: Python files of a wheel, and the index's answers.

Where no index answers, tests are skipped with its message. An index that answers and lacks the release fails them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
from filelock import FileLock

from tests.deadlines import scaled

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "requirements/gpu.txt"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rlhf-orchestrator/contract"
_OFFLINE = re.compile(
    r"Retrying|NewConnectionError|Failed to establish|error sending request|dns error|--no-index", re.I
)
_UNREACHABLE: list[str] = []
_OF_LOCK = re.compile(r"^(?P<name>[a-z0-9-]+)==(?P<version>[^ ;]+)(?P<rest>[^\n]*(?:\n    --hash=[^\n]*)*)", re.M)


def locked(name: str) -> tuple[str, str]:
    """(version, requirement with hashes) of a package of the lock."""
    found = next(entry for entry in _OF_LOCK.finditer(LOCK.read_text(encoding="utf-8")) if entry["name"] == name)
    return found["version"], f"{name}=={found['version']} \\\n" + found["rest"].partition("\n")[2]


def python_files(name: str) -> Path:
    """A folder with the Python files of the wheel that the lock pins; kept in the user's cache."""
    version, requirement = locked(name)
    target = CACHE / f"{name}-{version}-py"
    if target.is_dir():
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        _download(requirement, Path(scratch))
        (wheel,) = Path(scratch).glob("*.whl")
        unpacked = Path(scratch) / "py"
        with zipfile.ZipFile(wheel) as archive:
            members = [each for each in archive.namelist() if each.endswith(".py")]
            archive.extractall(unpacked, members)
        try:
            unpacked.rename(target)
        except OSError:  # another process was faster
            assert target.is_dir()
    return target


def _download(requirement: str, folder: Path) -> None:
    (folder / "lock.txt").write_text(requirement, encoding="utf-8")
    platform = ["--platform", "manylinux_2_28_x86_64", "--python-version", "3.11", "--abi", "abi3"]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary", ":all:"]
    run([*command, *platform, "--quiet", "--dest", str(folder), "--requirement", str(folder / "lock.txt")])


def uv() -> Path:
    """The resolver that wrote the lock: on PATH, else the locked one, installed to the user's cache. Processes that ask
    at the same time install it once."""
    found, target = shutil.which("uv"), CACHE / "uv"
    if found is not None:
        return Path(found)
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock", timeout=scaled(280)):
        if not (target / "bin/uv").is_file():
            lock = ROOT / "requirements/uv.txt"
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes"]
            run([*command, "--target", str(target), "--requirement", str(lock)])
    return target / "bin/uv"


def run(command: list[str]) -> str:
    """The output of a client of the index. Skips the test if no index answers, and later ones at once."""
    if _UNREACHABLE:
        pytest.skip(_UNREACHABLE[0])
    environment = {**os.environ, "PIP_RETRIES": "1", "UV_HTTP_RETRIES": "1", "UV_NO_PROGRESS": "1"}
    if "PIP_INDEX_URL" in os.environ:
        environment.setdefault("UV_DEFAULT_INDEX", os.environ["PIP_INDEX_URL"])
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=scaled(280), check=False)
    reason = next(filter(_OFFLINE.search, done.stderr.splitlines()), None)
    if done.returncode and (reason or os.environ.get("PIP_NO_INDEX")):
        _UNREACHABLE.append(f"no package index answers: {(reason or 'PIP_NO_INDEX is set').strip()[:200]}")
        pytest.skip(_UNREACHABLE[0])
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr
