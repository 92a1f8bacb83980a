"""Paths, modules, links and headings that the documents name exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/*.md", "benchmarks/trl/*.md", "Makefile", "k8s/**/*.yaml")
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"  # also describes the past
)
PACKAGES = ("actors", "benchmarks", "jobs", "orchestrator", "tests")
FOLDERS = (*PACKAGES, r"\.ci", "docs", "k8s", "requirements")
PATH = re.compile(rf"(?<![\w/.~<>$-])(?:{'|'.join(FOLDERS)})/[\w./*-]*[\w*]")
MODULE = re.compile(rf"(?<![\w/.-])(?:{'|'.join(PACKAGES)})(?:\.(?!md\b)[a-z_]+)+(?![\w(/])")
LINK = re.compile(r"\]\(([^()#\s]*)(#[^()\s]*)?\)")
# Outputs of commands.
MADE = ("benchmarks/results", "benchmarks/.venv-trl", "k8s/overlays/mine")


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_that_is_named_exists(document: str) -> None:
    """A path with a `*` must match at least one."""
    named = [path.rstrip(".") for path in PATH.findall(text_of(document))]
    assert [path for path in named if not path.startswith(MADE) and not list(ROOT.glob(path))] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_module_that_is_named_exists(document: str) -> None:
    assert [name for name in MODULE.findall(text_of(document)) if not is_there(name)] == []


def is_there(name: str) -> bool:
    """A package, a module, or a name that a module's text contains."""
    place = ROOT.joinpath(*name.split("."))
    if place.is_dir() or place.with_suffix(".py").is_file():
        return True
    module = place.parent.with_suffix(".py")
    return module.is_file() and re.search(rf"\b{place.name}\b", module.read_text(encoding="utf-8")) is not None


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if name.endswith(".md")])
def test_every_link_leads_to_a_file_and_a_heading(document: str) -> None:
    lost = []
    for target, anchor in LINK.findall(text_of(document)):
        if "://" in target:
            continue
        path = (ROOT / document).parent / target if target else ROOT / document
        is_lost = anchor and path.suffix == ".md" and path.exists() and anchor[1:] not in anchors(path)
        if not path.exists() or is_lost:
            lost.append(target + anchor)
    assert lost == []


def anchors(path: Path) -> set[str]:
    """Anchors of the headings, as on GitHub."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_assertion_about_a_device_is_listed_with_its_state() -> None:
    tests = {
        (path.relative_to(ROOT).as_posix(), node.name.removeprefix("test_").replace("_", " "))
        for path in sorted((ROOT / "tests/gpu").glob("test_*.py"))
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    }
    rows = re.findall(r"^\| `(tests/gpu/\S+)` \| (.+) \| (.+) \|$", text_of("docs/gpu.md"), re.MULTILINE)
    listed = {(path, said) for path, said, _ in rows}
    assert listed == tests, "list each test of tests/gpu in docs/gpu.md: its name in words, and where it has run"
    assert all(re.fullmatch(r"not yet run on a device|passed on .+", state) for *_, state in rows)


def test_the_patterns_see_what_they_are_for() -> None:
    seen = "`jobs/configs/*.yaml`, (docs/why.md#x), tests/unit, .ci/run. not/jobs/x https://a/docs/b"
    assert PATH.findall(seen) == ["jobs/configs/*.yaml", "docs/why.md", "tests/unit", ".ci/run"]
    text = "`jobs.cluster.local_ray` actors.rewards.gold:vader x.jobs.y benchmarks.md"
    assert MODULE.findall(text) == ["jobs.cluster.local_ray", "actors.rewards.gold"]
    for name in ("jobs.cluster.local_ray", "actors.weights", "jobs.cluster.local_ray.local_ray"):
        assert is_there(name)
    for name in ("jobs.no_such", "jobs.cluster.local_ray.no_such", "no.such.thing"):
        assert not is_there(name)
