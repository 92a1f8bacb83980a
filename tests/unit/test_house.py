"""Properties of the whole repository: layers, the code map, the configuration and its documentation."""

from __future__ import annotations

import ast
import gc
import itertools
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from pydantic import BaseModel

from jobs.configuration_docs import TARGET, configuration_markdown
from orchestrator.config.base import by_name
from orchestrator.config.config import Config
from orchestrator.config.described import description_of
from tests.deadlines import scaled

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("orchestrator", "actors", "jobs")
MODULES = sorted(
    path.relative_to(ROOT).as_posix()
    for package in PACKAGES
    for path in (ROOT / package).rglob("*.py")
    if path.name != "__init__.py" or len(ast.parse(path.read_text(encoding="utf-8")).body) > 1
)
CODE_MAP = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")

BLOCKED = ("ray", "torch", "vllm", "deepspeed", "transformers")
IMPORT_ALL = f"""
import importlib, pkgutil, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocker())
import orchestrator
names = [module.name for module in pkgutil.walk_packages(orchestrator.__path__, "orchestrator.")]
for name in names:
    importlib.import_module(name)
print(len(names))
"""


def test_all_but_vllms_own_modules_import_without_vllm() -> None:
    """vLLM is not published for macOS."""
    using = ("cpu", "experts", "packed", "places", "readback", "taken", "verify", "write")
    weights = [f"actors/weights/{name}.py" for name in using]
    own = [f"actors/engines/vllm_{name}.py" for name in ("engine", "plugin", "trial", "workers")] + weights
    others = [path for path in MODULES if path not in own and "__main__" not in path]
    names = [path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in others]
    code = f"import sys, importlib; sys.modules['vllm'] = None; [importlib.import_module(name) for name in {names}]"
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=scaled(120), check=False)
    assert done.returncode == 0, done.stderr


def test_orchestrator_imports_without_the_heavy_parts() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL], cwd=ROOT, capture_output=True, text=True, timeout=scaled(120), check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= sum(module.startswith("orchestrator/") for module in MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_code_map_names_every_module(module: str) -> None:
    assert re.search(rf"^\| `{re.escape(module)}` \| \S", CODE_MAP, re.MULTILINE), (
        f"{module}: not in docs/architecture.md"
    )


def test_code_map_names_no_module_that_is_gone() -> None:
    named = re.findall(r"^\| `((?:orchestrator|actors|jobs)/[^`]+\.py)` \|", CODE_MAP, re.MULTILINE)
    assert sorted(set(named)) == sorted(named)
    assert [name for name in named if not (ROOT / name).exists()] == []


def _sections(annotation: object) -> set[type[BaseModel]]:
    """All sections below an annotation, including those that a key `name` selects from."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        fields = annotation.model_fields.values()
        below = [*(field.annotation for field in fields), *_chosen_by_name(annotation)]
        return {annotation} | set(itertools.chain.from_iterable(map(_sections, below)))
    return set(itertools.chain.from_iterable(map(_sections, typing.get_args(annotation))))


def _chosen_by_name(section: type[BaseModel]) -> list[type[BaseModel]]:
    fields = section.model_fields.values()
    return [kind for field in fields if (choice := by_name(field)) for kind in choice.table.values()]


def _names_read() -> set[str]:
    """Names of attributes that code reads outside the sections that define them."""
    gc.collect()  # collecting a failed task during parsing parses too, which fails in Python 3.11.7
    trees = [
        ast.parse((ROOT / module).read_text(encoding="utf-8"))
        for module in MODULES
        if (not module.startswith("orchestrator/config/") or module == "orchestrator/config/changes.py")
        and module != "jobs/configuration_docs.py"
    ]
    return {
        node.attr
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }


def test_every_config_key_is_read_somewhere() -> None:
    keys = {name for section in _sections(Config) for name in section.model_fields}
    assert sorted(keys - _names_read()) == []


def test_every_config_key_is_described() -> None:
    # The table of sections documents their `name`.
    chosen = {kind for section in _sections(Config) for kind in _chosen_by_name(section)}
    plain = [
        f"{section.__name__}.{name}"
        for section in _sections(Config)
        for name, field in section.model_fields.items()
        if not _sections(field.annotation)
        and not description_of(section, name)
        and not (section in chosen and name == "name")
    ]
    assert plain == []


def test_configuration_document_is_in_step_with_the_config() -> None:
    assert TARGET.read_text(encoding="utf-8") == configuration_markdown(), "run `make docs`"
