"""Rendered overlays, exactly as `kubectl apply -k` would send them, and the CRD schemas."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.deadlines import scaled
from tests.k8s.crds import Manifest, Schemas, load_schemas

ROOT = Path(__file__).resolve().parents[2]
CRD_FOLDERS = (ROOT.parent / "shared/kuberay-crds", ROOT.parent / "shared/other-crds")
OVERLAYS = ("cpu", "gpu")
Render = Callable[[Path], list[Manifest]]


@pytest.fixture(scope="session")
def render() -> Render:
    """Renders a kustomization folder with plain `kubectl kustomize`, without flags that `kubectl apply -k` lacks."""
    beside_python = Path(sys.executable).with_name("kubectl")
    kubectl = str(beside_python) if beside_python.exists() else shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("no kubectl beside the Python interpreter or on PATH; pip install -r requirements/dev.txt")

    def _render(folder: Path) -> list[Manifest]:
        command = [kubectl, "kustomize", str(folder)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=scaled(60))
        assert done.returncode == 0, done.stderr
        assert not done.stderr, f"kustomize warns: {done.stderr}"
        return list(yaml.safe_load_all(done.stdout))

    return _render


@pytest.fixture(scope="session")
def schemas() -> Schemas:
    for folder in CRD_FOLDERS:
        if not folder.is_dir():
            pytest.skip(f"{folder} is absent: it holds the CustomResourceDefinitions to check against")
    return load_schemas(CRD_FOLDERS)


@pytest.fixture(scope="session")
def _rendered(render: Render) -> dict[str, list[Manifest]]:
    return {name: render(ROOT / "k8s/overlays" / name) for name in OVERLAYS}


@pytest.fixture(params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def objects(overlay: str, _rendered: dict[str, list[Manifest]]) -> list[Manifest]:
    """A copy of all objects of one overlay, which tests may modify."""
    return copy.deepcopy(_rendered[overlay])


@pytest.fixture
def gpu_objects(_rendered: dict[str, list[Manifest]]) -> list[Manifest]:
    return copy.deepcopy(_rendered["gpu"])
