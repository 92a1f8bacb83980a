"""Where the artifacts of a run come from: lineage.json in the run's folder, one entry per artifact.

An entry says which stage made the artifact, from which artifacts of the run and which files from outside, under which
config and commit of this program, and what it holds, as digests.
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
        kind, path: what it is, and where, relative to the run's folder.
        stage: the stage that made it, in attempt `attempt`.
        sha256: of its contents, as the digests of inputs are taken.
        config_sha256: of the config that the stage ran with, without where the run is kept and what only watches it.
        commit: of this program's source. None: not known.
        reads: artifacts of this run that it was made from: kind to path.
        contents: digests of the files from outside that the run reads.
        result: what the stage says of it.
    """

    kind: str
    path: str
    stage: str
    attempt: int
    sha256: str
    config_sha256: str
    commit: str | None = None
    reads: Mapping[str, str] = field(default_factory=dict)
    contents: Mapping[str, str] = field(default_factory=dict)
    result: Mapping[str, Any] = field(default_factory=dict)


def record(run: Path, made: Made) -> None:
    """Enters an artifact, in place of what its stage made under this path before. Raises StorageError."""
    kept = [entry for entry in read_lineage(run) if entry.path != made.path]
    write_json(run / LINEAGE_FILE, {"artifacts": [asdict(entry) for entry in (*kept, made)]})


def read_lineage(run: Path) -> list[Made]:
    """The artifacts of a run, in the order in which they were made. None for a run without the file.

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
            f"{path} is damaged ({type(error).__name__}: {error}). Delete it; only the record of where artifacts come "
            "from is lost."
        ) from None


def config_digest(config: Config) -> str:
    """Two runs with one digest compute the same from the same files."""
    tree = config.model_dump(mode="json", exclude={"run", "telemetry", "deadlines", "failures", "guards", "stages"})
    tree["seed"] = config.run.seed
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


@cache
def source_commit() -> str | None:
    """The commit of this program's source, with + where files differ from it. None where it is not a checkout."""
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
