"""The lock of GPU machines can be installed: the index has all of its files, and they satisfy each other."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.contract.fetch import LOCK, ROOT, run, uv

pytestmark = pytest.mark.variant  # what an index offers does not depend on the code

PYTHONS = ("3.11", "3.12", "3.13")
PLATFORMS = ("x86_64-manylinux_2_34", "aarch64-manylinux_2_34")
"""glibc 2.34 or newer; the image has 2.36."""


def hashes(text: str) -> dict[str, set[str]]:
    """By name==version: the hashes of its files."""
    found: dict[str, set[str]] = {}
    latest = ""
    for line in text.splitlines():
        if line.startswith("    --hash="):
            found[latest].add(line.split("=", 1)[1].rstrip(" \\"))
        elif line and not line.startswith("#"):
            latest = re.split(r"[ ;]", line)[0]
            found[latest] = set()
    return found


def missing(lock: Path, scratch: Path) -> list[str]:
    """Pins of a lock with a file that the index does not offer under this version."""
    text = lock.read_text(encoding="utf-8")
    pins = scratch / "pins.txt"
    pins.write_text(re.sub(r" \\$|^    --hash=.*\n?|^#.*\n", "", text, flags=re.M), encoding="utf-8")
    command = [str(uv()), "pip", "compile", "--quiet", "--universal", "--no-deps", "--generate-hashes", "--no-sources"]
    run([*command, "--python-version", "3.11", str(pins), "-o", str(scratch / "again.txt")])
    offered = hashes((scratch / "again.txt").read_text(encoding="utf-8"))
    return [pin for pin, digests in hashes(text).items() if not digests <= offered[pin]]


@pytest.mark.parametrize("name", ["gpu", "dev", "uv"])
def test_the_index_has_every_file_of_the_lock(tmp_path: Path, name: str) -> None:
    assert not missing(ROOT / f"requirements/{name}.txt", tmp_path)


def test_a_file_that_the_index_does_not_have_is_found(tmp_path: Path) -> None:
    text = LOCK.read_text(encoding="utf-8")
    digest = next(iter(hashes(text)["certifi==" + text.partition("\ncertifi==")[2].split()[0]]))
    (tmp_path / "lock.txt").write_text(text.replace(digest, "sha256:" + "0" * 64), encoding="utf-8")
    assert [pin.partition("==")[0] for pin in missing(tmp_path / "lock.txt", tmp_path)] == ["certifi"]


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("platform", PLATFORMS)
def test_every_package_of_the_lock_has_a_file_for_this_machine(tmp_path: Path, python: str, platform: str) -> None:
    command = [str(uv()), "pip", "install", "--dry-run", "--no-deps", "--require-hashes", "--target", str(tmp_path)]
    said = run([*command, "--python-version", python, "--python-platform", platform, "-r", str(LOCK)])
    assert f"Would install {len(hashes(LOCK.read_text(encoding='utf-8')))} packages" in said


def test_resolving_again_ends_with_the_same_lock(tmp_path: Path) -> None:
    """So the requirements of all packages, and of the project, hold together."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    run(["env", "LOCKS=gpu", f"PATH={uv().parent}:/usr/bin:/bin", str(tmp_path / "requirements/lock.sh")])
    again = (tmp_path / "requirements/gpu.txt").read_text(encoding="utf-8")
    assert hashes(again).keys() == hashes(LOCK.read_text(encoding="utf-8")).keys()
