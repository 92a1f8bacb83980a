"""The lineage of a run's artifacts: lineage.json in the run's folder, one entry per artifact.

An entry names the stage that made the artifact, the artifacts and outside files that it was made from, the config and
the commit of this program, and the digest of the artifact.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from orchestrator.config.config import Config
from orchestrator.errors import StorageError
from orchestrator.run.storage import read_json, write_json

LINEAGE_FILE = "lineage.json"
_GIT_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Made:
    """One artifact.

    Args:
        kind: kind of the artifact.
        path: its path, relative to the run's folder.
        stage: the stage that made it, in attempt `attempt`.
        sha256: digest of its contents, computed as for inputs.
        config_sha256: digest of the stage's config, see `config_digest`.
        commit: commit of this program's source. None: unknown.
        reads: path by kind of the run's artifacts that it was made from.
        read_sha256: their digests, by path. Those of older runs are unknown.
        contents: digests of the outside files that it was made from, by key of the config.
        result: the stage's report about it.
    """

    kind: str
    path: str
    stage: str
    attempt: int
    sha256: str
    config_sha256: str
    commit: str | None = None
    reads: Mapping[str, str] = field(default_factory=dict)
    read_sha256: Mapping[str, str] = field(default_factory=dict)
    contents: Mapping[str, str] = field(default_factory=dict)
    result: Mapping[str, Any] = field(default_factory=dict)


def why_stale(made: Made, by_path: Mapping[str, Made]) -> str | None:
    """Why an artifact no longer belongs to those that it was made from. None: it does, as far as known.

    Args:
        by_path: the artifacts of the run now.
    """
    for path, digest in made.read_sha256.items():
        now = by_path.get(path)
        if now is None:
            return f"it was made from {path}, which is gone"
        if now.sha256 != digest:
            return f"it was made from another {path}: sha256 {digest[:8]}, now {now.sha256[:8]}"
    return None


def record(run: Path, made: Made) -> None:
    """Records an artifact; replaces an earlier entry with the same path. Raises StorageError."""
    kept = [entry for entry in read_lineage(run) if entry.path != made.path]
    write_json(run / LINEAGE_FILE, {"artifacts": [asdict(entry) for entry in (*kept, made)]})


def read_lineage(run: Path) -> list[Made]:
    """The artifacts of a run, oldest first; empty if the file is missing.

    Raises:
        StorageError: the file is damaged.
    """
    path = run / LINEAGE_FILE
    if not path.exists():
        return []
    known = {item.name for item in fields(Made)}
    try:
        return [
            Made(**{name: value for name, value in entry.items() if name in known})
            for entry in read_json(path)["artifacts"]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise StorageError(
            f"{path} is damaged ({type(error).__name__}: {error}). Delete it; only the record of the artifacts' origin "
            "is lost."
        ) from None


def config_digest(config: Config) -> str:
    """Digest of the parts of a config that affect results. Equal digests and files give equal results."""
    tree = config.model_dump(mode="json", exclude={"run", "telemetry", "deadlines", "failures", "guards", "stages"})
    tree["seed"] = config.run.seed
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


@cache
def source_commit() -> str | None:
    """The commit of this program's source, with + if files differ from it. None: the source is not a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    with suppress(OSError, subprocess.SubprocessError):
        found = [
            subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=_GIT_S, check=True
            ).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
        return found[0] + ("+" if found[1] else "")
    return None
