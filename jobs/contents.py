"""Digests of the files that a run reads: contents identify a run, not paths.

Small files are read completely. Of a file above WHOLE_BYTES, usually weights, only the size, the ends and evenly spaced
blocks are read: training changes every tensor, and reading a large model would take minutes at every start.
For a rule the digest covers the file that defines it, not its imports. Files of this program are left out.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from actors.models.model import EMBEDDED, resolve_model
from jobs.prepare import PACKAGE_ROOT, find_data
from jobs.stages.table import own_name, stages_of
from orchestrator.config.config import Config
from orchestrator.data.mixtures import is_mixture, sources_of
from orchestrator.errors import RlhfError

WHOLE_BYTES = 64 << 20
_BLOCK_BYTES, _NUM_BLOCKS = 16 << 10, 256
_OF_A_MODEL = (".json", ".jinja", ".model", ".txt", ".safetensors", ".bin", ".py", ".tiktoken")


def contents(config: Config) -> dict[str, str]:
    """A digest by key of the config, or by `rule package.module:function`. Unreadable files are left out: the checks
    of a run report them."""
    found: dict[str, str] = {}
    for name, digest in _digests(config):
        with suppress(RlhfError, OSError, ValueError):
            value = digest()
            if value is not None:
                found[name] = value
    return found


def _digests(config: Config) -> Iterator[tuple[str, Callable[[], str | None]]]:
    stages = stages_of(config)
    inputs = [entry.stage.inputs(entry.config) for entry in stages]
    files: dict[str, Path | None] = {
        "prompts.path": config.prompts.path,
        "model.chat_template": config.model.chat_template,
    }
    models: dict[str, str | None] = {"model.path": config.model.path}
    for entry, found in zip(stages, inputs, strict=True):
        prompts = {"prompts.path": entry.config.prompts.path} if entry.stage.samples else {}
        for known, given in ((files, {**prompts, **found.files}), (models, found.models)):
            _add(known, given, entry.name)
    for name, file in files.items():
        if file is not None:
            yield name, partial(_data_digest, Path(file))
    for name, model in models.items():
        if model is not None and model != EMBEDDED:
            yield name, partial(_model_digest, model, config.run.cache)
    for rule in sorted({rule for found in inputs for rule in found.rules}):
        yield f"rule {rule}", partial(_rule_digest, rule)


def _add(known: dict[str, Any], given: Mapping[str, Any], stage: str) -> None:
    """Adds what a stage is given; what differs from an earlier stage's gets a name of its own (own_name)."""
    for key, value in given.items():
        if value is not None:
            name = key if known.get(key) in (None, value) else own_name(key, stage)
            known[name] = value


def digest_of(path: Path) -> str:
    """Of a file, or of a folder of a model."""
    return folder_digest(path) if path.is_dir() else file_digest(path)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, or of its size and samples of it (see above)."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        if size <= WHOLE_BYTES:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        for block in range(_NUM_BLOCKS):
            stream.seek(block * (size - _BLOCK_BYTES) // (_NUM_BLOCKS - 1))
            digest.update(stream.read(_BLOCK_BYTES))
        return digest.hexdigest()


def folder_digest(folder: Path) -> str:
    """Of the names and contents of a model's files."""
    files = sorted(path for path in folder.iterdir() if path.suffix in _OF_A_MODEL and path.is_file())
    lines = [f"{path.name} {file_digest(path)}\n" for path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _data_digest(path: Path) -> str:
    """Of a data file, or of a mixture and its sources."""
    file = find_data(path)
    if not is_mixture(file):
        return file_digest(file)
    lines = [file_digest(file), *(file_digest(source.path) for source in sources_of(file))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _model_digest(name_or_path: str, cache: Path) -> str:
    return folder_digest(resolve_model(name_or_path, cache))


def _rule_digest(function: str) -> str | None:
    """Of the file that defines a rule, found without importing anything: its package is code, too."""
    places: list[str] | None = sys.path
    name, origin = "", None
    for part in function.partition(":")[0].split("."):
        name = f"{name}.{part}" if name else part
        spec = PathFinder.find_spec(name, places)
        if spec is None:
            return None
        origin, places = spec.origin, list(spec.submodule_search_locations or ())
    if origin is None or Path(origin).resolve().is_relative_to(PACKAGE_ROOT / "actors"):
        return None
    return file_digest(Path(origin))
