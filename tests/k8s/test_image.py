"""The pods' image: the expectations of KubeRay and the manifests."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.deadlines import scaled
from tests.k8s.conftest import ROOT
from tests.k8s.crds import Manifest
from tests.k8s.house_rules import rayjob_of
from tests.k8s.kuberay_rules import templates_of

Instruction = tuple[str, str]


def stages(dockerfile: str) -> list[list[Instruction]]:
    """Instructions (keyword, arguments with joined continuation lines) of each stage, without ARGs before FROM."""
    lines = [line for line in dockerfile.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    found: list[list[Instruction]] = []
    for line in joined.splitlines():
        keyword, _, arguments = line.partition(" ")
        assert keyword.isupper(), line
        if keyword == "FROM":
            found.append([])
        if found:
            found[-1].append((keyword, arguments.strip()))
    return found


@pytest.fixture(scope="module")
def built() -> list[list[Instruction]]:
    return stages((ROOT / "Dockerfile").read_text(encoding="utf-8"))


def arguments_of(stage: list[Instruction], keyword: str) -> list[str]:
    return [arguments for found, arguments in stage if found == keyword]


def test_dockerfile_has_a_builder_and_a_final_stage(built: list[list[Instruction]]) -> None:
    builder, final = built
    assert arguments_of(builder, "FROM")[0].endswith(" AS builder")
    assert all("--from=builder" in arguments for arguments in arguments_of(final, "COPY"))


def test_python_is_the_one_of_the_lock() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert re.search(r"(?m)^ARG PYTHON=3\.11-slim", text)


def test_shell_commands_parse(built: list[list[Instruction]]) -> None:
    for stage in built:
        for command in arguments_of(stage, "RUN"):
            subprocess.run(["sh", "-n", "-c", command], check=True, timeout=scaled(10))


def test_final_stage_has_what_probes_and_kernels_need(built: list[list[Instruction]]) -> None:
    (install,) = [command for command in arguments_of(built[-1], "RUN") if "apt-get install" in command]
    assert {"bash", "wget", "g++"} <= set(install.split())
    assert "rm -rf /var/lib/apt/lists/*" in install


def test_pods_run_as_the_images_user(built: list[list[Instruction]], objects: list[Manifest]) -> None:
    (user,) = arguments_of(built[-1], "USER")
    for template in templates_of(rayjob_of(objects)).values():
        context = template["spec"]["securityContext"]
        assert f"{context['runAsUser']}:{context['runAsGroup']}" == user


def test_pods_that_ask_for_no_gpu_are_shown_none(built: list[list[Instruction]]) -> None:
    assert "NVIDIA_VISIBLE_DEVICES" not in " ".join(arguments_of(built[-1], "ENV"))


def test_login_shells_find_ray_too(built: list[list[Instruction]]) -> None:
    """An operator that uses login shells runs /etc/profile, which resets PATH."""
    assert any("/etc/profile.d/" in command for command in arguments_of(built[-1], "RUN"))
    assert any("PATH=/opt/venv/bin:" in variables for variables in arguments_of(built[-1], "ENV"))


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_packages_are_those_of_the_profiles_lock(built: list[list[Instruction]], profile: str) -> None:
    (install,) = [command for command in arguments_of(built[0], "RUN") if "packages.sh" in command]
    script = install.replace("/app/requirements/packages.sh", "env | grep CPU_WHEELS; echo")
    done = subprocess.run(
        ["sh", "-c", script],
        env={"PROFILE": profile, "CPU_WHEELS": "https://wheels.example", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
        timeout=scaled(10),
    )
    assert done.stdout.splitlines()[-1] == f"/opt/venv /app/requirements/{profile}.txt"
    assert (ROOT / "requirements/packages.sh").stat().st_mode & 0o111 and (
        ROOT / f"requirements/{profile}.txt"
    ).exists()


def test_the_pods_user_can_not_change_the_program(built: list[list[Instruction]]) -> None:
    copies = arguments_of(built[-1], "COPY")
    assert {copy.split()[-1] for copy in copies} == {"/opt/venv", "/app"}
    assert not [copy for copy in copies if "--chown" in copy or "--chmod" in copy]
    shell = " ".join(arguments_of(built[-1], "RUN"))
    assert "chown" not in shell and "chmod" not in shell
    assert "run.root=/runs" in arguments_of(built[-1], "CMD")[0], "a run writes where the user has permission"


def test_context_is_a_list_of_what_goes_in() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "*"
    admitted = {line[1:] for line in lines if line.startswith("!")}
    assert {"actors", "jobs", "orchestrator", "requirements", "pyproject.toml"} <= admitted
    assert not admitted & {".git", ".venv", "runs", "tests"}
